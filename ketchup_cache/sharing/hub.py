"""A cache in a dataset repository of the Hugging Face Hub: hf://datasets/owner/name or …/name@revision.

Data goes up in one commit, manifests and the dataset card in a later one. New repositories are private.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ketchup_cache.cache import disk as durable
from ketchup_cache.cache import segment_bytes as reading
from ketchup_cache.cache.manifest import Manifest
from ketchup_cache.errors import CacheError, WriteError
from ketchup_cache.sharing.base import MARKER_BYTES, KeyedRemote, Packed, persistently, read_manifest
from ketchup_cache.sharing.card import MARK, card

if TYPE_CHECKING:
    from huggingface_hub import HfApi

COMMIT_BYTES = 2**28
"""Segments are committed together up to this size: the Hub allows few commits an hour, and a batch is in memory."""
_ADDRESS = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@([\w./-]+))?/?")


class HubRemote(KeyedRemote):
    batch_bytes = COMMIT_BYTES

    def __init__(self, url: str, api: HfApi | None = None, license_id: str | None = None) -> None:
        """api: stands in for the Hub in tests. Raises CacheError for an address that is no dataset."""
        if not (found := _ADDRESS.fullmatch(url)):
            raise CacheError(f"{url}: is not an address of a Hub data set, which is hf://datasets/owner/name")
        self.url, self._repo, self._revision = url.rstrip("/"), found[1], found[2]
        self._license = license_id
        self._known: dict[str, Manifest] = {}
        if api is None:
            from huggingface_hub import HfApi

            api = HfApi()
        self._api = api

    def create(self) -> None:
        if self.exists():
            return

        def make() -> None:
            self._api.create_repo(self._repo, repo_type="dataset", private=True, exist_ok=True)

        persistently(self.url, make, writing=True)
        self._commit({durable.MARKER: MARKER_BYTES}, "Make a ketchup cache")

    def segment_ids(self) -> list[str]:
        from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

        def names() -> list[str]:
            try:
                tree = self._api.list_repo_tree(
                    self._repo, path_in_repo="manifests", repo_type="dataset", revision=self._revision
                )
                return [entry.path.rpartition("/")[2] for entry in tree]
            except (EntryNotFoundError, RepositoryNotFoundError):
                raise FileNotFoundError(self._repo) from None

        try:
            return reading.ids_among(persistently(self.url, names))
        except FileNotFoundError:
            return []

    def put(self, batch: Sequence[Packed]) -> None:
        if self._revision:
            raise WriteError(f"{self.url}: a revision is read-only; push to {self.url.partition('@')[0]}")
        data = {f"segments/{p.segment_id}/{name}": content for p in batch for name, content in p.files.items()}
        self._commit(data, f"Data of {len(batch)} segments")
        manifests = {f"manifests/{p.segment_id}.json": p.manifest for p in batch}
        self._commit(manifests | self._card(batch), f"{len(batch)} segments")

    def _card(self, batch: Sequence[Packed]) -> dict[str, bytes]:
        """README.md; nothing where somebody wrote one by hand."""
        try:
            before = self._get("README.md", reading.MAX_MANIFEST_BYTES).decode(errors="replace")
        except FileNotFoundError:
            before = ""
        if MARK not in before and before.strip():
            return {}
        for segment_id in self.segment_ids():
            if segment_id not in self._known:
                self._known[segment_id] = read_manifest(self, segment_id)[0]
        for packed in batch:
            self._known[packed.segment_id] = reading.parse_manifest(packed.manifest, packed.segment_id, self.url)
        kept = re.search(r"^license: *([\w.-]+) *$", before, re.MULTILINE)
        text = card(self._repo, list(self._known.values()), self._license or (kept[1] if kept else "unknown"))
        return {"README.md": text.encode()}

    def _commit(self, files: dict[str, bytes], message: str) -> None:
        from huggingface_hub import CommitOperationAdd

        def send() -> None:
            # an operation remembers what it has uploaded: a new try needs new ones
            operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=data) for name, data in files.items()]
            self._api.create_commit(self._repo, operations, commit_message=message, repo_type="dataset")

        try:
            persistently(self.url, send, writing=True)
        except FileNotFoundError:
            raise WriteError(f"{self.url}: no such repository, or no right to write to it") from None

    def _get(self, key: str, limit: int) -> bytes:
        """Through a folder of its own, not the Hub client's cache, which would keep every segment a second time."""
        from huggingface_hub.errors import (
            EntryNotFoundError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )

        def request() -> bytes:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    path = self._api.hf_hub_download(
                        self._repo, key, repo_type="dataset", revision=self._revision, local_dir=folder
                    )
                except LocalEntryNotFoundError as error:  # no connection: not an answer about the file
                    raise ConnectionError(str(error)) from None
                except (EntryNotFoundError, RepositoryNotFoundError):
                    raise FileNotFoundError(key) from None
                with Path(path).open("rb") as file:
                    return file.read(limit + 1)

        return persistently(f"{self.url}/{key}", request)
