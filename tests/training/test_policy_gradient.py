"""One step of the learner: its gradient and its metrics against ones computed by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from ketchup_cache.training.policy_gradient import learning_signal, policy_gradient_step, score_weights
from tests.helpers.caches import make_cache
from tests.helpers.learning import config, learner_of, whole_batch
from tests.helpers.models import make_t5
from tests.helpers.oracle import assert_bfloat16_gradient, plain_logits


@pytest.fixture
def cache(tmp_path, folders):
    return make_cache(tmp_path / "cache", *folders, forced=True, stale=0.7)


def captured_gradient(folders, batch, options):
    learner = learner_of(folders[0], options)
    metrics = policy_gradient_step(learner, batch, 0)
    return learner.optimizer.gradient, metrics


def literal_gradient(folders, batch, options):
    """One row at a time, full logits, Algorithm 1 step by step, in float64 where it costs nothing."""
    model = AutoModelForSeq2SeqLM.from_pretrained(folders[0]).eval()
    rollouts, scores = batch.rollouts, batch.scores
    kept, weights, total = [], [], 0
    for row in range(len(rollouts)):
        span = slice(rollouts.completions.offsets[row], rollouts.completions.offsets[row + 1])
        if not rollouts.finished[row] and options.unfinished == "drop":
            continue
        q, m, lse = (getattr(scores, name)[span].astype(float) for name in ("q", "max_q", "logsumexp"))
        last, g = len(q) - 1, np.zeros(len(q))
        for t in range(last, -1, -1):
            if t == last:
                g[t] = q[t] - (0 if rollouts.finished[row] or options.unfinished != "zero" else scores.final_max_q[row])
            elif last - t < options.k:
                g[t] = q[t] - m[t + 1] + g[t + 1]
            else:
                g[t] = q[t] - m[t + options.k] + g[t + options.k]
        g = np.clip(g - lse if options.normalization == "logprob" else g, -options.clip_return, options.clip_return)
        real = ~rollouts.forced[span]
        kept.append((row, span, real))
        weights.append(g)
        total += real.sum()
    if options.baseline == "mean":
        for t in range(max(map(len, weights))):
            reach = [i for i, (_, _, real) in enumerate(kept) if t < len(real) and real[t]]
            if reach:
                mean = np.mean([weights[i][t] for i in reach])
                for i in reach:
                    weights[i][t] -= mean
    loss = torch.zeros(())
    for (row, span, real), g in zip(kept, weights, strict=True):
        prompt, completion = batch.prompts.tokens[rollouts.prompt_index[row]], rollouts.completions[row]
        inputs = torch.tensor([[0, *map(int, completion[:-1])]])
        logits = model(input_ids=torch.tensor([prompt.tolist()]), decoder_input_ids=inputs).logits[0]
        logprob = logits.log_softmax(1)[range(len(completion)), completion.tolist()]
        log_ratio = logprob.detach() - torch.from_numpy(rollouts.behavior_logprob[span])
        ratio = log_ratio.exp().clamp(max=options.max_ratio)
        weight = torch.from_numpy(g).float() * (ratio if options.importance else 1)
        loss = loss - (weight * logprob)[torch.from_numpy(real)].sum() / int(total)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, float(loss.detach())


@pytest.mark.parametrize(
    "options",
    [
        {"k": 1},
        {"k": 2, "unfinished": "zero", "normalization": "raw", "clip_return": 4.0},
        {"k": 4, "baseline": "mean"},
        {"k": 4, "baseline": "mean", "unfinished": "drop"},
        {"k": 3, "importance": False},
        {"k": 2, "max_ratio": 1.1, "micro_batch_tokens": 40},
        {"k": 2, "max_ratio": 1.1, "micro_batch_tokens": 1},
    ],
)
def test_gradient_equals_the_literal_one(cache, tmp_path, folders, options):
    """Padding, packing, micro-batches (one row each at the smallest), forced tokens and dropped rows change nothing."""
    batch = whole_batch(cache)
    assert (~batch.rollouts.finished).any()
    assert batch.rollouts.forced.any()
    resolved = config(tmp_path, folders, **options)
    got, metrics = captured_gradient(folders, batch, resolved)
    expected, loss = literal_gradient(folders, batch, resolved)
    assert metrics.loss == pytest.approx(loss, rel=1e-4)
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        np.testing.assert_allclose(got[name].numpy(), gradient.numpy(), rtol=0, atol=2e-5 * scale + 1e-7, err_msg=name)


@pytest.mark.parametrize("baseline", ["none", "min-variance"])
def test_bfloat16_rounds_the_gradient_and_nothing_else(cache, tmp_path, folders, baseline):
    batch = whole_batch(cache)
    options = {"k": 2, "baseline": baseline, "importance": False}
    exact, plain = captured_gradient(folders, batch, config(tmp_path, folders, **options))
    rounded, metrics = captured_gradient(folders, batch, config(tmp_path, folders, precision="bfloat16", **options))
    assert_bfloat16_gradient(rounded, exact)
    assert metrics.return_mean == plain.return_mean
    assert metrics.loss == pytest.approx(plain.loss, rel=0.02)


def test_bfloat16_rounds_what_the_min_variance_baseline_weighs_by(cache, tmp_path, folders):
    batch = whole_batch(cache)
    exact, rounded = (
        score_weights(learner_of(folders[0], config(tmp_path, folders, precision=precision)), batch)
        for precision in ("float32", "bfloat16")
    )
    assert 2**-12 < np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 2**-3


def test_metrics_are_those_of_the_batch(cache, tmp_path, folders):
    batch = whole_batch(cache)
    _, metrics = captured_gradient(folders, batch, config(tmp_path, folders, k=2, unfinished="drop"))
    rollouts, scores = batch.rollouts, batch.scores
    returns, ratios = [], []
    student = make_t5("1.0", seed=1)
    for row in range(len(rollouts)):
        if not rollouts.finished[row]:
            continue
        span = slice(rollouts.completions.offsets[row], rollouts.completions.offsets[row + 1])
        q, m = scores.q[span].astype(float), scores.max_q[span].astype(float)
        returns.append(q.sum() - m[1:].sum() - scores.logsumexp[span][0])  # Eq. 10, then the logprob baseline
        prompt, completion = batch.prompts.tokens[rollouts.prompt_index[row]], rollouts.completions[row]
        logprob = plain_logits(student, prompt, completion).log_softmax(1)[range(len(completion)), completion.tolist()]
        ratios.extend(np.exp(logprob.double().numpy() - rollouts.behavior_logprob[span])[~rollouts.forced[span]])
    ratios = np.array(ratios)
    assert metrics.return_mean == pytest.approx(np.mean(returns), rel=1e-5)
    assert metrics.return_sd == pytest.approx(np.std(returns), rel=1e-5)
    assert metrics.ratio_mean == pytest.approx(ratios.mean(), rel=1e-5)
    assert metrics.ess == pytest.approx(ratios.sum() ** 2 / len(ratios) / (ratios**2).sum(), rel=1e-5)
    assert metrics.dropped == pytest.approx((~rollouts.finished).mean())
    assert metrics.action_tokens == len(ratios)


def test_leave_one_out_groups_by_prompt(cache, tmp_path, folders):
    """Two samples of a prompt: each one's baseline is the other's return, wherever the other is that long."""
    batch = whole_batch(cache)
    plain = learning_signal(batch, config(tmp_path, folders, samples=2, unfinished="zero"))
    centred = learning_signal(batch, config(tmp_path, folders, samples=2, unfinished="zero", baseline="leave-one-out"))
    index, offsets = batch.rollouts.prompt_index, batch.rollouts.completions.offsets
    checked = 0
    for a in range(len(index)):
        (b,) = [row for row in np.flatnonzero(index == index[a]) if row != a]
        for t in range(min(np.diff(offsets)[[a, b]])):
            if plain.in_loss[offsets[a] + t] and plain.in_loss[offsets[b] + t]:
                expected = plain.advantage[offsets[a] + t] - plain.advantage[offsets[b] + t]
                assert centred.advantage[offsets[a] + t] == pytest.approx(expected, abs=1e-4)
                checked += 1
    assert checked > 10
