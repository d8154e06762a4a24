"""Open, extend and read a cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Set
from copy import copy
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from numpy.typing import NDArray

from ketchup_cache.cache import disk as durable
from ketchup_cache.cache import index as coverage
from ketchup_cache.cache import rules as segments
from ketchup_cache.cache import segment_bytes as reading
from ketchup_cache.cache import zarr_files as arrays
from ketchup_cache.cache.index import ScoredRef
from ketchup_cache.cache.join import join, rows_of
from ketchup_cache.cache.manifest import (
    FORMAT,
    FORMAT_VERSION,
    FileEntry,
    Info,
    Kind,
    Manifest,
    PromptsInfo,
    RolloutsInfo,
    ScoresInfo,
)
from ketchup_cache.errors import CacheError, ConfigError, CorruptError, MismatchError, NumericsError
from ketchup_cache.provenance import PolicyInfo, TeacherInfo, canonical_json
from ketchup_cache.types import Prompts, Rollouts, Row, ScoredRollouts, Scores
from ketchup_cache.version import TOOL

AUTHOR_VARIABLE = "KETCHUP_CACHE_AUTHOR"
_KEEP_DECODED = 2
Written = dict[str, tuple[int, str]]
"""Length and SHA-256 of each file of a segment."""
Value = TypeVar("Value", Prompts, Rollouts, Scores)


def open_cache(path: str | os.PathLike[str], *, create: bool = False) -> Cache:
    """Open the cache in a folder; with `create`, make one where there is none.

    Raises CacheError where the folder is missing, holds something else or a cache of another format version;
    WriteError where a new one can't be written; ConfigError where $KETCHUP_CACHE_AUTHOR is no name.
    """
    root = Path(path)
    marker = root / durable.MARKER
    if not marker.exists():
        if not root.exists() and not create:
            raise CacheError(f"{root}: no cache here; `ketchup-cache rollout --cache {root}` makes one")
        # folders of ours are left by an interrupted creation, or another process is making the cache right now;
        # hidden files are no reason to refuse
        ours = (*durable.FOLDERS, durable.MARKER)
        foreign = [name for name in durable.list_folder(root) if name not in ours and name[0] != "."]
        if foreign or not create:
            raise CacheError(
                f"{root}: is not a ketchup cache (it has no {durable.MARKER}); "
                f"`ketchup-cache rollout --cache FOLDER` makes one in a new or empty folder"
            )
        durable.create(root, canonical_json({"format": FORMAT, "version": FORMAT_VERSION}))
    reading.check_marker(marker)
    return Cache(root)


class Cache:
    """A grow-only set of immutable segments in a folder. Any number of processes may read and commit at once.

    Made by `open_cache`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.address = str(path)
        """Where the segments are: the folder, or an address elsewhere."""
        self.only: frozenset[str] | None = None
        """Pinned: all other segments are as if they were not there, and no new ones are taken."""
        self.author = _author()
        """Recorded in every segment that is committed."""
        self._parsed: dict[str, Manifest] = {}
        self._decoded: dict[str, Prompts | Rollouts] = {}
        self._keep_decoded = _KEEP_DECODED

    def handle(self) -> Cache:
        """The same cache for another thread: manifests parsed once serve both, decoded segments are its own, and of
        each kind only the last is kept."""
        other = copy(self)  # an address and pins stay what they are
        other._decoded, other._keep_decoded = {}, 1
        return other

    def manifests(self, kind: Kind | None = None) -> list[tuple[str, Manifest]]:
        """(id, manifest) of all segments that are there now, in the order of commits (time, then id).

        Raises CorruptError where a manifest is not what its name promises, CacheError where its format is newer.
        """
        found = [(segment_id, self._parse(segment_id)) for segment_id in self._visible()]
        found.sort(key=lambda pair: (pair[1].created, pair[0]))
        return [pair for pair in found if kind in (None, pair[1].kind)]

    def rollouts(self) -> list[tuple[str, RolloutsInfo]]:
        """(id, info) of all rollouts segments, in the order of commits; the same rows, lossless and compact, once.

        Raises the errors of `manifests`.
        """
        return coverage.rollouts(dict(self.manifests("rollouts")))

    def manifest(self, segment_id: str) -> Manifest:
        """Raises CacheError where there is no such segment, CorruptError where its manifest is damaged."""
        if (manifest := self._find(segment_id)) is None:
            raise CacheError(f"{self.address}: has no segment {segment_id}")
        return manifest

    def _find(self, segment_id: str) -> Manifest | None:
        known = segment_id in self._parsed or segment_id in self._visible()
        return self._parse(segment_id) if known else None

    def _visible(self) -> list[str]:
        return [id_ for id_ in self.segment_ids() if self.only is None or id_ in self.only]

    def _parse(self, segment_id: str) -> Manifest:
        if segment_id not in self._parsed:
            self._parsed[segment_id] = self._read_manifest(segment_id)
        return self._parsed[segment_id]

    # ------------------------------------------------------------------- where the bytes are: a folder of this machine

    def segment_ids(self) -> list[str]:
        """Ids of all segments that are there now, in no special order."""
        return reading.segment_ids(self.path)

    def read_arrays(self, segment_id: str, manifest: Manifest, names: Set[str]) -> dict[str, NDArray]:
        """Some arrays of a segment, in the dtypes of memory, each byte checked. Raises CorruptError."""
        return reading.read_arrays(self.path, segment_id, manifest, names)

    def check_bytes(self, segment_id: str, manifest: Manifest) -> None:
        """Compare length and hash of every file of a segment with the manifest. Raises CorruptError for the first."""
        folder = self.path / "segments" / segment_id
        for name, promised in manifest.files.items():
            reading.read_checked(folder / name, promised)

    def refresh(self) -> None:
        """See the segments that others have committed since. A folder shows them anyway."""

    def reopened(self) -> Cache:
        """The same cache with nothing remembered."""
        return Cache(self.path)

    def _read_manifest(self, segment_id: str) -> Manifest:
        return reading.read_manifest(self.path, segment_id)

    def _write(self, packed: Mapping[str, NDArray], describe: Callable[[Written], Manifest]) -> str:
        """Commit arrays under the manifest that `describe` makes of their files; returns the id."""
        with durable.staged(self.path) as stage:
            manifest = describe(stage.write(arrays.encoders(packed)))
            stage.commit(manifest.id, manifest.to_bytes())
        return manifest.id

    # ------------------------------------------------------------------------------------------------ commit

    def commit_prompts(self, prompts: Prompts, info: PromptsInfo) -> str:
        """Store prompts; returns the id of the new segment once it is durable.

        Raises CacheError where they break a rule of the format, WriteError where the disk is full or failing.
        """
        return self._commit(prompts, info)

    def commit_rollouts(self, rollouts: Rollouts, info: RolloutsInfo, created: str = "") -> str:
        """Store rollouts of prompts that are in this cache; returns the id of the new segment once it is durable.

        Raises CacheError where they break a rule of the format or their prompts are missing, NumericsError for a NaN
        or infinity, MismatchError where the tokenizer is not that of the prompts, WriteError where the disk fails.
        created: time of a segment that is rewritten; empty for now.
        """
        return self._commit(rollouts, info, created)

    def commit_scores(self, scores: Scores, info: ScoresInfo, created: str = "") -> str:
        """Store scores of rollouts that are in this cache; returns the id of the new segment once it is durable.

        Raises the same errors as `commit_rollouts`.
        """
        return self._commit(scores, info, created)

    def _commit(self, segment: segments.Segment, info: Info, created: str = "") -> str:
        if self.only is not None:
            raise MismatchError(
                f"{self.address}: the pinned run has no such {info.kind}: repeat it with its own options and models"
            )
        segments.check(segment, info, self._parent(info))
        packed = segments.pack(segment, info)
        rows, tokens = segments.size(segment)

        def describe(written: Written) -> Manifest:
            manifest = Manifest(
                format=FORMAT,
                version=FORMAT_VERSION,
                tool=TOOL,
                **({"author": self.author} if self.author else {}),
                created=created or datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
                rows=rows,
                tokens=tokens,
                info=info,
                arrays={name: arrays.entry_of(array) for name, array in packed.items()},
                files={name: FileEntry(length=length, sha256=digest) for name, (length, digest) in written.items()},
            )
            reading.check_manifest(manifest)
            return manifest

        return self._write(packed, describe)

    def _parent(self, info: Info, segment_id: str = "") -> Rollouts | None:
        """Check that the parent is there and fits; for scores, load it."""
        if isinstance(info, PromptsInfo):
            return None
        coverage.check_parent(info, self._find(coverage.parent_id(info)), segment_id)
        return self.load_rollouts(info.rollouts) if isinstance(info, ScoresInfo) else None

    # -------------------------------------------------------------------------------------------------- load

    def load_prompts(self, segment_id: str) -> Prompts:
        """Every load checks length and SHA-256 of every byte it reads, then the format's rules.

        The arrays are read-only: the last few decoded segments are kept and shared.
        Raises CorruptError, naming file and key, where anything differs; CacheError where there is no such segment.
        """
        return self._load(segment_id, Prompts)

    def load_rollouts(self, segment_id: str) -> Rollouts:
        """As `load_prompts`. Also raises MismatchError where the tokenizer is not that of the prompts."""
        return self._load(segment_id, Rollouts)

    def load_scores(self, segment_id: str) -> Scores:
        """As `load_rollouts`; also checks that the scores fit the rollouts."""
        return self._load(segment_id, Scores)

    def _load(self, segment_id: str, wanted: type[Value]) -> Value:
        segment: segments.Segment | None = self._decoded.pop(segment_id, None)
        if segment is None:
            segment = self._decode(segment_id)
        if not isinstance(segment, wanted):
            raise CacheError(f"{self.address}: segment {segment_id} does not hold {wanted.__name__.lower()}")
        if not isinstance(segment, Scores):  # many scores segments share the same prompts and rollouts
            self._decoded[segment_id] = segment
            same_kind = [other for other in self._decoded if isinstance(self._decoded[other], wanted)]
            for oldest in same_kind[: -self._keep_decoded]:
                del self._decoded[oldest]
        return segment

    def _decode(self, segment_id: str) -> segments.Segment:
        manifest = self.manifest(segment_id)
        parent = self._parent(manifest.info, segment_id)
        stored = self.read_arrays(segment_id, manifest, manifest.arrays.keys())
        segment = segments.unpack(manifest.info, stored)
        try:
            segments.check(segment, manifest.info, parent)
        except (CacheError, NumericsError) as error:
            raise CorruptError(f"{self.address}/segments/{segment_id}: {error}; {reading.RESTORE}") from None
        return segment

    # ---------------------------------------------------------------------------------- models and scored rows

    def teachers(self) -> list[TeacherInfo]:
        """The teachers that have scores here, each fingerprint once, in the order of first commits."""
        return coverage.distinct(self._teachers())

    def policies(self) -> list[PolicyInfo]:
        """The policies that have rollouts here, each fingerprint once, in the order of first commits."""
        return coverage.distinct(self._policies())

    def select_teacher(self, selector: str | None) -> TeacherInfo:
        """By name or start of fingerprint; None: the only one. Raises CacheError where that is not exactly one."""
        if not (found := self._teachers()):
            raise CacheError(f"{self.address}: no scores yet; run `ketchup-cache score --cache {self.address}` first")
        return coverage.select("teacher", "--scored-by", selector, found)

    def select_policy(self, selector: str, option: str = "--policy") -> PolicyInfo:
        """By name or start of fingerprint. Raises CacheError where that is not exactly one."""
        if not (found := self._policies()):
            raise CacheError(
                f"{self.address}: no rollouts yet; run `ketchup-cache rollout --cache {self.address}` first"
            )
        return coverage.select("policy", option, selector, found)

    def scored(self, teacher: str | None = None, policy: str | None = None, *, keep_top: int = 0) -> list[ScoredRef]:
        """Every row scored by a teacher once, in the order of commits.

        teacher, policy: name or start of fingerprint. Without a teacher, the only one there is; without a policy, all.
        keep_top: only rows whose scores keep so many of the largest logits.
        Raises CacheError where the teacher or policy is unknown or ambiguous, or a parent segment is missing.
        """
        by = self.select_teacher(teacher).fingerprint
        of = self.select_policy(policy).fingerprint if policy is not None else None
        return coverage.scored(dict(self.manifests()), by, of, keep_top)

    def load_scored(self, ref: ScoredRef) -> ScoredRollouts:
        """The rows of one reference. `prompts` is the whole parent; `prompt_index` points into it."""
        info = self.manifest(ref.scores_id).info
        assert isinstance(info, ScoresInfo)
        prompts, rollouts = self.load_prompts(ref.prompts_id), self.load_rollouts(ref.rollouts_id)
        return join(ref, prompts, rollouts, self.load_scores(ref.scores_id), info.row_start)

    def unscored(self, teacher_fingerprint: str, *, keep_top: int = 0) -> list[tuple[str, int, int]]:
        """(rollouts id, row_start, row_stop) of all rows without scores by this teacher, in the order of commits.

        keep_top: scores with fewer of the largest logits don't count.
        """
        return coverage.unscored(dict(self.manifests()), teacher_fingerprint, keep_top)

    def rows(self, teacher: str | None = None, policy: str | None = None) -> Iterator[Row]:
        """Every scored rollout, one at a time. Selects and raises as `scored`, at once; loads segment by segment."""
        refs = self.scored(teacher, policy)
        return (row for ref in refs for row in rows_of(self.load_scored(ref), ref))

    def _teachers(self) -> list[TeacherInfo]:
        return [m.info.teacher for _, m in self.manifests() if isinstance(m.info, ScoresInfo)]

    def _policies(self) -> list[PolicyInfo]:
        return [m.info.policy for _, m in self.manifests() if isinstance(m.info, RolloutsInfo)]


def _author() -> str:
    """Who commits, as they want to be named: empty where they do not say so. Raises ConfigError."""
    name = os.environ.get(AUTHOR_VARIABLE, "").strip()
    if len(name) > 200 or not name.isprintable() or "://" in name:
        raise ConfigError([f"${AUTHOR_VARIABLE} must be a name of at most 200 printable characters, and no address"])
    return name
