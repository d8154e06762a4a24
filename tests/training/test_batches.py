"""`Stream`: the thread that reads ahead changes nothing but the waiting."""

from __future__ import annotations

import threading
import tracemalloc
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, strategies as st

from benchmarks.common import made_up_cache
from ketchup_cache.cache.cache import Cache
from ketchup_cache.errors import CorruptError
from ketchup_cache.training import batches as module
from ketchup_cache.training.batches import Stream, gather, plan_batches
from ketchup_cache.types import ScoredRollouts
from tests.helpers.segments import make_prompts, make_rollouts, make_scores


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return made_up_cache(tmp_path_factory.mktemp("stream") / "cache", 12_000, segment_tokens=1_000)


def test_order_is_that_of_the_plan_gathered_one_by_one(cache):
    refs = cache.scored()
    assert len(refs) >= 10
    plan, stream = plan_batches(refs, 64, 5), Stream(cache, refs, 64, 5)
    for _ in range(2 * sum(ref.rows for ref in refs) // 64):
        want = gather([(cache.load_scored(refs[i]), rows) for i, rows in next(plan)])
        got = next(stream)
        np.testing.assert_array_equal(got.scores.q, want.scores.q)
        np.testing.assert_array_equal(got.rollouts.completions.offsets, want.rollouts.completions.offsets)
        np.testing.assert_array_equal(got.prompts.tokens.values, want.prompts.tokens.values)
    stream._thread.shutdown()  # its last batch must not be made in the middle of the next test


@given(st.data())
def test_gathered_rows_are_those_of_their_segments_one_by_one(data):
    """Every array, rows in any order and more than once, empty completions, prompts shared between segments."""
    parts = []
    for seed in range(data.draw(st.integers(1, 3))):
        lengths = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=6))
        prompts, rollouts = make_prompts(seed=seed % 2), make_rollouts(lengths, seed=seed, forced=True)
        part = ScoredRollouts(prompts, rollouts, make_scores(rollouts, 0, len(lengths), seed=seed))
        rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=8))
        parts.append((part, np.array(rows)))
    got, at = gather(parts), 0
    for part, rows in parts:
        for row in rows:
            start, stop = part.rollouts.completions.offsets[row : row + 2]
            here = slice(*got.rollouts.completions.offsets[at : at + 2])
            for name in ("behavior_logprob", "forced"):
                np.testing.assert_array_equal(
                    getattr(got.rollouts, name)[here], getattr(part.rollouts, name)[start:stop]
                )
            for name in ("q", "max_q", "logsumexp", "mean_q"):
                np.testing.assert_array_equal(getattr(got.scores, name)[here], getattr(part.scores, name)[start:stop])
            np.testing.assert_array_equal(got.rollouts.completions[at], part.rollouts.completions.values[start:stop])
            assert got.rollouts.finished[at] == part.rollouts.finished[row]
            assert got.scores.final_max_q[at] == part.scores.final_max_q[row]
            prompt, own = got.rollouts.prompt_index[at], part.rollouts.prompt_index[row]
            np.testing.assert_array_equal(got.prompts.tokens[prompt], part.prompts.tokens[own])
            np.testing.assert_array_equal(got.prompts.ids[prompt], part.prompts.ids[own])
            at += 1
    assert len(got) == at
    assert len(np.unique(got.prompts.ids, axis=0)) == len(got.prompts)
    assert set(got.rollouts.prompt_index) == set(range(len(got.prompts)))


def test_the_next_batch_is_made_while_this_one_is_used(cache, monkeypatch):
    """In another thread, after `next` has returned, without being asked."""
    made = threading.Semaphore(0)
    threads = []

    def watched(parts):
        threads.append(threading.current_thread())
        made.release()
        return gather(parts)

    monkeypatch.setattr(module, "gather", watched)
    stream = Stream(cache, cache.scored(), 64, 0)
    next(stream)
    assert made.acquire(timeout=10)
    assert made.acquire(timeout=10), "the second batch waits to be asked for"
    assert not made.acquire(timeout=0.2), "more than one batch ahead"
    assert threading.main_thread() not in threads


def test_at_most_two_segments_are_held_whatever_the_size_of_the_cache(tmp_path):
    """Bytes of the heap while everything streams by, against what one segment takes."""
    cache = made_up_cache(tmp_path / "cache", 60_000, segment_tokens=3_000)
    refs = cache.scored()
    assert len(refs) >= 20
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        part = cache.load_scored(refs[0])
        segment = tracemalloc.get_traced_memory()[0] - before
        del part
        stream = Stream(cache, refs, 64, 0)
        next(stream)
        tracemalloc.reset_peak()
        start = tracemalloc.get_traced_memory()[0]
        for _ in range(sum(ref.rows for ref in refs) // 64):
            next(stream)
            assert len(stream._held) <= 2
        end = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    # at the start one segment is held, later two, and what the reader has in its hands; all would be nineteen more
    assert end - start < 4 * segment


def test_the_next_segment_is_read_while_batches_of_this_one_are_made(tmp_path, monkeypatch):
    """The second is read from the first batch on, each once in an epoch, and none beyond the last batch."""
    cache = made_up_cache(tmp_path / "cache", 4_000, segment_tokens=1_000)
    refs = cache.scored()
    read: list[int] = []
    load = Cache.load_scored

    def watched(self, ref):
        read.append(refs.index(ref))
        return load(self, ref)

    monkeypatch.setattr(Cache, "load_scored", watched)
    batches = sum(ref.rows for ref in refs) // 8
    order = list(dict.fromkeys(i for parts in islice(plan_batches(refs, 8, 3), batches) for i, _ in parts))
    stream = Stream(cache, refs, 8, 3, batches=batches)
    next(stream)
    stream._thread.submit(int).result(), stream._reader.submit(int).result()  # once they have done what they had to do
    assert read == order[:2]
    for _ in range(batches - 1):
        next(stream)
        assert len(stream._held) <= 2
    stream._reader.shutdown()
    assert read == order

    read.clear()
    only_first = Stream(cache, refs, 8, 3, skip=1, batches=2)
    next(only_first), next(only_first)
    with pytest.raises(StopIteration):
        next(only_first)
    only_first._reader.shutdown()
    assert read == order[:1]


def test_damage_is_reported_at_the_batch_that_meets_it(tmp_path):
    cache = made_up_cache(tmp_path / "cache", 5_000, segment_tokens=2_500)
    refs = cache.scored()
    archive = cache.path / "segments" / refs[1].scores_id / "arrays.zip"
    archive.write_bytes(b"x" * archive.stat().st_size)
    first = next(i for i, batch in enumerate(plan_batches(refs, 16, 0)) if any(index == 1 for index, _ in batch))
    stream = Stream(cache, refs, 16, 0)
    for _ in range(first):
        next(stream)
    with pytest.raises(CorruptError, match="its bytes are not those"):
        next(stream)
