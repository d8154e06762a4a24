"""A cache at an address, used like one on disk: segments come when they are needed and stay in a local segment cache.

The segment cache ($KETCHUP_CACHE_HOME, else ~/.cache/ketchup-cache) is shared by all addresses and processes: segments
are named by what they hold. It keeps the most recently used ones up to $KETCHUP_CACHE_SIZE (as 500MB; default 20GB).
There are no locks: a segment that another process drops while it is read is fetched again.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ketchup_cache.cache.cache import Cache
from ketchup_cache.cache.disk import FolderStore, delete, list_folder, weigh
from ketchup_cache.cache.index_file import home
from ketchup_cache.cache.segment_bytes import Packed, SegmentStore, read_manifest, read_segment
from ketchup_cache.console import warn
from ketchup_cache.errors import CacheError, ConfigError, WriteError
from ketchup_cache.files import write_file
from ketchup_cache.sharing.stores import is_url, open_existing, open_store

SIZE_VARIABLE = "KETCHUP_CACHE_SIZE"
DEFAULT_SIZE = "20GB"
LEFTOVERS_S = 24 * 3600
"""Age at which unfinished work in the segment cache is taken for that of a dead process."""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def open_cache(address: str | os.PathLike[str], *, create: bool = False) -> Cache:
    """Open the cache in a folder or at an address; with `create`, make one where there is none.

    Raises CacheError where there is none, where it is of a newer format version, or where the address can't be
    reached or holds credentials; ConfigError where $KETCHUP_CACHE_SIZE is no size; WriteError.
    """
    store = open_store(address) if create else open_existing(address)
    if create:
        store.create()
    if not is_url(address):
        return Cache(store)
    text = os.environ.get(SIZE_VARIABLE) or DEFAULT_SIZE
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper())
    if not found:
        raise ConfigError([f"${SIZE_VARIABLE} must be a size such as 500MB or 20GB, not {text!r:.40}"])
    return Cache(MirroredStore(store, home(), int(float(found[1]) * _UNITS[found[2]])))


class MirroredStore:
    """A store elsewhere (`SegmentStore`) whose segments are kept in a folder, the most recently used ones up to a size.

    What is committed goes to the store at once. Only what the store itself holds counts: damage to the kept copy, and
    eviction by another process, cost a fetch.
    """

    def __init__(self, source: SegmentStore, path: Path, limit: int) -> None:
        self.source, self.address, self.batch_bytes = source, source.address, source.batch_bytes
        self.exists, self.create, self.segment_ids = source.exists, source.create, source.segment_ids
        self.index = source.index
        self._kept, self._limit, self._warned = FolderStore(path), limit, False
        self._lock = threading.Lock()
        self._last: Packed | None = None

    def manifest(self, segment_id: str) -> bytes:
        with suppress(CacheError):
            return read_manifest(self._kept, segment_id)[1]
        data = read_manifest(self.source, segment_id)[1]
        with suppress(WriteError):
            write_file(self._kept.path / "manifests" / f"{segment_id}.json", data)
        return data

    def file(self, segment_id: str, name: str, length: int) -> bytes:
        with self._lock:  # the files of one segment are asked for by several threads
            if self._last is None or self._last.segment_id != segment_id:
                self._last = self._whole(segment_id)
            return self._last.files[name]

    def _whole(self, segment_id: str) -> Packed:
        """The kept copy, if it is whole; else the segment comes from the store, and is kept."""
        folder = self._kept.path / "segments" / segment_id
        with suppress(CacheError, OSError):
            os.utime(folder)  # used now
            return read_segment(self._kept, segment_id, *read_manifest(self._kept, segment_id))
        packed = read_segment(self.source, segment_id, *read_manifest(self.source, segment_id))
        self._keep(packed)
        return packed

    def put(self, batch: Sequence[Packed]) -> None:
        self.source.put(batch)
        for packed in batch:
            self._keep(packed)

    def _keep(self, packed: Packed) -> None:
        """The segment cache is a help and not a need: without space for it, segments come again."""
        try:
            self._kept.put([packed])
            self._shrink(packed.segment_id)
        except WriteError as error:
            if not self._warned:
                warn(f"segments are not kept here: {error}")
            self._warned = True

    def _shrink(self, newest: str) -> None:
        """Drop the least recently used segments beyond the limit, each at once: no reader takes half of one for all."""
        root = self._kept.path
        for left in (root / "tmp" / name for name in list_folder(root / "tmp")):  # of processes that were killed
            with suppress(OSError, WriteError):
                if left.stat().st_mtime < time.time() - LEFTOVERS_S:
                    delete(root, left)
        held = []
        for folder in (root / "segments" / name for name in list_folder(root / "segments")):
            with suppress(OSError):  # dropped by another process meanwhile
                held.append((folder.stat().st_mtime_ns, folder, weigh(folder)[1]))
        total = sum(size for _, _, size in held)
        for _, folder, size in sorted(held):
            if total > self._limit and folder.name != newest:
                with suppress(WriteError):
                    delete(root, folder, committed=True)
                total -= size
