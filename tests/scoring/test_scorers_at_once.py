"""Several plain `score` on one cache: without locks, little is scored twice. Time is made up, so that runs repeat."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from ketchup_cache import open_cache
from ketchup_cache.cache.inspect import verify
from ketchup_cache.scoring import score as scoring
from ketchup_cache.scoring.score import Scorer
from ketchup_cache.types import Ragged, Scores
from tests.helpers.models import save_model
from tests.helpers.oracle import make_rollouts
from tests.helpers.scoring import add_rollouts, options

SEGMENTS, ROWS, PER_COMMIT, TOKENS = 4, 100, 2, 3
COMMITS = SEGMENTS * ROWS // PER_COMMIT


class Clock:
    """Threads that sleep run one at a time, the one that wakes first; between two sleeps no time passes."""

    def __init__(self, threads: int) -> None:
        self.now, self._live, self._wake, self._runs, self._turn = 0.0, threads, {}, None, threading.Condition()

    def sleep(self, seconds: float) -> None:
        me = threading.get_ident()
        with self._turn:
            self._wake[me] = self.now + seconds
            self._next()
            self._turn.wait_for(lambda: self._runs == me)

    def leave(self) -> None:
        with self._turn:
            self._live -= 1
            self._next()

    def _next(self) -> None:
        if self._wake and len(self._wake) == self._live:
            self._runs = min(self._wake, key=lambda thread: (self._wake[thread], thread))
            self.now = self._wake.pop(self._runs)
            self._turn.notify_all()


class Slow:
    """In the place of a teacher: takes a while, and counts the rows it is given."""

    def __init__(self, clock: Clock, seed: int, scored: list[int]) -> None:
        self.clock, self.rng, self.scored = clock, random.Random(seed), scored

    def score(self, prompts, rollouts, *, rows, **_) -> Scores:
        self.clock.sleep(self.rng.uniform(0.8, 1.2))
        self.scored.append(len(rows))
        q = np.zeros(len(rows) * TOKENS, np.float32)
        return Scores(q, q, q + 1, q - 1, np.zeros(len(rows), np.float32))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("teacher"), "1.1")


def wasted(cache, teacher, monkeypatch, scorers: int, *, apart: float = 0.0) -> float:
    """Rows that were scored more than once, as a share of all. apart: seconds between the starts."""
    rng = np.random.default_rng(0)
    for segment in range(SEGMENTS):
        tokens = [rng.integers(3, 60, TOKENS) for _ in range(ROWS)]
        prompts = Ragged.from_rows([[segment + 3]], np.int32)
        add_rollouts(cache, prompts, make_rollouts([0] * ROWS, tokens, [True] * ROWS), policy=segment)
    clock, scored = Clock(scorers), []
    monkeypatch.setattr(scoring, "time", SimpleNamespace(monotonic=lambda: clock.now, sleep=clock.sleep))

    def work(number: int) -> None:
        scorer = Scorer(options(cache, teacher, commit_tokens=PER_COMMIT * TOKENS))
        scorer._random, scorer._teacher, scorer._stays = random.Random(number), Slow(clock, number, scored), True
        clock.sleep(apart * number)
        try:
            scorer.ensure(open_cache(cache.path), shared=True)
        finally:
            clock.leave()

    with ThreadPoolExecutor(scorers) as pool:
        list(pool.map(work, range(scorers)))
    there = open_cache(cache.path)
    assert sum(ref.rows for ref in there.scored()) == SEGMENTS * ROWS
    assert verify(there, deep=False).ok
    return sum(scored) / (SEGMENTS * ROWS) - 1


@pytest.mark.parametrize(("scorers", "most", "apart"), [(1, 0, 0), (2, 0.05, 0), (2, 0.05, 3.7), (8, 0.2, 0)])
def test_little_is_scored_twice(cache, teacher, monkeypatch, scorers, most, apart):
    share = wasted(cache, teacher, monkeypatch, scorers, apart=apart)
    print(f"{scorers} scorers: {share:.1%} twice")
    assert share <= most
    if scorers == 1:  # a lone one keeps the order of the cache
        spans = [(m.info.rollouts, m.info.row_start) for _, m in open_cache(cache.path).manifests("scores")]
        order = [id_ for id_, _ in cache.rollouts()]
        assert spans == [(id_, row) for id_ in order for row in range(0, ROWS, PER_COMMIT)]
        assert len(spans) == COMMITS
