"""Bytes of a cache → marker, manifest, arrays. Nothing is believed before it is checked."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol, TypeVar

from numpy.typing import NDArray
from pydantic import ValidationError
from pydantic_core import from_json

from ketchup_cache.cache import rules, zarr_files
from ketchup_cache.cache.manifest import FORMAT, FORMAT_VERSION, Manifest, ScoresInfo
from ketchup_cache.console import one_line
from ketchup_cache.errors import CacheError, CorruptError
from ketchup_cache.provenance import canonical_json

MARKER = "ketchup-cache.json"
MARKER_BYTES = canonical_json({"format": FORMAT, "version": FORMAT_VERSION})
MAX_MARKER_BYTES = 2**16
MAX_MANIFEST_BYTES = 2**22
RESTORE = "restore it from a copy (`ketchup-cache verify` lists all damage, `--set-aside` moves it out of the way)"
AT_ONCE = 8
"""Files that travel over a network at once."""
_MANIFEST_NAME = re.compile(r"([0-9a-f]{64})\.json")
Item = TypeVar("Item")
Value = TypeVar("Value")


class Packed(NamedTuple):
    """A whole segment as bytes, each checked against the manifest."""

    segment_id: str
    manifest: bytes
    files: Mapping[str, bytes]


class SegmentStore(Protocol):
    """Where the segments of a cache are: a folder, an object store, a web server, the Hub.

    All methods raise CacheError, in one line without credentials, where the place can't be reached.
    """

    address: str
    batch_bytes: int
    """Segments are handed to `put` together until they are this large. 0: one by one."""

    def exists(self) -> bool:
        """Whether a cache is there. Raises CacheError where it is of a newer format version."""

    def create(self) -> None:
        """Make an empty cache where there is none. Raises WriteError where that can't be done."""

    def segment_ids(self) -> list[str]:
        """Ids of all segments there now, in no special order."""

    def index(self, limit: int) -> bytes:
        """The file of all manifests (index_file.py), `limit` + 1 bytes at most. Raises FileNotFoundError."""

    def manifest(self, segment_id: str) -> bytes:
        """As it is stored, MAX_MANIFEST_BYTES + 1 bytes at most. Raises CorruptError where it is missing."""

    def file(self, segment_id: str, name: str, length: int) -> bytes:
        """One data file, `length` + 1 bytes at most. Raises CorruptError where it is missing."""

    def put(self, batch: Sequence[Packed]) -> None:
        """Commit segments: all data of a segment before its manifest. Returns once they are there.

        Raises WriteError where that fails; readers then see nothing of those that were not committed.
        """


class KeyedStore:
    """The reading half of a `SegmentStore` that finds files by key: `manifests/ID.json`, `segments/ID/NAME`."""

    INDEX = "manifests.jsonl"
    address: str

    def _get(self, key: str, limit: int) -> bytes:
        """At most `limit` + 1 bytes of a file. Raises FileNotFoundError where it is missing."""
        raise NotImplementedError

    def exists(self) -> bool:
        try:
            check_marker(self._get(MARKER, MAX_MARKER_BYTES), f"{self.address}/{MARKER}")
        except FileNotFoundError:
            return False
        return True

    def index(self, limit: int) -> bytes:
        return self._get(self.INDEX, limit)

    def manifest(self, segment_id: str) -> bytes:
        return self._must_get(f"manifests/{segment_id}.json", MAX_MANIFEST_BYTES)

    def file(self, segment_id: str, name: str, length: int) -> bytes:
        return self._must_get(f"segments/{segment_id}/{name}", length)

    def _must_get(self, key: str, limit: int) -> bytes:
        try:
            return self._get(key, limit)
        except FileNotFoundError:
            raise CorruptError(f"{self.address}/{key}: is missing") from None


def check_marker(data: bytes, path: object) -> None:
    """Raise CacheError where the bytes are not the marker of a cache that this program reads."""
    try:
        marker = from_json(data)
    except ValueError as error:
        raise CorruptError(f"{path}: not valid JSON ({error}); {RESTORE}") from None
    if not isinstance(marker, dict) or marker.get("format") != FORMAT:
        raise CacheError(f"{path}: does not say that this is a ketchup cache; choose another folder")
    _check_version(path, marker.get("version"))


def ids_among(names: Iterable[str]) -> list[str]:
    """The ids that file names in manifests/ stand for; other names are ignored."""
    return [match[1] for name in names if (match := _MANIFEST_NAME.fullmatch(name))]


def parse_manifest(data: bytes, segment_id: str, address: str) -> Manifest:
    """From the cache at `address`. Raises CorruptError where the bytes are not those of the id or break the format,
    CacheError where it is newer."""
    path = f"{address}/manifests/{segment_id}.json"
    if hashlib.sha256(data).hexdigest() != segment_id:
        raise CorruptError(f"{path}: its bytes are not those of its id; {RESTORE}")
    try:
        manifest = Manifest.model_validate_json(data, strict=True)
        check_manifest(manifest)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        for other in error.errors(include_url=False):
            if other["loc"] == ("version",):
                _check_version(path, other["input"])
        place = ".".join(str(part)[:40] for part in problem["loc"])
        raise CorruptError(f"{path}: {place}{': ' * bool(place)}{problem['msg']}; {RESTORE}") from None
    except CacheError as error:
        raise CorruptError(f"{path}: {error}; {RESTORE}") from None
    return manifest


def check_manifest(manifest: Manifest) -> None:
    """Raise CacheError where the parts of a manifest contradict each other or exceed the format's limits."""
    if not {"format", "version"} <= manifest.model_fields_set:
        raise CacheError("does not say its format and version")
    info, arrays = manifest.info, manifest.arrays
    if isinstance(info, ScoresInfo) and manifest.rows != info.row_stop - info.row_start:
        raise CacheError(f"{manifest.rows} rows of scores for rows {info.row_start} to {info.row_stop}")
    wanted = rules.layout(info, manifest.rows, manifest.tokens)
    for name in sorted((wanted.keys() - (rules.OPTIONAL - arrays.keys())) | arrays.keys()):
        if name not in wanted or name not in arrays or (arrays[name].dtype, arrays[name].shape) != wanted[name]:
            raise CacheError(f"array {name!r} is not what {info.kind} of this size hold")
    total = max(zarr_files.decoded_bytes(arrays), manifest.data_bytes)
    if total > zarr_files.MAX_BYTES:
        raise CacheError(f"{total:,} bytes in one segment, the limit is {zarr_files.MAX_BYTES:,}: store it in several")
    names = zarr_files.member_names(arrays) if manifest.version == 1 else {zarr_files.ARCHIVE}
    if different := names ^ manifest.files.keys():
        name = min(different)
        raise CacheError(f"file {name!r} is {'missing' if name not in manifest.files else 'foreign'}")


def read_manifest(store: SegmentStore, segment_id: str) -> tuple[Manifest, bytes]:
    """A segment's manifest and its bytes. Raises the errors of `parse_manifest`."""
    data = store.manifest(segment_id)
    return parse_manifest(data, segment_id, store.address), data


def read_segment(
    store: SegmentStore, segment_id: str, manifest: Manifest, data: bytes, advance: Callable[[int], None] | None = None
) -> Packed:
    """All files of a segment, each of the length and hash that its manifest promises. Raises CorruptError.

    data: the manifest's bytes. advance: called with the bytes of each file that has come.
    """

    def read(name: str) -> bytes:
        promised, path = manifest.files[name], f"{store.address}/segments/{segment_id}/{name}"
        for _ in range(2):  # a connection that was cut can look like a shorter file: ask once more
            found = store.file(segment_id, name, promised.length)
            if len(found) == promised.length and hashlib.sha256(found).hexdigest() == promised.sha256:
                if advance:
                    advance(promised.length)
                return found
        raise CorruptError(f"{path}: its bytes are not those its manifest promises; {RESTORE}")

    return Packed(segment_id, data, dict(zip(manifest.files, in_parallel(read, list(manifest.files)), strict=True)))


def arrays_of(packed: Packed, manifest: Manifest, address: str) -> dict[str, NDArray]:
    """The arrays of a segment, in the dtypes of memory. Raises CorruptError, naming the file."""
    folder = f"{address}/segments/{packed.segment_id}"
    try:
        files = packed.files if manifest.version == 1 else zarr_files.unpack(packed.files[zarr_files.ARCHIVE])
        return zarr_files.decode(files, manifest.arrays, rules.IN_MEMORY)
    except CorruptError as error:
        raise CorruptError(f"{folder}/{error}; {RESTORE}") from None


def in_parallel(work: Callable[[Item], Value], items: Sequence[Item]) -> list[Value]:
    """Results in the order of the items. The first error ends it."""
    if len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(min(AT_ONCE, len(items))) as pool:
        return list(pool.map(work, items))


def _check_version(path: object, version: object) -> None:
    if isinstance(version, bool) or version not in range(1, FORMAT_VERSION + 1):
        known = f"this program reads versions up to {FORMAT_VERSION}; upgrade ketchup-cache"
        raise CacheError(f"{path}: is of format version {one_line(repr(version), 20)}, {known}")
