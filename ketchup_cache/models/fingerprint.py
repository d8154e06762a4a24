"""What a model computes and what a tokenizer encodes, each as one SHA-256: the same numbers, the same fingerprint.

Weights are hashed from the safetensors files themselves, tensor by tensor in the order of their names, so neither
sharding nor metadata matters, and no memory and no torch is needed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from ketchup_cache.console import one_line
from ketchup_cache.errors import ModelError
from ketchup_cache.models.folders import ADAPTER, ADAPTER_WEIGHTS, SCALING, read_adapter, read_json, resolve_folder
from ketchup_cache.provenance import TokenizerInfo, canonical_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VOLATILE_KEYS = {
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache",
    "task_specific_params", "output_attentions", "output_hidden_states", "return_dict", "problem_type",
    "id2label", "label2id",
}  # fmt: skip
"""Parts of config.json that change no logit: where it came from, how it was saved, what it returns beside logits."""

Tensor = tuple[str, str, tuple[int, ...], str]
"""Name, safetensors' name of the number format, shape, and SHA-256 of the bytes."""


class WeightEntry(NamedTuple):
    """One tensor of a checkpoint. data: its bytes, which are read from the file when they are looked at."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    data: memoryview


def weights_fingerprint(model: str | Path) -> str:
    """SHA-256 of a checkpoint's weights and architecture; of an adapter, of its weights, its scaling and its base.

    model: a folder; as a string, also a Hub id. Raises ModelError for missing or damaged files, and for a base that is
    not the one that the adapter was trained on.
    """
    folder = resolve_folder(model) if isinstance(model, str) else model
    whole, adapter = base_fingerprint(folder), read_adapter(folder)
    return _of_files(folder, _of_adapter(adapter.config, whole)) if adapter else whole


def base_fingerprint(folder: Path) -> str:
    """Of a model, or of that which an adapter belongs to. Raises ModelError, as above."""
    if not (adapter := read_adapter(folder)):
        return _of_files(folder)
    found = base_fingerprint(adapter.base)
    if adapter.base_fingerprint not in (None, found):
        what = f"its base {adapter.base} is not the model that this adapter was trained on"
        todo = f"bring back that of fingerprint {str(adapter.base_fingerprint)[:12]}, or name it in {ADAPTER}"
        raise ModelError(f"{folder}: {what}; {todo}")
    return found


def _of_files(folder: Path, config: dict[str, Any] | None = None) -> str:
    """config: instead of config.json."""

    def tensor(entry: WeightEntry) -> Tensor:
        return entry.name, entry.dtype, entry.shape, hashlib.sha256(entry.data).hexdigest()

    return _fingerprint(weight_entries(folder), tensor, config or read_json(folder / "config.json"))


def _of_adapter(config: dict[str, Any], base: str) -> dict[str, Any]:
    return {"base": base, **{key: config.get(key, default) or default for key, default in SCALING.items()}}


def state_fingerprint(model: PreTrainedModel) -> str:
    """The same hash of weights in memory: that of the folder which `lora.save` would write."""
    import torch
    from safetensors.torch import _TYPES
    from transformers.modeling_utils import remove_tied_weights_from_state_dict, revert_weight_conversion

    from ketchup_cache.models import lora

    names = {dtype: name for name, dtype in _TYPES.items()}
    state: Any = lora.adapter_weights(model)
    if state:
        config = _of_adapter(model.peft_config[lora.NAME].to_dict(), model.base_fingerprint)
    else:
        kept = {k: value for k, value in model.state_dict().items() if k not in (model._keys_to_ignore_on_save or ())}
        # under the names of the file, which are others than in memory for some architectures (GPT-NeoX)
        state = revert_weight_conversion(model, remove_tied_weights_from_state_dict(kept, model))
        config = json.loads(model.config.to_json_string())

    def tensor(name: str) -> Tensor:
        value = state[name].detach().contiguous().cpu()
        digest = hashlib.sha256(value.reshape(-1).view(torch.uint8).numpy()).hexdigest()
        return name, names[value.dtype], tuple(value.shape), digest

    return _fingerprint(state, tensor, config)


def _fingerprint(items: Iterable[Any], tensor: Callable[[Any], Tensor], config: dict[str, Any]) -> str:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        content = {"tensors": sorted(pool.map(tensor, items)), "config": _lasting(config)}
    return hashlib.sha256(canonical_json(content)).hexdigest()


def _lasting(config: Any) -> Any:
    """The part of a config that changes logits. Dropout and initialisation act in training only."""
    if not isinstance(config, dict):
        return config
    changing = (k for k in config if k not in VOLATILE_KEYS and "dropout" not in k and not k.startswith("initializer"))
    return {key: _lasting(config[key]) for key in changing}


# ------------------------------------------------------------------------------------------------- safetensors


def weight_entries(folder: Path) -> list[WeightEntry]:
    """All tensors of a checkpoint folder, sorted by name, from the headers of its safetensors files.

    Raises ModelError where files are missing, cut off or damaged, or hold one tensor twice.
    """
    entries = sorted((e for file in _weight_files(folder) for e in _read_header(file)), key=lambda e: e.name)
    for one, other in itertools.pairwise(entries):
        if one.name == other.name:
            raise ModelError(f"{folder}: tensor {one.name} is in two weight files ({one.file.name}, {other.file.name})")
    return entries


def _weight_files(folder: Path) -> list[Path]:
    single = folder / (ADAPTER_WEIGHTS if (folder / ADAPTER).is_file() else "model.safetensors")
    index = folder / f"{single.name}.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        pickled = any(folder.glob("*.bin"))
        hint = "only pickled .bin ones, which can run code: convert them" if pickled else "save it with save_pretrained"
        hint = "only .gguf ones: make full weights of them (docs/quantised.md)" if any(folder.glob("*.gguf")) else hint
        raise ModelError(f"{folder}: has no weights in safetensors format ({single.name}); {hint}")
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(s, str) and Path(s).name == s for s in shards.values()):
        raise ModelError(f"{index}: is not an index of weight files beside it")
    files = [folder / shard for shard in sorted(set(shards.values()))]
    if missing := [file for file in files if not file.is_file()]:
        raise ModelError(f"{missing[0]}: is missing; copy or download the model again")
    return files


def _read_header(file: Path) -> Iterator[WeightEntry]:
    """Format: 8 bytes little-endian length, JSON header, then the tensors' bytes end to end."""
    try:
        safe_open(file, framework="np")  # refuses what is cut off, overlaps, leaves gaps or is no safetensors header
        content = np.memmap(file, np.uint8, "r").data
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: is damaged ({one_line(error)}); copy or download the model again") from None
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin].tobytes())
    header.pop("__metadata__", None)
    for name, tensor in header.items():
        data = content[begin:][slice(*tensor["data_offsets"])]
        yield WeightEntry(name, tensor["dtype"], tuple(tensor["shape"]), file, data)


# --------------------------------------------------------------------------------------------------- tokenizers

PROBES = (
    "The cat sees 2 dogs, e.g. 48/2 = <<48/2=24>>24!", " leading and trailing spaces ",
    "two  spaces\ttab\nnewline\r\nreturn\u00a0no-break\u3000wide",
    "MiXeD CaSe ÀÉÎ straße ŒUVRE ﬁnal ﬀ", "e\u0301 é Å ½ ² Ⅳ ™",
    "Die Vertreterin des Parlaments übernahm's – »ja«, „nein“ …",
    "日本語とカナ 한국어 中文 العربية עברית हिन्दी ไทย Ελληνικά Русский",
    "👩‍👩‍👧 👍🏽 ∀x∈ℝ: x²≥0 € £ ¥", "0123456789 3.14 1,000,000 -7 1e-5 50% #1 A+B @x _y",
    "()[]{}<>|\\/~^`\"'`*&$;:?!", "antidisestablishmentarianism supercalifragilistic unaffordable xqzjk",
    "\u200b\ufeff\x00\x7f\u2028", "",
)  # fmt: skip
"""Texts that normalisers, pre-tokenizers and post-processors are known to treat differently."""


def tokenizer_info(tokenizer: PreTrainedTokenizerBase, name: str) -> TokenizerInfo:
    """Fingerprint of what a tokenizer encodes: vocabulary, end of a text, and the ids of fixed texts.

    Every word of the vocabulary is one of the texts, so that a single different merge shows. Where the tokenizer came
    from, and how it is stored, does not matter. Nor do the names of other special tokens: nothing that is stored is
    padded, and the ids of the texts show what a tokenizer adds.
    """
    vocabulary, eos, unk = tokenizer.get_vocab(), tokenizer.eos_token_id, tokenizer.unk_token_id
    # ASCII: a vocabulary may hold lone surrogates
    ids = json.dumps(tokenizer(_probe_texts(tokenizer), add_special_tokens=True)["input_ids"])
    words = json.dumps(sorted(vocabulary.items()))

    def fingerprint(*special: int | None) -> str:
        content = f'{{"ids": {ids}, "special": {json.dumps(special)}, "vocabulary": {words}}}'
        return hashlib.sha256(content.encode()).hexdigest()

    info = TokenizerInfo(name=name, fingerprint=fingerprint(eos), vocab_size=max(vocabulary.values()) + 1)
    pads = {None, tokenizer.pad_token_id, eos, unk, tokenizer.bos_token_id}
    info._earlier = frozenset(fingerprint(eos, pad, unk) for pad in pads)
    return info


def first_difference(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    """The first thing that two tokenizers encode differently, in words; None where nothing is found."""

    def described(tokenizer: PreTrainedTokenizerBase) -> Iterator[Any]:
        words = {i: word for word, i in tokenizer.get_vocab().items()}
        yield from map(words.get, range(size))
        yield from tokenizer(texts, add_special_tokens=True)["input_ids"]
        yield tokenizer.eos_token_id

    size = max(max(tokenizer.get_vocab().values()) for tokenizer in (one, other)) + 1
    texts = _probe_texts(one)
    names = [*(f"id {i}" for i in range(size)), *map(repr, texts), "eos_token_id"]
    for name, mine, theirs in zip(names, described(one), described(other), strict=True):
        if mine != theirs:
            return f"{name} is {mine!r} in one and {theirs!r} in the other"
    return None


def _probe_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    vocabulary = tokenizer.get_vocab()
    words = sorted(vocabulary, key=lambda token: vocabulary[token])
    return [*PROBES, *words, *(tokenizer.convert_tokens_to_string([word]) for word in words)]
