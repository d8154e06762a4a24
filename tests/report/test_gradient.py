"""`analyze --gradient` against gradients of plain forward passes and the formulas in its docstring."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from ketchup_cache import open_cache
from ketchup_cache.cli import main
from ketchup_cache.config.commands import AnalyzeConfig
from ketchup_cache.errors import CacheError, ConfigError
from ketchup_cache.report.gradient import EXACT, SAMPLED, gradient_report
from ketchup_cache.training.batches import Stream
from tests.helpers.caches import make_cache
from tests.helpers.errors import refuses
from tests.helpers.learning import run
from tests.helpers.models import WORDS

SIZE, VOCAB = 4, len(WORDS) + 3


@pytest.fixture
def cache(tmp_path, folders):
    return make_cache(tmp_path / "cache", *folders, prompts=10, samples=2, seed=1)


def plain_gradient(folder, batch, values) -> np.ndarray:
    """Of Σ value · log π / tokens, values less their mean per time step, of the whole model. values: row → [T]."""
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    rollouts, total = batch.rollouts, len(batch.rollouts.completions.values)
    rows = [values(row) for row in range(len(rollouts))]
    for t in range(max(map(len, rows))):
        mean = np.mean([row[t] for row in rows if len(row) > t])
        for row in rows:
            row[t : t + 1] -= mean
    loss = torch.zeros(())
    for row, value in enumerate(rows):
        completion = rollouts.completions[row]
        prompt = batch.prompts.tokens[rollouts.prompt_index[row]]
        with torch.enable_grad():
            inputs = torch.tensor([[0, *map(int, completion[:-1])]])
            logits = model(input_ids=torch.tensor([prompt.tolist()]), decoder_input_ids=inputs).logits[0, :, :VOCAB]
            logprob = logits.log_softmax(1)[range(len(completion)), completion.tolist()]
            loss = loss + (torch.from_numpy(value).float() * logprob).sum() / total
    loss.backward()
    return np.concatenate([p.grad.flatten().numpy() for p in model.parameters()]).astype(np.float64)


def test_figures_are_those_of_plain_gradients(cache, tmp_path, folders):
    report = gradient_report(
        AnalyzeConfig(cache=cache.path, gradient=True, student=str(folders[0]), batch_size=SIZE, out=tmp_path / "out")
    )
    (ref,) = cache.scored()
    stream = Stream(open_cache(cache.path), [ref], SIZE, seed=0)
    batches = [next(stream) for _ in range(4)]  # of 20 rollouts in 5 batches: an even number

    def returns(batch):
        offsets, scores = batch.rollouts.completions.offsets, batch.scores

        def of(row):
            span = slice(offsets[row], offsets[row + 1])
            q, m, lse = (getattr(scores, n)[span].astype(np.float64) for n in ("q", "max_q", "logsumexp"))
            gap = m - q
            return np.array([q[t] - lse[t] - gap[t + 1 :].sum() for t in range(len(q))])

        return of

    def lengths(batch):
        return lambda row: np.arange(len(batch.rollouts.completions[row]))[::-1].astype(np.float64)

    one = [plain_gradient(folders[0], batch, returns(batch)) for batch in batches]
    length = [plain_gradient(folders[0], batch, lengths(batch)) for batch in batches]
    a, b = one[0] / 2 + one[2] / 2, one[1] / 2 + one[3] / 2
    along = (a @ (length[1] + length[3]) + b @ (length[0] + length[2])) / 4
    found = {record["name"]: record for record in report.estimators}["K = 1 (LLMR)"]
    assert found["agreement"] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-4)
    assert a @ b > 0  # a cache in which the halves agree: otherwise nothing else is known
    variance = np.var(np.stack(one), axis=0, ddof=1).sum()
    assert found["snr"] == pytest.approx(a @ b / variance, rel=1e-3)
    assert (found["cosine"], found["norm"]) == pytest.approx((1, 1), abs=1e-6)  # it is the reference, without top
    assert found["length"] == np.sign(along)
    assert [r["name"] for r in report.estimators] == ["reference", *SAMPLED]
    assert json.loads((tmp_path / "out" / "gradient.json").read_text()) == json.loads(json.dumps(report.to_dict()))


def test_top_logits_bring_the_exact_estimators(cache, folders, capsys):
    run("score", "--teacher", folders[1], "--cache", cache.path, "--keep-top", 3, "--device", "cpu")
    words = ["analyze", "--cache", cache.path, "--gradient", "--student", folders[0], "--batch-size", SIZE]
    assert main([*map(str, words), "--scored-by", str(folders[1])]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in ("reference", *SAMPLED, *EXACT))
    assert "4 batches of 4 rollouts" in printed


def test_what_it_needs(cache, folders):
    options = {"cache": cache.path, "gradient": True, "batch_size": 8}
    refuses(ConfigError, "give --student", gradient_report, AnalyzeConfig(**options))
    few = AnalyzeConfig(**options, student=str(folders[0]))
    refuses(CacheError, "20 scored rollouts are of .* 4 batches of 8 are needed", gradient_report, few)
    refuses(CacheError, "0 scored", gradient_report, AnalyzeConfig(**options, student=str(folders[1])))
