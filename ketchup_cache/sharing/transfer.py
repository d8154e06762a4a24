"""Segments from one cache to another: push, pull, merge.

A cache is a set of immutable segments that only grows, so copying what is missing is merging: in any order, as often as
one likes, by any number of people at once. What a killed copy has committed is there; the rest is copied next time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from ketchup_cache.cache.index import check_parent, parent_id
from ketchup_cache.cache.manifest import KINDS, Manifest
from ketchup_cache.cache.segment_bytes import Packed, SegmentStore, in_parallel, read_manifest, read_segment
from ketchup_cache.console import Bar, Report, printable, progress, size_text
from ketchup_cache.sharing.stores import open_existing, open_store

Address = str | os.PathLike[str]
Segments = dict[str, tuple[Manifest, bytes]]
"""Id → manifest, and its bytes as stored."""


@dataclass(frozen=True)
class TransferReport(Report):
    """What a copy moved; with `dry_run`, what it would move. segments: by kind. already: segments that were there."""

    source: str
    target: str
    segments: dict[str, int]
    rows: int
    bytes: int
    already: int
    seconds: float
    dry_run: bool

    def __str__(self) -> str:
        where = f"from {self.source} to {self.target}"
        if not any(self.segments.values()):
            return printable(f"nothing to copy {where}: all {self.already:,} segments are there")
        what = ", ".join(f"{count:,} {kind}" for kind, count in self.segments.items() if count)
        verb, took = ("would copy", "") if self.dry_run else ("copied", f" in {self.seconds:.1f} s")
        there = f"; {self.already:,} were there" if self.already else ""
        size = f"{self.rows:,} rows, {size_text(self.bytes)}"
        return printable(f"{verb} segments of {what} ({size}) {where}{took}{there}")


@dataclass(frozen=True)
class MergeReport(Report):
    parts: tuple[TransferReport, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.parts))


def copy(
    source: Address,
    target: Address,
    *,
    only: Collection[str] | None = None,
    dry_run: bool = False,
    license_id: str | None = None,
) -> TransferReport:
    """Bring all segments of `source` that `target` lacks to it; make `target` where there is none.

    only: ids of the segments to bring; their parents come too.
    Raises CacheError where the source is no cache, a parent is missing or an address can't be reached;
    CorruptError where bytes are not those a manifest promises (that segment is not committed, those before it are);
    WriteError.
    """
    giver, taker = open_existing(source), open_store(target, license_id)
    began = time.monotonic()
    there = set(taker.segment_ids()) if taker.exists() else set()
    offered = giver.segment_ids() if only is None else list(only)
    missing = _read(giver, offered, there)
    known = {id_: manifest for id_, (manifest, _) in missing.items()}
    for id_, (manifest, _) in missing.items():  # so that no child is ever committed without its parent
        parent = parent_id(manifest.info)
        if parent in there and parent not in known:
            known[parent] = read_manifest(taker, parent)[0]
        check_parent(manifest.info, known, id_)
    total = sum(manifest.data_bytes for manifest, _ in missing.values())
    if not dry_run:
        taker.create()
        with progress("copying", total, "bytes") as bar:
            for batch in _batches(giver, missing, taker.batch_bytes, bar):
                taker.put(batch)
    segments: dict[str, int] = {kind: sum(m.kind == kind for m, _ in missing.values()) for kind in KINDS}
    rows, already = sum(manifest.rows for manifest, _ in missing.values()), len(there.intersection(offered))
    took = round(time.monotonic() - began, 2)
    return TransferReport(giver.address, taker.address, segments, rows, total, already, took, dry_run)


def merge(sources: Iterable[Address], target: Address, *, dry_run: bool = False) -> MergeReport:
    """Copy each source into the target, in turn. Raises the errors of `copy`."""
    sources = list(sources)
    for source in sources:
        open_existing(source)  # before anything is written
    return MergeReport(tuple(copy(source, target, dry_run=dry_run) for source in sources))


def _read(giver: SegmentStore, ids: Iterable[str], there: set[str]) -> Segments:
    """Manifests of these segments and of their parents, as far as the giver has them and the taker has not: parents
    before children, older before newer."""
    found: Segments = {}
    offered = set(giver.segment_ids())
    wanted = [id_ for id_ in ids if id_ not in there]
    while wanted:
        found |= zip(wanted, in_parallel(lambda id_: read_manifest(giver, id_), wanted), strict=True)
        parents = dict.fromkeys(parent_id(manifest.info) for manifest, _ in found.values())
        wanted = [id_ for id_ in parents if id_ in offered and id_ not in found and id_ not in there]
    return dict(sorted(found.items(), key=lambda s: (KINDS.index(s[1][0].kind), s[1][0].created, s[0])))


def _batches(giver: SegmentStore, missing: Segments, limit: int, bar: Bar) -> Iterator[list[Packed]]:
    """Segments that are committed together: one kind only, so that parents are there before their children."""
    batch: list[Packed] = []
    held, kind = 0, ""
    for id_, (manifest, data) in missing.items():
        if batch and (held + manifest.data_bytes > limit or kind != manifest.kind):
            yield batch
            batch, held = [], 0
        batch.append(read_segment(giver, id_, manifest, data, bar.advance))
        held, kind = held + manifest.data_bytes, manifest.kind
    if batch:
        yield batch
