"""A cache in an object store (S3, Google Cloud, Azure), or read-only behind a web server, through obstore.

Objects appear whole or not at all. Every one is created only if it is absent (`If-None-Match: *` on S3), data before
the manifest, so that no writer ever replaces what another one has published.
A web server must list its folder manifests/, as servers do for a folder without an index page.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from ketchup_cache.cache.segment_bytes import MARKER, MARKER_BYTES, KeyedStore, Packed, ids_among, in_parallel
from ketchup_cache.console import one_line
from ketchup_cache.errors import CacheError, WriteError
from ketchup_cache.sharing.network import persistently

SCHEMES = ("s3", "s3a", "gs", "az", "abfs", "http", "https")
TIMEOUTS = {"timeout": timedelta(seconds=300), "connect_timeout": timedelta(seconds=10)}
RETRIES = {"max_retries": 2, "retry_timeout": timedelta(seconds=60)}
"""Of the client, for one request; `persistently` comes on top of it."""
MAX_LISTING_BYTES = 2**26
_LINK = re.compile(rb"""href\s*=\s*["']?(?:[^"'\s>]*/)?([0-9a-f]{64}\.json)["'\s>]""", re.IGNORECASE)
_LISTING = re.compile(rb"index of|directory listing", re.IGNORECASE)
Value = TypeVar("Value")


class ObjectStore(KeyedStore):
    batch_bytes = 0

    def __init__(self, address: str) -> None:
        """Raises CacheError where the client is not installed, or credentials are wanted that it can't read."""
        self.address = address.rstrip("/")
        self._web = address.startswith("http")
        self._client = open_client(self.address)

    def create(self) -> None:
        if self._web:
            raise WriteError(f"{self.address}: web addresses are read-only; push to a path, s3:// or hf:// address")
        if not self.exists():
            self._create(MARKER, MARKER_BYTES)

    def segment_ids(self) -> list[str]:
        def names() -> list[str]:
            found = self._client.list_with_delimiter("manifests")["objects"]
            return [entry["path"].rpartition("/")[2] for entry in found]

        try:
            return ids_among(self._linked() if self._web else persistently(self.address, lambda: _plain(names)))
        except FileNotFoundError:
            return []

    def put(self, batch: Sequence[Packed]) -> None:
        if self._web:
            self.create()
        for packed in batch:
            files = [(f"segments/{packed.segment_id}/{name}", data) for name, data in packed.files.items()]
            in_parallel(lambda file: self._send(*file), files)
            self._send(f"manifests/{packed.segment_id}.json", packed.manifest)

    def _linked(self) -> list[str]:
        """Names on the page that lists manifests/. Raises CacheError where the server answers with another page."""
        page = b""
        with suppress(FileNotFoundError):
            page = self._get("manifests/", MAX_LISTING_BYTES)
        names = [name.decode() for name in dict.fromkeys(_LINK.findall(page))]
        if not names and not _LISTING.search(page):
            raise CacheError(f"{self.address}/manifests/: is not listed; turn on folder listings in the server")
        return names

    def _get(self, key: str, limit: int) -> bytes:
        """More than `limit` bytes are enough to notice a longer object: the rest of it is never loaded."""

        def request() -> bytes:
            answer, data = self._client.get(key), b""
            if answer.meta["size"] <= limit:
                return bytes(answer.bytes())
            for chunk in answer.stream(min_chunk_size=1):
                data += bytes(chunk)
                if len(data) > limit:
                    break
            return data[: limit + 1]

        return persistently(f"{self.address}/{key}", lambda: _plain(request))

    def _create(self, key: str, data: bytes) -> bool:
        """Put an object where there is none; whether this call made it."""

        def request() -> None:
            # in several parts it could not be conditional; a segment's files are far below the limit of one
            self._client.put(key, data, mode="create", use_multipart=False)

        try:
            persistently(f"{self.address}/{key}", lambda: _plain(request), writing=True)
        except FileExistsError:
            return False
        except FileNotFoundError:
            raise WriteError(f"{self.address}: no such bucket; make it first") from None
        return True

    def _send(self, key: str, data: bytes) -> None:
        """An object that is there already must hold the same bytes: names are hashes of what they hold."""
        if not self._create(key, data) and self._must_get(key, len(data)) != data:
            raise WriteError(
                f"{self.address}/{key}: is there already, with other bytes; delete it (it is damaged) and push again"
            )


def _plain(call: Callable[[], Value]) -> Value:
    """Raise what the client raises as the errors of Python that mean the same, their first line only."""
    from obstore import exceptions as of

    try:
        return call()
    except of.BaseError as error:
        # the rest is a dump of the client's structures, request headers among them
        text = str(error).partition("\n")[0]
        kinds: dict[type, type[OSError]] = dict.fromkeys((of.AlreadyExistsError, of.PreconditionError), FileExistsError)
        kinds |= dict.fromkeys((of.PermissionDeniedError, of.UnauthenticatedError), PermissionError)
        kinds[of.NotFoundError] = FileNotFoundError
        raise kinds.get(type(error), ConnectionError)(text) from None


def open_client(address: str) -> Any:
    """The client for an address, with the prefix of the address in front of all keys. Raises CacheError."""
    scheme = address.partition("://")[0]
    try:
        from obstore.store import from_url
    except ImportError:
        raise CacheError(f"{address}: {scheme}:// needs the package obstore: pip install 'ketchup-cache[s3]'") from None
    own = scheme in ("s3", "s3a") and os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
    plain = own or scheme == "http"  # without TLS
    options: dict[str, Any] = {"client_options": {**TIMEOUTS, "allow_http": plain}, "retry_config": RETRIES}
    if scheme in ("s3", "s3a") and (provider := _aws_profile(address)):
        options["credential_provider"] = provider
    try:
        return from_url(address, **options)
    except Exception as error:  # errors of the client about the address or the environment
        raise CacheError(f"{address}: can't be opened ({one_line(str(error).partition(chr(10))[0])})") from None


def _aws_profile(address: str) -> Any:
    """Credentials of ~/.aws, which the client leaves to boto3. None where the environment holds some, or there are
    none. Raises CacheError where a profile is asked for that can't be read.
    """
    profile = os.environ.get("AWS_PROFILE")
    if "AWS_ACCESS_KEY_ID" in os.environ or not (profile or Path("~/.aws").expanduser().exists()):
        return None
    try:
        from boto3.session import Session
        from obstore.auth.boto3 import Boto3CredentialProvider

        return Boto3CredentialProvider(Session(profile_name=profile))
    except Exception as error:
        if not profile:
            return None
        missing = isinstance(error, ImportError)
        why = "is read by the package boto3: pip install boto3" if missing else f"can't be used ({one_line(error)})"
        raise CacheError(f"{address}: profile {profile!r} {why}") from None
