"""Score what is not scored yet: rollouts in, the teacher's Q-values out, one committed segment at a time."""

from __future__ import annotations

import functools
import gc
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ketchup_cache.cache.cache import Cache
from ketchup_cache.cache.index import ScoredRef
from ketchup_cache.cache.manifest import RolloutsInfo, ScoresInfo
from ketchup_cache.config.commands import EvaluateConfig, LearnConfig, ScoreConfig
from ketchup_cache.console import Bar, progress
from ketchup_cache.errors import MismatchError, ModelError, NumericsError
from ketchup_cache.models.fingerprint import require_same_encoding
from ketchup_cache.models.load import load_tokenizer
from ketchup_cache.models.memory import TokenBudget
from ketchup_cache.scoring.teacher import Teacher
from ketchup_cache.sharing.remote_cache import open_cache
from ketchup_cache.types import Ragged, Rollouts, Scores

COMMIT_TOKENS: int = ScoreConfig.model_fields["commit_tokens"].default

TOP_BYTES = 2**28
"""Most bytes of kept logits in a segment, so that it stays well below the format's limit and fits into memory."""
TOP_ITEM_BYTES = 8
"""Of one kept logit with its id, at most."""


@dataclass(frozen=True)
class ScoreReport:
    """What one run did. Rows are rollouts, tokens are completion tokens."""

    teacher: str
    """Name and start of the fingerprint."""
    already: int
    """Rows that had scores before."""
    computed: int = 0
    """Rows that went through the teacher."""
    tokens: int = 0
    """Their tokens."""
    copied: int = 0
    """Rows whose scores were there for the same prompt and completion, from earlier or in this run."""
    segments: int = 0
    """Segments written."""
    batch_tokens: int | None = None
    """Largest batch, in tokens, that was used in the end; None where the teacher had nothing to compute."""
    seconds: float = 0.0
    """From start to end, loading included."""

    @property
    def hit_rate(self) -> float:
        """Share of this run's rows that did not need the teacher, in [0, 1]."""
        return self.copied / max(self.copied + self.computed, 1)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"hit_rate": self.hit_rate, "tokens_per_second": self.tokens_per_second}

    def __str__(self) -> str:
        if not self.computed + self.copied:
            return f"nothing to do: all {self.already:,} rollouts are scored by teacher {self.teacher}"
        batches = f", in batches of up to {self.batch_tokens:,} tokens" if self.batch_tokens else ""
        return (
            f"scored {self.computed:,} rollouts ({self.tokens:,} tokens, {self.tokens_per_second:,.0f}/s) by teacher "
            f"{self.teacher}, copied {self.copied:,} (hit rate {self.hit_rate:.0%}), {self.already:,} were there; "
            f"{self.segments} segments in {self.seconds:.1f} s{batches}"
        )


def score(config: ScoreConfig) -> ScoreReport:
    """Score every rollout in the cache that this teacher has not scored. Killed and run again, it goes on where it was.

    Raises CacheError, ModelError, MismatchError (tokenizers), NumericsError, WriteError.
    """
    assert config.cache is not None
    cache = open_cache(config.cache)
    return Scorer(config, config.teacher, commit_tokens=config.commit_tokens).ensure(cache)


class Scorer:
    """A teacher by name. Its files say at once who it is; its weights are in memory only while they compute.

    info, tokenizer: what its scores are filed under.
    """

    def __init__(
        self, config: ScoreConfig | LearnConfig | EvaluateConfig, teacher: str, *, commit_tokens: int = COMMIT_TOKENS
    ) -> None:
        """Raises ModelError where the teacher's files are missing or damaged."""
        self._config, self._name, self._commit_tokens = config, teacher, commit_tokens
        self._known: _KnownScores | None = None
        self._budget = TokenBudget(config.batch_tokens)
        self._resident: Teacher | None = None
        wanted = config.keep_top if isinstance(config, ScoreConfig) else getattr(config, "top_needed", 0)
        self.info, self.tokenizer = Teacher.identify(
            teacher, dtype=config.dtype, trust_remote_code=config.trust_remote_code
        )
        self.keep_top = min(wanted, self.tokenizer.vocab_size)
        if self.keep_top:
            fitting = TOP_BYTES // (self.keep_top * TOP_ITEM_BYTES)
            self._commit_tokens = max(1, min(self._commit_tokens, fitting))

    def ensure(self, cache: Cache, rollout_ids: Sequence[str] | None = None) -> ScoreReport:
        """Score every row of these rollouts segments (None: of the whole cache) that has no scores by this teacher.

        Raises MismatchError, before any weights are loaded, where the rollouts were written with another tokenizer;
        CacheError for an unknown id; ModelError, NumericsError and WriteError. What was committed before stays.
        """
        began = time.monotonic()
        ids = {i for i, _ in cache.rollouts()} if rollout_ids is None else set(rollout_ids)
        rows = sum(cache.manifest(rollouts_id).rows for rollouts_id in ids)
        missing = [part for part in cache.unscored(self.info.fingerprint, keep_top=self.keep_top) if part[0] in ids]
        for rollouts_id, _, _ in missing:
            self._check_tokenizer(cache, rollouts_id)
        already = rows - sum(stop - start for _, start, stop in missing)
        report = ScoreReport(f"{self.info.name} ({self.info.fingerprint[:12]})", already)
        if missing:
            report = self._score_missing(cache, missing, report)
        return replace(report, seconds=time.monotonic() - began)

    def stay(self) -> None:
        """Load the teacher now, and keep it in memory. Raises ModelError."""
        self._resident = self._load()

    def ranges(self, cache: Cache, rollouts_id: str, start: int, stop: int) -> Iterator[range]:
        """Rows start..stop of a rollouts segment in the ranges that are committed one by one."""
        manifest = cache.manifest(rollouts_id)
        if manifest.tokens <= self._commit_tokens:  # most are: no need to read them
            return iter([range(start, stop)])
        return commit_ranges(cache.load_rollouts(rollouts_id).completions, start, stop, self._commit_tokens)

    def score_range(self, cache: Cache, rollouts_id: str, rows: range, bar: Bar) -> tuple[int, int]:
        """Score and commit these rows, whether they have scores or not; returns how many rows and tokens the teacher
        computed. `bar.advance` may raise, to drop the work.

        Raises the errors of `ensure`, and `CorruptError` where the rollouts are damaged.
        """
        self._check_tokenizer(cache, rollouts_id)
        scores, computed, tokens = self._score_rows(
            cache, rollouts_id, rows, self._known_in(cache), functools.cache(self._load), bar
        )
        cache.commit_scores(scores, self._scores_info(rollouts_id, rows))
        return computed, tokens

    def _known_in(self, cache: Cache) -> _KnownScores:
        if self._known is None or self._known.cache is not cache:
            self._known = _KnownScores(cache, self.info.fingerprint, self.keep_top)
        return self._known

    def _score_missing(self, cache: Cache, missing: list[tuple[str, int, int]], report: ScoreReport) -> ScoreReport:
        known = self._known_in(cache)
        teacher = functools.cache(self._load)  # loaded at its first call, if there is one
        try:
            with progress("score", sum(_estimated_tokens(cache, *part) for part in missing)) as bar:
                for rollouts_id, start, stop in missing:
                    completions = cache.load_rollouts(rollouts_id).completions
                    for rows in commit_ranges(completions, start, stop, self._commit_tokens):
                        scores, computed, tokens = self._score_rows(cache, rollouts_id, rows, known, teacher, bar)
                        cache.commit_scores(scores, self._scores_info(rollouts_id, rows))
                        report = replace(
                            report,
                            computed=report.computed + computed,
                            tokens=report.tokens + tokens,
                            copied=report.copied + len(rows) - computed,
                            segments=report.segments + 1,
                            batch_tokens=self._budget.tokens if report.computed + computed else None,
                        )
        finally:
            if teacher.cache_info().currsize and self._resident is None:  # a loaded one has reference cycles
                del teacher
                gc.collect()
                torch.cuda.empty_cache()
        return report

    def _score_rows(
        self,
        cache: Cache,
        rollouts_id: str,
        rows: range,
        known: _KnownScores,
        teacher: Callable[[], Teacher],
        bar: Bar,
    ) -> tuple[Scores, int, int]:
        """Scores of a range of rows, and how many rows and tokens of it the teacher computed."""
        rollouts, prompts = _load(cache, rollouts_id)
        keys = _keys(prompts, rollouts, rows)
        known.update()
        found = known.find(keys)
        # the first row of each key that is not known
        new = {key: row for row, key in reversed(list(zip(rows, keys, strict=True))) if key not in found}
        computed_tokens = 0
        if new:
            places = np.sort(np.fromiter(new.values(), np.int64))
            try:
                scores = teacher().score(
                    prompts,
                    rollouts,
                    rows=places,
                    batch_tokens=self._budget,
                    keep_top=self.keep_top,
                    on_batch=bar.advance,
                )
            except (MismatchError, NumericsError) as error:
                raise type(error)(f"{cache.address}, rollouts {rollouts_id[:12]}: {error}") from None
            computed_tokens = len(scores.q)
            completions = rollouts.completions.take(places)
            found |= {keys[row - rows.start]: scores.rows(completions, i, i + 1) for i, row in enumerate(places)}
        bar.advance(int(rollouts.completions.lengths[rows.start : rows.stop].sum()) - computed_tokens)
        return Scores.concatenate([found[key] for key in keys]), len(new), computed_tokens

    def _scores_info(self, rollouts_id: str, rows: range) -> ScoresInfo:
        return ScoresInfo(
            rollouts=rollouts_id,
            row_start=rows.start,
            row_stop=rows.stop,
            teacher=self.info,
            tokenizer=self.tokenizer,
            keep_top=self.keep_top,
        )

    def _load(self) -> Teacher:
        return self._resident or Teacher.load(
            self._name,
            dtype=self._config.dtype,
            device=self._config.device,
            device_map=self._config.device_map,
            trust_remote_code=self._config.trust_remote_code,
        )

    def _check_tokenizer(self, cache: Cache, rollouts_id: str) -> None:
        theirs = cache.manifest(rollouts_id).info.tokenizer

        def load(name: str) -> PreTrainedTokenizerBase:
            if name == theirs.name and not Path(name).is_dir():
                raise ModelError(f"{name}: is not here, and names in a cache are not downloaded")
            return load_tokenizer(name, trust_remote_code=self._config.trust_remote_code)

        who = f"tokenizer {theirs.name} wrote them, but that of teacher {self.info.name} encodes differently"
        what, todo = (
            f"{cache.address}, rollouts {rollouts_id[:12]}: {who}",
            "score with a teacher that shares the tokenizer",
        )
        require_same_encoding(self.tokenizer, theirs, what, todo, load)


def _estimated_tokens(cache: Cache, rollouts_id: str, start: int, stop: int) -> int:
    manifest = cache.manifest(rollouts_id)
    return manifest.tokens * (stop - start) // manifest.rows


def commit_ranges(completions: Ragged, start: int, stop: int, tokens: int) -> Iterator[range]:
    """Rows start..stop in contiguous ranges of at most so many completion tokens; a single row may have more."""
    offsets = completions.offsets
    while start < stop:
        fits = int(np.searchsorted(offsets, offsets[start] + tokens, side="right")) - 1
        end = min(max(fits, start + 1), stop)
        yield range(start, end)
        start = end


class _KnownScores:
    """Where a cache has this teacher's scores of a rollout, whichever policy and run the rollout came from."""

    def __init__(self, cache: Cache, fingerprint: str, keep_top: int) -> None:
        self.cache = cache
        self._fingerprint, self._keep_top = fingerprint, keep_top
        self._seen: set[ScoredRef] = set()
        self._places: dict[bytes, tuple[ScoredRef, int]] = {}

    def update(self) -> None:
        """Learn of the scores that were committed since the last time."""
        if all(teacher.fingerprint != self._fingerprint for teacher in self.cache.teachers()):
            return
        for ref in self.cache.scored(self._fingerprint, keep_top=self._keep_top):
            if ref not in self._seen:
                rollouts, prompts = _load(self.cache, ref.rollouts_id)
                for place, key in enumerate(_keys(prompts, rollouts, range(ref.row_start, ref.row_stop))):
                    self._places.setdefault(key, (ref, place))
                self._seen.add(ref)

    def find(self, keys: Iterable[bytes]) -> dict[bytes, Scores]:
        """The scores of the keys that have some, each of one row."""
        places: dict[ScoredRef, dict[bytes, int]] = {}
        for key in keys:
            if key in self._places:
                ref, place = self._places[key]
                places.setdefault(ref, {})[key] = place
        found: dict[bytes, Scores] = {}
        for ref, wanted in places.items():
            part = self.cache.load_scored(ref)
            scores = part.scores.with_top(self._keep_top)
            found |= {key: scores.rows(part.rollouts.completions, place, place + 1) for key, place in wanted.items()}
        return found


def _load(cache: Cache, rollouts_id: str) -> tuple[Rollouts, Ragged]:
    """Rollouts and the tokens of their prompts. The cache keeps the last ones it loaded."""
    info = cache.manifest(rollouts_id).info
    assert isinstance(info, RolloutsInfo)
    return cache.load_rollouts(rollouts_id), cache.load_prompts(info.prompts).tokens


def _keys(prompts: Ragged, rollouts: Rollouts, rows: range) -> list[bytes]:
    """What the scores of each row depend on, beside the teacher: prompt, completion, and whether it finished."""
    keys = []
    for row in rows:
        prompt = prompts[rollouts.prompt_index[row]]
        key = hashlib.blake2b(len(prompt).to_bytes(8, "little"), digest_size=16)
        key.update(prompt.tobytes())
        key.update(rollouts.completions[row].tobytes())
        key.update(b"finished" if rollouts.finished[row] else b"unfinished")
        keys.append(key.digest())
    return keys
