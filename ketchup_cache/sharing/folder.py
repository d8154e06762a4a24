"""A cache in a folder, on this machine or a shared file system."""

from __future__ import annotations

import os
import stat
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ketchup_cache.cache import disk as durable
from ketchup_cache.cache import segment_bytes as reading
from ketchup_cache.cache.cache import open_cache
from ketchup_cache.errors import CacheError, WriteError
from ketchup_cache.sharing.base import Packed


class LocalRemote:
    batch_bytes = 0

    def __init__(self, path: Path) -> None:
        self.path, self.url = path, str(path)

    def exists(self) -> bool:
        if not (self.path / durable.MARKER).exists():
            return False
        open_cache(self.path)
        return True

    def create(self) -> None:
        open_cache(self.path, create=True)

    def segment_ids(self) -> list[str]:
        return reading.segment_ids(self.path)

    def manifest(self, segment_id: str) -> bytes:
        return durable.read_file(self.path / "manifests" / f"{segment_id}.json", reading.MAX_MANIFEST_BYTES)

    def file(self, segment_id: str, name: str, length: int) -> bytes:
        return durable.read_file(self.path / "segments" / segment_id / name, length)

    def put(self, batch: Sequence[Packed]) -> None:
        for packed in batch:
            durable.publish(self.path, packed.segment_id, packed.files, packed.manifest)


class LocalBoard:
    """Notes (sharing/board.py) as files under watch/. They are whole or absent, and need not survive a power cut."""

    def __init__(self, path: Path, limit: int) -> None:
        self.url, self._root, self._limit = str(path), path / "watch", limit

    def list(self, folder: str) -> dict[str, float]:
        found = {}
        for name in durable.list_folder(self._root / folder):
            if not name.endswith(".json"):
                continue
            # opened, since only that asks a network file system for the time as it is now
            with suppress(OSError), _opened(self._root / folder / name) as file:
                status = os.fstat(file)
                if stat.S_ISREG(status.st_mode):
                    found[name] = status.st_mtime
        return found

    def read(self, name: str) -> bytes | None:
        with suppress(OSError), _opened(self._root / name) as file:
            if stat.S_ISREG(os.fstat(file).st_mode):
                return os.read(file, self._limit + 1)
        return None

    def create(self, name: str, data: bytes) -> bool:
        with self._staged(name, data) as staged:
            try:
                os.link(staged, self._root / name)
            except FileExistsError:
                # over a network, a link that was made may be reported as one that was there
                return os.stat(staged).st_nlink == 2
            return True

    def write(self, name: str, data: bytes) -> None:
        with self._staged(name, data) as staged:
            os.replace(staged, self._root / name)

    def delete(self, name: str) -> None:
        try:
            (self._root / name).unlink(missing_ok=True)
        except OSError as error:
            raise WriteError(f"{self._root / name}: can't be deleted ({error.strerror or error})") from None

    @contextmanager
    def _staged(self, name: str, data: bytes) -> Iterator[Path]:
        """A file with the note, to be moved to its name; gone afterwards."""
        folder = (self._root / name).parent
        staged = folder / f".{uuid.uuid4().hex}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            staged.write_bytes(data)
            yield staged
        except OSError as error:
            raise WriteError(
                f"{folder}: can't write ({error.strerror or error}); scoring for others needs a folder you may write to"
            ) from None
        finally:
            with suppress(OSError):
                staged.unlink(missing_ok=True)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A named pipe would block at open, a link could lead anywhere. Raises OSError."""
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield file
    finally:
        os.close(file)


def folder_of(address: str) -> Path:
    """The folder that a path or a file:// address means. Raises CacheError for another machine's."""
    if not address.startswith("file://"):
        return Path(address)
    from urllib.parse import unquote, urlsplit

    parts = urlsplit(address)
    if parts.netloc not in ("", "localhost"):
        raise CacheError(f"file://{parts.netloc}: means a folder of another machine; give the path where it is mounted")
    return Path(unquote(parts.path))
