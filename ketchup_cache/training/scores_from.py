"""`learn --scores-from`: new rollouts are scored elsewhere, by `ketchup-cache score --follow` on any machine."""

from __future__ import annotations

import time
from collections.abc import Sequence

from ketchup_cache.cache.cache import Cache
from ketchup_cache.config.commands import LearnConfig
from ketchup_cache.console import progress, say
from ketchup_cache.errors import CacheError, ConfigError, CorruptError, WriteError
from ketchup_cache.provenance import TeacherInfo
from ketchup_cache.sharing.remote_cache import open_cache
from ketchup_cache.sharing.transfer import copy

POLL_S = 2.0
"""Seconds between two looks for scores. After an outage they grow up to SAY_EVERY_S."""
SAY_EVERY_S = 60.0


class ScoresFrom:
    """What `OnPolicy` calls to have rollouts scored."""

    def __init__(self, config: LearnConfig) -> None:
        assert config.scores_from is not None
        self._config, self._in_cache = config, config.scores_from == "cache"
        self._place = config.cache if self._in_cache else config.scores_from
        self._store: Cache | None = None
        self._sent: set[str] = set()

    def __call__(self, cache: Cache, rollout_ids: Sequence[str], teacher: str | None) -> tuple[str, float]:
        """Put the rollouts there, wait until one teacher has scored every row, and bring the scores back.

        teacher: fingerprint of the one that the run has learned from; None: that of `--scored-by`, or the only one that
        has scored everything. An outage is retried with growing pauses, once the place was reached.

        Raises CacheError where the place can't be used, and where no scores came for `--scores-timeout` seconds;
        ConfigError where several teachers have scored everything; CorruptError for damage; WriteError.
        """
        if cache.pinned is not None:  # a pinned run takes no new scores
            return cache.select_teacher(self._config.scored_by).fingerprint, 0.0
        ids = set(rollout_ids)
        left = sum(cache.entry(id_).rows for id_ in ids)
        news = said = time.monotonic()
        pause, timeout = POLL_S, self._config.scores_timeout
        with progress("waiting for scores", left, "rollouts") as bar:
            while True:
                try:
                    by, waiting = self._look(cache, ids, teacher)
                    if by:
                        if teacher is None:
                            say(f"scores come from teacher {by.name} ({by.fingerprint[:12]})")
                        return by.fingerprint, 0.0
                    if waiting < left:
                        bar.advance(left - waiting)
                        left, news = waiting, time.monotonic()
                    pause = POLL_S
                except (CacheError, WriteError) as error:
                    # a place that was never reached is no outage: it can't be used
                    if self._store is None or isinstance(error, CorruptError):
                        raise
                    pause = min(2 * pause, SAY_EVERY_S)
                    say(f"{error}; trying again in {pause:.0f} s")
                now = time.monotonic()
                if timeout and now - news >= timeout:
                    raise CacheError(f"{self._nothing(left, now - news)} Start it, then run this again to go on")
                if now - max(news, said) >= SAY_EVERY_S:
                    said = now
                    say(self._nothing(left, now - news))
                time.sleep(pause)

    def _nothing(self, left: int, seconds: float) -> str:
        top = f" --keep-top {self._config.top_needed}" if self._config.top_needed else ""
        return (
            f"{left:,} rollouts wait for scores at {self._place}, and none came for {seconds:.0f} s; is `ketchup-cache "
            f"score --follow --cache {self._place} --teacher {self._config.scored_by or 'TEACHER'}{top}` running?"
        )

    def _look(self, cache: Cache, ids: set[str], teacher: str | None) -> tuple[TeacherInfo | None, int]:
        """The teacher whose scores of all rows are in the cache; None while rows wait, and how many."""
        by, left = self._scored_all(cache, ids, teacher)
        if by:
            return by, left
        if not self._in_cache and not ids <= self._sent:
            copy(cache.address, self._place, only=ids)
            self._sent |= ids
        self._store = self._store or (cache if self._in_cache else open_cache(self._place))
        self._store.refresh()
        by, left = self._scored_all(self._store, ids, teacher)
        if by is None or self._in_cache:
            return by, left
        refs = self._store.scored(by.fingerprint, keep_top=self._config.top_needed)
        copy(self._place, cache.address, only={ref.scores_id for ref in refs if ref.rollouts_id in ids})
        cache.refresh()
        return self._scored_all(cache, ids, by.fingerprint)

    def _scored_all(self, cache: Cache, ids: set[str], teacher: str | None) -> tuple[TeacherInfo | None, int]:
        """The one teacher that has scored all rows; and how many rows still lack scores by the one nearest to that."""
        selector = teacher or self._config.scored_by
        left = {}
        for by in cache.teachers():
            if selector in (None, by.name) or by.fingerprint.startswith(str(selector)):
                waiting = cache.unscored(by.fingerprint, keep_top=self._config.top_needed)
                left[by] = sum(stop - start for id_, start, stop in waiting if id_ in ids)
        done = [by for by, rows in left.items() if not rows]
        if len(done) > 1:
            names = ", ".join(f"{by.name} ({by.fingerprint[:12]})" for by in done)
            raise ConfigError([f"{cache.address}: {names} have all scored these rollouts; choose one with --scored-by"])
        return done[0] if done else None, min(left.values(), default=sum(cache.entry(id_).rows for id_ in ids))
