"""Bytes on disk → marker, manifest, arrays: nothing is believed before it is checked."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path

from numpy.typing import NDArray
from pydantic import ValidationError
from pydantic_core import ErrorDetails, from_json

from ketchup_cache.cache import disk as durable
from ketchup_cache.cache import rules as segments
from ketchup_cache.cache import zarr_files as arrays
from ketchup_cache.cache.disk import Bytes
from ketchup_cache.cache.manifest import FORMAT, FORMAT_VERSION, FileEntry, Manifest, ScoresInfo
from ketchup_cache.errors import CacheError, CorruptError

MAX_MARKER_BYTES = 2**16
MAX_MANIFEST_BYTES = 2**22
RESTORE = "restore it from a copy (`ketchup-cache verify` lists all damage)"
_MANIFEST_NAME = re.compile(r"([0-9a-f]{64})\.json")


def check_marker(path: Path) -> None:
    """Raise CacheError where a marker is not that of this format and version."""
    parse_marker(durable.read_file(path, MAX_MARKER_BYTES), path)


def parse_marker(data: bytes, path: Path | str) -> None:
    """As `check_marker`, for bytes that came from `path`."""
    try:
        marker = from_json(data)
    except ValueError as error:
        raise CorruptError(f"{path}: not valid JSON ({error}); {RESTORE}") from None
    if not isinstance(marker, dict) or marker.get("format") != FORMAT:
        raise CacheError(f"{path}: does not say that this is a ketchup cache; choose another folder")
    _check_version(path, marker.get("version"))


def segment_ids(root: Path) -> list[str]:
    """Ids of all segments, in no special order. Names in manifests/ that are no ids are ignored."""
    return ids_among(durable.list_folder(root / "manifests"))


def ids_among(names: Iterable[str]) -> list[str]:
    """The ids that file names in manifests/ stand for; other names are ignored."""
    return [match[1] for name in names if (match := _MANIFEST_NAME.fullmatch(name))]


def read_manifest(root: Path, segment_id: str) -> Manifest:
    """Raises CorruptError where the bytes are not those of the id or break the format, CacheError where it is newer."""
    path = root / "manifests" / f"{segment_id}.json"
    return parse_manifest(durable.read_file(path, MAX_MANIFEST_BYTES), segment_id, path)


def parse_manifest(data: bytes, segment_id: str, path: Path | str) -> Manifest:
    """As `read_manifest`, for bytes that came from `path`."""
    if hashlib.sha256(data).hexdigest() != segment_id:
        raise CorruptError(f"{path}: its bytes are not those of its id; {RESTORE}")
    try:
        manifest = Manifest.model_validate_json(data, strict=True)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        for problem in problems:
            if problem["loc"] == ("version",):
                _check_version(path, problem["input"])
        raise CorruptError(f"{path}: {_first_line(problems)}; {RESTORE}") from None
    try:
        check_manifest(manifest)
    except CacheError as error:
        raise CorruptError(f"{path}: {error}; {RESTORE}") from None
    return manifest


def check_manifest(manifest: Manifest) -> None:
    """Raise CacheError where the parts of a manifest contradict each other or exceed the format's limits."""
    if not {"format", "version"} <= manifest.model_fields_set:
        raise CacheError("does not say its format and version")
    info = manifest.info
    if isinstance(info, ScoresInfo) and manifest.rows != info.row_stop - info.row_start:
        raise CacheError(f"{manifest.rows} rows of scores for rows {info.row_start} to {info.row_stop}")
    wanted = segments.layout(info, manifest.rows, manifest.tokens)
    names = wanted.keys() - (segments.OPTIONAL - manifest.arrays.keys())
    for name in sorted(names | manifest.arrays.keys()):
        if name not in wanted or manifest.arrays.get(name) != wanted[name]:
            raise CacheError(f"array {name!r} is not what {info.kind} of this size hold")
    total = max(arrays.decoded_bytes(manifest.arrays), sum(file.length for file in manifest.files.values()))
    if total > arrays.MAX_BYTES:
        raise CacheError(f"{total:,} bytes in one segment, the limit is {arrays.MAX_BYTES:,}: store it in several")
    if different := arrays.file_names(manifest.arrays) ^ manifest.files.keys():
        raise CacheError(
            f"file {min(different)!r} is {'missing' if min(different) not in manifest.files else 'foreign'}"
        )


def read_arrays(root: Path, segment_id: str, manifest: Manifest, names: Set[str]) -> dict[str, NDArray]:
    """Some arrays of a segment, in the dtypes of memory; every byte that is read is checked against the manifest.

    Raises CorruptError, naming the file, where one is missing or differs.
    """
    folder = root / "segments" / segment_id
    entries = {name: entry for name, entry in manifest.arrays.items() if name in names}
    try:
        return arrays.decode(_Verified(folder, manifest, arrays.file_names(entries)), entries, segments.IN_MEMORY)
    except _Refused as error:
        raise CorruptError(str(error)) from None
    except CorruptError as error:
        raise CorruptError(f"{folder}/{error}; {RESTORE}") from None


def file_names(manifest: Manifest, names: Set[str]) -> list[str]:
    """The files of a segment that some of its arrays are in."""
    return sorted(arrays.file_names({name: entry for name, entry in manifest.arrays.items() if name in names}))


def decode(files: Mapping[str, Bytes], manifest: Manifest, names: Set[str], path: str) -> dict[str, NDArray]:
    """Some arrays of a segment, from files that were compared with the manifest. Raises CorruptError."""
    entries = {name: entry for name, entry in manifest.arrays.items() if name in names}
    try:
        return arrays.decode({key: files[key] for key in arrays.file_names(entries)}, entries, segments.IN_MEMORY)
    except CorruptError as error:
        raise CorruptError(f"{path}/{error}; {RESTORE}") from None


def read_checked(path: Path, promised: FileEntry) -> Bytes:
    """The bytes of a file, which are those that the manifest promises. Raises CorruptError, or CacheError."""
    data, digest = durable.read_hashed(path, promised.length)
    _check_hash(len(data), digest, promised, path)
    return data


def check_file(data: bytes, promised: FileEntry, path: Path | str) -> bytes:
    """The same bytes, once they are known to be those that the manifest promises. Raises CorruptError."""
    _check_hash(len(data), hashlib.sha256(data).hexdigest(), promised, path)
    return data


def _check_hash(length: int, digest: str, promised: FileEntry, path: Path | str) -> None:
    if (length, digest) != (promised.length, promised.sha256):
        raise CorruptError(f"{path}: its bytes are not those its manifest promises; {RESTORE}")


def copy_of(root: Path, segment_id: str, manifest: Manifest) -> tuple[dict[str, Bytes], bytes]:
    """The files and the manifest of a segment, byte by byte, for `durable.publish`. Every byte is checked.

    Raises CorruptError, naming the file, where one is missing or differs.
    """
    verified = _Verified(root / "segments" / segment_id, manifest, manifest.files.keys())
    return dict(verified), durable.read_file(root / "manifests" / f"{segment_id}.json", MAX_MANIFEST_BYTES)


class _Refused(CorruptError):
    """A file whose message says already where it is."""


class _Verified(Mapping[str, Bytes]):
    """Files of a segment, each read when it is asked for and checked against the manifest."""

    def __init__(self, folder: Path, manifest: Manifest, names: Set[str]) -> None:
        self._folder, self._files, self._names = folder, manifest.files, names

    def __getitem__(self, key: str) -> Bytes:
        try:
            return read_checked(self._folder / key, self._files[key])
        except CorruptError as error:
            raise _Refused(str(error)) from None

    def __contains__(self, key: object) -> bool:
        return key in self._names  # a Mapping's own would read the file to find out

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _check_version(path: Path | str, version: object) -> None:
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise CacheError(
            f"{path}: is of format version {version!r:.20}, this program reads version {FORMAT_VERSION}; "
            f"upgrade ketchup-cache"
        )


def _first_line(problems: list[ErrorDetails]) -> str:
    place = ".".join(str(part)[:40] for part in problems[0]["loc"])
    return f"{place}: {problems[0]['msg']}" if place else problems[0]["msg"]
