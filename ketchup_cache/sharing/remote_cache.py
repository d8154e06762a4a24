"""A cache at an address, used like one on disk: segments come when they are needed and stay in a local segment cache.

The segment cache ($KETCHUP_CACHE_HOME, else ~/.cache/ketchup-cache) is shared by all addresses and processes: segments
are named by what they hold. It keeps the most recently used ones up to $KETCHUP_CACHE_SIZE (as 500MB; default 20GB).
There are no locks: a segment that another process drops while it is read is fetched again.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Set
from contextlib import suppress
from pathlib import Path

from numpy.typing import NDArray

from ketchup_cache.cache import disk as durable
from ketchup_cache.cache import segment_bytes as reading
from ketchup_cache.cache import zarr_files as arrays
from ketchup_cache.cache.cache import Cache, Written
from ketchup_cache.cache.cache import open_cache as open_folder
from ketchup_cache.cache.manifest import Kind, Manifest
from ketchup_cache.errors import CacheError, ConfigError, WriteError
from ketchup_cache.files import write_file
from ketchup_cache.sharing.base import Packed, Remote, in_parallel, read_files, read_segment
from ketchup_cache.sharing.stores import is_url, open_remote

HOME_VARIABLE, SIZE_VARIABLE = "KETCHUP_CACHE_HOME", "KETCHUP_CACHE_SIZE"
DEFAULT_BYTES = 20 * 10**9
LEFTOVERS_S = 24 * 3600
"""Age at which unfinished work in the segment cache is taken for that of a dead process."""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def open_cache(address: str | os.PathLike[str], *, create: bool = False) -> Cache:
    """Open the cache in a folder or at an address; with `create`, make one where there is none.

    Raises CacheError where there is none, where it is of another format version, or where the address can't be
    reached or holds credentials; ConfigError where $KETCHUP_CACHE_SIZE is no size; WriteError.
    """
    remote = open_remote(address)
    if not is_url(address):
        return open_folder(remote.url, create=create)
    if not remote.exists():
        if not create:
            raise CacheError(f"{remote.url}: no cache here; `ketchup-cache push CACHE {remote.url}` makes one")
        remote.create()
    return RemoteCache(remote, SegmentCache.default())


class SegmentCache:
    """Whole segments in a folder, the most recently used ones up to a size."""

    def __init__(self, path: Path, limit: int) -> None:
        self.path, self.limit = path, limit

    @classmethod
    def default(cls) -> SegmentCache:
        """Where the environment says. Raises ConfigError where $KETCHUP_CACHE_SIZE is no size."""
        home = os.environ.get(HOME_VARIABLE)
        path = Path(home) if home else Path("~/.cache/ketchup-cache").expanduser()
        text = os.environ.get(SIZE_VARIABLE, "")
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper()) if text else None
        if text and not found:
            raise ConfigError([f"${SIZE_VARIABLE} must be a size such as 500MB or 20GB, not {text!r:.40}"])
        return cls(path, int(float(found[1]) * _UNITS[found[2]]) if found else DEFAULT_BYTES)

    def manifest(self, segment_id: str) -> bytes | None:
        """The bytes of a manifest that was kept; None where there is none, or a damaged one."""
        with suppress(CacheError):
            data = durable.read_file(self._manifest_path(segment_id), reading.MAX_MANIFEST_BYTES)
            reading.parse_manifest(data, segment_id, self._manifest_path(segment_id))
            return data
        return None

    def keep_manifest(self, segment_id: str, data: bytes) -> None:
        write_file(self._manifest_path(segment_id), data)

    def holds(self, segment_id: str) -> bool:
        """Whether a segment's data is here. Marks it as used now."""
        try:
            os.utime(self.path / "segments" / segment_id)
        except OSError:
            return False
        return True

    def keep(self, packed: Packed) -> None:
        """Put a segment here, whole or not at all, then drop the least recently used ones beyond the limit."""
        durable.publish(self.path, packed.segment_id, packed.files, packed.manifest)
        self._shrink(packed.segment_id)

    def drop(self, segment_id: str) -> None:
        """Its folder disappears at once, so that no reader takes half of it for the whole."""
        gone = self.path / "tmp" / uuid.uuid4().hex
        with suppress(OSError):
            os.rename(self.path / "segments" / segment_id, gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _shrink(self, newest: str) -> None:
        for name in durable.list_folder(self.path / "tmp"):  # of processes that were killed
            left = self.path / "tmp" / name
            with suppress(OSError):
                if left.stat().st_mtime < time.time() - LEFTOVERS_S:
                    shutil.rmtree(left, ignore_errors=True)
        held = []
        for name in durable.list_folder(self.path / "segments"):
            folder = self.path / "segments" / name
            with suppress(OSError):  # dropped by another process meanwhile
                size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
                held.append((folder.stat().st_mtime_ns, name, size))
        total = sum(size for _, _, size in held)
        for _, name, size in sorted(held):
            if total <= self.limit:
                break
            if name != newest:
                self.drop(name)
                total -= size

    def _manifest_path(self, segment_id: str) -> Path:
        return self.path / "manifests" / f"{segment_id}.json"


class RemoteCache(Cache):
    """A cache at an address. What is committed goes there at once: data first, manifest last.

    The segments are those that were there when it was opened, and those committed through it since.
    """

    def __init__(self, remote: Remote, segments: SegmentCache) -> None:
        super().__init__(segments.path)
        self.remote, self._segments = remote, segments
        self.address = remote.url
        self._warned = False
        self._ids = dict.fromkeys(sorted(remote.segment_ids()))

    def __repr__(self) -> str:
        return f"RemoteCache({self.address!r})"

    def segment_ids(self) -> list[str]:
        return list(self._ids)

    def read_arrays(self, segment_id: str, manifest: Manifest, names: Set[str]) -> dict[str, NDArray]:
        """Damage, and eviction by another process, cost a fetch; only what the address itself holds counts."""
        if self._segments.holds(segment_id):
            with suppress(CacheError):
                return reading.read_arrays(self._segments.path, segment_id, manifest, names)
            self._segments.drop(segment_id)
        if names >= manifest.arrays.keys():
            data = self._segments.manifest(segment_id) or self.remote.manifest(segment_id)
            packed = read_segment(self.remote, segment_id, manifest, data)
            self._keep(packed)
            files = packed.files
        else:  # a count of finished rollouts is no reason to bring all of them here
            files = read_files(self.remote, segment_id, manifest, reading.file_names(manifest, names))
        return reading.decode(files, manifest, names, f"{self.address}/segments/{segment_id}")

    def check_bytes(self, segment_id: str, manifest: Manifest) -> None:
        """Of the address itself, whatever the segment cache holds."""
        read_segment(self.remote, segment_id, manifest, b"")

    def refresh(self) -> None:
        self._ids |= dict.fromkeys(sorted(self.remote.segment_ids()))

    def reopened(self) -> Cache:
        return RemoteCache(self.remote, self._segments)

    def manifests(self, kind: Kind | None = None) -> list[tuple[str, Manifest]]:
        """As of a folder; those that are not here yet come several at a time."""
        missing = [id_ for id_ in self._visible() if id_ not in self._parsed]
        self._parsed |= zip(missing, in_parallel(self._read_manifest, missing), strict=True)
        return super().manifests(kind)

    def _keep(self, packed: Packed) -> None:
        """In the segment cache, which is a help and not a need: without space for it, segments come again."""
        try:
            self._segments.keep(packed)
        except WriteError as error:
            if not self._warned:
                print(f"ketchup-cache: warning: segments are not kept here: {error}", file=sys.stderr)
            self._warned = True

    def _read_manifest(self, segment_id: str) -> Manifest:
        data = self._segments.manifest(segment_id)
        if data is None:
            data = self.remote.manifest(segment_id)
            manifest = reading.parse_manifest(data, segment_id, f"{self.address}/manifests/{segment_id}.json")
            with suppress(WriteError):
                self._segments.keep_manifest(segment_id, data)
            return manifest
        return reading.parse_manifest(data, segment_id, self._segments.path)

    def _write(self, packed: Mapping[str, NDArray], describe: Callable[[Written], Manifest]) -> str:
        files = arrays.encode(packed)
        manifest = describe({name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()})
        whole = Packed(manifest.id, manifest.to_bytes(), files)
        self.remote.put([whole])
        self._ids[manifest.id] = None
        self._keep(whole)
        return manifest.id
