"""Watchers for tests: with the shipped teacher, or with one that makes scores up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ketchup_cache.cache.cache import Cache
from ketchup_cache.config.commands import ScoreConfig
from ketchup_cache.scoring.watch import Watcher, WatchReport
from ketchup_cache.sharing import presence
from ketchup_cache.sharing.board import ScorerNote
from ketchup_cache.sharing.folder import LocalBoard
from ketchup_cache.shipped import task
from tests.helpers.segments import (
    make_prompts,
    make_rollouts,
    make_scores,
    prompts_info,
    rollouts_info,
    scores_info,
    tokenizer,
)
from tests.helpers.segments import teacher as made_up

TASK = task("translate")


class MadeUp:
    """What `Watcher` asks of a `Scorer`, at no cost. before: called with the rollouts id ahead of each range."""

    def __init__(
        self, before: Callable[[str], object] = lambda id_: None, pieces: int = 1, by: str = "teacher"
    ) -> None:
        self.info, self.tokenizer, self.keep_top = made_up(by), tokenizer(), 0
        self.before, self.pieces, self.by = before, pieces, by
        self.asked: list[tuple[str, int]] = []

    def stay(self) -> None:
        pass

    def ranges(self, cache: Cache, rollouts_id: str, start: int, stop: int) -> Iterator[range]:
        for part in np.array_split(np.arange(start, stop), min(self.pieces, stop - start)):
            yield range(int(part[0]), int(part[-1]) + 1)

    def score_range(self, cache: Cache, rollouts_id: str, rows: range, bar) -> tuple[int, int]:
        self.asked.append((rollouts_id, rows.start))
        self.before(rollouts_id)
        bar.advance(0)
        rollouts = cache.load_rollouts(rollouts_id)
        cache.commit_scores(
            make_scores(rollouts, rows.start, rows.stop), scores_info(rollouts_id, rows.start, rows.stop, by=self.by)
        )
        return len(rows), len(rollouts.completions.slice(rows.start, rows.stop).values)


def add_rollouts(cache: Cache, segments: int, rows: int = 4, seed: int = 0) -> list[str]:
    prompts = cache.commit_prompts(make_prompts(seed=seed), prompts_info())
    return [
        cache.commit_rollouts(
            make_rollouts([3] * rows, seed=seed + i), rollouts_info(prompts, 3, policy=f"p{seed + i}")
        )
        for i in range(segments)
    ]


def options(url: str | Path, **more) -> ScoreConfig:
    return ScoreConfig(**{"teacher": str(TASK / "teacher"), "watch": str(url), "device": "cpu", "poll": 0.02, **more})


@contextmanager
def watching(url: str | Path, scorer=None, **more) -> Iterator[Future[WatchReport]]:
    """A watcher in a thread while the block runs; its report comes after."""
    config = options(url, **more)
    if scorer is None:
        from ketchup_cache.scoring.score import Scorer

        scorer = Scorer(config, config.teacher, commit_tokens=config.commit_tokens)
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        watcher = Watcher(config, scorer, stop)
        running = pool.submit(watcher.run)
        try:
            until(lambda: running.done() or watcher.ready)  # two threads can't load models at once
            yield running
        finally:
            stop.set()
            if running.done() and (error := running.exception()):
                print("the watcher died:", repr(error))


def until(true: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


class Shifted(LocalBoard):
    """A store whose clock is years off."""

    def list(self, folder):
        return {name: modified + 3e8 for name, modified in super().list(folder).items()}


def scorer_note(**more) -> bytes:
    values = {
        "teacher": made_up(),
        "tokenizer": tokenizer().fingerprint,
        "keep_top": 0,
        "beat_s": presence.BEAT_S,
        **more,
    }
    return ScorerNote(**values).model_dump_json().encode()
