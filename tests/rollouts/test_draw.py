"""Draws against the literal inverse of the cumulative distribution in float64, and against the softmax."""

import numpy as np
import pytest
import torch

from ketchup_cache.rollouts.draw import BLOCK, FEW, draw, uniforms

SIZES = (1, 7, BLOCK, BLOCK + 1, FEW * BLOCK, FEW * BLOCK + 1, 5_000)
BEFORE_ONE = float(np.nextafter(1, 0))


def scores_of(rows: int, size: int, *, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, size, generator=generator) * spread
    scores[torch.rand(rows, size, generator=generator) < 0.3] = -torch.inf
    scores[torch.arange(rows), torch.randint(size, (rows,), generator=generator)] = 1.0
    return scores


def literal(scores: torch.Tensor, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row by row, token by token."""
    tokens, logprobs = [], []
    for shares, number in zip(scores.double().softmax(1).numpy(), uniform, strict=True):
        token, passed = 0, shares[0]
        while passed <= number:
            token += 1
            passed += shares[token]
        tokens.append(token)
        logprobs.append(np.log(shares[token]))
    return np.array(tokens), np.array(logprobs)


@pytest.mark.parametrize("size", SIZES)
def test_the_first_token_that_passes_the_number(size):
    scores, uniform = scores_of(300, size), np.random.default_rng(1).random(300)
    tokens, logprob = draw(scores, torch.from_numpy(uniform))
    expected, share = literal(scores, uniform)
    assert tokens.tolist() == expected.tolist()
    np.testing.assert_allclose(logprob, share, rtol=0, atol=2e-6)
    assert (tokens.dtype, logprob.dtype) == (torch.int64, torch.float32)


def same(rows: int, number: float) -> torch.Tensor:
    return torch.full((rows,), number, dtype=torch.float64)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("number", [0.0, 1e-300, 1e-9, 1 - 1e-9, BEFORE_ONE])
def test_what_has_no_probability_is_never_drawn(size, number):
    """Nor at the ends of the numbers: before the first token that may be drawn, and behind the last."""
    scores = scores_of(200, size)
    tokens, _ = draw(scores, same(200, number))
    assert scores.gather(1, tokens[:, None]).isfinite().all()
    if number in (0.0, BEFORE_ONE) and size < 10:
        possible = [np.flatnonzero(row.isfinite().numpy()) for row in scores]
        assert tokens.tolist() == [ids[0 if number == 0 else -1] for ids in possible]


@pytest.mark.parametrize("size", [40, 3_000])
def test_a_forced_token_is_drawn_whatever_the_number(size):
    scores = torch.full((50, size), -torch.inf)
    forced = torch.arange(50) * (size - 1) // 49
    scores[torch.arange(50), forced] = 0
    for number in (0.0, 0.5, BEFORE_ONE):
        tokens, logprob = draw(scores, same(50, number))
        assert tokens.equal(forced)
        assert (logprob == 0).all()


def shares_of(scores: torch.Tensor) -> np.ndarray:
    """How much of [0, 1) draws each token, by bisection of where one gives way to the next. scores: [V]."""
    size = len(scores)
    low, high = same(size, 0.0), same(size, 1.0)
    every = torch.arange(size)
    for _ in range(60):
        middle = (low + high) / 2
        reached = draw(scores.expand(size, -1), middle.clamp(max=BEFORE_ONE))[0] >= every
        low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
    starts = high.numpy()
    starts[0] = 0  # where 0 is drawn, it is from the beginning
    return np.diff(starts, append=1)


@pytest.mark.parametrize("size", [60, 1_300])
def test_the_numbers_that_draw_a_token_are_its_probability(size):
    """Of every token, down to one in 10¹³: what no number of draws could show."""
    scores = torch.randn(size, generator=torch.Generator().manual_seed(4)) * 5
    exact = scores.double().softmax(0).numpy()
    assert exact.min() < 1e-9
    np.testing.assert_allclose(shares_of(scores), exact, rtol=1e-6, atol=1e-15)  # numbers are multiples of 1.1e-16


def test_uniforms_depend_on_seed_prompt_and_sample_alone():
    whole = uniforms(3, 17, slice(0, 9), 20)
    assert whole.shape == (9, 20)
    assert np.array_equal(uniforms(3, 17, slice(4, 7), 20), whole[4:7])
    others = [*uniforms(3, 18, slice(0, 9), 20), *uniforms(4, 17, slice(0, 9), 20)]
    assert len({row.tobytes() for row in [*whole, *others]}) == 27
    assert 0 <= whole.min() < whole.max() < 1
