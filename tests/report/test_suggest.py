"""The suggestion of K where the right answer is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ketchup_cache.method.returns import k_step_returns
from ketchup_cache.report.suggest import AVERAGED, suggest_k

KS = (1, 2, 3)


def draw(rng, prompts=300, samples=32, tokens=3):
    shape = (prompts, samples)
    prompt = np.repeat(np.arange(prompts), samples)
    token = rng.integers(0, tokens, shape).ravel()
    return prompt, token, lambda sd: rng.normal(0, sd, prompts * samples)


def test_components_and_efficiency_are_those_of_a_known_model():
    rng = np.random.default_rng(0)
    prompt, token, noise = draw(rng, prompts=3000)
    q = np.array([-1.0, 0.0, 1.0])[token]  # variance 2/3
    tilt = np.array([0.5, -1.0, 0.5])[token]  # variance 1/2, uncorrelated with q
    one = q + noise(3)
    k_step = np.column_stack([one, 0.5 * q + tilt + noise(1)])
    found = suggest_k(prompt, token, one, k_step, (1, 2))
    assert found.signal == pytest.approx(2 / 3, rel=0.1)
    second = found.by_k[1]
    assert (second.covariance, second.signal, second.variance) == pytest.approx((1 / 3, 2 / 3, 5 / 3), rel=0.08)
    expected = [(1 / 9) / (2 / 3 * (2 / 3 + 5 / 3 / m)) for m in AVERAGED]
    assert second.efficiency == pytest.approx(expected, rel=0.15)
    expected = [(2 / 3) / (2 / 3 + (2 / 3 + 9) / m) for m in AVERAGED]
    assert found.by_k[0].efficiency == pytest.approx(expected, rel=0.15)
    assert found.by_k[0].worth == pytest.approx(1)


def test_with_a_harmless_bias_the_least_variance_wins():
    """Teacher = optimal policy, or any bias that depends on the prompt only."""
    rng = np.random.default_rng(1)
    prompt, token, noise = draw(rng)
    q = np.array([-1.0, 0.0, 1.0])[token]
    one = q + noise(4)
    k_step = np.column_stack([one, q + 7 + prompt + noise(2), 3 * (q + noise(1)) + 50])
    found = suggest_k(prompt, token, one, k_step, KS)
    assert found.k == 3
    assert found.best == (3,) * len(AVERAGED)
    assert found.by_k[2].wins > 0.95
    # noise that is four times smaller, squared, with (S + V) / (S + V_1): 2/3 + 2/3 + 1 against 2/3 + 2/3 + 16
    assert found.by_k[2].worth == pytest.approx((2 / 3 + 16) / (2 / 3 + 1), rel=0.2)


def test_a_bias_that_differs_between_tokens_loses_although_it_has_no_variance():
    rng = np.random.default_rng(2)
    prompt, token, noise = draw(rng)
    q = np.array([-1.0, 0.0, 1.0])[token]
    one = q + noise(2)
    wrong = np.array([1.0, 0.0, -1.0])[token]
    found = suggest_k(prompt, token, one, np.column_stack([one, wrong, q + noise(1.5)]), KS)
    assert found.k == 3
    assert found.by_k[1].efficiency == (0,) * len(AVERAGED)


def test_baselines_and_scale_change_nothing():
    rng = np.random.default_rng(3)
    prompt, token, noise = draw(rng, prompts=50)
    q = np.array([-1.0, 0.0, 1.0])[token]
    one = q + noise(1)
    k_step = np.column_stack([one, q + noise(0.5)])
    plain = suggest_k(prompt, token, one, k_step, (1, 2))
    state = rng.normal(0, 100, 50)[prompt]
    moved = suggest_k(prompt, token, one + state, k_step * [1, 5] + state[:, None], (1, 2))
    for a, b in zip(plain.by_k, moved.by_k, strict=True):
        assert b.efficiency == pytest.approx(a.efficiency, rel=1e-9)
        assert b.wins == a.wins


def test_no_signal_no_suggestion():
    rng = np.random.default_rng(4)
    prompt, token, noise = draw(rng, prompts=40)
    one = noise(1)
    found = suggest_k(prompt, token, one, np.column_stack([one, one / 2]), (1, 2))
    assert found.k is None
    assert "by more than chance" in found.reason
    alone = suggest_k(np.arange(9), np.zeros(9, int), one[:9], one[:9, None], (1,))
    assert alone.k is None
    assert "first token that came twice" in alone.reason
    assert suggest_k(prompt[:0], token[:0], one[:0], one[:0, None], (1,)).prompts == 0


@pytest.mark.parametrize("sticky", [0.5, 0.9], ids=["chance", "sticky"])
def test_a_chain_whose_best_k_is_computed_by_enumeration(sticky):
    """Tokens 0 and 1; a 1 costs a gap. `sticky`: chance to repeat the last token, so that a bad start costs more."""
    length, ks, gap = 6, (1, 2, 3, 4), 2.0
    every = np.array(list(itertools.product([0, 1], repeat=length)))
    chance = 0.5 * np.prod(np.where(every[:, 1:] == every[:, :-1], sticky, 1 - sticky), axis=1)
    assert chance.sum() == pytest.approx(1)
    q = -gap * every.astype(float)
    returns = np.stack([k_step_returns(q, 0 * q, [length] * len(q), k)[:, 0] for k in ks], axis=1)

    def mean(values, weights):
        return (values * weights[:, None]).sum(0) / weights.sum()

    value = np.stack([mean(returns[every[:, 0] == a], chance[every[:, 0] == a]) for a in (0, 1)])
    centred = value - value.mean(0)
    covariance, signal = (centred * centred[:, :1]).mean(0), (centred**2).mean(0)
    variance = mean((returns - mean(returns, chance)) ** 2, chance)
    truth = [covariance**2 / (signal[0] * (signal + variance / m)) for m in AVERAGED]

    rng = np.random.default_rng(5)
    drawn = rng.choice(len(every), 3000 * 32, p=chance)
    prompt = np.repeat(np.arange(3000), 32)
    found = suggest_k(prompt, every[drawn, 0], returns[drawn, 0], returns[drawn], ks)
    for i in range(len(ks)):
        assert found.by_k[i].efficiency == pytest.approx([t[i] for t in truth], abs=0.02)
    assert found.k == ks[int(np.argmax(truth[0]))]
