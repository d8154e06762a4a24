"""What a cache elsewhere can do, whatever holds it, and reading a segment of it with every byte checked."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

from ketchup_cache.cache import disk as durable
from ketchup_cache.cache import segment_bytes as reading
from ketchup_cache.cache.manifest import FORMAT, FORMAT_VERSION, Manifest
from ketchup_cache.errors import CacheError, CorruptError, KetchupError, WriteError
from ketchup_cache.provenance import canonical_json

MARKER_BYTES = canonical_json({"format": FORMAT, "version": FORMAT_VERSION})
REQUESTS = 8
"""Files of one segment that travel at once."""
TRIES = 4
FIRST_PAUSE_S = 0.2
"""Before the second try; each later pause is four times as long."""

Value = TypeVar("Value")


@dataclass(frozen=True)
class Packed:
    """A whole segment as bytes, each checked against the manifest."""

    segment_id: str
    manifest: bytes
    files: Mapping[str, bytes]


class Remote(Protocol):
    """A cache elsewhere. All methods raise CacheError, in one line without credentials, where it can't be reached."""

    url: str
    batch_bytes: int
    """Segments are handed to `put` together until they are this large. 0: one by one."""

    def exists(self) -> bool:
        """Whether a cache is there. Raises CacheError where it is of another format version."""

    def create(self) -> None:
        """Make an empty cache where there is none. Raises WriteError where that can't be done."""

    def segment_ids(self) -> list[str]:
        """Ids of all segments there now."""

    def manifest(self, segment_id: str) -> bytes:
        """As it is stored, MAX_MANIFEST_BYTES + 1 at most. Raises CorruptError where it is missing."""

    def file(self, segment_id: str, name: str, length: int) -> bytes:
        """One data file, `length` + 1 bytes at most. Raises CorruptError where it is missing."""

    def put(self, batch: Sequence[Packed]) -> None:
        """Commit segments: all data of a segment before its manifest. Returns once they are there.

        Raises WriteError where that fails; readers then see nothing of those that were not committed.
        """


class KeyedRemote:
    """The reading half of a `Remote` whose files are found by their key: `manifests/ID.json`, `segments/ID/NAME`."""

    url: str

    def _get(self, key: str, limit: int) -> bytes:
        """At most `limit` + 1 bytes of a file. Raises FileNotFoundError where it is missing."""
        raise NotImplementedError

    def exists(self) -> bool:
        try:
            data = self._get(durable.MARKER, reading.MAX_MARKER_BYTES)
        except FileNotFoundError:
            return False
        reading.parse_marker(data, f"{self.url}/{durable.MARKER}")
        return True

    def manifest(self, segment_id: str) -> bytes:
        return self._must_get(f"manifests/{segment_id}.json", reading.MAX_MANIFEST_BYTES)

    def file(self, segment_id: str, name: str, length: int) -> bytes:
        return self._must_get(f"segments/{segment_id}/{name}", length)

    def _must_get(self, key: str, limit: int) -> bytes:
        try:
            return self._get(key, limit)
        except FileNotFoundError:
            raise CorruptError(f"{self.url}/{key}: is missing") from None


def read_manifest(remote: Remote, segment_id: str) -> tuple[Manifest, bytes]:
    """Raises CorruptError where its bytes do not hash to its id or break the format."""
    path = f"{remote.url}/manifests/{segment_id}.json"
    data = remote.manifest(segment_id)
    return reading.parse_manifest(data, segment_id, path), data


def read_segment(
    remote: Remote, segment_id: str, manifest: Manifest, data: bytes, advance: Callable[[int], None] = lambda n: None
) -> Packed:
    """All files of a segment, each of the length and hash its manifest promises. Raises CorruptError."""
    return Packed(segment_id, data, read_files(remote, segment_id, manifest, list(manifest.files), advance))


def read_files(
    remote: Remote,
    segment_id: str,
    manifest: Manifest,
    names: Sequence[str],
    advance: Callable[[int], None] = lambda n: None,
) -> dict[str, bytes]:
    """Some files of a segment, checked as in `read_segment`."""

    def read(name: str) -> bytes:
        promised = manifest.files[name]
        path = f"{remote.url}/segments/{segment_id}/{name}"
        found = remote.file(segment_id, name, promised.length)
        try:
            checked = reading.check_file(found, promised, path)
        except CorruptError:  # a connection that was cut can look like a shorter file: ask once more
            checked = reading.check_file(remote.file(segment_id, name, promised.length), promised, path)
        advance(promised.length)
        return checked

    return dict(zip(names, in_parallel(read, names), strict=True))


def in_parallel(work: Callable[[str], Value], names: Sequence[str]) -> list[Value]:
    """Results in the order of `names`; the first error ends it."""
    with ThreadPoolExecutor(min(REQUESTS, len(names) or 1)) as pool:
        futures = [pool.submit(work, name) for name in names]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def persistently(what: str, call: Callable[[], Value], *, writing: bool = False) -> Value:
    """Try a request again while the connection fails; what the server answers for good is raised at once.

    Raises FileNotFoundError and FileExistsError as they are, WriteError or CacheError for everything else.
    """
    failed = WriteError if writing else CacheError
    for attempt in range(TRIES):
        try:
            return call()
        except (FileNotFoundError, FileExistsError, KetchupError, ImportError):
            raise
        except PermissionError as error:
            raise failed(f"{what}: access is refused ({reason(error)}); check your credentials and rights") from None
        except Exception as error:  # clients raise errors of many libraries
            if attempt == TRIES - 1:
                advice = "check the connection and run the command again; what has arrived is kept"
                raise failed(f"{what}: can't be reached ({reason(error)}); {advice}") from None
            time.sleep(FIRST_PAUSE_S * 4**attempt)
    raise AssertionError("unreachable")


def reason(error: BaseException) -> str:
    """An error of a client in one line of at most 200 characters, without credentials or signed queries."""
    text = " ".join(str(error).split()) or type(error).__name__
    return scrub(text)[:200]


def scrub(text: str) -> str:
    """Cut `user:password@` and `?query` out of every address in a text."""
    text = re.sub(r"(\w+://)[^/\s@'\"]*@", r"\1", text)
    return re.sub(r"((?:\w+://|/)[^\s?'\"]*)\?[^\s'\")]*", r"\1", text)
