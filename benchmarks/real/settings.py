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
    "epochs": 12, "batch_size": 64, "lr": 3e-3, "schedule": "linear", "warmup": 400, "precision": "bfloat16",
    "eval_limit": 300, "eval_every": 906, "metric": "bleu,loss", "max_new_tokens": 64, "checkpoint_every": 200,
}  # fmt: skip
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
