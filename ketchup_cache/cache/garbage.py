"""Delete what crashes have left behind (`ketchup-cache gc`). A cache only grows: segments are never deleted."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ketchup_cache.cache import disk as durable
from ketchup_cache.cache import segment_bytes as reading
from ketchup_cache.cache.cache import Cache
from ketchup_cache.console import printable, size_text
from ketchup_cache.errors import WriteError


@dataclass(frozen=True)
class GcReport:
    """`removed`: paths within the cache; with `dry_run`, those that would go. `kept`: garbage that is too young."""

    path: str
    removed: tuple[str, ...]
    bytes: int
    kept: int
    dry_run: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        verb = "would delete" if self.dry_run else "deleted"
        young = f"; {self.kept:,} younger ones stay, a writer may be at work on them" if self.kept else ""
        head = f"{self.path}: {verb} {len(self.removed):,} leftovers, {size_text(self.bytes)}{young}"
        return "\n".join(printable(line) for line in (head, *(f"  {name}" for name in self.removed)))


def collect(cache: Cache, *, hours: float = 24.0, dry_run: bool = False) -> GcReport:
    """Delete entries of tmp/ and watch/, and folders of segments/ without a manifest, untouched for so many hours.

    A commit renames its data to segments/ and right after that its manifest: the age must be longer than that takes,
    and than clocks of machines differ. Raises WriteError where deleting fails.
    """
    limit = time.time() - hours * 3600
    removed, size, kept = [], 0, 0
    for path in _garbage(cache.path):
        newest, weight = _touched(path)
        if newest > limit:
            kept += 1
            continue
        name = str(path.relative_to(cache.path))
        if not dry_run and not _delete(cache.path, path):
            continue
        removed.append(name)
        size += weight
    return GcReport(str(cache.path), tuple(removed), size, kept, dry_run)


def _garbage(root: Path) -> Iterator[Path]:
    for name in sorted(durable.list_folder(root / "tmp")):
        yield root / "tmp" / name
    notes = root / "watch"  # the living write theirs every few seconds
    for folder in sorted(notes.iterdir()) if notes.is_dir() and not notes.is_symlink() else ():
        if folder.is_dir() and not folder.is_symlink():
            yield from sorted(folder.iterdir())
    # folders first, manifests after: a segment that is committed in between is no garbage
    folders = sorted(durable.list_folder(root / "segments"))
    known = set(reading.segment_ids(root))
    for name in folders:
        if name not in known:
            yield root / "segments" / name


def _touched(path: Path) -> tuple[float, int]:
    """Time of the newest change in a folder (names, contents and renames), and its bytes."""
    newest, size = 0.0, 0
    for inner in (path, *path.rglob("*")) if path.is_dir() and not path.is_symlink() else (path,):
        with suppress(FileNotFoundError):
            status = os.lstat(inner)
            newest = max(newest, status.st_mtime, status.st_ctime)
            size += status.st_size if not inner.is_dir() else 0
    return newest, size


def _delete(root: Path, path: Path) -> bool:
    """Whether it went. A segment's folder leaves by one rename, and comes back where its manifest came meanwhile."""
    gone = path
    try:
        if path.parent.name == "segments":
            gone = root / "tmp" / uuid.uuid4().hex
            os.rename(path, gone)
            if path.name in reading.segment_ids(root):
                os.rename(gone, path)
                return False
        if gone.is_dir() and not gone.is_symlink():
            shutil.rmtree(gone)
        else:
            gone.unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise WriteError(f"{path}: can't be deleted ({error.strerror or error}); check your permissions") from error
    return True
