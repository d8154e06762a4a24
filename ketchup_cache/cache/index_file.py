"""All manifests of a cache in one file, so that opening it is one read and not one for each segment.

`manifests.jsonl` holds in each line a manifest as it is stored. It lies in the cache; of one that can't be written, or
is at an address, in the user's own folder. Nobody needs it and nobody believes it: a line is the manifest of the id
that it hashes to, if that is listed, and is checked as one that comes from its own file. What is torn, stale or forged
hashes to no listed id, and costs reads of single files. So it is written without locks, aside, and renamed.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ketchup_cache.cache.disk import FolderStore
from ketchup_cache.cache.segment_bytes import SegmentStore, in_parallel
from ketchup_cache.errors import CacheError, WriteError
from ketchup_cache.files import read_small, write_file

HOME_VARIABLE = "KETCHUP_CACHE_HOME"
FEW, SHARE = 32, 16
"""So many manifests, and one in so many of all, are read from files of their own before the file is written anew. What
is ever written is then at most 17 times the last file."""
LINE_BYTES, MAX_BYTES = 2**12, 2**28
"""Of a manifest, on average, and of the file, at most. A longer file is not read."""


def home() -> Path:
    """The user's folder for what is kept here of caches elsewhere."""
    # a user without a home folder opens caches, too
    return Path(os.path.expanduser(os.environ.get(HOME_VARIABLE) or "~/.cache/ketchup-cache"))


def read_all(store: SegmentStore, ids: Sequence[str], listed: bool) -> dict[str, bytes]:
    """The bytes of these manifests. listed: they are all that there are, which the file then holds, if it can be
    written.

    Raises CorruptError where one is missing, CacheError where the place can't be reached.
    """
    wanted, limit, own = set(ids), min(LINE_BYTES * len(ids), MAX_BYTES), _own_file(store)
    found: dict[str, bytes] = {}
    for read in (lambda: read_small(own, limit), lambda: store.index(limit)):
        with suppress(CacheError, OSError):
            for line in io.BytesIO(read() if len(wanted) > FEW else b""):
                if (id_ := hashlib.sha256(data := line.rstrip(b"\n")).hexdigest()) in wanted:
                    found[id_] = data
                    wanted.remove(id_)
    alone = [id_ for id_ in ids if id_ in wanted]
    found |= zip(alone, in_parallel(store.manifest, alone), strict=True)
    if listed and len(alone) > FEW + len(ids) // SHARE:
        text = b"".join(data + b"\n" for data in found.values() if b"\n" not in data)
        for path in [store.path / store.INDEX, own] if isinstance(store, FolderStore) else [own]:
            with suppress(WriteError):
                write_file(path, text)
                break
    return found


def _own_file(store: SegmentStore) -> Path:
    place = store.address if "://" in store.address else os.path.realpath(store.address)
    return home() / "indexes" / f"{hashlib.sha256(place.encode()).hexdigest()}.jsonl"
