"""Open, extend and read a cache."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection, Iterable, Iterator
from copy import copy
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from ketchup_cache.cache import index_file, rules, segment_bytes, zarr_files
from ketchup_cache.cache.index import Entry, Index, Range, ScoredRef, check_parent, distinct, parent_id
from ketchup_cache.cache.manifest import FORMAT, FileEntry, Info, Kind, Manifest, PromptsInfo, RolloutsInfo, ScoresInfo
from ketchup_cache.cache.segment_bytes import Packed, SegmentStore, parse_manifest
from ketchup_cache.errors import CacheError, CorruptError, MismatchError, NumericsError
from ketchup_cache.parallel.group import group
from ketchup_cache.provenance import PolicyInfo, TeacherInfo
from ketchup_cache.types import Prompts, Rollouts, Row, ScoredRollouts, Scores, UnscoredRow
from ketchup_cache.version import TOOL

KEEP_DECODED = 2
"""Decoded segments of prompts, and of rollouts, that stay in memory: many scores segments share them."""
SHOWN_S = 60.0
"""After which a shared disk has shown on every machine what was written on one."""
Value = TypeVar("Value", Prompts, Rollouts, Scores)


class Cache:
    """A grow-only set of immutable segments. Any number of processes may read and commit at once.

    It shows the segments that were there when it was made, those committed through it, and after `refresh` those of
    others. Made by `open_cache`.
    """

    def __init__(self, store: SegmentStore, index: Index | None = None) -> None:
        """index: of the segments to show, where it is known already."""
        self.store, self.address = store, store.address
        self.pinned: frozenset[str] | None = None
        """All other segments are as if they were not there, and no new ones are taken."""
        self._entries: dict[str, Entry] = {}
        self._shared: dict[Any, Any] = {}
        self._index, self._looked = index, index is not None
        self._decoded: dict[str, Prompts | Rollouts] = {}
        self._keep_decoded = KEEP_DECODED

    @property
    def path(self) -> Path:
        """The folder of a cache on disk; of one at an address there is none (AttributeError)."""
        return self.store.path  # type: ignore[attr-defined]

    def handle(self) -> Cache:
        """The same cache for another thread: manifests serve both, decoded segments are its own, and of each kind only
        the last is kept."""
        other = copy(self)
        other._decoded, other._keep_decoded = {}, 1
        return other

    def refresh(self) -> None:
        """See the segments that others have committed since."""
        self._looked = False

    def agree(self, own: Iterable[str] = ()) -> None:
        """Show in all processes of a group the same segments: those that the first sees, with what each has committed.

        own: ids of these. Raises CacheError where they are not to be seen here: the cache must be at one place for all.
        """
        if group().size > 1:
            self.await_shown({id_ for ids in group().gathered(list(own)) for id_ in ids})
            ids = group().from_first(self.segment_ids)
            self.await_shown(ids)
            self._index = Index({id_: self._entries[id_] for id_ in ids}, self.address)

    def await_shown(self, ids: Collection[str]) -> None:
        """Wait until segments of another process are seen here too, as on NFS. Raises CacheError after `SHOWN_S`."""
        until = time.monotonic() + SHOWN_S
        while missing := set(ids) - set(self.segment_ids()):
            if time.monotonic() > until:
                what = f"segment {min(missing)[:12]} of another process is not to be seen on this machine"
                raise CacheError(f"{self.address}: {what}; use a --cache on a disk that all machines share")
            time.sleep(0.02)
            self.refresh()

    def pin(self, ids: Collection[str]) -> None:
        """Show these segments alone, and take no new ones. Raises MismatchError where one is missing."""
        if missing := set(ids) - set(self.segment_ids()):
            what = f"lacks {len(missing)} of the {len(ids)} pinned segments, {min(missing)[:12]} for one"
            raise MismatchError(f"{self.address}: {what}; use the cache of that run, or pull them")
        self.pinned, self._looked = frozenset(ids), False

    # ------------------------------------------------------------------------------------------------- manifests

    @property
    def index(self) -> Index:
        """What the cache holds. Raises CorruptError for a damaged manifest, CacheError for one of a newer format."""
        if not self._looked or self._index is None:
            ids = [id_ for id_ in self.store.segment_ids() if self.pinned is None or id_ in self.pinned]
            new = [id_ for id_ in ids if id_ not in self._entries]
            listed = self.pinned is None and len(new) == len(ids)
            for id_, data in index_file.read_all(self.store, new, listed).items():
                self._take(id_, parse_manifest(data, id_, self.address), data)
            if self._index is None or self._index.entries.keys() != set(ids):
                self._index = Index({id_: self._entries[id_] for id_ in ids}, self.address)
            self._looked = True
        return self._index

    def segment_ids(self) -> list[str]:
        """Ids of all segments, in the order of commits."""
        return list(self.index.entries)

    def manifests(self, kind: Kind | None = None) -> list[tuple[str, Entry]]:
        """(id, what the index keeps of the manifest) of all segments of a kind, in the order of commits (time, id)."""
        return [(id_, m) for id_, m in self.index.entries.items() if kind in (None, m.kind)]

    def entry(self, segment_id: str) -> Entry:
        """What the index keeps of a manifest. Raises CacheError where there is no such segment."""
        if segment_id not in self.index.entries:
            raise CacheError(f"{self.address}: has no segment {segment_id}")
        return self.index.entries[segment_id]

    def manifest(self, segment_id: str) -> Manifest:
        """Read and checked anew. Raises CacheError where there is no such segment, CorruptError for a damaged one."""
        return self.entry(segment_id) and segment_bytes.read_manifest(self.store, segment_id)[0]

    def rollouts(self) -> list[tuple[str, RolloutsInfo]]:
        """(id, info) of all rollouts segments, in the order of commits; the same rows only once."""
        return self.index.rollouts

    def teachers(self) -> list[TeacherInfo]:
        """The teachers that have scores here, each fingerprint once, in the order of first commits."""
        return distinct(self.index.models("teacher"))

    def policies(self) -> list[PolicyInfo]:
        """The policies that have rollouts here, each fingerprint once, in the order of first commits."""
        return distinct(self.index.models("policy"))

    def select_teacher(self, selector: str | None) -> TeacherInfo:
        """By name or start of fingerprint; None: the only one. Raises CacheError where that is not exactly one."""
        found: TeacherInfo = self.index.select("teacher", selector, "--scored-by")
        return found.alone_in(self.index.models("teacher")) if found.served else found

    def select_policy(self, selector: str | None, option: str = "--policy") -> PolicyInfo:
        """As `select_teacher`, of the policies that have rollouts here."""
        return self.index.select("policy", selector, option)

    def scored(
        self, teacher: str | tuple[str | None, ...] | None = None, policy: str | None = None, *, keep_top: int = 0
    ) -> list[ScoredRef]:
        """Every row scored by a teacher once, in the order of commits; of several, those that each has scored.

        teacher, policy: name or start of fingerprint. Without a teacher, the only one there is; without a policy, all.
        keep_top: only rows whose scores keep at least this many of the largest logits.
        Raises CacheError where the teacher or policy is unknown or ambiguous, or a parent segment is missing.
        """
        by = [self.select_teacher(one).fingerprint for one in (teacher if isinstance(teacher, tuple) else (teacher,))]
        of = self.select_policy(policy).fingerprint if policy is not None else None
        return self.index.scored_by_all(by, of, keep_top)

    def unscored(self, teacher_fingerprint: str, *, keep_top: int = 0) -> list[Range]:
        """(rollouts id, row_start, row_stop) of all rows without scores by this teacher, in the order of commits.

        keep_top: scores with fewer of the largest logits don't count.
        """
        return self.index.unscored(teacher_fingerprint, keep_top)

    # ------------------------------------------------------------------------------------------------ commit

    def commit_prompts(self, prompts: Prompts, info: PromptsInfo) -> str:
        """Store prompts; returns the id of the new segment once it is durable.

        Raises CacheError where they break a rule of the format, WriteError where the disk is full or failing.
        """
        return self._commit(prompts, info)

    def commit_rollouts(self, rollouts: Rollouts, info: RolloutsInfo) -> str:
        """Store rollouts of prompts that are in this cache; returns the id of the new segment once it is durable.

        Raises CacheError where they break a rule of the format or their prompts are missing, NumericsError for a NaN
        or infinity, MismatchError where the tokenizer is not that of the prompts, WriteError where the disk fails.
        """
        return self._commit(rollouts, info.model_copy(update={"finished": int(rollouts.finished.sum())}))

    def commit_scores(self, scores: Scores, info: ScoresInfo) -> str:
        """Store scores of rollouts that are in this cache; returns the id of the new segment once it is durable.

        Raises the same errors as `commit_rollouts`.
        """
        return self._commit(scores, info)

    def _commit(self, segment: rules.Segment, info: Info) -> str:
        if self.pinned is not None:
            what = f"the pinned run has no such {info.kind}: repeat it with its own options and models"
            raise MismatchError(f"{self.address}: {what}")
        parent = self.index.entries.get(parent_id(info))
        if parent and info.tokenizer.encodes_as(parent.info.tokenizer):  # whose fingerprint may be an earlier version's
            same = {"fingerprint": parent.info.tokenizer.fingerprint}
            info = info.model_copy(update={"tokenizer": info.tokenizer.model_copy(update=same)})
        rules.check(segment, info, self._parent(info))
        arrays = rules.pack(segment, info)
        counts = dict(zip(("rows", "tokens"), rules.size(segment), strict=True))
        archive = zarr_files.pack(zarr_files.encode(arrays))
        digest = hashlib.sha256(archive).hexdigest()
        made_by = {"tool": TOOL, "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")}
        entries = {name: zarr_files.entry_of(array) for name, array in arrays.items()}
        files = {zarr_files.ARCHIVE: FileEntry(length=len(archive), sha256=digest)}
        manifest = Manifest(format=FORMAT, version=2, info=info, arrays=entries, files=files, **counts, **made_by)
        segment_bytes.check_manifest(manifest)
        data = manifest.to_bytes()
        id_ = hashlib.sha256(data).hexdigest()
        self.store.put([Packed(id_, data, {zarr_files.ARCHIVE: archive})])
        self._index = Index({**self.index.entries, id_: self._take(id_, manifest, data)}, self.address)
        return id_

    def _take(self, segment_id: str, manifest: Manifest, data: bytes) -> Entry:
        """Keep what the index needs of a manifest. data: its bytes."""
        return self._entries.setdefault(segment_id, Entry.of(manifest, len(data), self._shared))

    def _parent(self, info: Info, segment_id: str = "") -> Rollouts | None:
        """Check that the parent is there and fits; for scores, load it."""
        check_parent(info, self.index.entries, segment_id)
        return self.load_rollouts(info.rollouts) if isinstance(info, ScoresInfo) else None

    # -------------------------------------------------------------------------------------------------- load

    def load(self, segment_id: str) -> rules.Segment:
        """A segment of any kind. Raises the errors of `load_rollouts`."""
        segment: rules.Segment | None = self._decoded.pop(segment_id, None)
        if segment is None:
            segment = self._decode(segment_id)
        if not isinstance(segment, Scores):
            self._decoded[segment_id] = segment
            same_kind = [id_ for id_, other in self._decoded.items() if type(other) is type(segment)]
            for oldest in same_kind[: -self._keep_decoded]:
                del self._decoded[oldest]
        return segment

    def load_prompts(self, segment_id: str) -> Prompts:
        """Every load checks length and SHA-256 of every byte it reads, then the format's rules.

        The arrays are read-only: the last few decoded segments are kept and shared.
        Raises CorruptError, naming file and array, where anything differs; CacheError where there is no such segment.
        """
        return self._load(segment_id, Prompts)

    def load_rollouts(self, segment_id: str) -> Rollouts:
        """As `load_prompts`. Also raises MismatchError where the tokenizer is not that of the prompts."""
        return self._load(segment_id, Rollouts)

    def load_scores(self, segment_id: str) -> Scores:
        """As `load_rollouts`; also checks that the scores fit the rollouts."""
        return self._load(segment_id, Scores)

    def load_scored(self, ref: ScoredRef) -> ScoredRollouts:
        """The rows of one reference. `prompts` is the whole parent; `prompt_index` points into it."""
        prompts, rollouts = self.load_prompts(ref.prompts_id), self.load_rollouts(ref.rollouts_id)
        scores = self.load_scores_of(ref, ref.scores_id)
        return ScoredRollouts(prompts, rollouts.rows(ref.row_start, ref.row_stop), scores)

    def load_scores_of(self, ref: ScoredRef, scores_id: str) -> Scores:
        """The scores of a reference's rows in one segment: its own, or one of those `beside` it."""
        info = self.entry(scores_id).info
        assert isinstance(info, ScoresInfo)
        own = self.load_rollouts(ref.rollouts_id).completions.slice(info.row_start, info.row_stop)
        scores = self.load_scores(scores_id)
        return scores.rows(own, ref.row_start - info.row_start, ref.row_stop - info.row_start)

    def rows(self, teacher: str | None = None, policy: str | None = None) -> Iterator[Row]:
        """Every scored rollout, one at a time. Selects and raises as `scored`, at once; loads segment by segment."""
        refs = self.scored(teacher, policy)
        parts = ((ref, self.load_scored(ref)) for ref in refs)
        return (Row.of(part, i, ref.policy.name, ref.teacher.name) for ref, part in parts for i in range(len(part)))

    def unscored_rows(self, teacher: str | None = None, policy: str | None = None) -> Iterator[UnscoredRow]:
        """Every rollout without scores by this teacher, one at a time. Selects and raises as `scored`; in a cache
        without scores, all rollouts are without."""
        by = self.select_teacher(teacher).fingerprint if teacher is not None or self.teachers() else ""
        of = self.select_policy(policy).fingerprint if policy is not None else None
        infos = {id_: info for id_, info in self.rollouts() if of in (None, info.policy.fingerprint)}
        found = [part for part in self.unscored(by) if part[0] in infos]

        def rows(id_: str, start: int, stop: int) -> Iterator[UnscoredRow]:
            rollouts, prompts = self.load_rollouts(id_), self.load_prompts(infos[id_].prompts)
            for row in range(start, stop):
                part = rollouts.rows(row, row + 1)
                nothing = Scores.empty(len(part.completions.values), 1)
                facts = UnscoredRow.facts(ScoredRollouts(prompts, part, nothing), infos[id_].policy.name)
                yield UnscoredRow(**facts)

        return (row for part in found for row in rows(*part))

    def _load(self, segment_id: str, wanted: type[Value]) -> Value:
        segment = self.load(segment_id)
        if not isinstance(segment, wanted):
            raise CacheError(f"{self.address}: segment {segment_id} does not hold {wanted.__name__.lower()}")
        return segment

    def check(self, packed: Packed) -> None:
        """That a segment which may still be on its way keeps every rule of the format. Raises CorruptError."""
        self._decode(packed.segment_id, packed)

    def _decode(self, segment_id: str, packed: Packed | None = None) -> rules.Segment:
        manifest = parse_manifest(packed.manifest, segment_id, self.address) if packed else self.manifest(segment_id)
        parent = self._parent(manifest.info, segment_id)
        packed = packed or segment_bytes.read_segment(self.store, segment_id, manifest, b"")
        segment = rules.unpack(manifest.info, segment_bytes.arrays_of(packed, manifest, self.address))
        try:
            rules.check(segment, manifest.info, parent)
        except (CacheError, NumericsError) as error:
            raise CorruptError(f"{self.address}/segments/{segment_id}: {error}; {segment_bytes.RESTORE}") from None
        return segment
