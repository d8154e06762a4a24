"""Which families of language models run exactly: a tiny model of each goes through `rollout`, `score` and `learn`.

Every architecture that transformers loads as a model that writes text (AutoModelForCausalLM, AutoModelForSeq2SeqLM) is
made from its config with small sizes, saved, and loaded as a user's folder. "Exact" means: the scores in the cache, and
the log-probabilities that completions were drawn with, are those of plain forward passes of transformers over each row
alone, and an optimizer step starts from the same numbers (importance ratio 1). A family that ends with one of our
errors is refused; one that gives other numbers without an error is WRONG.

    python -m benchmarks.families                  # all; `--only llama,t5` some; `--part 1/4` a quarter
    python -m benchmarks.families --page           # docs/families.md from what was found
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from transformers.models.auto import configuration_auto, modeling_auto

from benchmarks.common import RESULTS, ROOT
from ketchup_cache import open_cache
from ketchup_cache.config.commands import LearnConfig, RolloutConfig, ScoreConfig
from ketchup_cache.console import one_line
from ketchup_cache.errors import KetchupError
from ketchup_cache.models.load import load_model
from ketchup_cache.rollouts.rollout import rollout
from ketchup_cache.scoring.score import score
from ketchup_cache.training.learn import learn
from tests.helpers.models import ENDS, VOCAB, make_decoder_tokenizer, make_tokenizer, write_prompts
from tests.helpers.oracle import plain_row_scores

FILE, PAGE = RESULTS / "families.json", ROOT / "docs" / "families.md"
MARK, END = "<!-- table of families -->", "<!-- end of table of families -->"
NEAR = 1e-5
"""Largest difference of a number, as a share of the largest logit."""
MOST = 8_000_000
"""Weights of a model that counts as tiny."""
SECONDS = 60
"""That a family may take."""
KINDS = {
    "decoder-only": ("AutoModelForCausalLM", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "encoder-decoder": ("AutoModelForSeq2SeqLM", modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
}
SMALL = {
    "vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 3, "eos_token_id": 1, "initializer_range": 0.3,
    "init_std": 0.3, "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "max_seq_len": 64,
} | dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "dim_model"), 32) | (
    dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim"), 48)
) | dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
                   "num_decoder_layers", "num_encoder_layers"), 2) | (
    dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
                   "decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 4)
) | dict.fromkeys(("num_key_value_heads", "n_kv_heads", "num_kv_heads"), 2) | (
    dict.fromkeys(("head_dim", "d_kv", "dim_head", "attention_head_dim", "v_head_dim"), 8)
) | dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4) | {
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "n_group": 1,
    "topk_group": 1, "sliding_window": 4, "attention_window": 8, "dropout": 0.0, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "kv_lora_rank": 16, "q_lora_rank": 16, "o_lora_rank": 16, "image_size": 8, "patch_size": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8,
}  # fmt: skip
"""Sizes of a tiny model, by the keys of configs; of these a family takes what it knows."""
LATENT = {"num_key_value_heads": 4}
NO_PAD = {"pad_token_id": VOCAB, "vocab_size": VOCAB + 2}
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "bailing_hybrid", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "youtu",
                     "dots3_note", "dots3_note_text", "kimi_linear", "longcat_flash", "minicpm3", "axk2",
                     "glm4_moe_lite"), LATENT),
    "codegen": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    # whose positions follow from the ids that pad: here the policy must not draw one
    **dict.fromkeys(("m2m_100", "nllb-moe", "seamless_m4t", "seamless_m4t_v2"), NO_PAD),
    "gptj": {"rotary_dim": 4},
    "deepseek_v2": LATENT | {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "ministral": {"head_dim": 8},
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1,
                  "mamba_chunk_size": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 8,
                         "mamba_d_state": 8, "mamba_chunk_size": 4},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8,
              "mamba_chunk_size": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 4},
    "zamba2": {"mamba_d_state": 8, "chunk_size": 4, "mamba_headdim": 8, "n_mamba_heads": 8},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "chunk_size": 4},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "prophetnet": {"max_position_embeddings": 64, "decoder_start_token_id": 0},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, 
                        "block_types": ["recurrent", "recurrent", "attention"]},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
}  # fmt: skip
"""What a family needs beside them."""


class Found(NamedTuple):
    """state: exact, refused, wrong or "not made". why: the error, or what differs."""

    state: str
    why: str = ""


def small_config(kind: type, own: dict[str, Any], **more: Any) -> Any:
    """A config of this class with small sizes, its parts too."""
    default, values = kind(), {}
    for name in kind.sub_configs:
        if (part := vars(default).get(name)) is not None:
            values[name] = small_config(type(part), own.get(name, {})).to_dict()
    held = {kind.attribute_map.get(key, key): value for key, value in SMALL.items()}
    values |= {key: value for key, value in held.items() if vars(default).get(key) is not None}
    if layers := vars(default).get("layer_types"):
        kinds = list(dict.fromkeys(layers))
        values["layer_types"] = kinds if len(kinds) > 1 else kinds * 2
        values[kind.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(values["layer_types"])
    return kind(**values | {k: v for k, v in own.items() if k not in kind.sub_configs} | more)


def make(family: str, kind: str) -> torch.nn.Module:
    """A random model, wide enough that its distribution is far from uniform."""
    config_class = configuration_auto.CONFIG_MAPPING[family]
    start = 0 if "t5" in family or family in ("umt5", "switch_transformers") else 1  # the token that pads, or that ends
    more = {"decoder_start_token_id": start} if kind == "encoder-decoder" else {}
    config = small_config(config_class, OWN.get(family, {}), **more)
    loader = getattr(transformers, KINDS[kind][0])
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in loader.from_config(config).parameters())
    if weights > MOST:
        raise ValueError(f"{weights:,} weights, with small sizes by these keys")
    torch.manual_seed(0)
    model = loader.from_config(config).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                module.weight.normal_(0, 1.5 / module.weight.shape[1] ** 0.5)
        ids = torch.tensor([[5, 9, 4, 7, 1, 8, 6, 3, 2, 9]])
        started = {"decoder_input_ids": ids} if kind == "encoder-decoder" else {}
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **started)
    model.generation_config.eos_token_id = ENDS
    return model


def try_family(family: str, kind: str, folder: Path) -> Found:
    """Through all commands, in `folder`, which is empty."""
    try:
        model = make(family, kind)
        model.save_pretrained(folder / "model")
        words = make_tokenizer if model.config.is_encoder_decoder else make_decoder_tokenizer
        words().save_pretrained(folder / "model")
    except Exception as error:
        return Found("not made", f"{type(error).__name__}: {one_line(error)}")
    try:
        return compared(folder)
    except TimeoutError as error:
        return Found("not made", str(error))
    except KetchupError as error:
        return Found("refused", one_line(error).replace(str(folder / "model"), "MODEL"))
    except Exception as error:
        return Found("wrong", f"an error that is not ours: {type(error).__name__}: {one_line(error)}")


def compared(folder: Path) -> Found:
    """Scores and log-probabilities in the cache beside plain passes; then an optimizer step."""
    name, data = str(folder / "model"), str(write_prompts(folder / "prompts.jsonl", 8))
    given: dict[str, Any] = {"cache": folder / "cache", "device": "cpu"}
    how = {"samples": 3, "max_new_tokens": 8, "rollout_batch": 12}
    rollout(RolloutConfig(student=name, data=data, **given, **how))
    score(ScoreConfig(teacher=name, batch_tokens=200, **given))
    model, _ = load_plain(folder / "model")
    worst, largest = Counter[str](), 1.0
    lengths = set()
    for row in open_cache(given["cache"]).rows():
        tokens = row.completion_tokens
        lengths.add((len(row.prompt_tokens), len(tokens)))
        plain = plain_row_scores(model, row.prompt_tokens, tokens, row.finished, VOCAB)
        largest = max(largest, float(np.abs(plain["max_q"]).max()), float(np.abs(plain["q"]).max()))
        ours = {key: getattr(row, key) for key in plain}
        ours["drawn"], plain["drawn"] = row.behavior_logprob, plain["q"] - plain["logsumexp"]
        for key, values in plain.items():
            worst[key] = max(worst[key], float(np.abs(ours[key] - values).max()))
    assert len(lengths) > 4  # rows are ragged
    for key, difference in worst.items():
        if not difference <= NEAR * max(largest, 10):
            return Found("wrong", f"{key} differs by {difference:.2g}, of logits up to {largest:.0f}")
    report = learn(LearnConfig(student=name, **given, out=folder / "run", steps=1, batch_size=24, samples=3, lr=1e-3))
    if not (abs(report.first["ratio_mean"] - 1) < 1e-3 and report.first["grad_norm"] > 0):
        return Found("wrong", f"learn: importance ratio {report.first['ratio_mean']:.5f} before the first step")
    load_model(str(folder / "run" / "last"), device="cpu")
    return Found("exact", f"{max(worst.values()) / largest:.0e}")


def load_plain(folder: Path) -> tuple[Any, Any]:
    """By transformers alone."""
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype="float32").eval(), config


def write_page(known: dict[str, dict[str, str]]) -> None:
    """The table, between the marks of docs/families.md."""
    rows = []
    for family, kind in families():
        found = Found(**known[f"{family} {kind}"])
        why = "" if found.state == "exact" else found.why.replace("|", "\\|")
        rows.append(f"| `{family}` | {kind} | {found.state} | {why} |")
    counts = Counter(Found(**known[f"{family} {kind}"]).state for family, kind in families())
    head = ", ".join(f"{n} {state}" for state, n in counts.most_common())
    table = f"transformers {transformers.__version__}: {head}.\n\n"
    table += "| family | kind | here | why |\n| --- | --- | --- | --- |\n"
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(f"{MARK}\n")
    _, end, after = rest.partition(END)
    PAGE.write_text(before + f"{MARK}\n" + table + "\n".join(rows) + "\n\n" + end + after, encoding="utf-8")


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"takes longer than {SECONDS} s")


def families() -> list[tuple[str, str]]:
    """(model_type, kind) of all that transformers knows."""
    return [(family, kind) for kind, (_, names) in KINDS.items() for family in names]


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="model types, comma-separated")
    parser.add_argument("--part", default="1/1", help="N/M: the N-th of M parts")
    parser.add_argument("--page", action="store_true", help="write docs/families.md, try nothing")
    options = parser.parse_args(words)
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    part, parts = map(int, options.part.split("/"))
    only = set(options.only.split(",")) - {""}
    wanted = [row for row in families() if not only or row[0] in only][part - 1 :: parts]
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _too_long)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    if options.page:
        write_page(known)
        return
    for family, kind in wanted:
        began = time.monotonic()
        signal.alarm(SECONDS)
        with tempfile.TemporaryDirectory() as folder:
            found = try_family(family, kind, Path(folder))
        signal.alarm(0)
        print(f"{family:<24} {kind:<16} {found.state:<9} {time.monotonic() - began:4.1f} s  {found.why}", flush=True)
        known[f"{family} {kind}"] = found._asdict()
        FILE.write_text(json.dumps(dict(sorted(known.items())), indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
