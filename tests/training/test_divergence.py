"""The divergence methods' optimizer step: its gradient against a literal one over full distributions, its figures."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from ketchup_cache import open_cache
from ketchup_cache.config.commands import LearnConfig, ScoreConfig
from ketchup_cache.errors import CacheError, NumericsError
from ketchup_cache.scoring.score import score
from ketchup_cache.training.batches import Stream
from ketchup_cache.training.divergence import divergence_step, token_weights
from ketchup_cache.training.learn import learn
from ketchup_cache.training.policy_gradient import learning_signal, score_weights
from ketchup_cache.training.source import Offline
from ketchup_cache.types import Ragged
from tests.helpers.caches import make_cache
from tests.helpers.learning import learner_of
from tests.helpers.models import WORDS, save_model
from tests.helpers.oracle import assert_bfloat16_gradient, plain_logits

VOCAB = len(WORDS) + 3
METHODS = ("seqkd", "kl", "reverse-kl", "js", "tvd")
ON_SAMPLES = ("reverse-kl", "js", "tvd")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Rollouts of a student (stale, with forced tokens and unfinished ones) and of the teacher, with all logits."""
    base = tmp_path_factory.mktemp("distill")
    student, teacher = save_model(base / "s", "1.0", seed=1), save_model(base / "t", "1.1", seed=2)
    make_cache(base / "cache", student, teacher, prompts=5, forced=True, stale=0.5)
    make_cache(base / "cache", teacher, teacher, prompts=7, seed=1, forced=True)
    score(ScoreConfig(teacher=str(teacher), cache=base / "cache", device="cpu", keep_top=10**6))
    return base


def config(base, **options) -> LearnConfig:
    defaults = {"student": str(base / "s"), "cache": base / "cache", "out": base / "none", "batch_size": 20}
    defaults |= {"teacher_outputs": str(base / "t"), "lr": 1e-3, "steps": 3, "device": "cpu", "keep_top": VOCAB}
    return LearnConfig(**(defaults | options))


def step_of(base, options):
    """Gradient and metrics of the first step, and the batch it was of."""
    drawn = Offline(open_cache(options.cache), options).batch(0, None)
    learner = learner_of(base / "s", options)
    metrics = divergence_step(learner, drawn.rollouts, drawn.from_teacher, 0)
    return learner.optimizer.gradient, metrics, drawn


def literal(base, drawn, method, learned=None):
    """Plain forward passes of both models, one row at a time, full distributions: gradient and loss."""
    folders = learned or base / "s", base / "t"
    student, teacher = (AutoModelForSeq2SeqLM.from_pretrained(folder).eval() for folder in folders)
    rollouts, sums, counts = drawn.rollouts.rollouts, {}, {}
    for row, completion in enumerate(rollouts.completions):
        span = slice(*rollouts.completions.offsets[row : row + 2])
        real = torch.from_numpy(~rollouts.forced[span])
        prompt = drawn.rollouts.prompts.tokens[rollouts.prompt_index[row]]
        tokens = torch.tensor(completion.tolist())
        inputs = torch.tensor([[0, *tokens[:-1].tolist()]])
        own = student(input_ids=torch.tensor([prompt.tolist()]), decoder_input_ids=inputs).logits[0, :, :VOCAB]
        s, p = own.log_softmax(1), plain_logits(teacher, prompt, completion)[:, :VOCAB].log_softmax(1)
        m = ((s.exp() + p.exp()) / 2).log()
        kind = bool(drawn.from_teacher[row])
        term = {
            "seqkd": lambda s=s, tokens=tokens: -s[range(len(tokens)), tokens],
            "kl": lambda s=s, p=p: (p.exp() * (p - s)).sum(1),
            "reverse-kl": lambda s=s, p=p: (s.exp() * (s - p)).sum(1),
            "js": lambda s=s, p=p, m=m, kind=kind: ((p.exp() * (p - m)) if kind else (s.exp() * (s - m))).sum(1),
            "tvd": lambda s=s, p=p: (p.exp() - s.exp()).abs().sum(1) / 2,
        }[method]()
        sums[kind] = sums.get(kind, 0) + term[real].sum()
        counts[kind] = counts.get(kind, 0) + int(real.sum())
    loss = sum(sums[kind] / counts[kind] for kind in sums) / len(sums)
    loss.backward()
    return {name: p.grad for name, p in student.named_parameters()}, float(loss.detach()), counts


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("micro", [16384, 40, 1])
def test_gradient_equals_the_literal_one(base, method, micro):
    """Exact with the whole vocabulary; padding, micro-batches, forced tokens and unfinished rows change nothing."""
    options = config(base, method=method, micro_batch_tokens=micro)
    got, metrics, drawn = step_of(base, options)
    expected, loss, counts = literal(base, drawn, method)
    assert set(counts) == {"seqkd": {True}, "kl": {True}, "reverse-kl": {False}}.get(method, {True, False})
    assert drawn.rollouts.rollouts.forced.any()
    assert not drawn.rollouts.rollouts.finished.all()
    assert metrics.action_tokens == sum(counts.values())
    assert metrics.loss == pytest.approx(loss, rel=1e-5)
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        np.testing.assert_allclose(got[name].numpy(), gradient.numpy(), rtol=0, atol=3e-5 * scale + 1e-8, err_msg=name)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_rounds_the_gradient(base, method):
    exact, plain, _ = step_of(base, config(base, method=method))
    rounded, metrics, _ = step_of(base, config(base, method=method, precision="bfloat16"))
    assert_bfloat16_gradient(rounded, exact)
    assert metrics.loss == pytest.approx(plain.loss, rel=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_chunks_of_states_change_nothing(base, method, monkeypatch):
    """Three states at once instead of a thousand, in one micro-batch and in several."""
    whole, metrics, _ = step_of(base, config(base, method=method))
    monkeypatch.setattr("ketchup_cache.training.optimizer.CHUNK", 3)
    for micro in (16384, 60):
        parts, of_parts, _ = step_of(base, config(base, method=method, micro_batch_tokens=micro))
        assert of_parts.loss == pytest.approx(metrics.loss, rel=1e-6)
        for name in ("ratio_mean", "ess", "behavior_kl") if method in ON_SAMPLES else ():
            assert getattr(of_parts, name) == pytest.approx(getattr(metrics, name), rel=1e-5), name
        for name, gradient in whole.items():
            bound = 2e-5 * gradient.abs().max().item() + 1e-8
            np.testing.assert_allclose(parts[name].numpy(), gradient.numpy(), rtol=0, atol=bound, err_msg=name)


@pytest.mark.parametrize("method", ["kl", *ON_SAMPLES])
def test_kept_and_used_numbers_may_differ(base, method, tmp_path):
    """`learn --keep-top 4` over scores that keep all is the run over scores that keep 4."""
    student, teacher = base / "s", base / "t"
    for model, prompts, seed, stale in ((student, 5, 0, 0.5), (teacher, 7, 1, 0.0)):
        make_cache(tmp_path / "few", model, teacher, prompts=prompts, seed=seed, stale=stale, forced=True)
    score(ScoreConfig(teacher=str(teacher), cache=tmp_path / "few", device="cpu", keep_top=4))
    many, of_many, _ = step_of(base, config(base, method=method, keep_top=4))
    few, of_few, _ = step_of(base, config(base, method=method, keep_top=4, cache=tmp_path / "few"))
    exact = step_of(base, config(base, method=method))[1]
    assert of_few.loss == pytest.approx(of_many.loss, rel=1e-6)
    assert of_few.loss < 0.99 * exact.loss  # lumping only ever hides a difference
    for name, gradient in many.items():
        scale = gradient.abs().max().item()
        np.testing.assert_allclose(few[name].numpy(), gradient.numpy(), rtol=0, atol=1e-5 * scale + 1e-8, err_msg=name)


def test_weights_of_a_token():
    lengths = np.array([3, 0, 2, 1])
    completions = Ragged.from_rows([np.zeros(n) for n in lengths], np.int32)
    forced = np.array([0, 1, 0, 0, 0, 1], bool)
    for from_teacher, without, expected in (
        ([1, 0, 0, 1], forced, [1 / 4, 0, 1 / 4, 1 / 4, 1 / 4, 0]),
        ([1, 1, 1, 1], forced, [1 / 4, 0, 1 / 4, 1 / 4, 1 / 4, 0]),
        ([1, 1, 0, 0], np.zeros(6, bool), [1 / 6] * 6),
        ([1, 1, 1, 0], np.zeros(6, bool), [1 / 10] * 5 + [1 / 2]),
        ([1, 1, 1, 1], np.ones(6, bool), [0] * 6),
    ):
        np.testing.assert_allclose(token_weights(np.array(from_teacher, bool), completions, without), expected)


@pytest.mark.parametrize("method", METHODS)
def test_metrics_are_of_the_students_samples_or_null(base, method):
    options = config(base, method=method, unfinished="bootstrap")
    _, metrics, drawn = step_of(base, options)
    assert (metrics.k_return_mean, metrics.k_return_sd, metrics.advantage_sd) == (None, None, None)
    assert metrics.dropped == 0
    rollouts, scores = drawn.rollouts.rollouts, drawn.rollouts.scores
    mine = np.flatnonzero(~drawn.from_teacher)
    if method in ("seqkd", "kl"):
        assert not len(mine)
        names = ("return_mean", "return_sd", "teacher_kl", "ratio_mean", "ess", "behavior_kl")
        assert {getattr(metrics, name) for name in names} == {None}
        return
    assert len(mine) == options.batch_size / (1 if method == "reverse-kl" else 2)
    returns, ratios, kls = [], [], []
    student = AutoModelForSeq2SeqLM.from_pretrained(base / "s").eval()
    for row in mine:
        span = slice(*rollouts.completions.offsets[row : row + 2])
        q, m, lse = (getattr(scores, name)[span].astype(float) for name in ("q", "max_q", "logsumexp"))
        returns.append(q[0] - lse[0] - (m - q)[1:].sum())
        prompt, tokens = drawn.rollouts.prompts.tokens[rollouts.prompt_index[row]], rollouts.completions[row]
        own = plain_logits(student, prompt, tokens)[:, :VOCAB].log_softmax(1)[range(len(tokens)), tokens.tolist()]
        real, behavior = ~rollouts.forced[span], rollouts.behavior_logprob[span]
        ratios.extend(np.exp(own.numpy() - behavior)[real])
        kls.extend((behavior - (q - lse))[real])
    assert metrics.return_mean == pytest.approx(np.mean(returns), rel=1e-5)
    assert metrics.return_sd == pytest.approx(np.std(returns), rel=1e-5)
    assert metrics.ratio_mean == pytest.approx(np.mean(ratios), rel=1e-5)
    assert metrics.ess == pytest.approx(np.sum(ratios) ** 2 / len(ratios) / np.square(ratios).sum(), rel=1e-4)
    assert metrics.teacher_kl == pytest.approx(np.mean(kls), rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_lowers_its_own_divergence(base, tmp_path, method):
    """Measured exactly, though learned off 8 of the logits."""
    options = config(base, method=method, keep_top=8, steps=30, lr=3e-3, weight_decay=0, out=tmp_path / "run")
    report = learn(options)
    everything = Offline(open_cache(base / "cache"), config(base, method=method, batch_size=24)).batch(0, None)
    (_, before, _), (_, after, _) = (
        literal(base, everything, method, folder) for folder in (base / "s", tmp_path / "run" / "best")
    )
    assert after < 0.8 * before
    assert (report.first["return_mean"] is None) == (method in ("seqkd", "kl"))
    summary = "loss" if method in ("seqkd", "kl") else "its return"
    assert f"; {summary} " in str(report)


def test_min_variance_learns_from_start_to_end(base, tmp_path, monkeypatch):
    """The baseline of a whole run's first step is the one of plain forward passes."""
    options = config(base, method="ketchup", baseline="min-variance", k=2, unfinished="bootstrap", keep_top=64)
    options = options.model_copy(update={"policy": str(base / "s"), "batch_size": 10, "out": tmp_path / "run"})
    report = learn(options)
    assert report.steps == 3
    cache = open_cache(base / "cache")
    batch = next(Stream(cache, cache.scored(policy=str(base / "s")), 10, seed=0))
    for micro, chunk in ((16384, 1024), (30, 1024), (16384, 3)):
        monkeypatch.setattr("ketchup_cache.training.policy_gradient.CHUNK", chunk)
        learner = learner_of(base / "s", options.model_copy(update={"micro_batch_tokens": micro}))
        model, weight = learner.model, score_weights(learner, batch)
        expected = []
        for row, tokens in enumerate(batch.rollouts.completions):
            prompt = batch.prompts.tokens[batch.rollouts.prompt_index[row]]
            score_ = -plain_logits(model, prompt, tokens)[:, :VOCAB].double().softmax(1)
            score_[range(len(tokens)), tokens.tolist()] += 1
            expected.extend(score_.square().sum(1).tolist())
        np.testing.assert_allclose(weight, expected, rtol=1e-4, atol=1e-6)
    signal = learning_signal(batch, options, weight)
    plain = learning_signal(batch, options.model_copy(update={"baseline": "none"}))
    assert report.first["advantage_sd"] == pytest.approx(signal.advantage[signal.in_loss].std(), rel=1e-4)
    starts = batch.rollouts.completions.offsets[:-1]
    first = starts[signal.in_loss[starts]]
    value = (weight[first] * plain.advantage[first]).sum() / weight[first].sum()
    np.testing.assert_allclose(plain.advantage[first] - signal.advantage[first], value, rtol=1e-4)


def test_what_a_method_lacks_is_said_in_one_line(base, tmp_path):
    student, teacher = base / "s", base / "t"
    make_cache(tmp_path / "cache", student, teacher, prompts=3)
    make_cache(tmp_path / "outputs", teacher, teacher, prompts=3)

    def source(cache="cache", teacher_outputs=None, **options):
        options = config(base, cache=tmp_path / cache, teacher_outputs=teacher_outputs, **options)
        return Offline(open_cache(options.cache), options)

    def refused(match, **options):
        with pytest.raises(CacheError, match=match) as caught:
            source(**options)
        assert "\n" not in str(caught.value)

    for method in ("seqkd", "kl", "js", "tvd"):
        refused(f"--method {method} learns from teacher outputs.*rollout --student", method=method)
    refused("--method ketchup --anchor 0.1 learns from teacher outputs", method="ketchup", anchor=0.1)
    score(ScoreConfig(teacher=str(teacher), cache=tmp_path / "outputs", device="cpu", keep_top=8))
    nobody = "no scored rollouts of a student; make some with `rollout` and `score`"
    refused(nobody, cache="outputs", method="js", keep_top=8)
    make_cache(tmp_path / "cache", teacher, teacher, prompts=3, seed=1)
    # found by its fingerprint, without --teacher-outputs
    assert source(method="seqkd").batch(0, None).from_teacher.all()
    anchored = source(method="ketchup", anchor=0.1, batch_size=4).batch(0, None)
    assert anchored.from_teacher.tolist() == [False, False, True, True]
    refused("--keep-top 8", method="kl", keep_top=8)
    refused("--keep-top 8", method="reverse-kl", keep_top=8)
    refused("no policy `nobody`", method="kl", teacher_outputs="nobody")


def test_an_option_of_returns_is_said_to_do_nothing(base, capsys):
    for more, said in (({"k": 8, "clip_return": 5.0}, ["--clip-return", "--k"]), ({}, [])):
        learn(config(base, method="seqkd", steps=1, out=base / f"said-{len(said)}", **more))
        assert re.findall(r"--method seqkd has no returns: (\S+) does nothing", capsys.readouterr().err) == said


def test_a_loss_that_is_not_finite_changes_nothing(base):
    options = config(base, method="kl")
    drawn = Offline(open_cache(base / "cache"), options).batch(0, None)
    learner = learner_of(base / "s", options)
    with torch.no_grad():
        learner.model.shared.weight[5] = float("nan")
    with pytest.raises(NumericsError, match="step 0: the loss is nan; the weights were not changed"):
        divergence_step(learner, drawn.rollouts, drawn.from_teacher, 0)
    assert not learner.optimizer.gradient
