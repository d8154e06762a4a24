"""Segments from one cache to another: push, pull, merge.

A cache is a set of immutable segments that only grows, so copying what is missing is merging: in any order, as often as
one likes, by any number of people at once. What a killed copy has committed is there; the rest is copied next time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ketchup_cache.cache.cache import Cache
from ketchup_cache.cache.disk import FolderStore, aside
from ketchup_cache.cache.index import Entry, Index, check_parent, parent_id, read_entry
from ketchup_cache.cache.manifest import KINDS
from ketchup_cache.cache.segment_bytes import Packed, SegmentStore, in_parallel, parse_manifest, read_segment
from ketchup_cache.console import Bar, Report, printable, progress, size_text
from ketchup_cache.errors import CacheError, CorruptError, MismatchError
from ketchup_cache.sharing.stores import open_existing, open_store

Address = str | os.PathLike[str]
Segments = dict[str, tuple[Entry, bytes]]
"""Id → what the manifest says, and its bytes as stored."""
Wrong = dict[str, str]
"""Id → what is wrong with the segment."""


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
    Raises CacheError where the source is no cache or an address can't be reached; WriteError. Damaged segments, and
    those whose parent is missing or damaged, stop no others: CorruptError at the end, with a line for each.
    """
    giver, taker = open_existing(source), open_store(target, license_id)
    began = time.monotonic()
    there = set(taker.segment_ids()) if taker.exists() else set()
    offered = giver.segment_ids() if only is None else list(only)
    wrong: Wrong = {}
    missing = _read(giver, offered, there, wrong)
    known = {id_: manifest for id_, (manifest, _) in missing.items()}
    for id_, (manifest, _) in missing.items():  # so that no child is ever committed without its parent
        above = parent = parent_id(manifest.info)
        while above in there and above not in known:
            known[above] = read_entry(taker, above, {})[0]
            above = parent_id(known[above].info)
        _tried(wrong, id_, check_parent, manifest.info, known, id_)
        if id_ in wrong:  # nor do its children fit
            wrong[id_] = wrong.get(parent, wrong[id_])
            del known[id_]
    total = sum(manifest.data_bytes for manifest, _ in missing.values())
    if not dry_run and (missing.keys() - wrong.keys() or not wrong):
        taker.create()
        with progress("copying", total, "bytes") as bar:
            for batch in _batches(_Arriving(giver, taker, known, missing), missing, bar, wrong):
                taker.put(batch)
    if wrong:
        raise CorruptError(*dict.fromkeys(wrong.values()))
    segments: dict[str, int] = {kind: sum(m.kind == kind for m, _ in missing.values()) for kind in KINDS}
    rows, already = sum(manifest.rows for manifest, _ in missing.values()), len(there.intersection(offered))
    took = round(time.monotonic() - began, 2)
    return TransferReport(giver.address, taker.address, segments, rows, total, already, took, dry_run)


def merge(sources: Iterable[Address], target: Address, *, dry_run: bool = False) -> MergeReport:
    """Copy each source into the target, in turn. Raises the errors of `copy`, those of damage after the last source."""
    sources, reports, wrong = list(sources), list[TransferReport](), list[str]()
    for source in sources:
        open_existing(source)  # before anything is written
    for source in sources:
        try:
            reports.append(copy(source, target, dry_run=dry_run))
        except CorruptError as error:
            wrong += error.args
    if wrong:
        raise CorruptError(*wrong)
    return MergeReport(tuple(reports))


def _read(giver: SegmentStore, ids: Iterable[str], there: set[str], wrong: Wrong) -> Segments:
    """Manifests of these segments and of their parents, as far as the giver has them and the taker has not: parents
    before children, older before newer. wrong: receives what is wrong with those that can't be read."""
    found, shared = Segments(), dict[Any, Any]()
    offered = set(giver.segment_ids())
    wanted = [id_ for id_ in ids if id_ not in there]
    while wanted:
        read = in_parallel(lambda id_: _tried(wrong, id_, read_entry, giver, id_, shared), wanted)
        found |= {id_: one for id_, one in zip(wanted, read, strict=True) if one}
        parents = dict.fromkeys(parent_id(manifest.info) for manifest, _ in found.values())
        wanted = [id_ for id_ in parents if id_ in offered and id_ not in {*found, *wrong, *there}]
    return dict(sorted(found.items(), key=lambda s: (KINDS.index(s[1][0].kind), s[1][0].created, s[0])))


def _tried(wrong: Wrong, id_: str, work: Callable[..., Any], *args: Any) -> Any:
    """What the work on a segment returns; None where the segment is to blame, which `wrong` receives."""
    try:
        return work(*args)
    except (CacheError, MismatchError) as error:
        if type(error) is CacheError:  # the place can't be reached
            raise
        wrong[id_] = str(error)


class _Arriving:
    """Segments on their way: what has come is checked against every rule of the format before it is committed. What
    breaks one goes to the folder `aside` of the taker, and never takes part."""

    def __init__(self, giver: SegmentStore, taker: SegmentStore, known: dict[str, Entry], coming: Segments) -> None:
        """known: manifests of all that come, and of their parents."""
        self.giver, self.taker, self.address = giver, taker, giver.address
        self._coming = set() if isinstance(taker, FolderStore) else coming.keys()  # parents are near in a folder
        view: Any = self
        self._known = Cache(view, Index(known, self.address))

    def file(self, segment_id: str, name: str, length: int) -> bytes:
        """Of a parent."""
        return (self.giver if segment_id in self._coming else self.taker).file(segment_id, name, length)

    def manifest(self, segment_id: str) -> bytes:
        """Of a parent."""
        return (self.giver if segment_id in self._coming else self.taker).manifest(segment_id)

    def fetch(self, segment_id: str, data: bytes, advance: Callable[[int], None]) -> Packed:
        """A whole segment that keeps the rules. data: its manifest. Raises CorruptError."""
        manifest = parse_manifest(data, segment_id, self.address)
        packed = read_segment(self.giver, segment_id, manifest, data, advance)
        try:
            self._known.check(packed)
        except CorruptError as error:
            if isinstance(self.taker, FolderStore):
                (store := aside(self.taker.path)).put([packed])
                raise CorruptError(f"{error}; what came is in {store.path}") from None
            raise
        return packed


def _batches(arriving: _Arriving, missing: Segments, bar: Bar, wrong: Wrong) -> Iterator[list[Packed]]:
    """Segments that are committed together: one kind only, so that parents are there before their children. wrong:
    those that are left out."""
    batch: list[Packed] = []
    held, kind = 0, ""
    for id_, (manifest, data) in missing.items():
        if batch and (held + manifest.data_bytes > arriving.taker.batch_bytes or kind != manifest.kind):
            yield batch
            batch, held = [], 0
        if (parent := parent_id(manifest.info)) in wrong:
            wrong.setdefault(id_, wrong[parent])
        if id_ in wrong:
            continue
        if packed := _tried(wrong, id_, arriving.fetch, id_, data, bar.advance):
            batch.append(packed)
            held, kind = held + manifest.data_bytes, manifest.kind
    if batch:
        yield batch
