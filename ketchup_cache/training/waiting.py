"""`learn --scorer`: rollouts are scored by `ketchup-cache score --watch` in another process, on any machine.

The rollouts go to a shared cache, or are there already; a note asks for their scores (sharing/board.py); the scores
come back. The run keeps to the teacher that scored its first rollouts (OUT/teacher.json).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import ValidationError

from ketchup_cache.cache.cache import Cache
from ketchup_cache.cache.manifest import RolloutsInfo
from ketchup_cache.config.commands import LearnConfig
from ketchup_cache.console import Bar, printable, progress
from ketchup_cache.errors import CacheError, ConfigError, CorruptError, WriteError
from ketchup_cache.files import write_file
from ketchup_cache.provenance import TeacherInfo
from ketchup_cache.sharing import presence
from ketchup_cache.sharing.base import read_manifest, read_segment
from ketchup_cache.sharing.board import (
    MAX_WAITING,
    TEACHER_DIGITS,
    Board,
    RefusalNote,
    ScorerNote,
    WaitingNote,
    open_board,
    parse,
)
from ketchup_cache.sharing.presence import Living, Patience, Presence
from ketchup_cache.sharing.remote_cache import open_cache
from ketchup_cache.sharing.stores import open_remote
from ketchup_cache.training.origin import Origin

IN_CACHE = "watch"
"""`--scorer watch`: --cache itself is what the scorers watch."""
FIRST_POLL_S, LAST_POLL_S = 0.2, 2.0
NOBODY_S = 10.0
"""Without a scorer for so long: it is said, and again every REPEAT_S."""
REPEAT_S = 60.0


class WaitForScores:
    """What `OnPolicy` calls to have rollouts scored (`learn.source.ScoreRollouts`)."""

    def __init__(self, config: LearnConfig) -> None:
        """Raises CacheError where the address can't be used for this; nothing is asked of it yet."""
        assert config.scorer is not None
        self._config = config
        self._address = config.cache if config.scorer == IN_CACHE else config.scorer
        self._board: Board = open_board(self._address)
        self._scorers = Living(self._board, "scorers", ScorerNote)
        self._store: Cache | None = None
        self._teacher: TeacherInfo | None = None
        self._reached = False

    def __call__(self, cache: Cache, rollout_ids: Sequence[str]) -> str:
        """Wait until every row is scored; returns the teacher's fingerprint.

        Raises CacheError where nobody scores for `--scorer-timeout` seconds, two teachers could, the teacher can't
        score these rollouts, or the place can't be reached for long; WriteError.
        """
        if cache.only is not None:  # a pinned run takes no new scores
            return cache.select_teacher(self._config.scored_by).fingerprint
        self._teacher = self._teacher or self._recorded()
        if self._teacher and not self._missing(cache, rollout_ids, self._teacher):
            return self._teacher.fingerprint
        patience = Patience()
        while True:  # what a try has brought there and back stays
            try:
                return self._try(cache, rollout_ids)
            except (_Final, CorruptError):
                raise
            except (CacheError, WriteError) as error:
                if not self._reached:  # an address that is wrong, and no outage
                    raise
                pause = patience.failed(error)
                _say(f"{error}; trying again in {pause:.0f} s")
                time.sleep(pause)

    def _try(self, cache: Cache, ids: Sequence[str]) -> str:
        store = self._opened(cache)
        if store is not cache:
            self._push(cache, ids)
        asked = WaitingNote(rollouts=tuple(ids)[:MAX_WAITING], beat_s=presence.BEAT_S)
        with Presence(self._board, "waiting", asked.model_dump_json().encode()) as me:
            rows = sum(cache.manifest(id_).rows for id_ in ids)
            with progress("waiting for scores", rows, "rollouts") as bar:
                teacher = self._wait(store, ids, rows, me, bar)
        write_file(self._record_path, (teacher.model_dump_json(indent=2) + "\n").encode())
        if store is not cache:
            self._pull(store, cache, ids, teacher)
        return teacher.fingerprint

    # ----------------------------------------------------------------------------------------------------- waiting

    def _wait(self, store: Cache, ids: Sequence[str], total: int, me: Presence, bar: Bar) -> TeacherInfo:
        """Returns once every row has scores there: whose they are."""
        patience, pause, seen, said = Patience(), FIRST_POLL_S, time.monotonic(), 0.0
        timeout = self._config.scorer_timeout
        while True:
            try:
                alive, fitting, left = self._look(store, ids, total, me)
                patience.worked()
                self._reached = True
            except (_Final, CorruptError):
                raise
            except (CacheError, WriteError) as error:
                pause, seen = patience.failed(_Final(str(error))), time.monotonic()
                _say(f"{error}; trying again in {pause:.0f} s")
                time.sleep(pause)
                continue
            bar.note(f"{len(fitting)} scorer{'s' if len(fitting) != 1 else ''}")
            bar.advance(total - left - bar.done)
            if not left and self._teacher:
                return self._teacher
            now = time.monotonic()
            if fitting:
                seen, said = now, 0.0
            alone = now - seen
            if timeout and alone >= timeout:
                raise _Final(self._nobody(alive, left, alone) + "; then run this again to go on")
            if alone >= NOBODY_S and (not said or now - said >= REPEAT_S):
                said = now
                _say(self._nobody(alive, left, alone))
            time.sleep(pause)
            pause = min(pause * 1.5, LAST_POLL_S)

    def _look(
        self, store: Cache, ids: Sequence[str], total: int, me: Presence
    ) -> tuple[dict[str, ScorerNote], dict[str, ScorerNote], int]:
        """Who is scoring there, who of them can help, and how many rows lack scores. Raises _Final for a refusal."""
        store.refresh()
        alive = self._scorers.look(me.now())
        if self._teacher is None:
            self._teacher = self._choose(store, ids, alive)
        if self._teacher is None:
            return alive, {}, total
        left = sum(stop - start for _, start, stop in self._missing(store, ids, self._teacher))
        fitting = self._fitting(store, ids, alive)
        if left and (refusal := self._refusal(ids, fitting, self._teacher)):
            raise _Final(refusal)
        return alive, fitting, left

    def _choose(self, store: Cache, ids: Sequence[str], alive: dict[str, ScorerNote]) -> TeacherInfo | None:
        """The one teacher that is scoring; where none is, the one that has scored all of these rollouts already."""
        teachers = {note.teacher.fingerprint: note for note in alive.values() if self._is_wanted(note.teacher)}
        ours = store.manifest(ids[0]).info.tokenizer
        if len(teachers) > 1:  # those of other runs, with another tokenizer, are no candidates
            teachers = {id_: note for id_, note in teachers.items() if note.tokenizer == ours.fingerprint} or teachers
        if len(teachers) > 1:
            raise _Final(
                f"{self._board.url}: more than one teacher is scoring: {_listed(teachers.values())}; choose one with "
                "--scored-by and the start of its fingerprint"
            )
        found = [note.teacher for note in teachers.values()]
        for note in teachers.values():
            if note.tokenizer != ours.fingerprint:
                raise _Final(
                    f"{self._board.url}: teacher {note.teacher.name}, which is scoring there, encodes differently from "
                    f"the tokenizer of these rollouts ({ours.name}); start one that shares it"
                )
        if not found:
            known = [teacher for teacher in store.teachers() if self._is_wanted(teacher)]
            found = [teacher for teacher in known if not self._missing(store, ids, teacher)]
        if len(found) != 1:
            return None
        teacher = found[0]
        _say(f"scores come from teacher {teacher.name} ({teacher.fingerprint[:12]}) at {self._board.url}")
        origin = Origin.of(self._config.student)
        if origin and (warning := origin.differs_from(teacher.name)):
            _say(f"warning: {self._config.student}: {warning}")
        return teacher

    def _is_wanted(self, teacher: TeacherInfo) -> bool:
        selector = self._config.scored_by
        return selector is None or teacher.name == selector or teacher.fingerprint.startswith(selector)

    def _fitting(self, store: Cache, ids: Sequence[str], alive: dict[str, ScorerNote]) -> dict[str, ScorerNote]:
        """The living scorers that can help: this teacher, and as many logits as the method needs."""
        vocab_size = store.manifest(ids[0]).info.tokenizer.vocab_size
        needed = min(self._config.top_needed, vocab_size)
        return {
            id_: note
            for id_, note in alive.items()
            if self._teacher and note.teacher.fingerprint == self._teacher.fingerprint and note.keep_top >= needed
        }

    def _refusal(self, ids: Sequence[str], fitting: dict[str, ScorerNote], teacher: TeacherInfo) -> str | None:
        """Why a living scorer can't score one of these rollouts segments."""
        digits, listed = teacher.fingerprint[:TEACHER_DIGITS], self._board.list("refused")
        for id_ in ids:
            if (name := f"{digits}-{id_}.json") in listed:
                note = parse(self._board.read(f"refused/{name}"), RefusalNote)
                if note and note.scorer in fitting:
                    return printable(f"{self._board.url}: the scorer passes these rollouts over: {note.message}")
        return None

    def _nobody(self, alive: dict[str, ScorerNote], left: int, seconds: float) -> str:
        name = self._teacher.name if self._teacher else self._config.scored_by or "…"
        top = f" --keep-top {self._config.top_needed}" if self._config.top_needed else ""
        others = f" (only {_listed(alive.values())})" if alive else ""
        return (
            f"nobody is scoring at {self._board.url} for {seconds:.0f} s{others}, and {left:,} rollouts wait; start "
            f"`ketchup-cache score --watch {self._board.url} --teacher {name}{top}`"
        )

    # ---------------------------------------------------------------------------------------------------- segments

    def _missing(self, cache: Cache, ids: Sequence[str], teacher: TeacherInfo) -> list[tuple[str, int, int]]:
        found, wanted = cache.unscored(teacher.fingerprint, keep_top=self._config.top_needed), set(ids)
        return [part for part in found if part[0] in wanted]

    def _opened(self, cache: Cache) -> Cache:
        """What the scorers watch: the cache itself, or another one, made where there is none."""
        if self._config.scorer == IN_CACHE:
            return cache
        if self._store is None:
            self._store = open_cache(self._address, create=True)
        return self._store

    def _push(self, cache: Cache, ids: Sequence[str]) -> None:
        infos = [cache.manifest(id_).info for id_ in ids]
        prompts = [info.prompts for info in infos if isinstance(info, RolloutsInfo)]
        _copy(cache.address, self._address, [*dict.fromkeys(prompts), *ids])

    def _pull(self, store: Cache, cache: Cache, ids: Sequence[str], teacher: TeacherInfo) -> None:
        refs = store.scored(teacher.fingerprint, keep_top=self._config.top_needed)
        wanted = set(ids)
        _copy(self._address, cache.address, list(dict.fromkeys(r.scores_id for r in refs if r.rollouts_id in wanted)))
        cache.refresh()
        if self._missing(cache, ids, teacher):
            raise CorruptError(f"{cache.address}: lacks scores that {self._board.url} has; run `verify` on both")

    @property
    def _record_path(self) -> Path:
        return self._config.out / "teacher.json"

    def _recorded(self) -> TeacherInfo | None:
        """The teacher of this run, where it was killed and goes on."""
        if not self._record_path.exists():
            return None
        try:
            teacher = TeacherInfo.model_validate(json.loads(self._record_path.read_text(encoding="utf-8")))
            return teacher if self._is_wanted(teacher) else None
        except (OSError, ValueError, ValidationError) as error:
            problem = " ".join(str(error).split())[:200]
            raise ConfigError([f"{self._record_path}: can't be read ({problem}); choose another --out"]) from None


class _Final(CacheError):
    """Raised for what waiting does not mend."""


def _copy(source: str | Path, target: str | Path, ids: Sequence[str]) -> None:
    """Segments that the target lacks, in this order, each byte checked."""
    giver, taker = open_remote(source), open_remote(target)
    there = set(taker.segment_ids())
    for id_ in ids:
        if id_ not in there:
            manifest, data = read_manifest(giver, id_)
            taker.put([read_segment(giver, id_, manifest, data)])


def _listed(notes: Iterable[ScorerNote]) -> str:
    names = {f"{n.teacher.name} ({n.teacher.fingerprint[:12]}, keep-top {n.keep_top})" for n in notes}
    return ", ".join(sorted(names))


def _say(text: str) -> None:
    print(f"ketchup-cache: {printable(text)}", file=sys.stderr, flush=True)
