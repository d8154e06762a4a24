"""`score --watch`: one teacher stays in memory and scores whatever rollouts appear in a shared cache.

Any number of these share the work by notes beside the cache (sharing/board.py), without a server. A claim on some rows
counts while its owner lives. Of a dead one's claim number n, claim n + 1 takes over, and only one scorer can make it.
Claims only save work: were they all wrong, rows would be scored twice, which the format allows.
"""

from __future__ import annotations

import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from types import FrameType
from typing import TYPE_CHECKING, Any

from ketchup_cache.config.commands import ScoreConfig
from ketchup_cache.console import Bar, printable, progress
from ketchup_cache.errors import (
    CacheError,
    CorruptError,
    KetchupError,
    MismatchError,
    ModelError,
    NumericsError,
    WriteError,
)
from ketchup_cache.sharing import presence
from ketchup_cache.sharing.board import (
    TEACHER_DIGITS,
    ClaimNote,
    RefusalNote,
    ScorerNote,
    WaitingNote,
    open_board,
    parse,
)
from ketchup_cache.sharing.presence import Living, Patience, Presence, forget, tidy
from ketchup_cache.sharing.remote_cache import open_cache

if TYPE_CHECKING:
    from ketchup_cache.scoring.score import Scorer

SAY_EVERY_S = 60.0
"""Between two lines on what was done."""
_CLAIM = re.compile(r"([0-9a-f]{64})-(\d{1,12})\.(\d{1,6})\.json")
_REFUSED = re.compile(r"([0-9a-f]{64})\.json")


@dataclass(frozen=True)
class WatchReport:
    """What one watcher did. Rows are rollouts, tokens are completion tokens."""

    cache: str
    teacher: str
    """Name and start of the fingerprint."""
    computed: int = 0
    """Rows that went through the teacher."""
    tokens: int = 0
    """Their tokens."""
    copied: int = 0
    """Rows whose scores were there for the same prompt and completion."""
    segments: int = 0
    """Segments of scores written."""
    taken_over: int = 0
    """Of them, those that a dead scorer had begun."""
    refused: int = 0
    """Segments of rollouts that can't be scored."""
    busy_s: float = 0.0
    """Seconds at work on rows."""
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        done = f"{self.computed:,} rollouts ({self.tokens:,} tokens) computed, {self.copied:,} copied"
        over = f", {self.taken_over:,} taken over" if self.taken_over else ""
        refused = f"; {self.refused:,} segments can't be scored" if self.refused else ""
        return printable(
            f"teacher {self.teacher} at {self.cache}: {done} in {self.segments:,} segments{over}{refused}; "
            f"{self.busy_s:.0f} s of work in {self.seconds:.0f} s"
        )


def watch(config: ScoreConfig, scorer: Scorer) -> WatchReport:
    """Score what appears at `config.watch` until SIGINT, SIGTERM or `config.idle_exit`.

    Raises CacheError where the place can't be written or reached (for long: `presence.PATIENCE_S`), ModelError where
    the teacher can't be loaded, and WriteError.
    """
    assert config.watch is not None
    with _stopping() as stop:
        return Watcher(config, scorer, stop).run()


class Stopped(Exception):
    """Raised between two batches, so that the rows at hand are dropped and not finished."""


class Watcher:
    def __init__(self, config: ScoreConfig, scorer: Scorer, stop: threading.Event) -> None:
        assert config.watch is not None
        self._config, self._scorer, self._stop = config, scorer, stop
        self._board = open_board(config.watch)
        self._cache = open_cache(config.watch, create=True)
        self._digits = scorer.info.fingerprint[:TEACHER_DIGITS]
        self._scorers = Living(self._board, "scorers", ScorerNote)
        self._waiting = Living(self._board, "waiting", WaitingNote)
        self._refused: dict[str, str] = {}
        """Rollouts segments that this teacher can't score → why."""
        self._foreign: set[str] = set()
        """Fingerprints of tokenizers that were complained of."""
        self.ready = False
        """Whether the teacher is loaded and others can see that."""
        self._report = WatchReport(self._board.url, f"{scorer.info.name} ({scorer.info.fingerprint[:12]})")

    def run(self) -> WatchReport:
        began = said = time.monotonic()
        told = self._report
        self._scorer.stay()
        info, idle_since, patience = self._scorer.info, time.monotonic(), Patience()
        note = ScorerNote(
            teacher=info,
            tokenizer=self._scorer.tokenizer.fingerprint,
            keep_top=self._scorer.keep_top,
            beat_s=presence.BEAT_S,
        )
        with Presence(self._board, "scorers", note.model_dump_json().encode()) as me:
            self._me, self.ready = me, True
            self._tidy()
            _say(f"teacher {self._report.teacher} is ready; watching {self._board.url}")
            try:
                while not self._stop.is_set():
                    pause = self._config.poll
                    try:
                        worked, outstanding = self._look()
                        patience.worked()
                    except (CacheError, WriteError) as error:
                        pause, worked, outstanding = patience.failed(error), False, True
                        _say(f"{error}; trying again in {pause:.0f} s")
                    now = time.monotonic()
                    if worked or outstanding:
                        idle_since = now
                    elif self._config.idle_exit and now - idle_since >= self._config.idle_exit:
                        break
                    if self._report != told and now - said >= SAY_EVERY_S:
                        said, told = now, replace(self._report, seconds=now - began)
                        _say(str(told))
                    if not worked:
                        self._stop.wait(pause)
            except Stopped:
                pass
            finally:
                for rollouts_id in self._refused:
                    forget(self._board, self._refusal_name(rollouts_id))
        return replace(self._report, busy_s=round(self._report.busy_s, 2), seconds=round(time.monotonic() - began, 2))

    def _tidy(self) -> None:
        with suppress(KetchupError):
            tidy(self._board, self._me.now())

    # ------------------------------------------------------------------------------------------------- what to do

    def _look(self) -> tuple[bool, bool]:
        """Score one range, if there is one to score; whether that was so, and whether any rows still lack scores."""
        missing = self._missing()
        if not missing:
            return False, False
        now = self._me.now()
        with ThreadPoolExecutor(4) as pool:  # each is a request over the network
            claims = pool.submit(lambda: dict(self._read_claims()))
            refusals = pool.submit(self._read_refusals)
            waiting, scorers = pool.submit(self._waiting.look, now), pool.submit(self._scorers.look, now)
        claimed, alive = claims.result(), scorers.result().keys() - {self._me.id}
        wanted = {id_ for note in waiting.result().values() for id_ in note.rollouts}
        # what another living scorer could not score; that of dead ones is tried once more
        refused = {id_ for id_, note in refusals.result() if note.scorer in alive}
        missing = [part for part in missing if part[0] not in refused]
        # those that somebody waits for come first, older ones before newer ones
        for rollouts_id, start, stop in sorted(missing, key=lambda part: part[0] not in wanted):
            try:
                parts = list(self._scorer.ranges(self._cache, rollouts_id, start, stop))
            except CorruptError as error:
                self._refuse(rollouts_id, str(error))
                continue
            for rows in parts:
                if self._work_on(rollouts_id, rows, claimed, alive):
                    return True, True
        return False, bool(missing)

    def _missing(self) -> list[tuple[str, int, int]]:
        self._cache.refresh()
        found = self._cache.unscored(self._scorer.info.fingerprint, keep_top=self._scorer.keep_top)
        return [part for part in found if part[0] not in self._refused and not self._is_foreign(part[0])]

    def _is_foreign(self, rollouts_id: str) -> bool:
        """Rollouts with another tokenizer are those of another teacher. Who waits for them sees that in our note."""
        theirs = self._cache.manifest(rollouts_id).info.tokenizer
        if theirs.fingerprint == self._scorer.tokenizer.fingerprint:
            return False
        if theirs.fingerprint not in self._foreign:
            self._foreign.add(theirs.fingerprint)
            _say(f"rollouts with the tokenizer of {theirs.name} are passed over: this teacher's encodes differently")
        return True

    # ------------------------------------------------------------------------------------------------------ claims

    def _read_claims(self) -> Iterator[tuple[tuple[str, int, int], ClaimNote | None]]:
        """(rollouts id, first row, number) → claim, of this teacher; None for one that is no valid note.

        Always read anew: one that was given up may have been made again by another scorer, under the same name.
        """
        for name in self._board.list("claims"):
            found = _CLAIM.fullmatch(name[TEACHER_DIGITS + 1 :])
            if found and name.startswith(f"{self._digits}-"):
                data = self._board.read(f"claims/{name}")
                if data is not None:  # else given up meanwhile
                    yield (found[1], int(found[2]), int(found[3])), parse(data, ClaimNote)

    def _work_on(
        self,
        rollouts_id: str,
        rows: range,
        claimed: dict[tuple[str, int, int], ClaimNote | None],
        alive: Set[str],
    ) -> bool:
        """Claim a range and score it; False where somebody else has it, or has done it."""
        numbers = [n for (id_, start, n) in claimed if (id_, start) == (rollouts_id, rows.start)]
        newest: dict[int, tuple[int, ClaimNote | None]] = {}
        for (id_, start, n), claim in claimed.items():
            if id_ == rollouts_id and n >= newest.get(start, (-1, None))[0]:
                newest[start] = n, claim
        for _, claim in newest.values():
            if claim and claim.scorer in alive and claim.start < rows.stop and rows.start < claim.stop:
                return False
        last, dead = newest.get(rows.start, (-1, None))
        number = last + 1
        over = [number]
        own = ClaimNote(scorer=self._me.id, start=rows.start, stop=rows.stop)
        if not self._board.create(self._claim_name(rollouts_id, rows, number), own.model_dump_json().encode()):
            return False
        try:
            # the one that we took for dead may have given its claim up before it went, and a living one made it anew
            if number and parse(self._board.read(self._claim_name(rollouts_id, rows, last)), ClaimNote) != dead:
                return False
            over += numbers
            # it may have been scored, and its claim be gone, since we looked
            if not any(id_ == rollouts_id and a <= rows.start and rows.stop <= b for id_, a, b in self._missing()):
                return False
            done = self._score(rollouts_id, rows)
            if done and number:
                self._report = replace(self._report, taken_over=self._report.taken_over + 1)
            return done
        finally:
            for n in over:
                forget(self._board, self._claim_name(rollouts_id, rows, n))

    def _score(self, rollouts_id: str, rows: range) -> bool:
        began = time.monotonic()
        manifest = self._cache.manifest(rollouts_id)
        try:
            with progress("score", manifest.tokens * len(rows) // max(manifest.rows, 1)) as bar:
                computed, tokens = self._scorer.score_range(self._cache, rollouts_id, rows, _Stoppable(bar, self._stop))
        except (MismatchError, NumericsError, ModelError, CorruptError) as error:
            self._refuse(rollouts_id, str(error))
            return True
        done = self._report
        self._report = replace(
            done,
            computed=done.computed + computed,
            tokens=done.tokens + tokens,
            copied=done.copied + len(rows) - computed,
            segments=done.segments + 1,
            busy_s=done.busy_s + time.monotonic() - began,
        )
        return True

    def _claim_name(self, rollouts_id: str, rows: range, number: int) -> str:
        return f"claims/{self._digits}-{rollouts_id}-{rows.start}.{number}.json"

    # ---------------------------------------------------------------------------------------------------- refusals

    def _refuse(self, rollouts_id: str, why: str) -> None:
        """Not tried again by this process; while it lives, whoever waits for these scores fails with this message."""
        self._refused[rollouts_id] = why
        self._report = replace(self._report, refused=self._report.refused + 1)
        _say(f"passed over: {why}")
        note = RefusalNote(scorer=self._me.id, message=why[:2000])
        try:
            self._board.write(self._refusal_name(rollouts_id), note.model_dump_json().encode())
        except KetchupError as error:
            _say(str(error))

    def _read_refusals(self) -> list[tuple[str, RefusalNote]]:
        """(rollouts id, note) of scorers with this teacher."""
        names = [name for name in self._board.list("refused") if name.startswith(f"{self._digits}-")]
        found = [
            (match[1], parse(self._board.read(f"refused/{name}"), RefusalNote))
            for name in names
            if (match := _REFUSED.fullmatch(name[TEACHER_DIGITS + 1 :]))
        ]
        return [(id_, note) for id_, note in found if note]

    def _refusal_name(self, rollouts_id: str) -> str:
        return f"refused/{self._digits}-{rollouts_id}.json"


class _Stoppable(Bar):
    """Hands on to another bar, until it is time to stop."""

    def __init__(self, bar: Bar, stop: threading.Event) -> None:
        super().__init__(bar.label, bar.total, bar.unit)
        self._bar, self._stop = bar, stop

    def advance(self, n: int = 1) -> None:
        if self._stop.is_set():
            raise Stopped
        self._bar.advance(n)


@contextmanager
def _stopping() -> Iterator[threading.Event]:
    """Set by the first SIGINT or SIGTERM; the second one has its usual effect."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, frame: FrameType | None) -> None:
        restore()
        stop.set()

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        restore()


def _say(text: str) -> None:
    print(f"ketchup-cache: {printable(text)}", file=sys.stderr, flush=True)
