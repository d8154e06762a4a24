"""Segments from one cache to another: push, pull, merge, diff.

A cache is a set of immutable segments that only grows, so copying what is missing is merging: in any order, as often as
one likes, by any number of people at once. What a killed copy has committed is there; the rest is copied next time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ketchup_cache.cache import index as coverage
from ketchup_cache.cache.inspect import KINDS, data_bytes
from ketchup_cache.cache.manifest import Manifest, RolloutsInfo, ScoresInfo
from ketchup_cache.console import Bar, printable, progress, size_text
from ketchup_cache.sharing.base import Packed, Remote, in_parallel, read_manifest, read_segment
from ketchup_cache.sharing.stores import open_existing, open_remote

Segments = dict[str, tuple[Manifest, bytes]]
"""Id → manifest, and its bytes as stored; parents before their children."""


@dataclass(frozen=True)
class TransferReport:
    """What a copy moved; with `dry_run`, what it would move. `already`: segments that were there."""

    source: str
    target: str
    segments: dict[str, int]
    """By kind."""
    rows: int
    bytes: int
    already: int
    seconds: float
    dry_run: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        where = f"from {self.source} to {self.target}"
        if not any(self.segments.values()):
            return printable(f"nothing to copy {where}: all {self.already:,} segments are there")
        what = ", ".join(f"{count:,} {kind}" for kind, count in self.segments.items() if count)
        verb = "would copy" if self.dry_run else "copied"
        took = "" if self.dry_run else f" in {self.seconds:.1f} s"
        there = f"; {self.already:,} were there" if self.already else ""
        return printable(
            f"{verb} segments of {what} ({self.rows:,} rows, {size_text(self.bytes)}) {where}{took}{there}"
        )


@dataclass(frozen=True)
class MergeReport:
    parts: tuple[TransferReport, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"parts": [part.to_dict() for part in self.parts]}

    def __str__(self) -> str:
        return "\n".join(map(str, self.parts))


def copy(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dry_run: bool = False,
    license_id: str | None = None,
    only: Collection[str] | None = None,
) -> TransferReport:
    """Bring all segments of `source` that `target` lacks to it; make `target` where there is none.

    only: ids to copy, with their parents.

    Raises CacheError where the source is no cache, a parent is missing or an address can't be reached;
    CorruptError where bytes are not those a manifest promises (that segment is not committed, those before it are);
    WriteError.
    """
    giver, taker = open_existing(source), open_remote(target, license_id)
    began = time.monotonic()
    there = set(taker.segment_ids()) if taker.exists() else set()
    offered = giver.segment_ids() if only is None else _with_parents(giver, only)
    missing = in_order(_read(giver, [id_ for id_ in offered if id_ not in there]))
    _check_parents(missing, taker, there)
    total = sum(data_bytes(manifest) for manifest, _ in missing.values())
    if not dry_run:
        taker.create()
        with progress("copying", total, "bytes") as bar:
            for batch in _batches(giver, missing, taker.batch_bytes, bar):
                taker.put(batch)
    return TransferReport(
        source=giver.url,
        target=taker.url,
        segments={kind: sum(m.kind == kind for m, _ in missing.values()) for kind in KINDS},
        rows=sum(manifest.rows for manifest, _ in missing.values()),
        bytes=total,
        already=len(offered) - len(missing),
        seconds=round(time.monotonic() - began, 2),
        dry_run=dry_run,
    )


def merge(
    sources: Iterable[str | os.PathLike[str]], target: str | os.PathLike[str], *, dry_run: bool = False
) -> MergeReport:
    """Copy each source into the target, in turn. Raises the errors of `copy`."""
    sources = list(sources)
    for source in sources:
        open_existing(source)  # before anything is written
    return MergeReport(tuple(copy(source, target, dry_run=dry_run) for source in sources))


def in_order(segments: Segments) -> Segments:
    """Parents before children, older before newer."""
    return dict(sorted(segments.items(), key=lambda s: (KINDS.index(s[1][0].kind), s[1][0].created, s[0])))


def _read(remote: Remote, ids: Iterable[str]) -> Segments:
    ids = list(ids)
    return dict(zip(ids, in_parallel(lambda id_: read_manifest(remote, id_), ids), strict=True))


def _with_parents(remote: Remote, ids: Collection[str]) -> list[str]:
    found: set[str] = set()
    while ids:
        found |= set(ids)
        infos = [manifest.info for manifest, _ in _read(remote, ids).values()]
        ids = {coverage.parent_id(info) for info in infos if isinstance(info, RolloutsInfo | ScoresInfo)}
    return sorted(found)


def _check_parents(missing: Segments, taker: Remote, there: set[str]) -> None:
    """So that no child is ever committed without its parent."""
    for id_, (manifest, _) in missing.items():
        if isinstance(manifest.info, RolloutsInfo | ScoresInfo):
            parent = coverage.parent_id(manifest.info)
            if parent in missing:
                coverage.check_parent(manifest.info, missing[parent][0], id_)
            elif parent not in there:
                coverage.check_parent(manifest.info, None, id_)
            else:
                coverage.check_parent(manifest.info, read_manifest(taker, parent)[0], id_)


def _batches(giver: Remote, missing: Segments, limit: int, bar: Bar) -> Iterator[list[Packed]]:
    """Segments that are committed together: one kind only, so that parents are there before their children."""
    batch: list[Packed] = []
    held, kind = 0, ""
    for id_, (manifest, data) in missing.items():
        size = data_bytes(manifest)
        if batch and (held + size > limit or kind != manifest.kind):
            yield batch
            batch, held = [], 0
        batch.append(read_segment(giver, id_, manifest, data, bar.advance))
        held, kind = held + size, manifest.kind
    if batch:
        yield batch


# -------------------------------------------------------------------------------------------------------- diff


@dataclass(frozen=True)
class OneSide:
    """Segments that one cache has and the other lacks."""

    cache: str
    ids: tuple[str, ...]
    segments: dict[str, int]
    rows: dict[str, int]
    """By kind."""
    bytes: int
    models: tuple[str, ...]
    """Policies of the rollouts and teachers of the scores, with their rows."""


@dataclass(frozen=True)
class DiffReport:
    only: tuple[OneSide, OneSide]
    both: int

    def to_dict(self) -> dict[str, Any]:
        return {"a": asdict(self.only[0]), "b": asdict(self.only[1]), "both": self.both}

    def __str__(self) -> str:
        lines = [f"in both: {self.both:,} segments"]
        for side in self.only:
            what = ", ".join(f"{n:,} {kind} ({side.rows[kind]:,} rows)" for kind, n in side.segments.items() if n)
            lines.append(f"only in {side.cache}: " + (f"{what}, {size_text(side.bytes)}" if what else "nothing"))
            lines += [f"  {model}" for model in side.models]
        return "\n".join(map(printable, lines))


def diff(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> DiffReport:
    """What each of two caches has that the other lacks, from the manifests alone."""
    remotes = open_existing(a), open_existing(b)
    ids = [set(remote.segment_ids()) for remote in remotes]
    sides = _one_side(remotes[0], ids[0] - ids[1]), _one_side(remotes[1], ids[1] - ids[0])
    return DiffReport(sides, len(ids[0] & ids[1]))


def _one_side(remote: Remote, ids: set[str]) -> OneSide:
    segments = in_order(_read(remote, sorted(ids)))
    manifests = [manifest for manifest, _ in segments.values()]
    models: dict[str, int] = {}
    for manifest in manifests:
        if isinstance(manifest.info, RolloutsInfo):
            who = f"policy {manifest.info.policy.name} ({manifest.info.policy.fingerprint[:12]})"
        elif isinstance(manifest.info, ScoresInfo):
            who = f"teacher {manifest.info.teacher.name} ({manifest.info.teacher.fingerprint[:12]})"
        else:
            continue
        models[who] = models.get(who, 0) + manifest.rows
    return OneSide(
        cache=remote.url,
        ids=tuple(segments),
        segments={kind: sum(m.kind == kind for m in manifests) for kind in KINDS},
        rows={kind: sum(m.rows for m in manifests if m.kind == kind) for kind in KINDS},
        bytes=sum(map(data_bytes, manifests)),
        models=tuple(f"{who}: {rows:,} rows" for who, rows in models.items()),
    )
