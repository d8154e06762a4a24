"""A cache in a folder, on this machine or a shared file system."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ketchup_cache.cache import disk as durable
from ketchup_cache.cache import segment_bytes as reading
from ketchup_cache.cache.cache import open_cache
from ketchup_cache.errors import CacheError
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


def folder_of(address: str) -> Path:
    """The folder that a path or a file:// address means. Raises CacheError for another machine's."""
    if not address.startswith("file://"):
        return Path(address)
    from urllib.parse import unquote, urlsplit

    parts = urlsplit(address)
    if parts.netloc not in ("", "localhost"):
        raise CacheError(f"file://{parts.netloc}: means a folder of another machine; give the path where it is mounted")
    return Path(unquote(parts.path))
