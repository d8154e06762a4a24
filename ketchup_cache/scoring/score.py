"""Score what is not scored yet: rollouts in, the teacher's Q-values out, one committed segment at a time."""

from __future__ import annotations

import gc
import hashlib
import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ketchup_cache.cache.cache import Cache
from ketchup_cache.cache.index import Range, ScoredRef, gaps, parent_id
from ketchup_cache.cache.manifest import RolloutsInfo, ScoresInfo, Storage
from ketchup_cache.config.commands import ScoreConfig
from ketchup_cache.console import Bar, progress, say
from ketchup_cache.errors import (
    CacheError,
    CorruptError,
    MismatchError,
    ModelError,
    NumericsError,
    ServerError,
    WriteError,
)
from ketchup_cache.models.load import require_same_encoding
from ketchup_cache.models.memory import TokenBudget
from ketchup_cache.parallel.group import Group, alone, group
from ketchup_cache.parallel.pool import on_ray
from ketchup_cache.provenance import OTHER_TOKENIZER, TeacherInfo
from ketchup_cache.scoring.report import ScoreReport
from ketchup_cache.scoring.served import ServedTeacher
from ketchup_cache.scoring.teacher import Teacher
from ketchup_cache.sharing.remote_cache import open_cache
from ketchup_cache.types import Ragged, Rollouts, Scores, concatenated

LONGEST_PAUSE_S = 60.0
"""Between two tries in an outage."""
TOP_BYTES = 2**28
"""Most bytes of kept logits in a segment, so that it stays well below the format's limit and fits into memory."""
TOP_ITEM_BYTES = 8
"""Of one kept logit with its id, at most."""


def score(config: ScoreConfig) -> ScoreReport:
    """Score every rollout in the cache that this teacher has not scored. Killed and run again, it goes on where it was.

    Raises CacheError, ModelError, MismatchError (tokenizers), NumericsError, ServerError, WriteError.
    """
    cache, scorer = opened(config)
    if config.follow:
        with alone():  # several processes follow one place, as several commands would
            return follow(cache, scorer)
    return scorer.ensure(cache, shared=True)


def opened(config: ScoreConfig) -> tuple[Cache, Scorer]:
    """What the options name. Raises what `open_cache` and `Scorer` raise."""
    cache = open_cache(config.cache, create=config.follow)
    return cache, Scorer(config if config.teacher else config.model_copy(update={"teacher": _tokenizer_of(cache)}))


def follow(cache: Cache, scorer: Scorer) -> ScoreReport:
    """`score --follow`: score what lacks scores, look again every `--poll` seconds, until Ctrl-C or `--until-idle`.

    Any number of these may work at one place. They do not talk to each other: each takes a segment at random, and the
    format allows a row to be scored twice. Rollouts that this teacher can't score are said once and passed over. An
    outage of the place is retried with growing pauses. Raises ModelError where the teacher can't be loaded.
    """
    began, config = time.monotonic(), scorer.config
    scorer.stay()
    idle_since, pause, passed_over = time.monotonic(), config.poll, set[str]()
    done = ScoreReport(str(scorer), 0)
    say(f"teacher {scorer} is loaded; scoring what appears in {cache.address} until Ctrl-C")
    with suppress(KeyboardInterrupt):
        while not config.until_idle or time.monotonic() - idle_since < config.until_idle:
            try:
                cache.refresh()
                if waiting := sorted({id_ for id_, _, _ in scorer.unscored(cache)} - passed_over):
                    chosen, pause = random.choice(waiting), 0.0
                    try:
                        done = done.plus(scorer.ensure(cache, [chosen], shared=True))
                    except (MismatchError, NumericsError, ModelError, CorruptError) as error:
                        passed_over.add(chosen)
                        say(f"passed over: {error}")
                    idle_since = time.monotonic()
                else:
                    pause = config.poll
            except (CacheError, WriteError, ServerError) as error:
                pause, idle_since = min(2 * max(pause, config.poll), LONGEST_PAUSE_S), time.monotonic()
                say(f"{error}; trying again in {pause:.0f} s")
            time.sleep(pause)
    return replace(done, seconds=time.monotonic() - began)


class Scorer:
    """A teacher by name. Its files say at once who it is; its weights are in memory only while they compute, or where
    they are small beside what is free. One behind a server says so itself, and is tested first.

    info, tokenizer: what its scores are filed under. keep_top: how many of the largest logits they keep.
    """

    def __init__(self, config: ScoreConfig) -> None:
        """Raises ModelError where the teacher's files are missing or damaged; what `ServedTeacher` raises."""
        self.config, self._budget = config, TokenBudget(config.batch_tokens)
        storage: Storage = "compact" if config.storage == "float16" else "lossless"
        self._cache: Cache | None = None
        self._teacher: Teacher | ServedTeacher | None = None
        self._stays, self._load_s = bool(config.teacher_url), 0.0
        self._own, self._random = set[str](), random.Random()
        if config.teacher_url:
            self._teacher = ServedTeacher(config)
            self.info, self.tokenizer = self._teacher.info, self._teacher.tokenizer
        else:
            self.info, self.tokenizer = Teacher.identify(config.teacher, config)
        self.keep_top = min(config.keep_top, self.tokenizer.vocab_size)
        fitting = TOP_BYTES // (self.keep_top * TOP_ITEM_BYTES) if self.keep_top else config.commit_tokens
        self._commit_tokens = max(1, min(config.commit_tokens, fitting))
        self._made = {"tokenizer": self.tokenizer, "keep_top": self.keep_top, "storage": storage}

    def __str__(self) -> str:
        return f"{self.info.name} ({self.info.fingerprint[:12]})"

    def described(self, rollouts_id: str, start: int, stop: int) -> ScoresInfo:
        """How its scores of these rows are described."""
        return ScoresInfo(rollouts=rollouts_id, row_start=start, row_stop=stop, teacher=self.info, **self._made)

    def stay(self) -> None:
        """Load the teacher now, and keep it in memory. Raises ModelError."""
        self._stays = self._loaded() is not None

    def unscored(self, cache: Cache) -> list[tuple[str, int, int]]:
        """(rollouts id, row_start, row_stop) of all rows without scores by this teacher; with --shard, of its part.

        Raises MismatchError where another model behind a server has scored under its name.
        """
        if self.info.served:
            known = cache.index.models("teacher")
            self.info = self.info.known_in(known).alone_in(known)
        waiting = cache.unscored(self.info.fingerprint, keep_top=self.keep_top)
        own = ((id_, r) for id_, a, b in waiting for r in _still([(id_, a, b)], id_, self._own_rows(cache, id_)))
        return [(id_, r.start, r.stop) for id_, r in own]

    def _own_rows(self, cache: Cache, rollouts_id: str) -> range:
        """Of a rollouts segment, the rows of `--shard`, with all samples of a prompt."""
        manifest = cache.entry(rollouts_id)
        assert isinstance(manifest.info, RolloutsInfo)
        part = self.config.part_of(-(-manifest.rows // (samples := manifest.info.sampling.samples)))
        return range(part.start * samples, min(part.stop * samples, manifest.rows))

    def ensure(self, cache: Cache, rollout_ids: Iterable[str] | None = None, *, shared: bool = False) -> ScoreReport:
        """Score every row of these rollouts segments (None: of the whole cache) that has no scores by this teacher.

        shared: look before each part whether others have scored it meanwhile (`_turns`).
        Raises MismatchError, before any weights are loaded, where the rollouts were written with another tokenizer;
        CacheError for an unknown id; ModelError, NumericsError, ServerError and WriteError. What was committed before
        stays, and of a server all that it has answered.

        Of several processes each scores and commits parts of its own, and what is left in the end they share row by
        row: the segments are those of a single process.
        """
        began, loaded_s, by, before = time.monotonic(), self._load_s, group(), set(self._own)
        cache.agree()
        ids = {i for i, _ in cache.rollouts()} if rollout_ids is None else set(rollout_ids)
        rows = sum(len(self._own_rows(cache, rollouts_id)) for rollouts_id in ids)
        missing = [part for part in self.unscored(cache) if part[0] in ids]
        for rollouts_id, _, _ in missing:
            theirs, trust = cache.entry(rollouts_id).info.tokenizer, self.config.trust_remote_code
            what = f"{cache.address}, rollouts {rollouts_id[:12]}: tokenizer {theirs.name} wrote them"
            what += f", but that of teacher {self.info.name} encodes differently"
            require_same_encoding(self.tokenizer, theirs, what, OTHER_TOKENIZER, trust_remote_code=trust)
        report = ScoreReport(str(self), rows - sum(stop - start for _, start, stop in missing))
        parents = [cache.entry(rollouts_id) for rollouts_id, _, _ in missing]
        total = sum(m.tokens * (b - a) // m.rows for m, (_, a, b) in zip(parents, missing, strict=True))
        with self._unloaded_after(), progress("score", total, workers=by.size) as bar:
            if missing and self.config.engine == "ray":
                make = partial(_worker, self.config, self.info)
                for (id_, part), done in on_ray(self.config, make, self.parts(cache, missing)):
                    bar.advance(int(cache.load_rollouts(id_).completions.lengths[part.start : part.stop].sum()))
                    report = report.plus(done)
                missing = []
            for (rollouts_id, part), whose in self._dealt(cache, missing, shared):
                report = report.plus(self._score_rows(cache, rollouts_id, part, bar, shared, whose))
        cache.agree(self._own - before)
        names = ("computed", "tokens", "copied", "segments")
        totals = by.summed(np.array([getattr(report, name) for name in names], np.int64))
        counts: Any = dict(zip(names, totals.tolist(), strict=True))
        return replace(report, **counts, seconds=time.monotonic() - began, load_s=self._load_s - loaded_s)

    def _dealt(self, cache: Cache, missing: Iterable[Range], shared: bool) -> Iterator[tuple[tuple[str, range], Group]]:
        """What this process commits, or helps to, and the group that computes it."""
        if (by := group()).size == 1:
            turns = self._turns if shared and not self.config.shard else self.parts  # nobody else does a shard's rows
            yield from ((part, by) for part in turns(cache, missing))
            return
        parts = list(self.parts(cache, missing))
        whole = len(parts) // by.size * by.size
        yield from ((part, Group()) for part in by.mine(parts[:whole]))
        yield from ((part, by) for part in parts[whole:])

    def parts(self, cache: Cache, missing: Iterable[Range]) -> Iterator[tuple[str, range]]:
        """What is committed together, in the order of the cache."""
        for rollouts_id, start, stop in missing:
            completions = cache.load_rollouts(rollouts_id).completions
            yield from ((rollouts_id, part) for part in completions.ranges(start, stop, self._commit_tokens))

    def _turns(self, cache: Cache, missing: Iterable[Range]) -> Iterator[tuple[str, range]]:
        """As `_parts`, as long as nobody else scores here. Otherwise each process goes on from a part of its own, and
        leaves out what is done by now. Nobody says what he is at, but it follows a part that is done: such a part is
        taken last, and only once its scorer had the time to end it. So without locks little is done twice.
        """
        parts, before, at, took, waited = list(self.parts(cache, missing)), set(cache.segment_ids()), 0, 0.0, False
        while True:
            cache.refresh()
            waiting = {id_: list(same) for id_, same in groupby(self.unscored(cache), itemgetter(0))}
            left = {i: rest for i, part in enumerate(parts) if (rest := _still(waiting.get(part[0], ()), *part))}
            if not left:
                return
            new = [m.info for id_, m in cache.manifests("scores") if id_ not in before | self._own]
            theirs = [i for i in new if isinstance(i, ScoresInfo) and i.teacher.fingerprint == self.info.fingerprint]
            met = _still([(i.rollouts, i.row_start, i.row_stop) for i in theirs], *parts[at])
            if not theirs:
                at = min(left)
            elif not met and (at in left or at + 1 in left):
                at = at if at in left else at + 1
            elif unlikely := [i for i in left if (i - 1) % len(parts) in left]:
                at = self._random.choice(unlikely)
            elif waited:
                at = self._random.choice(list(left))
            else:
                waited = True
                time.sleep(took * self._random.uniform(1, 4))
                continue
            began, waited = time.monotonic(), False
            yield parts[at][0], left[at][0]
            took = time.monotonic() - began

    def scores(self, prompts: Ragged, rollouts: Rollouts, keep_top: int = 0) -> Scores:
        """Of rollouts that are in no cache. Raises ModelError, MismatchError, NumericsError and ServerError."""
        by, rows = group(), np.arange(len(rollouts))
        rows = by.cut(rows, _sizes(prompts, rollouts, rows))
        with self._unloaded_after(), progress("score", len(rollouts.completions.values), workers=by.size) as bar:
            how: Any = {"batch_tokens": self._budget, "keep_top": keep_top, "on_batch": bar.advance}
            return Scores.concatenate(by.gathered(self._loaded().score(prompts, rollouts, rows=rows, **how)))

    @contextmanager
    def _unloaded_after(self) -> Iterator[None]:
        try:
            yield
        finally:
            if self._teacher is not None and not self._stays:  # a loaded one has reference cycles
                self._teacher = None
                gc.collect()
                torch.cuda.empty_cache()

    def _score_rows(
        self, cache: Cache, rollouts_id: str, rows: range, bar: Bar, shared: bool, by: Group
    ) -> ScoreReport:
        """Score and commit a range of rows. shared: unless somebody else has done so meanwhile. by: the processes that
        score it; the first of them commits it, and counts."""
        rollouts, prompts = load_with_prompts(cache, rollouts_id)
        keys = _keys(prompts, rollouts, rows)
        found = self._known(cache, keys) if by.first else {}
        # the first row of each key that is not known
        new = {key: row for row, key in reversed(list(zip(rows, keys, strict=True))) if key not in found}
        new = by.from_first(lambda: new)
        tokens, mine, failed = 0, 0, None
        if new:
            places = np.sort(np.fromiter(new.values(), np.int64))
            places = by.cut(places, _sizes(prompts, rollouts, places))
            how: dict[str, Any] = {"batch_tokens": self._budget, "keep_top": self.keep_top, "on_batch": bar.advance}
            try:
                scores = self._loaded().score(prompts, rollouts, rows=places, **how)
            except (MismatchError, NumericsError) as error:
                raise type(error)(f"{cache.address}, rollouts {rollouts_id[:12]}: {error}") from None
            except ServerError as error:
                failed, places, scores = error, places[error.places], error.done
            mine = len(scores.q)
            if not failed:
                places, scores = map(concatenated, zip(*by.gathered((places, scores)), strict=True))
            tokens = len(scores.q)
            completions = rollouts.completions.take(places)
            found |= {keys[row - rows.start]: scores.rows(completions, i, i + 1) for i, row in enumerate(places)}
        bar.advance(int(rollouts.completions.lengths[rows.start : rows.stop].sum()) // by.size - mine)
        missing = [(row, row + 1) for row, key in zip(rows, keys, strict=True) if key not in found]
        if shared:
            cache.refresh()
        commits = by.first or bool(failed)  # what a process has of a server is kept, whatever the others have
        if commits and (commits := not shared or bool(_still(self.unscored(cache), rollouts_id, rows))):
            for start, stop in gaps(rows.start, rows.stop, missing):
                done = Scores.concatenate([found[key] for key in keys[start - rows.start : stop - rows.start]])
                self._own.add(cache.commit_scores(done, self.described(rollouts_id, start, stop)))
        if failed:
            raise failed
        if not by.first:
            return ScoreReport(str(self), 0)
        copied, batch = len(rows) - len(new), self._budget.tokens if new and not self.info.served else None
        return ScoreReport(str(self), 0, len(new), tokens, copied, segments=int(commits), batch_tokens=batch)

    def _known(self, cache: Cache, keys: Iterable[bytes]) -> dict[bytes, Scores]:
        """The scores that a cache has of these rollouts by now, each of one row, whichever policy and run the rollout
        came from. Where scores are to be stored losslessly, compact ones do not count."""
        if self._cache is not cache:
            self._cache, self._seen, self._places = cache, set[ScoredRef](), dict[bytes, tuple[ScoredRef, int]]()
        for ref in cache.index.scored(self.info.fingerprint, keep_top=self.keep_top):
            info = cache.entry(ref.scores_id).info
            if (
                ref not in self._seen
                and isinstance(info, ScoresInfo)
                and info.storage in ("lossless", self._made["storage"])
            ):
                rollouts, prompts = load_with_prompts(cache, ref.rollouts_id)
                for place, key in enumerate(_keys(prompts, rollouts, range(ref.row_start, ref.row_stop))):
                    self._places.setdefault(key, (ref, place))
                self._seen.add(ref)
        places: dict[ScoredRef, dict[bytes, int]] = {}
        for key in self._places.keys() & set(keys):
            ref, place = self._places[key]
            places.setdefault(ref, {})[key] = place
        found: dict[bytes, Scores] = {}
        for ref, wanted in places.items():
            part = cache.load_scored(ref)
            scores = part.scores.with_top(self.keep_top)
            found |= {key: scores.rows(part.rollouts.completions, place, place + 1) for key, place in wanted.items()}
        return found

    def _loaded(self) -> Teacher | ServedTeacher:
        if self._teacher is None:
            began = time.monotonic()
            loaded = Teacher.load(self.config.teacher, self.config, (self.info, self.tokenizer))
            self._teacher, self._stays = loaded, self._stays or loaded.small
            self._load_s += time.monotonic() - began
        return self._teacher


def _worker(config: ScoreConfig, teacher: TeacherInfo) -> Callable[[tuple[str, range]], ScoreReport]:
    """On a cluster: holds the teacher, and scores what nobody has scored by now of each part."""
    cache, scorer = open_cache(config.cache), Scorer(config)
    if scorer.info.fingerprint != teacher.fingerprint and not scorer.info.answers_as(teacher):
        raise ModelError(f"{config.teacher}: is another model than where the command was started; copy it again")
    scorer.info = teacher
    scorer.stay()

    def work(part: tuple[str, range]) -> ScoreReport:
        cache.refresh()
        cache.await_shown(part[:1])
        left = _still(scorer.unscored(cache), *part)
        report, bar = ScoreReport(str(scorer), len(part[1]) - sum(map(len, left))), Bar("score", None, "tokens")
        for rows in left:
            report = report.plus(scorer._score_rows(cache, part[0], rows, bar, shared=True, by=Group()))
        return report

    return work


def _tokenizer_of(cache: Cache) -> str:
    """Folder of the tokenizer that wrote the rollouts. Raises CacheError where it is not here."""
    for name in {info.tokenizer.name: None for _, info in cache.rollouts()}:
        if Path(name).is_dir():
            return name
    raise CacheError(f"{cache.address}: the tokenizer of its rollouts is not here; give --teacher, where it is")


def _still(unscored: Iterable[Range], rollouts_id: str, rows: range) -> list[range]:
    """What of these rows has no scores yet."""
    same = (range(max(a, rows.start), min(b, rows.stop)) for id_, a, b in unscored if id_ == rollouts_id)
    return [some for some in same if some]


def load_with_prompts(cache: Cache, rollouts_id: str) -> tuple[Rollouts, Ragged]:
    """Rollouts and the tokens of their prompts. The cache keeps the last ones it loaded."""
    prompts_id = parent_id(cache.entry(rollouts_id).info)
    return cache.load_rollouts(rollouts_id), cache.load_prompts(prompts_id).tokens


def _sizes(prompts: Ragged, rollouts: Rollouts, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Tokens of each row with its prompt."""
    return prompts.lengths[rollouts.prompt_index[rows]] + rollouts.completions.lengths[rows]


def _keys(prompts: Ragged, rollouts: Rollouts, rows: range) -> list[bytes]:
    """What the scores of each row depend on, beside the teacher: prompt, completion, and whether it finished."""
    keys = []
    for row in rows:
        prompt, ending = prompts[rollouts.prompt_index[row]], b"finished" if rollouts.finished[row] else b"unfinished"
        parts = len(prompt).to_bytes(8, "little"), prompt.tobytes(), rollouts.completions[row].tobytes(), ending
        keys.append(hashlib.blake2b(b"".join(parts), digest_size=16).digest())
    return keys
