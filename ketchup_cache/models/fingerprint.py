"""What a model computes and what a tokenizer encodes, each as one SHA-256: the same numbers, the same fingerprint.

Weights are hashed from the safetensors files themselves, tensor by tensor in the order of their names, so neither
sharding nor metadata matters, and no memory and no torch is needed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ketchup_cache.errors import ModelError
from ketchup_cache.provenance import TokenizerInfo, canonical_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
"""safetensors' names of number formats."""

LONGEST_HEADER = 100_000_000
"""Bytes; safetensors' own limit."""

VOLATILE_KEYS = {
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache",
    "task_specific_params", "output_attentions", "output_hidden_states", "return_dict", "problem_type",
    "id2label", "label2id",
}  # fmt: skip
"""Parts of config.json that change no logit: where it came from, how it was saved, what it returns beside logits."""


@dataclass(frozen=True)
class WeightEntry:
    """One tensor of a checkpoint: its bytes are `file[start:stop]`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int


def weights_fingerprint(folder: Path) -> str:
    """SHA-256 of a checkpoint folder's weights and architecture.

    Raises ModelError for missing or damaged files.
    """
    entries = weight_entries(folder)
    maps: dict[Path, mmap.mmap] = {}
    try:
        for file in {entry.file for entry in entries}:
            with file.open("rb") as opened:
                maps[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)

        def digest(entry: WeightEntry) -> str:
            with memoryview(maps[entry.file]) as whole, whole[entry.start : entry.stop] as part:
                return hashlib.sha256(part).hexdigest()

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            digests = list(pool.map(digest, entries))
    except OSError as error:
        raise ModelError(f"{folder}: the weights can't be read ({error.strerror})") from None
    finally:
        for mapped in maps.values():
            mapped.close()
    tensors = [(e.name, e.dtype, e.shape, d) for e, d in zip(entries, digests, strict=True)]
    return _fingerprint(tensors, _read_json(folder / "config.json"))


def state_fingerprint(model: PreTrainedModel) -> str:
    """The same hash of weights in memory: that of the folder which `model.save_pretrained` would write."""
    import torch
    from safetensors.torch import _TYPES
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    names = {dtype: name for name, dtype in _TYPES.items()}
    state = remove_tied_weights_from_state_dict(dict(model.state_dict()), model)

    def tensor(name: str) -> tuple[str, str, tuple[int, ...], str]:
        value = state[name].detach().contiguous().cpu()
        digest = hashlib.sha256(value.reshape(-1).view(torch.uint8).numpy()).hexdigest()
        return name, names[value.dtype], tuple(value.shape), digest

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        tensors = list(pool.map(tensor, sorted(state)))
    return _fingerprint(tensors, json.loads(model.config.to_json_string()))


def _fingerprint(tensors: Iterable[tuple[str, str, tuple[int, ...], str]], config: dict[str, Any]) -> str:
    content = {"tensors": sorted(tensors), "config": _lasting(config)}
    return hashlib.sha256(canonical_json(content)).hexdigest()


def _lasting(config: Any) -> Any:
    """The part of a config that changes logits. Dropout and initialisation act in training only."""
    if not isinstance(config, dict):
        return config
    return {
        key: _lasting(value)
        for key, value in config.items()
        if key not in VOLATILE_KEYS and "dropout" not in key and not key.startswith("initializer")
    }


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


def _weight_files(folder: Path) -> Iterator[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        yield single
        return
    if not index.is_file():
        pickled = any(folder.glob("*.bin"))
        hint = "only pickled .bin ones, which can run code: convert them" if pickled else "save it with save_pretrained"
        raise ModelError(f"{folder}: has no weights in safetensors format (model.safetensors); {hint}")
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(s, str) and Path(s).name == s for s in shards.values()):
        raise ModelError(f"{index}: is not an index of weight files beside it")
    for shard in sorted(set(shards.values())):
        if not (folder / shard).is_file():
            raise ModelError(f"{folder / shard}: is missing; copy or download the model again")
        yield folder / shard


def _read_header(file: Path) -> Iterator[WeightEntry]:
    """Format: 8 bytes little-endian length, JSON header, then the tensors' bytes end to end."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise _damaged(file, "its header is cut off")
        try:
            header = json.loads(opened.read(length))
            entries = [_entry(file, 8 + length, name, e) for name, e in header.items() if name != "__metadata__"]
        except (ValueError, TypeError, KeyError, AttributeError):
            raise _damaged(file, "its header is not one of safetensors") from None
    end = 8 + length
    for entry in sorted(entries, key=lambda e: (e.start, e.stop)):
        if entry.dtype not in ITEM_BYTES:
            raise ModelError(f"{file}: tensor {entry.name} has the unknown number format {entry.dtype!r}")
        if entry.start != end or entry.stop - entry.start != math.prod(entry.shape) * ITEM_BYTES[entry.dtype]:
            raise _damaged(file, f"tensor {entry.name} is not where its header says")
        end = entry.stop
    if end != size:
        raise _damaged(file, f"it holds {size:,} bytes instead of {end:,}")
    yield from entries


def _entry(file: Path, data_start: int, name: str, fields: dict[str, Any]) -> WeightEntry:
    """Raises ValueError, TypeError or KeyError for fields of another kind than the format's."""
    dtype, shape, (start, stop) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
    if not isinstance(dtype, str) or not all(isinstance(n, int) and n >= 0 for n in (*shape, start, stop)):
        raise ValueError
    return WeightEntry(name, dtype, shape, file, data_start + start, data_start + stop)


def _damaged(file: Path, why: str) -> ModelError:
    return ModelError(f"{file}: is damaged ({why}); copy or download the model again")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{file}: is missing; a model folder has one") from None
    except (OSError, ValueError):
        raise ModelError(f"{file}: is not readable JSON; copy or download the model again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{file}: is not a JSON object; copy or download the model again")
    return value


# --------------------------------------------------------------------------------------------------- tokenizers

PROBES = (
    "The cat sees 2 dogs, e.g. 48/2 = <<48/2=24>>24!",
    " leading and trailing spaces ",
    "two  spaces\ttab\nnewline\r\nreturn\u00a0no-break\u3000wide",
    "MiXeD CaSe ÀÉÎ straße ŒUVRE ﬁnal ﬀ",
    "e\u0301 é Å ½ ² Ⅳ ™",
    "Die Vertreterin des Parlaments übernahm's – »ja«, „nein“ …",
    "日本語とカナ 한국어 中文 العربية עברית हिन्दी ไทย Ελληνικά Русский",
    "👩‍👩‍👧 👍🏽 ∀x∈ℝ: x²≥0 € £ ¥",
    "0123456789 3.14 1,000,000 -7 1e-5 50% #1 A+B @x _y",
    "()[]{}<>|\\/~^`\"'`*&$;:?!",
    "antidisestablishmentarianism supercalifragilistic unaffordable xqzjk",
    "\u200b\ufeff\x00\x7f\u2028",
    "",
)
"""Texts that normalisers, pre-tokenizers and post-processors are known to treat differently."""


def tokenizer_info(tokenizer: PreTrainedTokenizerBase, name: str) -> TokenizerInfo:
    """Fingerprint of what a tokenizer encodes: vocabulary, special tokens, and the ids of fixed texts.

    Every word of the vocabulary is one of the texts, so that a single different merge shows. Where the tokenizer came
    from, and how it is stored, does not matter.
    """
    vocabulary = tokenizer.get_vocab()
    content = {
        "vocabulary": sorted(vocabulary.items()),
        "special": [tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id],
        "ids": tokenizer(_probe_texts(tokenizer, vocabulary), add_special_tokens=True)["input_ids"],
    }
    encoded = json.dumps(content, sort_keys=True).encode()  # ASCII: a vocabulary may hold lone surrogates
    return TokenizerInfo(
        name=name, fingerprint=hashlib.sha256(encoded).hexdigest(), vocab_size=max(vocabulary.values()) + 1
    )


def first_difference(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    """The first thing that two tokenizers encode differently, in words; None where nothing is found."""
    words, other_words = ({i: t for t, i in tokenizer.get_vocab().items()} for tokenizer in (one, other))
    for i in sorted(words.keys() | other_words.keys()):
        if words.get(i) != other_words.get(i):
            return f"id {i} is {words.get(i)!r} in one and {other_words.get(i)!r} in the other"
    for text in _probe_texts(one, one.get_vocab()):
        ids, other_ids = (tokenizer(text, add_special_tokens=True)["input_ids"] for tokenizer in (one, other))
        if ids != other_ids:
            return f"{text!r} is {ids} in one and {other_ids} in the other"
    for special in ("eos_token_id", "pad_token_id", "unk_token_id"):
        if getattr(one, special) != getattr(other, special):
            return f"{special} is {getattr(one, special)} in one and {getattr(other, special)} in the other"
    return None


def _probe_texts(tokenizer: PreTrainedTokenizerBase, vocabulary: dict[str, int]) -> list[str]:
    words = sorted(vocabulary, key=lambda token: vocabulary[token])
    return [*PROBES, *words, *(tokenizer.convert_tokens_to_string([word]) for word in words)]
