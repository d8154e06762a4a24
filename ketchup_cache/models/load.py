"""Models and tokenizers from a folder or the Hugging Face Hub, or one line that says why not.

A checkpoint is taken only as it is: safetensors, every weight present, nothing left over. transformers would fill
a missing weight with random numbers, or tie it to another, with no more than a warning; its scores would be noise.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.activations import NewGELUActivation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from ketchup_cache.config.options import StudentOptions
from ketchup_cache.console import one_line, silence
from ketchup_cache.errors import ConfigError, MismatchError, ModelError
from ketchup_cache.models import lora
from ketchup_cache.models.fingerprint import PROBES, base_fingerprint, first_difference, tokenizer_info, weight_entries
from ketchup_cache.models.folders import Adapter, read_adapter, read_json, resolve_folder, whole_folder
from ketchup_cache.models.t5_unpadded import is_ragged
from ketchup_cache.parallel.group import group
from ketchup_cache.provenance import TokenizerInfo

TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "*.model", "vocab.*"]

LAYERS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")


def pick_device(device: str) -> torch.device:
    """For "auto" the GPU if there is one (CUDA, then MPS), else the CPU; otherwise the device that was asked for.

    Raises ModelError where that device does not exist.
    """
    group()  # of several processes each has a GPU of its own, which is "cuda"
    there = ["cpu", *(["mps"] if torch.backends.mps.is_available() else [])]
    if torch.cuda.is_available():
        there += [*(f"cuda:{i}" for i in range(torch.cuda.device_count())), "cuda"]
    if device == "auto":
        return torch.device(there[-1])
    if device not in there:
        raise ModelError(f"device {device!r} is not on this machine: use auto, or one of {', '.join(there)}")
    return torch.device(device)


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Raises ModelError where there is none, where it has no end-of-sequence token, and where it ends every text with
    one although the model is decoder-only: the prompt would be over before the completion begins.
    """
    folder, whole = resolve_folder(name), whole_folder(name)
    if not any(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)):
        folder = whole
    if not any(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)):
        raise ModelError(f"{name}: holds no tokenizer (tokenizer.json or the like); save the model's tokenizer there")
    with _loading(name, "its tokenizer "):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
        if not _encodes_as_its_file(tokenizer, folder / "tokenizer.json"):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{name}: its tokenizer has no end-of-sequence token (eos_token); completions would never end")
    ends = tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id] and (whole / "config.json").is_file()
    if ends and not is_encoder_decoder(name, trust_remote_code=trust_remote_code):
        what = f"ends every text with {tokenizer.eos_token!r}, but a decoder-only model goes on from its prompt"
        todo = "set add_eos_token to false in tokenizer_config.json (or change its post-processor)"
        raise ModelError(f"{name}: its tokenizer {what}: {todo}")
    return tokenizer


def require_same_encoding(
    mine: TokenizerInfo, theirs: TokenizerInfo, what: str, todo: str, *, trust_remote_code: bool, download: bool = False
) -> None:
    """Raise MismatchError where two tokenizers encode differently, with the first difference.

    what: who encodes differently, and where. todo: what to do. download: whether their name may be one on the Hub, as
    the user's are and those in a cache are not. Where one of the tokenizers can't be loaded, or their name leads to
    another than the recorded one, the message has no difference.
    """
    if mine.encodes_as(theirs):
        return
    difference = ""
    if download or Path(theirs.name).is_dir():
        with suppress(ModelError):
            own, other = (load_tokenizer(i.name, trust_remote_code=trust_remote_code) for i in (mine, theirs))
            if tokenizer_info(other, theirs.name).encodes_as(theirs) and (found := first_difference(own, other)):
                difference = f": {found}"
    raise MismatchError(f"{what}{difference}; {todo}")


def _encodes_as_its_file(tokenizer: PreTrainedTokenizerBase, file: Path) -> bool:
    """False where transformers built another tokenizer than tokenizer.json holds: for some model types (Qwen2) it
    takes the vocabulary and puts a pre-tokenizer of its own before it, whatever the file says."""
    if not file.is_file():
        return True
    held = Tokenizer.from_file(str(file))
    held.no_truncation()
    texts = [text for text in PROBES if text]
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return ids == [encoding.ids for encoding in held.encode_batch(texts, add_special_tokens=False)]


def is_encoder_decoder(name: str, *, trust_remote_code: bool = False) -> bool:
    """From the configuration alone; False for a decoder-only model. Raises ModelError where it can't be read."""
    folder = whole_folder(name)
    read_json(folder / "config.json")
    with _loading(name):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    return bool(config.is_encoder_decoder)


def load_model(
    name: str,
    *,
    dtype: str = "float32",
    device: str = "auto",
    device_map: str | None = None,
    trust_remote_code: bool = False,
    fit: StudentOptions | None = None,
    quantize: str = "none",
) -> PreTrainedModel:
    """An encoder-decoder or decoder-only model in eval mode, on `device` or spread over devices by `device_map`. The
    folder of a LoRA adapter is the model with the adapter merged.

    dtype: float32 or bfloat16. Not float16: T5's feed-forward layers overflow it and give NaN. fit: of a model that
    is to be trained; an adapter, its own or a new one, then stays beside the weights, which are frozen. quantize: as
    `ScoringOptions.quantize`; a model that was saved quantised is loaded as it is.
    Raises ModelError for a folder that is missing, incomplete, damaged or of another kind of model, for weights that
    are missing, left over or of another shape, for a device that is not there, and for options that do not fit the
    folder; ConfigError for `fsdp` in a single process. With `fsdp` the model stays on the CPU.
    """
    target = None if device_map else pick_device(device)
    adapter, folder = read_adapter(resolve_folder(name)), whole_folder(name)
    if fit:
        _refuse_unfit(name, adapter, folder, fit)
        if fit.fsdp and (group().size == 1 or (target and target.type == "mps")):
            raise ConfigError(
                ["--fsdp needs several processes, on GPUs or CPUs: start it by torchrun, or leave it out"]
            )
    raw_config, entries = read_json(folder / "config.json"), weight_entries(folder)
    quantised = raw_config.get("quantization_config") or {}
    if quantize != "none" and (quantised or adapter):
        what = f"is quantised already ({quantised.get('quant_method')})" if quantised else "is an adapter; merge it"
        raise ModelError(f"{name}: {what}; or leave --quantize out")
    trust = {"trust_remote_code": trust_remote_code}
    with _loading(name):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, **trust)
        kind = _kind(name, config)
        layers = max(int(getattr(config, key, None) or 0) for key in LAYERS)
        if layers > len(entries):  # each has a weight; to build them would take for ever
            raise ModelError(f"{name}: config.json says {layers:,} layers, but there are {len(entries):,} weights")
        with torch.device("meta"):
            shapes = {key: tuple(value.shape) for key, value in kind.from_config(config, **trust).state_dict().items()}
        # before loading: what transformers says of a head of another shape does not name it
        for entry in [] if quantised else entries:
            if entry.shape != (expected := shapes.get(entry.name, entry.shape)):
                raise ModelError(f"{name}: {entry.name} has shape {entry.shape}, but config.json makes it {expected}")
        options = {"config": config, "dtype": dtype, "device_map": device_map, "use_safetensors": True, **trust}
        if quantize != "none":
            options["quantization_config"] = _quantization(name, quantize, target)
        if quantised or quantize.startswith("bnb"):  # bitsandbytes does not move what it has packed
            options["device_map"] = device_map or {"": target}
            target = None
        model, loading = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True, **options)
    _refuse_incomplete(name, model, loading)
    _refuse_silently_tied(name, model, raw_config)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError(f"{name}: does not fit on the devices (device_map {device_map!r}): use bfloat16 or more GPUs")
    fuse_gelu(model)
    if adapter or (fit and fit.lora_rank):
        own = str(adapter.config["base_model_name_or_path"]) if adapter else name
        own = str(folder.absolute()) if Path(own).expanduser().exists() else own
        base = base_fingerprint(resolve_folder(name))
        with _loading(name):
            lora.attach(model, own, adapter, fit or StudentOptions(), base)
        if not fit:
            lora.merge(model)
    if fit and fit.gradient_checkpointing:
        _checkpoint_layers(model)
    if fit and fit.fsdp:  # its parts come to the device
        target = None
    return (model.to(target) if target else model).eval()


def _refuse_unfit(name: str, adapter: Adapter | None, folder: Path, options: StudentOptions) -> None:
    """Raise ModelError where the options of an adapter do not fit the folder that is to be trained."""
    if adapter and options.lora_rank:
        what = f"is an adapter of rank {adapter.config.get('r')} already, which goes on being trained"
        raise ModelError(f"{name}: {what}; leave --lora-rank out, or start from the merged model")
    if options.lora_merge and not (adapter or options.lora_rank):
        raise ModelError(f"{name}: is no adapter, so there is nothing for --lora-merge to merge; give --lora-rank too")
    if "quantization_config" in read_json(folder / "config.json"):
        what = "is quantised; such weights are not trained, and adapters on them (QLoRA) are not supported"
        raise ModelError(f"{name}: {what}: take the full weights")


def _quantization(name: str, how: str, device: torch.device | None) -> Any:
    """What transformers quantises by. Raises ModelError without the package, and where it would not give one answer."""
    if how.startswith("bnb") and device and device.type == "cpu":
        what = "bitsandbytes computes a row otherwise beside other rows there"
        raise ModelError(f"{name}: --quantize {how} is not for a CPU ({what}): use int8, or a GPU")
    package = "bitsandbytes" if how.startswith("bnb") else "torchao"
    if importlib.util.find_spec(package) is None:
        raise ModelError(f"{name}: --quantize {how} needs {package}: pip install 'ketchup-cache[quantize]'")
    from transformers import BitsAndBytesConfig, TorchAoConfig  # they import both packages

    if how == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if how == "bnb-int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


@contextmanager
def _loading(name: str, what: str = "") -> Iterator[None]:
    """What the libraries raise, in one line."""
    try:
        with quiet():
            yield
    except ModelError:
        raise
    except Exception as error:  # of transformers, of Rust, of JSON, of a model's own code: they have no common base
        raise ModelError(f"{name}: {what}can't be loaded ({one_line(error)})") from error


def fuse_gelu(model: PreTrainedModel) -> None:
    """The same function in one kernel where transformers takes eight ("gelu_new", of FLAN-T5 and GPT-2): each reads and
    writes the widest tensors of the model, rounds them to its precision, and keeps them for the backward pass."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:
                setattr(module, name, nn.GELU(approximate="tanh"))


def _checkpoint_layers(model: PreTrainedModel) -> None:
    """From now on, keep the inputs of the layers for the backward pass, and compute the rest of each again: the same
    gradient. transformers' own switch works in train mode alone, that is with dropout."""
    if is_ragged(model):
        model.encoder.gradient_checkpointing = model.decoder.gradient_checkpointing = True
        return
    for layer in layers_of(model, "--gradient-checkpointing"):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def layers_of(model: PreTrainedModel, option: str) -> list[nn.Module]:
    """The transformer layers. option: which needs them. Raises ModelError for a model that does not mark them."""
    if layers := [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]:
        return layers
    raise ModelError(f"{type(model).__name__} does not mark its layers: leave {option} out")


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go in; not where logits come out of a model that is spread over devices."""
    return model.get_input_embeddings().weight.device


def model_name(model: PreTrainedModel) -> str:
    """What a model is called in messages: where it was loaded from, else its class."""
    return str(model.name_or_path or type(model).__name__)


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """In eval mode, that is without dropout, while the block runs."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _kind(name: str, config: PreTrainedConfig) -> type[AutoModelForCausalLM] | type[AutoModelForSeq2SeqLM]:
    """What loads it. Raises ModelError for a model that does not write text."""
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    if type(config) not in kind._model_mapping and kind.__name__ not in (getattr(config, "auto_map", None) or {}):
        what = "is not a language model that writes text (T5, Qwen2 and the like)"
        raise ModelError(f"{name}: {config.model_type} {what}")
    return kind


def _refuse_incomplete(name: str, model: PreTrainedModel, loading: dict[str, Any]) -> None:
    # a constant that old GPT-2 files hold: what the causal mask was filled with
    left_over = [key for key in loading["unexpected_keys"] if not key.endswith(".attn.masked_bias")]
    kinds = {"missing": loading["missing_keys"], "not part of the model": left_over}
    problems = [f"{len(keys)} weights {kind} (first: {min(keys)})" for kind, keys in kinds.items() if keys]
    if problems:
        raise ModelError(f"{name}: not a complete {type(model).__name__} checkpoint: {'; '.join(problems)}")


def _refuse_silently_tied(name: str, model: PreTrainedModel, raw_config: dict[str, Any]) -> None:
    """transformers 5 ties T5's head whatever config.json says, unless the file has a head: without one it would run
    FLAN-T5 with its input embedding as its head, and report nothing missing."""
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    if tied and raw_config.get("tie_word_embeddings") is False:
        keys = [f"{key}.weight" for key, module in model.named_modules() if module is head]
        raise ModelError(f"{name}: config.json says that the head is not tied, but the weights lack {keys[0]}")


def quiet() -> ExitStack:
    """As `silence`, of transformers."""
    return silence(transformers_logging)
