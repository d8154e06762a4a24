"""Cross-entropy training: its gradient, its data, and that it goes on where it was killed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from ketchup_cache.config.commands import PretrainConfig
from ketchup_cache.config.options import StepOptions
from ketchup_cache.errors import CacheError, DataError, KetchupError
from ketchup_cache.text.prompts import target_ids
from ketchup_cache.training.optimizer import Optimizer
from ketchup_cache.training.pretrain import pretrain
from tests.helpers.caches import make_cache
from tests.helpers.learning import assert_same_weights, killed_before, metrics
from tests.helpers.models import make_t5, make_tokenizer, write_prompts
from tests.helpers.oracle import assert_bfloat16_gradient, plain_logits


def config(tmp_path, folders, **options) -> PretrainConfig:
    defaults = {"model": str(folders[0]), "out": tmp_path / "run", "batch_size": 4, "epochs": 1, "device": "cpu"}
    return PretrainConfig(**(defaults | {"dropout": False} | options))


def test_first_loss_is_the_mean_negative_log_likelihood(tmp_path, folders):
    """Against one plain forward per pair; targets end with EOS; the mean is over tokens, not over rows."""
    data = write_prompts(tmp_path / "d.jsonl", 6)
    report = pretrain(config(tmp_path, folders, data=str(data), batch_size=6))
    examples, encode = map(json.loads, data.read_text().splitlines()), make_tokenizer()
    pairs = [[encode(example[part])["input_ids"] for part in ("prompt", "target")] for example in examples]
    assert {target[-1] for _, target in pairs} == {1}
    assert report.loss_first == pytest.approx(mean_nll(pairs), rel=1e-5)


def mean_nll(pairs) -> float:
    """Of the target's tokens given the prompt, by plain forward passes of the first model."""
    model, nll = make_t5("1.0", seed=1), []
    for prompt, target in pairs:
        logprob = plain_logits(model, prompt, target).log_softmax(1)
        nll += (-logprob[range(len(target)), [int(token) for token in target]]).tolist()
    return np.mean(nll)


def gradient(tmp_path, folders, monkeypatch, name, **options):
    """Of the one step over eight examples."""
    found = {}

    def keep(self, step):
        found.update({name: p.grad.clone() for name, p in self.named.items() if p.grad is not None})
        return 0.0

    monkeypatch.setattr(Optimizer, "step", keep)
    data = str(write_prompts(tmp_path / "d.jsonl", 8))
    pretrain(config(tmp_path, folders, data=data, batch_size=8, out=tmp_path / str(name), **options))
    return found


def test_the_gradient_is_the_same_however_the_batch_is_cut(tmp_path, folders, monkeypatch):
    sizes = (1, 40, 10**6)
    first, *others = (gradient(tmp_path, folders, monkeypatch, n, micro_batch_tokens=n) for n in sizes)
    for other in others:
        assert other.keys() == first.keys()
        for name, plain in first.items():
            scale = float(plain.abs().max())
            torch.testing.assert_close(other[name], plain, rtol=1e-4, atol=1e-5 * scale, msg=name)


def test_bfloat16_rounds_the_gradient(tmp_path, folders, monkeypatch):
    exact, rounded = (gradient(tmp_path, folders, monkeypatch, p, precision=p) for p in ("float32", "bfloat16"))
    assert_bfloat16_gradient(rounded, exact)


def test_learns_a_small_set_by_heart(tmp_path, folders):
    data = str(write_prompts(tmp_path / "d.jsonl", 4))
    report = pretrain(config(tmp_path, folders, data=data, epochs=120, lr=5e-3))
    assert report.loss_last < 0.05 < 1 < report.loss_first


def test_learns_the_finished_rollouts_of_a_cache(tmp_path, folders):
    cache = make_cache(tmp_path / "cache", *folders, prompts=5, samples=2, segments=2)
    report = pretrain(config(tmp_path, folders, cache=tmp_path / "cache", batch_size=100))
    rows = [row for row in cache.rows() if row.finished]
    assert len(rows) < 10
    assert report.examples == len(rows)
    expected = mean_nll((row.prompt_tokens, row.completion_tokens) for row in rows)
    assert report.loss_first == pytest.approx(expected, rel=1e-5)


def test_interrupted_run_goes_on_to_the_same_weights(tmp_path, folders):
    """With dropout on: its randomness belongs to the step."""
    options = {"data": str(write_prompts(tmp_path / "d.jsonl", 8)), "epochs": 4, "dropout": True, "checkpoint_every": 3}
    pretrain(config(tmp_path, folders, out=tmp_path / "whole", **options))
    with killed_before(5):
        pretrain(config(tmp_path, folders, **options))
    assert pretrain(config(tmp_path, folders, **options)).resumed_from == 3
    assert_same_weights(tmp_path / "whole", tmp_path / "run")
    assert len(metrics(tmp_path / "run")) == 8
    assert pretrain(config(tmp_path, folders, **options)).already_done


def test_targets_end_with_eos_even_if_the_tokenizer_adds_none():
    """As GPT-2's and others' do not; a student that never sees EOS never stops."""
    plain = make_tokenizer()
    plain.backend_tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    assert plain("the cat")["input_ids"] == [3, 5]
    for tokenizer in (plain, make_tokenizer()):
        assert target_ids(tokenizer, "the cat") == [3, 5, 1]
    assert target_ids(plain, "the cat", limit=2) == [3, 5]


def test_schedule_by_hand():
    def rates(warmup, schedule, steps):
        optimizer = Optimizer(torch.nn.Linear(1, 1), StepOptions(lr=1, warmup=warmup, schedule=schedule), steps)
        return [optimizer.lr(step) for step in range(steps)]

    assert rates(0, "constant", 3) == [1, 1, 1]
    assert rates(3, "constant", 5) == [0.25, 0.5, 0.75, 1, 1]
    assert rates(0, "linear", 4) == [1, 0.75, 0.5, 0.25]
    assert rates(1, "linear", 5) == [0.5, 1, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("content", ['{"prompt": "the cat"}', "", '{"target": "x"}'])
def test_unusable_data_is_one_line(tmp_path, folders, content):
    (tmp_path / "d.jsonl").write_text(content)
    with pytest.raises(DataError) as caught:
        pretrain(config(tmp_path, folders, data=str(tmp_path / "d.jsonl")))
    assert "\n" not in str(caught.value)


def test_unusable_caches_are_one_line(tmp_path, folders):
    make_cache(tmp_path / "cache", *folders, prompts=2, samples=1)
    with pytest.raises(CacheError, match="nobody"):
        pretrain(config(tmp_path, folders, cache=tmp_path / "cache", policy="nobody"))
    with pytest.raises(KetchupError, match="no cache here"):
        pretrain(config(tmp_path, folders, cache=tmp_path / "none"))
