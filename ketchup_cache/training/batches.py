"""Batches of scored rollouts for the optimizer, in an order that depends on the seed alone.

A segment is loaded once and its rows are gathered from memory; at most two segments are held at a time: the next one is
read while batches of this one are gathered. The next batch is made by a thread while the student learns from this one.
The order is worked out from row counts, without reading any data, so that a resumed run skips what it has seen at no
cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby, islice, pairwise, tee

import numpy as np
from numpy.typing import NDArray

from ketchup_cache.cache.cache import Cache
from ketchup_cache.cache.index import ScoredRef
from ketchup_cache.types import Prompts, ScoredRollouts, Scores, concatenated

Part = tuple[int, NDArray[np.int64]]
"""Rows of one segment: index of its ref, rows counted from the ref's first."""


def seed_of(major: int, minor: int) -> int:
    """One seed from two numbers: a seed and a step or phase."""
    return major * 1_000_003 + minor


def plan_batches(refs: Sequence[ScoredRef], batch_size: int, seed: int) -> Iterator[list[Part]]:
    """Endless batches of `batch_size` rollouts: each epoch visits every segment once, in a new order, and within a
    segment every prompt in a new order. Samples of one prompt stay together, so that they can be compared.

    A batch may span two segments or two epochs; none is ever short.
    """
    epoch, pending, room = 0, [], batch_size
    while True:
        rng = np.random.default_rng([seed, epoch])
        for index in rng.permutation(len(refs)):
            rows = _shuffled_rows(refs[index], rng)
            while len(rows):
                taken, rows = rows[:room], rows[room:]
                pending.append((int(index), taken))
                room -= len(taken)
                if room == 0:
                    yield pending
                    pending, room = [], batch_size
        epoch += 1


def _shuffled_rows(ref: ScoredRef, rng: np.random.Generator) -> NDArray[np.int64]:
    """Rows of a ref in random order of prompts. A prompt's samples are consecutive rows of the parent segment, and a
    ref may begin or end in the middle of them.
    """
    prompt = np.arange(ref.row_start, ref.row_stop) // ref.samples
    prompt -= prompt[0]
    place = rng.permutation(prompt[-1] + 1)
    return np.argsort(place[prompt], kind="stable")


class Stream:
    """Loads what the plan asks for, one batch ahead. While batches are gathered from one segment, the next is read by
    a thread of its own; these two are all that is held. load: how the rows of a ref are read.
    """

    load: Callable[[Cache, ScoredRef], ScoredRollouts] = staticmethod(lambda cache, ref: cache.load_scored(ref))

    def __init__(
        self, cache: Cache, refs: Sequence[ScoredRef], size: int, seed: int, skip: int = 0, batches: int | None = None
    ) -> None:
        """size: rollouts per batch. skip: batches that were seen already. batches: how many will be asked for after
        them, so that none is read in vain; None: no end.
        """
        # a handle of its own: the caller may commit to the cache while the thread reads it
        self._cache, self._refs = cache.handle(), refs
        plan = islice(plan_batches(refs, size, seed), skip, None if batches is None else skip + batches)
        self._plan, ahead = tee(plan)
        indices = (index for parts in ahead for index, _ in parts)
        self._pairs = pairwise(index for index, _ in groupby(indices))
        """Each segment with the one that comes after it."""
        self._pair = -1, -1
        self._held: dict[int, Future[ScoredRollouts]] = {}
        """Segments in memory, and at most one that is being read."""
        self._thread, self._reader = ThreadPoolExecutor(1, "stream"), ThreadPoolExecutor(1, "segments")
        self._ahead: Future[ScoredRollouts] | None = None

    def __next__(self) -> ScoredRollouts:
        """Raises what loading a segment raises, at the batch that needs it; StopIteration after `batches`."""
        batch = (self._ahead or self._thread.submit(self._make)).result()
        self._ahead = self._thread.submit(self._make)
        return batch

    def _make(self) -> ScoredRollouts:
        parts = next(self._plan)
        loaded = [(self._segment(index).result(), rows) for index, rows in parts]
        # otherwise two segments are held for this batch; and of one alone, there is no next
        if len(parts) == 1 < len(self._refs):
            if self._pair[0] != (current := parts[0][0]):
                self._pair = next((pair for pair in self._pairs if pair[0] == current), (current, current))
            self._segment(self._pair[1])
        return gather(loaded)

    def _segment(self, index: int) -> Future[ScoredRollouts]:
        """Read a segment that is not held. The two that were asked for last are held."""
        held = self._held.pop(index, None)
        if held is None:
            while len(self._held) > 1:
                del self._held[next(iter(self._held))]
            held = self._reader.submit(self.load, self._cache, self._refs[index])
        self._held[index] = held
        return held


def gather(parts: Sequence[tuple[ScoredRollouts, NDArray[np.int64]]]) -> ScoredRollouts:
    """The given rows of the given segments as one. Prompts with equal ids become one, and only those used are kept."""
    taken = [part.take(rows) for part, rows in parts]
    ids = np.concatenate([part.prompts.ids[part.rollouts.prompt_index] for part in taken])
    # as strings of 16 bytes: ten times faster than np.unique by rows, in the same order
    _, first, prompt_index = np.unique(ids.view("S16").reshape(-1), return_index=True, return_inverse=True)
    if len(taken) == 1:  # as nearly always: the prompts that are used, each copied once
        tokens = taken[0].prompts.tokens.take(taken[0].rollouts.prompt_index[first])
    else:
        tokens = concatenated([p.prompts.tokens.take(p.rollouts.prompt_index) for p in taken]).take(first)
    rollouts = concatenated([part.rollouts for part in taken])
    return ScoredRollouts(
        Prompts(ids[first], tokens),
        replace(rollouts, prompt_index=prompt_index.reshape(-1).astype(np.int64)),
        Scores.concatenate([part.scores for part in taken]),
    )


def concatenate(batches: Sequence[ScoredRollouts]) -> ScoredRollouts:
    """All rows of the batches, in their order, as one."""
    return batches[0] if len(batches) == 1 else gather([(batch, np.arange(len(batch))) for batch in batches])
