"""A cache in an object store, through fsspec: S3, Google Cloud, Azure, or memory.

Objects appear whole or not at all. Every one is created only if it is absent (`If-None-Match: *` on S3), data before
the manifest, so that no writer ever replaces what another one has published.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ketchup_cache.errors import CacheError, CorruptError, WriteError
from ketchup_cache.remote.base import MARKER_BYTES, Packed, in_parallel, persistently
from ketchup_cache.store import durable, reading

EXTRAS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "memory": ""}
"""Addresses that are served, and the package each needs."""


class ObjectRemote:
    batch_bytes = 0

    def __init__(self, url: str) -> None:
        """Raises CacheError where the client for such addresses is not installed."""
        self.url = url.rstrip("/")
        scheme = url.partition("://")[0]
        self._fs, self._root = _filesystem(scheme, self.url)

    def exists(self) -> bool:
        try:
            data = self._get(durable.MARKER, reading.MAX_MARKER_BYTES)
        except FileNotFoundError:
            return False
        reading.parse_marker(data, f"{self.url}/{durable.MARKER}")
        return True

    def create(self) -> None:
        if not self.exists():
            self._create(durable.MARKER, MARKER_BYTES)

    def segment_ids(self) -> list[str]:
        def names() -> list[str]:
            self._fs.invalidate_cache()
            return [str(path).rpartition("/")[2] for path in self._fs.ls(f"{self._root}/manifests", detail=False)]

        try:
            return reading.ids_among(persistently(self.url, names))
        except FileNotFoundError:
            return []

    def manifest(self, segment_id: str) -> bytes:
        return self._must_get(f"manifests/{segment_id}.json", reading.MAX_MANIFEST_BYTES)

    def file(self, segment_id: str, name: str, length: int) -> bytes:
        return self._must_get(f"segments/{segment_id}/{name}", length)

    def put(self, batch: Sequence[Packed]) -> None:
        for packed in batch:
            files = {f"segments/{packed.segment_id}/{name}": data for name, data in packed.files.items()}

            def send(key: str, files: dict[str, bytes] = files) -> None:
                if not self._create(key, files[key]):
                    self._confirm(key, files[key])

            in_parallel(send, list(files))
            manifest = f"manifests/{packed.segment_id}.json"
            if not self._create(manifest, packed.manifest):
                self._confirm(manifest, packed.manifest)

    def _must_get(self, key: str, limit: int) -> bytes:
        try:
            return self._get(key, limit)
        except FileNotFoundError:
            raise CorruptError(f"{self.url}/{key}: is missing") from None

    def _get(self, key: str, limit: int) -> bytes:
        """One byte more than `limit` at most, so that a longer object is noticed and never loaded."""
        path = f"{self._root}/{key}"
        return persistently(f"{self.url}/{key}", lambda: bytes(self._fs.cat_file(path, start=0, end=limit + 1)))

    def _create(self, key: str, data: bytes) -> bool:
        """Put an object where there is none; whether this call made it."""
        path = f"{self._root}/{key}"
        try:
            persistently(f"{self.url}/{key}", lambda: self._fs.pipe_file(path, data, mode="create"), writing=True)
        except FileExistsError:
            return False
        except FileNotFoundError:
            raise WriteError(f"{self.url}: no such bucket; make it first") from None
        return True

    def _confirm(self, key: str, data: bytes) -> None:
        """An object that is there already must hold the same bytes: names are hashes of what they hold."""
        if self._must_get(key, len(data)) != data:
            raise WriteError(
                f"{self.url}/{key}: is there already, with other bytes; delete it (it is damaged) and push again"
            )


def _filesystem(scheme: str, url: str) -> tuple[Any, str]:
    import fsspec  # type: ignore[import-untyped]

    try:
        fs = fsspec.filesystem(scheme, use_listings_cache=False)
    except ImportError:
        package = EXTRAS[scheme]
        extra = "pip install 'ketchup-cache[s3]'" if package == "s3fs" else f"pip install {package}"
        raise CacheError(f"{url}: {scheme}:// needs the package {package}: {extra}") from None
    return fs, str(fs._strip_protocol(url)).rstrip("/")
