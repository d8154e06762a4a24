"""LoRA adapters by peft: attached to a model, merged into it, and written in peft's format.

The model keeps its class and its methods: peft replaces its linear layers, and freezes what it had.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from ketchup_cache.config.options import StudentOptions
from ketchup_cache.errors import ModelError
from ketchup_cache.models.folders import ADAPTER, ADAPTER_WEIGHTS, Adapter

NAME, PREFIX = "default", "base_model.model."
"""Of the adapter in the model, and of its weights in the file."""


def attach(model: PreTrainedModel, name: str, adapter: Adapter | None, options: StudentOptions, base: str) -> None:
    """Put an adapter beside the frozen weights of its base: the given one, or else a new one, which changes nothing yet
    (B = 0). name: of the base, as adapter_config.json is to have it. base: its fingerprint.

    Raises ModelError without peft, for layers that are not linear, for the head, and for weights that do not fit.
    """
    try:
        import peft
    except ImportError:
        raise ModelError(f"{name}: LoRA needs the package peft: pip install 'ketchup-cache[lora]'") from None
    config: Any = peft.LoraConfig(r=options.lora_rank, lora_alpha=options.lora_alpha or 2 * options.lora_rank)
    config.target_modules = "all-linear" if options.lora_targets == ("all-linear",) else set(options.lora_targets)
    if adapter:
        config = peft.PeftConfig.from_pretrained(str(adapter.folder))
    config.inference_mode = False
    config.task_type = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    with torch.random.fork_rng(), warnings.catch_warnings(action="ignore"):
        torch.manual_seed(getattr(options, "seed", 0))  # of A: a run that goes on begins with the same
        # `model.add_adapter` does this too, and refuses versions of peft by a list of its own
        peft.inject_adapter_in_model(config, model, NAME)
    config.base_model_name_or_path, model.base_fingerprint = name, base
    if isinstance(config.target_modules, set):  # in another order in every process
        config.target_modules = sorted(config.target_modules)
    head, linear = model.get_output_embeddings(), peft.tuners.lora.Linear
    adapted = {path: layer for path, layer in model.named_modules() if hasattr(layer, "base_layer")}
    if odd := [path for path, layer in adapted.items() if layer is head or not isinstance(layer, linear)]:
        raise ModelError(f"{name}: an adapter of {odd[0]} is not supported: only linear layers before the head are")
    mine = adapter_weights(model)
    theirs = load_file(adapter.folder / ADAPTER_WEIGHTS) if adapter else mine
    shapes = ({(key, tuple(weight.shape)) for key, weight in weights.items()} for weights in (mine, theirs))
    if wrong := sorted(set.symmetric_difference(*shapes)):
        what = f"its weights do not fit {name} and its {ADAPTER}: {wrong[0][0]} {list(wrong[0][1])} is in one of them"
        raise ModelError(f"{adapter and adapter.folder}: {what}; copy or download the adapter again")
    with torch.no_grad():
        for key, weight in mine.items():
            weight.copy_(theirs[key])


def adapter_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Of the adapter of a model, by their names in the file; empty for a model without one."""
    if NAME not in getattr(model, "peft_config", {}):
        return {}
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(model, adapter_name=NAME, save_embedding_layers=False)
    return {PREFIX + key: value for key, value in found.items()}


def merge(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, its adapter added to its weights."""
    for path, layer in list(model.named_modules()):
        if hasattr(layer, "base_layer"):
            layer.merge()
            model.set_submodule(path, layer.base_layer)
    del model.peft_config, model.base_fingerprint
    return model.requires_grad_(True)


def save(model: PreTrainedModel, folder: Path) -> None:
    """An ordinary folder, or one of an adapter in peft's format."""
    if not (weights := adapter_weights(model)):
        model.save_pretrained(folder)
        return
    model.peft_config[NAME].save_pretrained(folder)
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / ADAPTER_WEIGHTS, {"format": "pt"})
