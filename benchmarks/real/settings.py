"""What the tables on real text compare: sizes, budgets, and the rows with their options of `learn`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Options = Mapping[str, Any]
LABELLED = 4000
"""Prompts whose teacher outputs the students are pre-distilled on; the others of the training split have none."""
SEEDS = (0, 1, 2, 3, 4)
"""Starts of the table, each of its own initialisation and order."""
DEV_SEEDS = (5, 6)
"""Starts on which settings are chosen."""
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
"""Of pre-distillation."""
EPOCHS = 40
"""Of pre-distillation; the grid has twice as many too."""
KEEP_TOP = 256
STEPS, BATCH, REFRESH = 80, 192, 4
DECODING = {"max_new_tokens": 64, "rollout_batch": 256}
PRETRAIN = {"batch_size": 64, "schedule": "linear", "warmup": 50, "weight_decay": 0.0}
DEV = {"eval_limit": 500, "metric": "bleu,chrf"}
LEARN: Options = {
    "steps": STEPS, "batch_size": BATCH, "refresh_every": REFRESH, "schedule": "linear", "weight_decay": 0.0,
    "baseline": "mean", "eval_every": STEPS // 5, "checkpoint_every": 0, "save_limit": 0, **DECODING, **DEV,
}  # fmt: skip
"""Of every row, unless it says otherwise."""


@dataclass(frozen=True)
class Task:
    """Of Multi30k: from one language into the other."""

    name: str
    prompt: str
    target: str


TASKS = {"ende": Task("ende", "prompt", "target"), "deen": Task("deen", "target", "prompt")}
TEACHER = {
    "epochs": 12, "batch_size": 64, "lr": 2e-3, "schedule": "linear", "warmup": 200, "weight_decay": 0.1,
    "dropout": False, "precision": "bfloat16", "eval_limit": 300, "eval_every": 453, "metric": "bleu,loss",
    "max_new_tokens": 64, "checkpoint_every": 200,
}  # fmt: skip
TEACHER_AGAIN = {"dropout": True, "lr": 1e-3, "epochs": 10}
"""What is different in its second stage."""
K = {"method": "ketchup", "tail": "jump"}
FLAT, EXACT = {"weights": "flat"}, {"exact": True, "keep_top": KEEP_TOP}
REVERSE_KL = {"method": "reverse-kl", "keep_top": KEEP_TOP, "baseline": "none"}
NEW = {
    "flat 1/4": FLAT | {"lam": 0.25},
    "flat 1/4, centred": FLAT | {"lam": 0.25, "cost": "centred"},
    "exact": EXACT | FLAT | {"lam": 0.0},
    "exact, flat 1/4, centred": EXACT | FLAT | {"lam": 0.25, "cost": "centred"},
}
GROUPS: dict[str, dict[str, Options]] = {
    "llmr": {
        f"LLMR, {baseline}, {lr:g}": {"method": "llmr", "baseline": baseline, "lr": lr}
        for baseline in ("mean", "min-variance")
        for lr in (1e-4, 3e-4, 1e-3, 3e-3)
    },
    "paper": {f"K = {k}, {lr:g}": K | {"k": k, "lr": lr} for k in (2, 4, 8, 16) for lr in (3e-4, 1e-3)},
    "new": {f"{name}, {lr:g}": {**options, "lr": lr} for name, options in NEW.items() for lr in (1e-3, 3e-3)},
    "kl": {
        **{f"reverse KL, {lr:g}": REVERSE_KL | {"lr": lr} for lr in (3e-4, 1e-3, 3e-3, 6e-3)},
        **{
            f"MiniLLM, {lr:g}": {"method": "minillm", "keep_top": KEEP_TOP, "lr": lr} for lr in (3e-4, 1e-3, 3e-3, 6e-3)
        },
    },
}
"""Each has 16 runs on the dev set: eight settings on two starts."""

GROUP_OF = {"LLMR": "llmr", "K =": "paper", "reverse KL": "kl", "MiniLLM": "kl"}
AS_RELEASED = {
    "method": "ketchup", "greedy": True, "normalization": "centred", "tail": "jump", "end_weight": 1.0,
    "clip_return": 50.0, "baseline": "batch-mean",
}  # fmt: skip
"""What the authors' program does and the paper's text does not: greedy rollouts whose importance ratio is π itself,
logits less their mean, a last jump that lands on the last token, a narrower clip, one number for a baseline. Its start,
trained by KL, its batch of 8 and its 200 epochs are not in it."""
TURNED_BACK = {
    "sampled": {"greedy": False},
    "logprob": {"normalization": "logprob"},
    "no end weight": {"end_weight": None},
    "clip 100": {"clip_return": 100.0},
    "baseline mean": {"baseline": "mean"},
}
COMPARED = (("paper", "llmr"), ("new", "start"), ("new", "SeqKD, new outputs"))
"""The three comparisons that are tested, by group or row; all else is descriptive."""


def rows(chosen: Mapping[str, Options]) -> dict[str, Options]:
    """Those of `learn` in the table. chosen: of each group, the options that won on the dev set."""
    llmr, paper, new = (dict(chosen[group]) for group in ("llmr", "paper", "new"))
    rate = {method: {"lr": options["lr"]} for method, options in chosen.items() if method.startswith("method ")}
    outputs = {"keep_top": KEEP_TOP, "baseline": "none"}
    table: dict[str, Options] = {
        "LLMR": llmr | {"baseline": "none"},
        "LLMR + mean": llmr | {"baseline": "mean"},
        "LLMR + min-variance": llmr | {"baseline": "min-variance"},
        **{f"K = {k}": paper | {"k": k} for k in (2, 4, 8, 16)},
        "as released": {**AS_RELEASED, "k": paper["k"], "lr": paper["lr"]},
        **{f"as released, {name}": {**AS_RELEASED, "k": paper["k"], "lr": paper["lr"], **back}
           for name, back in TURNED_BACK.items()},
        "KL": {"method": "kl", **outputs, **rate["method reverse-kl"]},
        "JS": {"method": "js", **outputs, **rate["method reverse-kl"]},
        "TVD": {"method": "tvd", **outputs, **rate["method reverse-kl"]},
        "reverse KL": REVERSE_KL | rate["method reverse-kl"],
        "reverse KL, fresh": REVERSE_KL | rate["method reverse-kl"] | {"refresh_every": 1},
        "MiniLLM": {"method": "minillm", "keep_top": KEEP_TOP, **rate["method minillm"]},
        **{name: options | {"lr": new["lr"]} for name, options in NEW.items()},
    }  # fmt: skip
    return table
