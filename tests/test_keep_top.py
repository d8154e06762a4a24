"""From `score --keep-top` to `learn --method`: what is stored, what is refused, and what is learned."""

from __future__ import annotations

import numpy as np
import pytest
from caches import make_cache, plain_logits
from tiny import WORDS, save_model
from transformers import AutoModelForSeq2SeqLM

from ketchup_cache.config import LearnConfig, ScoreConfig
from ketchup_cache.errors import CacheError
from ketchup_cache.learn.loop import learn
from ketchup_cache.score import score
from ketchup_cache.store.cache import open_cache

VOCAB = len(WORDS) + 3


@pytest.fixture
def setting(tmp_path):
    student, teacher = save_model(tmp_path / "s", "1.0", seed=1), save_model(tmp_path / "t", "1.1", seed=2)
    make_cache(tmp_path / "cache", student, teacher, prompts=4)
    make_cache(tmp_path / "cache", teacher, teacher, prompts=4, seed=1)
    return tmp_path, student, teacher


def test_the_largest_logits_are_stored_and_every_method_learns(setting):
    base, student, teacher = setting
    common = {"student": str(student), "cache": base / "cache", "device": "cpu", "batch_size": 16, "lr": 3e-3}
    common |= {"steps": 25, "weight_decay": 0, "teacher_outputs": str(teacher), "policy": None}
    with pytest.raises(CacheError, match="--keep-top 64"):
        learn(LearnConfig(**common, method="kl", out=base / "refused"))
    report = score(ScoreConfig(teacher=str(teacher), cache=base / "cache", device="cpu", keep_top=64))
    assert (report.already, report.computed + report.copied) == (0, 16)
    cache = open_cache(base / "cache")
    model = AutoModelForSeq2SeqLM.from_pretrained(teacher).eval()
    refs = cache.scored(keep_top=64)
    for ref in refs:
        part = cache.load_scored(ref)
        assert part.scores.top == ref.keep_top == min(64, VOCAB)
        for row, completion in enumerate(part.rollouts.completions):
            prompt = part.prompts.tokens[part.rollouts.prompt_index[row]]
            span = slice(*part.rollouts.completions.offsets[row : row + 2])
            logits = plain_logits(model, prompt, completion)[:, :VOCAB].numpy()
            np.testing.assert_allclose(part.scores.top_q[span], -np.sort(-logits)[:, :64], atol=1e-4)
            at_ids = np.take_along_axis(logits, part.scores.top_ids[span].astype(int), 1)
            np.testing.assert_allclose(part.scores.top_q[span], at_ids, atol=1e-4)
    for method in ("seqkd", "kl", "js", "tvd"):
        done = learn(LearnConfig(**common, method=method, out=base / method))
        assert done.last["loss"] < 0.9 * done.first["loss"], method
