"""A trained model and its card to a model repository of the Hugging Face Hub, hf://owner/name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ketchup_cache.console import Report, printable, size_text
from ketchup_cache.errors import CacheError, ModelError
from ketchup_cache.models.folders import ADAPTER, SNAPSHOT_FILES, resolve_folder
from ketchup_cache.sharing.stores import persistently

_ADDRESS = re.compile(r"hf://([\w-][\w.-]*/[\w-][\w.-]*)/?")
PRIVATE = [".*", "optimizer*"]
"""Never sent, nor is what lies in folders."""


@dataclass(frozen=True)
class ModelReport(Report):
    """files: names of what was sent; with `dry_run`, of what would be. bytes: of all."""

    source: str
    target: str
    files: tuple[str, ...]
    bytes: int
    dry_run: bool

    def __str__(self) -> str:
        verb = "would copy" if self.dry_run else "copied"
        what = f"{len(self.files)} files ({size_text(self.bytes)})"
        return printable(f"{verb} {what} from {self.source} to {self.target}: {', '.join(self.files)}")


def push_model(source: str, address: str, *, dry_run: bool = False, api: Any = None) -> ModelReport:
    """Weights, configuration, tokenizer, origin and card in one commit. A new repository is private; what it has under
    the same names is replaced. api: stands in for the Hub in tests.

    Raises ModelError where the folder holds no model, CacheError for an address that is no repository's, WriteError
    where the Hub can't be reached or refuses.
    """
    from huggingface_hub import HfApi

    if not (found := _ADDRESS.fullmatch(address)):
        todo = "of a model it is hf://owner/name, of a cache hf://datasets/owner/name"
        shown = "the address" if re.search("[@?#]", address) else address  # which may hold credentials
        raise CacheError(f"{shown}: is not that of a repository on the Hub, and must hold no user or revision; {todo}")
    folder = Path(source).expanduser()
    if folder.is_dir():
        folder = resolve_folder(source).resolve()
    if not any((folder / name).is_file() for name in ("config.json", ADAPTER)) or not any(folder.glob("*.safetensors")):
        what = "is no folder of a trained model (config.json or an adapter's, *.safetensors)"
        raise ModelError(f"{source}: {what}; a cache goes to hf://datasets/{found[1]}")
    there = sorted(path.name for path in folder.iterdir() if path.is_file())
    names = [n for n in there if _fits(n, [*SNAPSHOT_FILES, "README.md"]) and not _fits(n, PRIVATE)]
    size = sum((folder / name).stat().st_size for name in names)
    report = ModelReport(source, address, tuple(names), size, dry_run)
    if dry_run:
        return report
    hub: Any = api or HfApi()
    where = {"repo_id": found[1], "repo_type": "model"}

    def send() -> None:
        hub.create_repo(**where, private=True, exist_ok=True)
        hub.upload_folder(**where, folder_path=folder, commit_message="A model by ketchup-cache", allow_patterns=names)

    persistently(address, send, writing=True)
    return report


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
