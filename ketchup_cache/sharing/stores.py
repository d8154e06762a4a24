"""Where a cache is: a folder, an object store, a web server, the Hub; and from an address to the store that serves it.

`ObjectStore`: S3, Google Cloud, Azure, through obstore. Objects appear whole or not at all. Every one is created only
if it is absent (`If-None-Match: *` on S3), data before the manifest, so that no writer ever replaces what another one
has published.
`WebStore`: a web server, read-only. It must list its folder manifests/, as servers do where there is no index page.
`HubStore`: a dataset repository of the Hugging Face Hub, hf://datasets/owner/name or …/name@revision. Data and
manifests of a batch go up in one commit, so a killed upload shows nothing. New repositories are private.
Requests over a network are tried again, and errors are one line without credentials.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from ketchup_cache.cache import segment_bytes
from ketchup_cache.cache.disk import FolderStore
from ketchup_cache.cache.segment_bytes import MARKER, MARKER_BYTES, KeyedStore, Packed, SegmentStore
from ketchup_cache.console import one_line
from ketchup_cache.errors import CacheError, KetchupError, WriteError

TRIES = 4
FIRST_PAUSE_S = 0.2
"""Before the second try; each later pause is four times as long."""
Value = TypeVar("Value")


def is_url(address: str | os.PathLike[str]) -> bool:
    return "://" in str(address)


def open_store(address: str | os.PathLike[str], license_id: str | None = None) -> SegmentStore:
    """The store at an address; nothing is asked of it yet.

    license_id: of a repository that is made on the Hub.
    Raises CacheError for an address that is not served, or that holds credentials; they are not repeated.
    """
    text = str(address)
    if not is_url(text):
        return FolderStore(Path(address).expanduser())
    scheme, _, rest = text.partition("://")
    if "@" in rest.partition("/")[0] or "?" in rest or "#" in rest or (scheme != "hf" and "@" in rest):
        todo = "give credentials as the store's own tools take them (AWS_ACCESS_KEY_ID, AWS_PROFILE, HF_TOKEN, …)"
        what = "an address must hold no user, password, token or query"
        raise CacheError(f"{scheme.split(':')[-1][:20]}://…: {what}; {todo}")
    if scheme == "hf":
        return HubStore(text, license_id)
    if scheme in SCHEMES and rest.strip("/"):
        return WebStore(text) if scheme.startswith("http") else ObjectStore(text)
    served = ", ".join(f"{name}://" for name in ("s3", "gs", "az", "hf", "https"))
    raise CacheError(f"{scheme.split(':')[-1][:20]}://: no such caches; give a path or one of {served}")


def open_existing(address: str | os.PathLike[str]) -> SegmentStore:
    """As `open_store`. Raises CacheError where there is no cache."""
    store = open_store(address)
    if not store.exists():
        if isinstance(store, FolderStore):
            raise store.no_cache()
        raise CacheError(f"{store.address}: no cache here; `ketchup-cache push CACHE {store.address}` makes one")
    return store


# -------------------------------------------------------------------------------------------------------- object stores

SCHEMES = ("s3", "s3a", "gs", "az", "abfs", "http", "https")
IDLE_S, REQUEST_S, DEADLINE_S = 30.0, 300.0, 900.0
"""How long a server may say nothing, a request may take, and a request may be tried again."""
TIMEOUTS = {"timeout": timedelta(seconds=REQUEST_S), "connect_timeout": timedelta(seconds=10)}
RETRIES = {"max_retries": 2, "retry_timeout": timedelta(seconds=60)}
"""Of the client, for one request; `persistently` comes on top of it."""
MAX_LISTING_BYTES = 2**26
_LINK = re.compile(rb"""href\s*=\s*["']?(?:[^"'\s>]*/)?([0-9a-f]{64}\.json)["'\s>]""", re.IGNORECASE)
_LISTING = re.compile(rb"<title>\s*(?:index of|directory listing)[^<]*manifests/?\s*</title>", re.IGNORECASE)
"""Of a folder without files."""


class ObjectStore(KeyedStore):
    batch_bytes = 0

    def __init__(self, address: str) -> None:
        """Raises CacheError where the client is not installed, or credentials are wanted that it can't read."""
        self.address = address.rstrip("/")
        self._client = open_client(self.address)

    def create(self) -> None:
        if not self.exists():
            self._create(MARKER, MARKER_BYTES)

    def segment_ids(self) -> list[str]:
        # a page that is no listing can read as one of nothing; a listing of the cache has the marker
        if not (found := self._listed("manifests")) and MARKER not in self._listed(None):
            raise CacheError(
                f"{self.address}: is not listed; what answers there is no object store, or hides its names"
            )
        return segment_bytes.ids_among(found)

    def _listed(self, folder: str | None) -> list[str]:
        with suppress(FileNotFoundError):
            listed = persistently(self.address, lambda: _plain(lambda: self._client.list_with_delimiter(folder)))
            return [entry["path"].rpartition("/")[2] for entry in listed["objects"]]
        return []

    def put(self, batch: Sequence[Packed]) -> None:
        for packed in batch:
            files = [(f"segments/{packed.segment_id}/{name}", data) for name, data in packed.files.items()]
            segment_bytes.in_parallel(lambda file: self._send(*file), files)
            self._send(f"manifests/{packed.segment_id}.json", packed.manifest)

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
        # in several parts it could not be conditional; a segment's files are far below the limit of one
        request = partial(self._client.put, key, data, mode="create", use_multipart=False)
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
            todo = "delete it (it is damaged) and push again"
            raise WriteError(f"{self.address}/{key}: is there already, with other bytes; {todo}")


class _SameHost(urllib.request.HTTPRedirectHandler):
    """A cache on one host must not make this machine ask another, which may be inside its own network."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if new.netloc != old.netloc or new.scheme not in (old.scheme, "https"):
            raise CacheError(f"{req.full_url}: leads to another host, {new.netloc[:100]}; give the address of that one")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class WebStore(KeyedStore):
    batch_bytes = 0

    def __init__(self, address: str) -> None:
        self.address, self._opener = address.rstrip("/"), urllib.request.build_opener(_SameHost)

    def create(self) -> None:
        raise WriteError(f"{self.address}: web addresses are read-only; push to a path, s3:// or hf:// address")

    def put(self, batch: Sequence[Packed]) -> None:
        self.create()

    def segment_ids(self) -> list[str]:
        """Those on the page that lists manifests/. Raises CacheError where the server answers with another page."""
        page = b""
        with suppress(FileNotFoundError):
            page = self._get("manifests/", MAX_LISTING_BYTES)
        names = [name.decode() for name in dict.fromkeys(_LINK.findall(page))]
        if not names and not _LISTING.search(page):
            raise CacheError(f"{self.address}/manifests/: is not listed; turn on folder listings in the server")
        return segment_bytes.ids_among(names)

    def _get(self, key: str, limit: int) -> bytes:
        def request() -> bytes:
            ends, data = time.monotonic() + REQUEST_S, b""
            try:
                with self._opener.open(f"{self.address}/{key}", timeout=IDLE_S) as answer:
                    while len(data) <= limit and (chunk := answer.read1(2**20)):
                        data += chunk
                        if time.monotonic() > ends:
                            raise TimeoutError(f"took more than {REQUEST_S:.0f} s")
                    return data[: limit + 1]
            except urllib.error.HTTPError as error:
                kinds = {404: FileNotFoundError, 401: PermissionError, 403: PermissionError}
                raise kinds.get(error.code, ConnectionError)(str(error)) from None

        return persistently(f"{self.address}/{key}", request)


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
    # without TLS
    plain = scheme in ("s3", "s3a") and os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
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


# -------------------------------------------------------------------------------------------------------------- the Hub

COMMIT_BYTES = 2**28
"""Segments are committed together up to this size: the Hub allows few commits an hour, and a batch is in memory."""
_ADDRESS = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([\w./-]+))?/?")
_README = """---
license: {license}
tags: [ketchup-cache, knowledge-distillation]
---

Rollouts of a language model and a frozen teacher's scores of every token, as a ketchup cache (Zarr v3).

    pip install ketchup-cache
    ketchup-cache info hf://datasets/{repo}
    ketchup-cache learn --student STUDENT --cache hf://datasets/{repo} --out run
"""


class HubStore(KeyedStore):
    batch_bytes = COMMIT_BYTES

    def __init__(self, address: str, license_id: str | None = None, api: Any = None) -> None:
        """license_id: of a repository that is made. api: stands in for the Hub in tests.

        Raises CacheError for an address that is no dataset.
        """
        if not (found := _ADDRESS.fullmatch(address)):
            raise CacheError(f"{address}: is not an address of a Hub data set, which is hf://datasets/owner/name")
        from huggingface_hub import HfApi

        self.address, self._repo, self._revision = address.rstrip("/"), found[1], found[2]
        self._place: dict[str, Any] = {"repo_type": "dataset", "revision": self._revision}
        self._license, self._api = license_id or "unknown", api or HfApi()

    def create(self) -> None:
        if self.exists():
            return
        make = partial(self._api.create_repo, self._repo, repo_type="dataset", private=True, exist_ok=True)
        persistently(self.address, make, writing=True)
        files = {"README.md": _README.format(license=self._license, repo=self._repo).encode(), MARKER: MARKER_BYTES}
        with suppress(FileNotFoundError):
            self._get("README.md", 0)
            del files["README.md"]  # there is one
        self._commit(files, "Make a ketchup cache")

    def segment_ids(self) -> list[str]:
        from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

        def names() -> list[str]:
            with suppress(EntryNotFoundError, RepositoryNotFoundError):
                tree = self._api.list_repo_tree(self._repo, path_in_repo="manifests", **self._place)
                return [entry.path.rpartition("/")[2] for entry in tree]
            return []

        return segment_bytes.ids_among(persistently(self.address, names))

    def put(self, batch: Sequence[Packed]) -> None:
        if self._revision:
            raise WriteError(f"{self.address}: a revision is read-only; push to {self.address.partition('@')[0]}")
        files = {f"segments/{p.segment_id}/{name}": data for p in batch for name, data in p.files.items()}
        files |= {f"manifests/{p.segment_id}.json": p.manifest for p in batch}
        self._commit(files, f"{len(batch)} segments")

    def _commit(self, files: dict[str, bytes], message: str) -> None:
        from huggingface_hub import CommitOperationAdd

        def send() -> None:
            # an operation remembers what it has uploaded: a new try needs new ones
            operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=data) for name, data in files.items()]
            self._api.create_commit(self._repo, operations, commit_message=message, repo_type="dataset")

        try:
            persistently(self.address, send, writing=True)
        except FileNotFoundError:
            raise WriteError(f"{self.address}: no such repository, or no right to write to it") from None

    def _get(self, key: str, limit: int) -> bytes:
        """Through a folder of its own, not the Hub client's cache, which would keep every segment a second time."""
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

        def request() -> bytes:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    path = self._api.hf_hub_download(self._repo, key, local_dir=folder, **self._place)
                except LocalEntryNotFoundError as error:  # no connection: not an answer about the file
                    raise ConnectionError(str(error)) from None
                except (EntryNotFoundError, RepositoryNotFoundError):
                    raise FileNotFoundError(key) from None
                with Path(path).open("rb") as file:
                    return file.read(limit + 1)

        return persistently(f"{self.address}/{key}", request)


# ------------------------------------------------------------------------------------------------------- over a network


def persistently(what: str, call: Callable[[], Value], *, writing: bool = False) -> Value:
    """Try a request again while the connection fails; what the server answers for good is raised at once.

    Raises FileNotFoundError and FileExistsError as they are, WriteError or CacheError for everything else.
    """
    failed, ends = WriteError if writing else CacheError, time.monotonic() + DEADLINE_S
    for attempt in range(TRIES):
        try:
            return call()
        except (FileNotFoundError, FileExistsError, KetchupError, ImportError):
            raise
        except Exception as error:  # clients raise errors of many libraries
            status = getattr(getattr(error, "response", None), "status_code", None)
            if isinstance(error, PermissionError) or status in (401, 403):
                todo = "check your credentials and rights"
                raise failed(f"{what}: access is refused ({reason(error)}); {todo}") from None
            if attempt == TRIES - 1 or time.monotonic() > ends:
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
