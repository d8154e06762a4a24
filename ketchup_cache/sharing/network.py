"""What stores over a network have in common: tries again, one-line errors without credentials, files by key."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import TypeVar

from ketchup_cache.cache.segment_bytes import MARKER, MAX_MANIFEST_BYTES, MAX_MARKER_BYTES, check_marker
from ketchup_cache.console import one_line
from ketchup_cache.errors import CacheError, CorruptError, KetchupError, WriteError

TRIES = 4
FIRST_PAUSE_S = 0.2
"""Before the second try; each later pause is four times as long."""
Value = TypeVar("Value")


class KeyedStore:
    """The reading half of a `SegmentStore` that finds files by key: `manifests/ID.json`, `segments/ID/NAME`."""

    address: str

    def _get(self, key: str, limit: int) -> bytes:
        """At most `limit` + 1 bytes of a file. Raises FileNotFoundError where it is missing."""
        raise NotImplementedError

    def exists(self) -> bool:
        try:
            check_marker(self._get(MARKER, MAX_MARKER_BYTES), f"{self.address}/{MARKER}")
        except FileNotFoundError:
            return False
        return True

    def manifest(self, segment_id: str) -> bytes:
        return self._must_get(f"manifests/{segment_id}.json", MAX_MANIFEST_BYTES)

    def file(self, segment_id: str, name: str, length: int) -> bytes:
        return self._must_get(f"segments/{segment_id}/{name}", length)

    def _must_get(self, key: str, limit: int) -> bytes:
        try:
            return self._get(key, limit)
        except FileNotFoundError:
            raise CorruptError(f"{self.address}/{key}: is missing") from None


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
    """An error of a client in one line, without credentials or signed queries."""
    return one_line(scrub(one_line(error, 10_000)))


def scrub(text: str) -> str:
    """Cut `user:password@` and `?query` out of every address in a text."""
    text = re.sub(r"(\w+://)[^/\s@'\"]*@", r"\1", text)
    return re.sub(r"((?:\w+://|/)[^\s?'\"]*)\?[^\s'\")]*", r"\1", text)
