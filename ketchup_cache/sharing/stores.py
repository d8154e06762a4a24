"""From an address to what serves it."""

from __future__ import annotations

import os
from pathlib import Path

from ketchup_cache.errors import CacheError
from ketchup_cache.sharing.base import Remote
from ketchup_cache.sharing.folder import LocalRemote, folder_of
from ketchup_cache.sharing.hub import HubRemote
from ketchup_cache.sharing.object_store import SCHEMES, ObjectRemote
from ketchup_cache.sharing.web import WebRemote


def is_url(address: str | os.PathLike[str]) -> bool:
    return "://" in str(address) and not str(address).startswith("file://")


def open_remote(address: str | os.PathLike[str], license_id: str | None = None) -> Remote:
    """The cache at an address; nothing is asked of it yet.

    license_id: of a data set card, where the address is the Hub's.
    Raises CacheError for an address that is not served, or that holds credentials; they are not repeated.
    """
    text = str(address)
    if not is_url(text):
        return LocalRemote(Path(address) if not text.startswith("file://") else folder_of(text))
    scheme, _, rest = text.partition("://")
    check_address(text)
    if scheme == "hf":
        return HubRemote(text, license_id=license_id)
    if scheme in ("https", "http"):
        return WebRemote(text)
    if scheme in SCHEMES and rest.strip("/"):
        return ObjectRemote(text)
    served = ", ".join(f"{name}://" for name in ("s3", "gs", "az", "hf", "https"))
    raise CacheError(f"{scheme.split(':')[-1][:20]}://: no such caches; give a path or one of {served}")


def check_address(text: str) -> None:
    """Raise CacheError for credentials in an address, before it can reach a log, a manifest or a run's record."""
    scheme, _, rest = text.partition("://")
    if "@" in rest.partition("/")[0] or "?" in rest or "#" in rest or (scheme != "hf" and "@" in rest):
        raise CacheError(
            f"{scheme.split(':')[-1][:20]}://…: an address must hold no user, password, token or query; "
            "give credentials as the store's own tools take them (AWS_ACCESS_KEY_ID, AWS_PROFILE, HF_TOKEN, …)"
        )


def open_existing(address: str | os.PathLike[str]) -> Remote:
    """As `open_remote`. Raises CacheError where there is no cache."""
    remote = open_remote(address)
    if not remote.exists():
        raise CacheError(f"{remote.url}: no cache here (it has no ketchup-cache.json)")
    return remote
