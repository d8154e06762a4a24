"""Scores in float16: the documented error, the format's rules after rounding, and what float16 can't hold."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp

from ketchup_cache import open_cache
from ketchup_cache.cache import rules
from ketchup_cache.cache.cache import Cache
from ketchup_cache.cache.inspect import verify
from ketchup_cache.errors import NumericsError
from ketchup_cache.types import PER_TOKEN, Scores
from tests.helpers.errors import refuses
from tests.helpers.segments import VOCAB, fill, make_rollouts, make_scores


def committed(root: Path, scores: Scores | None = None, vocab: int = VOCAB) -> tuple[Cache, str]:
    """A cache with three rollouts, and the id of their scores in float16."""
    cache = open_cache(root, create=True)
    return cache, fill(cache, scores, forced=False, vocab_size=vocab, storage="compact")[2]


@pytest.mark.parametrize("top", [0, 1, 3, VOCAB])
def test_committed_scores_come_back_within_the_documented_error(tmp_path: Path, top: int) -> None:
    exact, half = make_scores(make_rollouts(), 0, 3, top=top), 2.0**-11
    cache, id_ = committed(tmp_path / "c", exact)
    read = open_cache(cache.path).load_scores(id_)
    dtypes = {name: entry.dtype for name, entry in cache.manifest(id_).arrays.items()}
    assert {name for name, dtype in dtypes.items() if dtype != "float16"} == {"final_max_q", *["top_ids"][:top]}
    gap = exact.max_q - exact.q
    np.testing.assert_array_less(abs(read.q - exact.q), abs(exact.q) * half + 1e-7)
    np.testing.assert_array_less(abs(read.max_q - read.q - gap), gap * half + 1e-5)
    assert all(values.dtype == np.float32 for values in read.per_token().values())
    assert verify(cache).ok, str(verify(cache))
    if not top:
        return
    np.testing.assert_array_equal(read.top.ids, exact.top.ids)
    np.testing.assert_array_equal(read.top.q[:, 0], read.max_q)
    gap = exact.max_q[:, None] - exact.top.q
    np.testing.assert_array_less(abs(read.max_q[:, None] - read.top.q - gap), gap * half + 1e-5)
    if top < VOCAB:
        rest_gap = exact.logsumexp - exact.top.rest_logsumexp
        np.testing.assert_array_less(abs(read.logsumexp - read.top.rest_logsumexp - rest_gap), rest_gap * half + 1e-5)
    else:
        assert (read.top.rest_logsumexp == -np.inf).all()


floats = hnp.arrays(np.float32, st.integers(1, 30), elements=st.floats(-1000, 1000, width=32))


@settings(derandomize=True, deadline=None, max_examples=200)
@given(floats, st.data())
def test_errors_are_those_of_one_rounding(q: np.ndarray, data: st.DataObject) -> None:
    up = hnp.arrays(np.float32, len(q), elements=st.floats(0, 500, width=32))
    gap, over, under = (data.draw(up) for _ in range(3))
    max_q = q + gap
    scores = Scores(q, max_q, max_q + over, max_q - under, np.zeros(1, np.float32))
    read = rules.from_float16(rules.to_float16(scores))
    rounding = 2.0**-11
    exact = {name: np.float64(getattr(scores, name)) for name in PER_TOKEN}
    got = {name: np.float64(getattr(read, name)) for name in PER_TOKEN}
    for name, sign in (("q", -1), ("logsumexp", 1), ("mean_q", -1)):
        want = sign * (exact[name] - exact["max_q"])
        have = sign * (got[name] - got["max_q"])
        assert (abs(have - want) <= abs(want) * rounding + 2e-4).all()  # float32 near 1000 errs by 6e-5
        assert (have >= 0).all()
    assert (abs(got["q"] - exact["q"]) <= abs(exact["q"]) * rounding + 2.0**-25).all()
    # written again, nothing more is lost than float32 loses
    again = rules.from_float16(rules.to_float16(read))
    np.testing.assert_array_equal(again.q, read.q)
    assert (abs(np.float64(again.max_q) - read.max_q) <= 2e-4).all()


def test_gaps_up_to_16_err_by_at_most_4_thousandths() -> None:
    """The figure in the documentation, over every float32 step that matters."""
    gap = np.linspace(0, 16, 1_000_001, dtype=np.float32)
    zero = np.zeros_like(gap)
    read = rules.from_float16(rules.to_float16(Scores(-gap, zero, zero, -gap, zero[:1])))
    error = abs((read.max_q - read.q) - gap).max()
    assert 0.0038 < error <= 2**-8


def test_uniform_logits_are_within_the_rules_after_rounding(tmp_path: Path) -> None:
    """logsumexp may lie log(vocab_size) above the maximum, and float16 rounds that up."""
    vocab = next(v for v in range(30_000, 32_000) if float(np.float16(math.log(v))) - math.log(v) > 0.003)
    zero = np.zeros(14, np.float32)
    scores = Scores(zero, zero, zero + np.float32(math.log(vocab)), zero, np.zeros(3, np.float32))
    assert verify(committed(tmp_path / "c", scores, vocab)[0]).ok


@pytest.mark.parametrize(("name", "value"), [("q", -70_000), ("logsumexp", 1e5), ("max_q", 69_999), ("mean_q", -1e5)])
def test_what_float16_can_not_hold_is_refused(name: str, value: float) -> None:
    zero = np.zeros(3, np.float32)
    scores = replace(Scores(zero, zero, zero, zero, zero), **{name: np.array([0, value, 0], np.float32)})
    refuses(NumericsError, r"\[1\] is .* float16 ends at 65504: keep these scores lossless", rules.to_float16, scores)
