"""From an address to the store that serves it."""

from __future__ import annotations

import os
from pathlib import Path

from ketchup_cache.cache.disk import FolderStore
from ketchup_cache.cache.segment_bytes import SegmentStore
from ketchup_cache.errors import CacheError
from ketchup_cache.sharing.hub import HubStore
from ketchup_cache.sharing.object_store import SCHEMES, ObjectStore


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
        raise CacheError(
            f"{scheme.split(':')[-1][:20]}://…: an address must hold no user, password, token or query; "
            "give credentials as the store's own tools take them (AWS_ACCESS_KEY_ID, AWS_PROFILE, HF_TOKEN, …)"
        )
    if scheme == "hf":
        return HubStore(text, license_id)
    if scheme in SCHEMES and rest.strip("/"):
        return ObjectStore(text)
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
