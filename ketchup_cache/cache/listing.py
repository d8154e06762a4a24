"""One line per segment (`ketchup-cache ls`)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ketchup_cache.cache import index as coverage
from ketchup_cache.cache.cache import Cache
from ketchup_cache.cache.inspect import data_bytes
from ketchup_cache.cache.manifest import Manifest, PromptsInfo, RolloutsInfo
from ketchup_cache.console import printable, size_text


@dataclass(frozen=True)
class Entry:
    id: str
    kind: str
    rows: int
    tokens: int
    bytes: int
    created: str
    tool: str
    author: str
    model: str
    """The data of prompts, the policy of rollouts, the teacher of scores."""
    parent: str | None


@dataclass(frozen=True)
class Listing:
    cache: str
    segments: tuple[Entry, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{e.id[:12]}  {e.created[:19]}  {e.kind:<8} {e.rows:>9,} rows {e.tokens:>12,} tokens "
            f"{size_text(e.bytes):>9}  {e.model}"
            for e in self.segments
        ]
        return "\n".join(map(printable, lines)) or f"{printable(self.cache)}: no segments yet"


def listing(cache: Cache) -> Listing:
    """All segments, in the order of commits, from the manifests alone. Raises the errors of `Cache.manifests`."""
    return Listing(cache.address, tuple(_entry(id_, manifest) for id_, manifest in cache.manifests()))


def _entry(segment_id: str, manifest: Manifest) -> Entry:
    info = manifest.info
    if isinstance(info, PromptsInfo):
        model, parent = info.data.name, None
    elif isinstance(info, RolloutsInfo):
        model, parent = f"{info.policy.name} ({info.policy.fingerprint[:12]})", coverage.parent_id(info)
    else:
        model, parent = f"{info.teacher.name} ({info.teacher.fingerprint[:12]})", coverage.parent_id(info)
    size = data_bytes(manifest)
    counts = (manifest.rows, manifest.tokens, size)
    return Entry(segment_id, manifest.kind, *counts, manifest.created, manifest.tool, manifest.author, model, parent)
