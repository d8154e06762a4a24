"""How many bytes on disk each array takes per token, for each kind of segment: what each choice of `score` costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from ketchup_cache.cache.manifest import Manifest, PromptsInfo, ScoresInfo


@dataclass(frozen=True)
class ArraySizes:
    """Segments of one kind that hold the same arrays."""

    kind: str
    keep_top: int
    """Of scores: how many of the largest logits they keep; 0 for the others."""
    storage: str
    """lossless or compact."""
    tokens: int
    """Prompt tokens in prompts, completion tokens in the others."""
    bytes: dict[str, int]
    """Compressed, of each array, its zarr.json included; `manifest` is what describes the segments."""

    @property
    def bytes_per_token(self) -> dict[str, float]:
        return {name: size / self.tokens for name, size in self.bytes.items()} if self.tokens else {}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"bytes_per_token": self.bytes_per_token}

    @property
    def label(self) -> str:
        compact = ", compact" if self.storage == "compact" else ""
        return self.kind + compact + (f", --keep-top {self.keep_top}" if self.keep_top else "")

    def __str__(self) -> str:
        arrays = ", ".join(f"{name} {size:.2f}" for name, size in self.bytes_per_token.items())
        return f"{self.label}: {sum(self.bytes_per_token.values()):.1f} bytes per token ({arrays})"


def array_sizes(manifests: Iterable[Manifest]) -> tuple[ArraySizes, ...]:
    """One entry for each kind and storage, and of scores for each number of kept logits; the largest arrays first."""
    tokens: Counter[tuple[str, int, str]] = Counter()
    sizes: dict[tuple[str, int, str], Counter[str]] = {}
    for manifest in manifests:
        info = manifest.info
        storage = "lossless" if isinstance(info, PromptsInfo) else info.storage
        key = (manifest.kind, info.keep_top if isinstance(info, ScoresInfo) else 0, storage)
        tokens[key] += manifest.tokens
        found = sizes.setdefault(key, Counter())
        found["manifest"] += len(manifest.to_bytes())
        for name, file in manifest.files.items():
            array = name.split("/")[0]
            found[array if array in manifest.arrays else "manifest"] += file.length
    return tuple(ArraySizes(*key, tokens[key], dict(sizes[key].most_common())) for key in sorted(sizes))
