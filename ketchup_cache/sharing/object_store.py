"""A cache in an object store, through obstore: S3, Google Cloud, Azure, or memory.

Objects appear whole or not at all. Every one is created only if it is absent (`If-None-Match: *` on S3), data before
the manifest, so that no writer ever replaces what another one has published.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ketchup_cache.cache import disk as durable
from ketchup_cache.cache import segment_bytes as reading
from ketchup_cache.errors import CacheError, WriteError
from ketchup_cache.sharing.base import MARKER_BYTES, KeyedRemote, Packed, in_parallel, persistently

if TYPE_CHECKING:
    from obstore.store import ObjectStore

SCHEMES = ("s3", "s3a", "gs", "az", "abfs", "memory")
"""Addresses that are served. memory:// lasts as long as the process: for tests and trials."""
TIMEOUTS = {"timeout": timedelta(seconds=300), "connect_timeout": timedelta(seconds=10)}
RETRIES = {"max_retries": 2, "retry_timeout": timedelta(seconds=60)}
"""Of the client, for one request; `persistently` comes on top of it."""

Value = TypeVar("Value")


class ObjectRemote(KeyedRemote):
    batch_bytes = 0

    def __init__(self, url: str) -> None:
        """Raises CacheError where the client is not installed, or credentials are wanted that it can't read."""
        self.url = url.rstrip("/")
        self._store = _open_store(self.url)

    def create(self) -> None:
        if not self.exists():
            self._create(durable.MARKER, MARKER_BYTES)

    def segment_ids(self) -> list[str]:
        def names() -> list[str]:
            found = self._store.list_with_delimiter("manifests")["objects"]
            return [entry["path"].rpartition("/")[2] for entry in found]

        try:
            return reading.ids_among(persistently(self.url, lambda: _plain(names)))
        except FileNotFoundError:
            return []

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

    def _get(self, key: str, limit: int) -> bytes:
        """More than `limit` bytes are enough to notice a longer object: the rest of it is never loaded."""

        def request() -> bytes:
            answer = self._store.get(key)
            if answer.meta["size"] <= limit:
                return bytes(answer.bytes())
            data = b""
            for chunk in answer.stream(min_chunk_size=1):
                data += bytes(chunk)
                if len(data) > limit:
                    break
            return data[: limit + 1]

        return persistently(f"{self.url}/{key}", lambda: _plain(request))

    def _create(self, key: str, data: bytes) -> bool:
        """Put an object where there is none; whether this call made it."""

        def request() -> None:
            # in several parts it could not be conditional; a segment's files are far below the limit of one
            self._store.put(key, data, mode="create", use_multipart=False)

        try:
            persistently(f"{self.url}/{key}", lambda: _plain(request), writing=True)
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


def _plain(call: Callable[[], Value]) -> Value:
    """Raise what the client raises as the errors of Python that mean the same, their first line only."""
    from obstore import exceptions

    try:
        return call()
    except exceptions.BaseError as error:
        # the rest is a dump of the client's structures, request headers among them
        text = str(error).partition("\n")[0]
        kinds = {
            exceptions.AlreadyExistsError: FileExistsError,
            exceptions.PreconditionError: FileExistsError,
            exceptions.NotFoundError: FileNotFoundError,
            exceptions.PermissionDeniedError: PermissionError,
            exceptions.UnauthenticatedError: PermissionError,
        }
        raise kinds.get(type(error), ConnectionError)(text) from None


_memory: dict[str, ObjectStore] = {}


def _open_store(url: str) -> Any:
    """The client for an address, with the prefix of the address in front of all keys."""
    scheme, _, rest = url.partition("://")
    try:
        from obstore.store import MemoryStore, from_url
    except ImportError:
        raise CacheError(f"{url}: {scheme}:// needs the package obstore: pip install 'ketchup-cache[s3]'") from None
    if scheme == "memory":
        return _memory.setdefault(rest, MemoryStore())
    options: dict[str, Any] = {"client_options": TIMEOUTS, "retry_config": RETRIES}
    if scheme in ("s3", "s3a"):
        if os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://"):  # a store of one's own, without TLS
            options["client_options"] = {**TIMEOUTS, "allow_http": True}
        if provider := _aws_profile(url):
            options["credential_provider"] = provider
    try:
        return from_url(url, **options)
    except Exception as error:  # errors of the client about the address or the environment
        raise CacheError(f"{url}: can't be opened ({str(error).partition(chr(10))[0][:200]})") from None


def _aws_profile(url: str) -> Any:
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
    except ImportError:
        if not profile:
            return None
        raise CacheError(f"{url}: AWS_PROFILE is read by the package boto3: pip install boto3") from None
    except Exception as error:
        if not profile:
            return None
        raise CacheError(f"{url}: profile {profile!r} can't be used ({str(error)[:200]})") from None
