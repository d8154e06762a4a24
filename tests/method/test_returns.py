"""k_step_returns against Algorithm 1 and Eq. 7 written out literally, and against the laws they obey."""

import timeit

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from ketchup_cache import k_step_returns
from tests.helpers.errors import refuses
from tests.helpers.returns import LITERAL, algorithm_1


@st.composite
def rollouts(draw, max_rows: int = 6, max_width: int = 14):
    """q, max_q ≥ q, lengths (0 … T), with NaN after each row's end; k below, at and above the lengths."""
    rows, width = draw(st.integers(1, max_rows)), draw(st.integers(1, max_width))
    lengths = np.array(draw(st.lists(st.integers(0, width), min_size=rows, max_size=rows)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    q = rng.normal(0, 10, (rows, width))
    max_q = q + rng.exponential(3, (rows, width)) * (rng.random((rows, width)) < 0.7)
    outside = np.arange(width) >= lengths[:, None]
    q[outside] = max_q[outside] = np.nan
    return q, max_q, lengths, draw(st.integers(1, width + 3))


def literal(q, max_q, lengths, k, tail):
    out = np.zeros(q.shape)
    for row, n in enumerate(lengths):
        out[row, :n] = LITERAL[tail](q[row, :n].tolist(), max_q[row, :n].tolist(), k) if n else []
    return out


def sums_of_rewards(q, m, final: float) -> list[float]:
    """Eq. 10: Σ_{i≥t} (q_i − m_{i+1}) of each t, with m_{T+1} = final."""
    rewards = q - [*m[1:], final][: len(q)]
    return [sum(rewards[t:]) for t in range(len(q))]


def assert_close(got, expected, tolerance: float) -> None:
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)


BOTH_TAILS = pytest.mark.parametrize("tail", LITERAL)


@BOTH_TAILS
@given(case=rollouts())
def test_equals_the_literal_algorithm(case, tail):
    q, max_q, lengths, k = case
    assert_close(k_step_returns(q, max_q, lengths, k, tail=tail), literal(q, max_q, lengths, k, tail), 1e-10)


def test_worked_example():
    """By hand, K = 2, T = 5, gaps 1, 2, 4, 8, 16: Ĝ_t = q_t − the gaps that are landed on."""
    q = np.array([[10.0, 20.0, 30.0, 40.0, 50.0]])
    max_q = q + np.array([[1.0, 2.0, 4.0, 8.0, 16.0]])
    # t=1 jumps to 3 and 5 (4 + 16); t=2 jumps to 4, then steps to 5 (8 + 16); t=3 to 5; t=4 steps to 5; t=5 ends.
    np.testing.assert_array_equal(k_step_returns(q, max_q, [5], 2), [[-10.0, -4.0, 14.0, 24.0, 50.0]])
    # Eq. 7: from 2 to 4 and over the end (8); from 4 over the end (nothing).
    np.testing.assert_array_equal(k_step_returns(q, max_q, [5], 2, tail="jump"), [[-10.0, 12.0, 14.0, 40.0, 50.0]])


@given(case=rollouts())
def test_one_step_is_llmr_and_so_is_any_k_over_the_length(case):
    """Eq. 10 summed reward by reward; with Algorithm 1, any K > T − 1 gives it again."""
    q, max_q, lengths, _ = case
    llmr = np.zeros(q.shape)
    for row, n in enumerate(lengths):
        llmr[row, :n] = sums_of_rewards(q[row, :n], max_q[row, :n], 0.0)
    for k in (1, int(lengths.max(initial=1)) + 1, 10**9):
        assert_close(k_step_returns(q, max_q, lengths, k), llmr, 1e-10)


@given(case=rollouts())
def test_is_optimistic(case):
    """Ĝ_t − G_t is a sum of gaps, so never negative; and never more than what K = ∞ with a jumping tail gives."""
    q, max_q, lengths, k = case
    one = k_step_returns(q, max_q, lengths, 1)
    for tail in LITERAL:
        assert (k_step_returns(q, max_q, lengths, k, tail=tail) >= one - 1e-10).all()


@BOTH_TAILS
@given(case=rollouts(), seed=st.integers(0, 99))
def test_normalisation_is_a_state_only_baseline(case, seed, tail):
    """Subtracting c(s) from all logits of each state changes Ĝ_t by −c(s_t) and nothing else."""
    q, max_q, lengths, k = case
    c = np.random.default_rng(seed).normal(0, 20, q.shape)
    shifted = k_step_returns(q - c, max_q - c, lengths, k, tail=tail)
    for name, argument in (("centred", "mean_q"), ("logprob", "logsumexp")):
        got = k_step_returns(q, max_q, lengths, k, tail=tail, normalization=name, **{argument: c})
        assert_close(got, shifted, 1e-9)


@given(case=rollouts(), seed=st.integers(0, 99))
def test_unfinished_rollouts(case, seed):
    """Bootstrap: V = m_{T+1} cancels what the last reward subtracts. Zero: the reward stands alone. Drop: no return."""
    q, max_q, lengths, k = case
    rng = np.random.default_rng(seed)
    finished, final = rng.random(len(q)) < 0.5, rng.normal(30, 5, len(q))
    everything = k_step_returns(q, max_q, lengths, k)
    options = {"finished": finished, "final_max_q": final}
    dropped = everything * finished[:, None]
    for how, expected in (("drop", dropped), ("bootstrap", everything)):
        np.testing.assert_array_equal(k_step_returns(q, max_q, lengths, k, unfinished=how, **options), expected)
    np.testing.assert_array_equal(k_step_returns(q, max_q, lengths, k, **options), everything)  # the default
    zero = k_step_returns(q, max_q, lengths, k, unfinished="zero", **options)
    for row, n in enumerate(lengths):
        # a literal K = 1 chain whose last reward is q_T − m_{T+1}, and no value after it
        if k == 1 and n and not finished[row]:
            expected = sums_of_rewards(q[row, :n], max_q[row, :n], final[row])
        else:
            expected = everything[row, :n] - (0 if finished[row] else final[row])
        assert_close(zero[row, :n], expected, 1e-9)


@given(case=rollouts())
@settings(max_examples=30)
def test_torch_gives_the_same_and_stays_torch(case):
    torch = pytest.importorskip("torch")
    q, max_q, lengths, k = case
    for tail in LITERAL:
        expected = k_step_returns(q, max_q, lengths, k, tail=tail)
        got = k_step_returns(*(torch.from_numpy(x) for x in (q, max_q, lengths)), k, tail=tail)
        assert isinstance(got, torch.Tensor)
        assert got.dtype == torch.float64
        assert_close(got.numpy(), expected, 1e-12)


def test_does_not_change_its_input():
    q, max_q = np.array([[1.0, 2.0, np.nan]]), np.array([[3.0, 4.0, np.nan]])
    before = q.copy(), max_q.copy()
    for k in (1, 2, 5):
        k_step_returns(q, max_q, [2], k)
    np.testing.assert_array_equal((q, max_q), before)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_keeps_the_dtype_and_sums_half_precision_in_float32(dtype):
    """512 gaps of 1/16 + one of 1: float16 sums would lose them (its step at 512 is 0.5)."""
    q = np.zeros((1, 512), dtype)
    max_q = np.full((1, 512), 1 / 16, dtype)
    got = k_step_returns(q, max_q, [512], 1)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got[0], -(511 - np.arange(512)) / 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be"), ({"k": 1.5}, "k must be"), ({"k": True}, "k must be"),
        ({"tail": "two-step"}, "tail must be"), ({"normalization": "logprob"}, "needs logsumexp"),
        ({"normalization": "centred", "mean_q": np.zeros((1, 3))}, "needs mean_q"),
        ({"unfinished": "zero", "finished": [True, False]}, "needs final_max_q"),
        ({"unfinished": "never"}, "unfinished must be"), ({"lengths": [2]}, "lengths must have"),
        ({"max_q": np.zeros((2, 4))}, "one shape"),
    ],
)  # fmt: skip
def test_refuses_what_it_cannot_use(options, message):
    arguments = {"q": np.zeros((2, 3)), "max_q": np.zeros((2, 3)), "lengths": [3, 1], "k": 2} | options
    refuses(ValueError, message, k_step_returns, **arguments)


def test_is_several_times_as_fast_as_the_literal_algorithm():
    """B=256, T=64, K=4 in the same run; the literal version gets plain Python lists, its best case."""
    rng = np.random.default_rng(0)
    q = rng.normal(size=(256, 64)).astype(np.float32)
    max_q = q + rng.exponential(size=q.shape).astype(np.float32)
    lengths, rows = np.full(256, 64), list(zip(q.tolist(), max_q.tolist(), strict=True))

    def best(call) -> float:
        return min(timeit.repeat(call, number=1, repeat=40))

    ratio = best(lambda: [algorithm_1(a, b, 4) for a, b in rows]) / best(lambda: k_step_returns(q, max_q, lengths, 4))
    print(f"k_step_returns: {ratio:.1f} times the literal algorithm's speed")
    assert ratio >= 5
