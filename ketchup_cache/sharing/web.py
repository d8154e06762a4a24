"""A cache behind a web server, read-only. Its folder manifests/ must be listed, as web servers do for a folder
without an index page (`python -m http.server`, nginx `autoindex on`, Apache `Options Indexes`)."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from collections.abc import Sequence

from ketchup_cache.cache import segment_bytes as reading
from ketchup_cache.errors import CacheError, WriteError
from ketchup_cache.sharing.base import KeyedRemote, Packed, persistently

TIMEOUT_S = 30.0
MAX_LISTING_BYTES = 2**26
_LINK = re.compile(rb"""href\s*=\s*["']?(?:[^"'\s>]*/)?([0-9a-f]{64}\.json)["'\s>]""", re.IGNORECASE)


class WebRemote(KeyedRemote):
    batch_bytes = 0

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def create(self) -> None:
        raise WriteError(f"{self.url}: web addresses are read-only; push to a path, s3:// or hf:// address")

    def segment_ids(self) -> list[str]:
        try:
            page = self._get("manifests/", MAX_LISTING_BYTES)
        except FileNotFoundError:
            raise CacheError(f"{self.url}/manifests/: is not listed; turn on folder listings in the server") from None
        return list(dict.fromkeys(reading.ids_among(name.decode() for name in _LINK.findall(page))))

    def put(self, batch: Sequence[Packed]) -> None:
        self.create()

    def _get(self, key: str, limit: int) -> bytes:
        def request() -> bytes:
            try:
                with urllib.request.urlopen(f"{self.url}/{key}", timeout=TIMEOUT_S) as answer:
                    data = bytes(answer.read(limit + 1))
                    declared = answer.headers.get("Content-Length")
                    if declared is not None and len(data) < min(int(declared), limit + 1):
                        raise ConnectionError("the connection was cut")
                    return data
            except urllib.error.HTTPError as error:
                error.close()
                if error.code in (404, 410):
                    raise FileNotFoundError(key) from None
                if error.code in (401, 403):
                    raise PermissionError(f"HTTP {error.code}") from None
                raise ConnectionError(f"HTTP {error.code}") from None

        return persistently(f"{self.url}/{key}", request)
