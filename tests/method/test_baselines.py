"""Baselines against loops over rows and steps, and the law that they leave the expected gradient alone."""

import itertools

import numpy as np
from hypothesis import given, strategies as st

from ketchup_cache.method.baselines import batch_mean_baseline, leave_one_out_baseline, mean_baseline


@st.composite
def batches(draw):
    rows, width, groups = draw(st.integers(1, 7)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    real = rng.random((rows, width)) < 0.7
    returns = np.where(real, rng.normal(0, 5, (rows, width)), np.nan)  # what is not real must never be used
    return returns, real, rng.integers(0, groups, rows) * 17


@given(batches())
def test_mean_is_per_time_step(case):
    returns, real, _ = case
    got = mean_baseline(returns, real)
    for t in range(returns.shape[1]):
        seen = returns[real[:, t], t]
        np.testing.assert_allclose(got[:, t], seen.mean() if len(seen) else 0.0, rtol=0, atol=1e-12)


@given(batches())
def test_the_batch_mean_is_one_number(case):
    returns, real, _ = case
    seen = [g for row, inside in zip(returns, real, strict=True) for g in row[inside]]
    got = batch_mean_baseline(returns, real)
    np.testing.assert_allclose(got, np.full(returns.shape, np.mean(seen or [0.0])), rtol=0, atol=1e-12)


@given(batches())
def test_leave_one_out_looks_at_the_others_only(case):
    returns, real, group = case
    got = leave_one_out_baseline(returns, real, group)
    for b, t in itertools.product(*map(range, returns.shape)):
        others = [i for i in range(len(returns)) if i != b and real[i, t]]
        same = [returns[i, t] for i in others if group[i] == group[b]]
        elsewhere = [returns[i, t] for i in others if group[i] != group[b]]
        np.testing.assert_allclose(got[b, t], np.mean(same or elsewhere or [0.0]), rtol=0, atol=1e-9)


def test_leave_one_out_keeps_the_expected_gradient():
    """Exact, by enumerating all outcomes of two samples of a three-armed bandit: E[(r − b) ∇ log π] = E[r ∇ log π]."""
    logits, reward = np.array([0.3, -0.5, 1.1]), np.array([2.0, -1.0, 0.5])
    p = np.exp(logits) / np.exp(logits).sum()
    score = np.eye(3) - p  # ∇ log π(a) with respect to the logits, row a
    plain, with_baseline = np.zeros(3), np.zeros(3)
    for a, b in itertools.product(range(3), repeat=2):
        returns = np.array([[reward[a]], [reward[b]]])
        baseline = leave_one_out_baseline(returns, np.ones((2, 1), bool), np.array([7, 7]))
        for i, action in enumerate((a, b)):
            plain += p[a] * p[b] * reward[action] * score[action]
            with_baseline += p[a] * p[b] * (returns[i, 0] - baseline[i, 0]) * score[action]
    np.testing.assert_allclose(with_baseline, plain, rtol=0, atol=1e-12)
