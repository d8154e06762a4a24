"""Where a model's files are: its folder, a snapshot of the Hub, and the base that a LoRA adapter names."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import snapshot_download

from ketchup_cache.console import one_line, say, silence
from ketchup_cache.errors import ModelError
from ketchup_cache.files import read_small

SNAPSHOT_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py"]
"""Weights, configuration and tokenizer files; never pickles."""

GONE_FOLDERS = ("student", "model")
"""What `best` of a run was called by version 1."""

RUN_FILES = (".lock", "metrics.jsonl", "report.json")
"""What the folder of a run has, and that of a model has not."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
MAX_JSON_BYTES = 2**26

ORIGIN = "ketchup-cache-origin.json"
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SCALING = {"r": 8, "lora_alpha": 8, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
"""What of adapter_config.json decides, beside the weights, what an adapter computes; with peft's defaults."""
WITHOUT_EFFECT = {
    "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "fan_in_fan_out",
    "megatron_core", "qalora_group_size",
}  # fmt: skip
"""Its keys that name the base, say which modules have weights in the file, act in training only, or nowhere."""
PLAIN = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, "gaussian", "orthogonal")}
"""Values under which an adapter is B·A beside untouched weights, and no more."""


class Adapter(NamedTuple):
    """A folder with a LoRA adapter. config: its adapter_config.json. base: folder of the model that it belongs to.
    base_fingerprint: of that model when the adapter was trained here; None for adapters from elsewhere."""

    folder: Path
    config: dict[str, Any]
    base: Path
    base_fingerprint: str | None


def resolve_folder(name: str, revision: str | None = None) -> Path:
    """The folder itself, or a local snapshot of the Hub repository `owner/name` (downloaded where it is not there yet).

    revision: of the repository. Raises ModelError where there is no such folder and the Hub does not give it either.
    """
    folder = Path(name).expanduser()
    if folder.name in GONE_FOLDERS and not folder.exists() and (folder.parent / "best").is_dir():
        say(f"{name}: is {folder.parent / 'best'} now; a later version will not find it here")
        folder = folder.parent / "best"
    if folder.is_dir():
        if any((folder / file).exists() for file in RUN_FILES) and not any(folder.glob("*.safetensors")):
            best = folder / "best"
            which = f"its model is {best}" if best.is_dir() else "without a model yet; run its command again"
            raise ModelError(f"{name}: is the folder of a run of `pretrain` or `learn`; {which}")
        return folder
    if folder.exists():
        raise ModelError(f"{name}: is a file; give the folder that holds config.json and the weights")
    beside = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
    if close := difflib.get_close_matches(folder.name, beside, n=1):
        raise ModelError(f"{name}: no such folder; did you mean {folder.parent / close[0]}?")
    if not HUB_ID.fullmatch(name):
        raise ModelError(f"{name}: no such folder")
    from transformers.utils import logging  # brings torch

    try:
        with silence(logging):
            return Path(snapshot_download(name, revision=revision, allow_patterns=SNAPSHOT_FILES))
    except Exception as error:  # the Hub's errors have no common base: HTTP, offline mode, name, disk
        what = f"no such folder, and the Hugging Face Hub does not give it ({one_line(error)})"
        raise ModelError(f"{name}: {what}") from error


def read_adapter(folder: Path) -> Adapter | None:
    """None for the folder of an ordinary model.

    Raises ModelError for an adapter that is not plain LoRA on linear layers, and where its base is not to be found.
    """
    if not (file := folder / ADAPTER).is_file():
        return None
    config = read_json(file)
    for key, value in config.items():
        if value and key not in WITHOUT_EFFECT | SCALING.keys() and value not in PLAIN.get(key, ()):
            what = f"adapter with {key} {value!r}, of which only plain LoRA is read; merge it with peft"
            raise ModelError(f"{folder}: {what}")
    if not isinstance(name := config.get("base_model_name_or_path"), str) or not name:
        raise ModelError(f"{file}: names no base model; write its folder or Hub id into base_model_name_or_path")
    try:
        base = resolve_folder(name, config.get("revision"))
    except ModelError as error:
        raise ModelError(f"{folder}: the base of this adapter is named by base_model_name_or_path: {error}") from None
    known = read_json(folder / ORIGIN).get("base") if (folder / ORIGIN).is_file() else None
    return Adapter(folder, config, base, known)


def whole_folder(name: str) -> Path:
    """Where the config.json of a model, or of an adapter's base, is. Raises ModelError."""
    folder = resolve_folder(name)
    adapter = read_adapter(folder)
    return adapter.base if adapter else folder


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file of a model folder. Raises ModelError where it is missing, unreadable or not an object."""
    try:
        value = json.loads(read_small(file, MAX_JSON_BYTES))
    except FileNotFoundError:
        raise ModelError(f"{file.parent}: has no {file.name}, so it is not a model folder") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: can't be read ({one_line(error)}); copy or download the model again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{file}: is not a JSON object; copy or download the model again")
    return value
