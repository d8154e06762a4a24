"""A cache in a dataset repository of the Hugging Face Hub: hf://datasets/owner/name or …/name@revision.

Data and manifests of a batch go up in one commit, so a killed upload shows nothing. New repositories are private.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ketchup_cache.cache.segment_bytes import MARKER, MARKER_BYTES, KeyedStore, Packed, ids_among
from ketchup_cache.errors import CacheError, WriteError
from ketchup_cache.sharing.network import persistently

if TYPE_CHECKING:
    from huggingface_hub import HfApi

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

    def __init__(self, address: str, license_id: str | None = None, api: HfApi | None = None) -> None:
        """license_id: of a repository that is made. api: stands in for the Hub in tests.

        Raises CacheError for an address that is no dataset.
        """
        if not (found := _ADDRESS.fullmatch(address)):
            raise CacheError(f"{address}: is not an address of a Hub data set, which is hf://datasets/owner/name")
        from huggingface_hub import HfApi

        self.address, self._repo, self._revision = address.rstrip("/"), found[1], found[2]
        self._license, self._api = license_id or "unknown", api or HfApi()

    def create(self) -> None:
        if self.exists():
            return

        def make() -> None:
            self._api.create_repo(self._repo, repo_type="dataset", private=True, exist_ok=True)

        persistently(self.address, make, writing=True)
        files = {MARKER: MARKER_BYTES}
        try:
            self._get("README.md", 0)
        except FileNotFoundError:
            files["README.md"] = _README.format(license=self._license, repo=self._repo).encode()
        self._commit(files, "Make a ketchup cache")

    def segment_ids(self) -> list[str]:
        from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

        def names() -> list[str]:
            try:
                place = {"repo_type": "dataset", "revision": self._revision}
                tree = self._api.list_repo_tree(self._repo, path_in_repo="manifests", **place)  # type: ignore[arg-type]
                return [entry.path.rpartition("/")[2] for entry in tree]
            except (EntryNotFoundError, RepositoryNotFoundError):
                return []

        return ids_among(persistently(self.address, names))

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
                    path = self._api.hf_hub_download(
                        self._repo, key, repo_type="dataset", revision=self._revision, local_dir=folder
                    )
                except LocalEntryNotFoundError as error:  # no connection: not an answer about the file
                    raise ConnectionError(str(error)) from None
                except (EntryNotFoundError, RepositoryNotFoundError):
                    raise FileNotFoundError(key) from None
                with Path(path).open("rb") as file:
                    return file.read(limit + 1)

        return persistently(f"{self.address}/{key}", request)
