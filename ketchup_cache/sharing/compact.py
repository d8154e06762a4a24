"""Rewrite a cache into another one: in float16, and with the scores of many small segments in a few large ones.

Nothing in a cache ever changes, so the result is a cache of its own. Prompts are copied as they are; each rollouts
segment becomes one that names its original; the scores of each are merged, every row once. What is in the target
already is left out, so a killed run goes on where it was, and a later one brings over what has been added since.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

import numpy as np

from ketchup_cache.cache import disk as durable
from ketchup_cache.cache import index as coverage
from ketchup_cache.cache import segment_bytes as reading
from ketchup_cache.cache.cache import Cache, open_cache
from ketchup_cache.cache.index import ScoredRef
from ketchup_cache.cache.manifest import Manifest, RolloutsInfo, ScoresInfo, Storage
from ketchup_cache.config.caches import CompactConfig
from ketchup_cache.console import Bar, progress
from ketchup_cache.errors import ConfigError, CorruptError
from ketchup_cache.types import Scores

Run = list[ScoredRef]
"""Rows that lie side by side, and become one segment."""
_TIME = "%Y-%m-%dT%H:%M:%S.%fZ"


@dataclass(frozen=True)
class CompactReport:
    """What one run did."""

    cache: str
    into: str
    segments: int = 0
    """Written, copies included."""
    rows: int = 0
    """Scored rollouts written."""
    tokens: int = 0
    """Their tokens."""
    bytes_before: int = 0
    """Of the whole cache, manifests included; also of the target."""
    bytes_after: int = 0
    errors: dict[str, float] = field(default_factory=dict)
    """Largest difference between what was read and what was written, by array; gap is max_q − q. In logits or nats."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        if not self.segments:
            return f"nothing to do: {self.into} has all segments of {self.cache}"
        wrong = ", ".join(f"{name} {error:.2g}" for name, error in self.errors.items() if error)
        return (
            f"{self.segments:,} segments into {self.into}: {self.rows:,} scored rollouts ({self.tokens:,} tokens); "
            f"{self.bytes_before / 1e6:,.1f} MB are now {self.bytes_after / 1e6:,.1f} MB"
            + (f"; largest error: {wrong}" if wrong else "")
        )


def compact(config: CompactConfig) -> CompactReport:
    """Rewrite one cache into another. Killed and run again, it goes on where it was.

    Raises ConfigError where both are the same folder, CacheError (CorruptError) where the source is not whole,
    NumericsError where a number is too large for float16, WriteError.
    """
    source = open_cache(config.cache)
    if config.into.resolve() == config.cache.resolve():
        raise ConfigError([f"into: {config.into} is the cache itself; give a new folder"])
    target = open_cache(config.into, create=True)
    report = CompactReport(str(source.path), str(target.path))
    manifests, there = dict(source.manifests()), dict(target.manifests())
    held = {coverage.original_id(id_, info): id_ for id_, info in coverage.rollouts(there)}
    done, todo = _by_rows(there), _by_rows(manifests)
    for prompts_id, manifest in manifests.items():
        if manifest.kind == "prompts":
            report = _copy(source, prompts_id, manifest, target, report)
    rollouts = coverage.rollouts(manifests)
    with progress("compact", sum(manifests[id_].tokens for id_, _ in rollouts)) as bar:
        for rollouts_id, info in rollouts:
            original = coverage.original_id(rollouts_id, info)
            if original not in held:
                report, held[original] = _rollouts(
                    source, rollouts_id, manifests[rollouts_id], target, config.storage, report
                )
            missing = _missing(todo.get(original, []), done.get(original, []))
            report = _scores(source, missing, target, held[original], config, report, bar)
    return replace(report, bytes_before=_size(source), bytes_after=_size(target))


def _by_rows(manifests: dict[str, Manifest]) -> dict[str, list[ScoredRef]]:
    """What is scored in a cache, by the original of the rollouts: every row once, from where most logits are kept."""
    found: dict[str, list[ScoredRef]] = {}
    kept = {m.info.keep_top for m in manifests.values() if isinstance(m.info, ScoresInfo)}
    for keep_top in sorted(kept, reverse=True):
        for ref in coverage.scored(manifests, keep_top=keep_top):
            info = manifests[ref.rollouts_id].info
            assert isinstance(info, RolloutsInfo)
            own = found.setdefault(coverage.original_id(ref.rollouts_id, info), [])
            own += _missing([ref], own)
    return found


def _copy(source: Cache, segment_id: str, manifest: Manifest, target: Cache, report: CompactReport) -> CompactReport:
    if segment_id in reading.segment_ids(target.path):
        return report
    durable.publish(target.path, segment_id, *reading.copy_of(source.path, segment_id, manifest))
    return replace(report, segments=report.segments + 1)


def _rollouts(
    source: Cache, rollouts_id: str, manifest: Manifest, target: Cache, storage: Storage, report: CompactReport
) -> tuple[CompactReport, str]:
    """Bring over a rollouts segment; returns its id in the target."""
    info = manifest.info
    assert isinstance(info, RolloutsInfo)
    if storage == "lossless" or info.storage == "compact":
        return _copy(source, rollouts_id, manifest, target, report), rollouts_id
    rollouts = source.load_rollouts(rollouts_id)
    info = info.model_copy(update={"storage": "compact", "original": rollouts_id})
    new_id = target.commit_rollouts(rollouts, info, _after([manifest]))
    written = target.load_rollouts(new_id)
    error = _largest(rollouts.behavior_logprob, written.behavior_logprob)
    return _with_errors(replace(report, segments=report.segments + 1), {"behavior_logprob": error}), new_id


def _scores(
    source: Cache,
    missing: list[ScoredRef],
    target: Cache,
    rollouts_id: str,
    config: CompactConfig,
    report: CompactReport,
    bar: Bar,
) -> CompactReport:
    """Bring over scores of one rollouts segment, which has this id in the target."""
    if not missing:
        return report
    offsets = target.load_rollouts(rollouts_id).completions.offsets
    for run in _runs(missing, source, offsets, config.segment_tokens):
        scores = Scores.concatenate([source.load_scored(ref).scores for ref in run])
        parents = [source.manifest(ref.scores_id) for ref in run]
        info = parents[0].info
        assert isinstance(info, ScoresInfo)
        storage: Storage = "compact" if "compact" in (config.storage, info.storage) else "lossless"
        rows = {"row_start": run[0].row_start, "row_stop": run[-1].row_stop}
        new = info.model_copy(update={"rollouts": rollouts_id, "storage": storage, **rows})
        written = target.load_scores(target.commit_scores(scores, new, _after(parents)))
        errors = {name: _largest(value, getattr(written, name)) for name, value in scores.per_token().items()}
        errors["gap"] = _largest(scores.max_q - scores.q, written.max_q - written.q)
        report = _with_errors(report, errors)
        report = replace(
            report,
            segments=report.segments + 1,
            rows=report.rows + len(scores.final_max_q),
            tokens=report.tokens + len(scores.q),
        )
        bar.advance(len(scores.q))
    return report


def _missing(refs: list[ScoredRef], done: list[ScoredRef]) -> list[ScoredRef]:
    """The parts of some scored rows that are not done yet with as many logits kept, by teacher and place."""
    parts = []
    for ref in refs:
        same = [d for d in done if d.teacher.fingerprint == ref.teacher.fingerprint and d.keep_top >= ref.keep_top]
        covered = [(d.row_start, d.row_stop) for d in same]
        parts += [
            replace(ref, row_start=start, row_stop=stop)
            for start, stop in coverage.gaps(ref.row_start, ref.row_stop, covered)
        ]
    return sorted(parts, key=lambda ref: (ref.teacher.fingerprint, ref.row_start))


def _runs(refs: list[ScoredRef], source: Cache, offsets: np.ndarray, tokens: int) -> Iterator[Run]:
    """Neighbours of the same origin in one run, of at most so many tokens; a single part may have more."""
    run: Run = []
    for ref in refs:
        joins = run and run[-1].row_stop == ref.row_start and _origin(source, run[0]) == _origin(source, ref)
        if run and not (joins and offsets[ref.row_stop] - offsets[run[0].row_start] <= tokens):
            yield run
            run = []
        run.append(ref)
    if run:
        yield run


def _origin(cache: Cache, ref: ScoredRef) -> tuple[Any, ...]:
    """All that a scores segment says about itself beside its rows."""
    info = cache.manifest(ref.scores_id).info
    return tuple(sorted((key, repr(value)) for key, value in info if key not in ("row_start", "row_stop", "rollouts")))


def _after(manifests: list[Manifest]) -> str:
    """A moment after the last of these. So the same sources make the same segment, and they come before it."""
    last = max(manifests, key=lambda manifest: manifest.created)
    try:
        return (datetime.strptime(last.created, _TIME) + timedelta(microseconds=1)).strftime(_TIME)
    except (ValueError, OverflowError):
        raise CorruptError(f"a segment was created at {last.created[:40]!r}, which is not a time") from None


def _with_errors(report: CompactReport, errors: dict[str, float]) -> CompactReport:
    return replace(report, errors={**report.errors, **{n: max(e, report.errors.get(n, 0)) for n, e in errors.items()}})


def _largest(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max(initial=0))


def _size(cache: Cache) -> int:
    manifests = [manifest for _, manifest in cache.manifests()]
    return sum(len(m.to_bytes()) + sum(file.length for file in m.files.values()) for m in manifests)
