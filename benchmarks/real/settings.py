"""What the tables on real text compare: sizes, budgets, and the rows with their options of `learn`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Options = Mapping[str, Any]
SEEDS = (0, 1, 2, 3, 4)
"""Starts of the rows that are compared, each pre-distilled in an order of its own."""
OTHER_SEEDS = SEEDS[:3]
"""Starts of the other rows, which describe."""
DEV_SEEDS = (5, 6)
"""Starts on which settings are chosen."""
RATES = (4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
"""Of pre-distillation."""
KEEP_TOP = 256
STEPS, BATCH = 160, 128
REFRESH, REUSE = 16, 4
"""Steps between new rollouts, and how many of them use each rollout. Pilots of one start end the same without reuse,
at four times the teacher's seconds; with 8 and 16 uses the student ends below its start."""
GRADIENT_BATCH = 256
DECODING = {"max_new_tokens": 64, "rollout_batch": 256}
BASE = {
    "epochs": 4, "batch_size": 64, "lr": 4e-3, "schedule": "linear", "warmup": 200, "weight_decay": 0.0,
    "max_new_tokens": 64, "checkpoint_every": 500,
}  # fmt: skip
"""How the students' base learns to take out noise."""
PRETRAIN = {"batch_size": 64, "schedule": "linear", "warmup": 50, "weight_decay": 0.0}
DEV = {"eval_limit": 500, "metric": "bleu,chrf"}
LEARN: Options = {
    "steps": STEPS, "batch_size": BATCH, "refresh_every": REFRESH, "reuse": REUSE,
    "schedule": "linear", "weight_decay": 0.0,
    "baseline": "mean", "eval_every": STEPS // 5, "checkpoint_every": 0, "save_limit": 0, **DECODING, **DEV,
}  # fmt: skip
"""Of every row, unless it says otherwise."""


@dataclass(frozen=True)
class Task:
    """Of Multi30k, from one language into the other.

    labelled: prompts whose teacher outputs the students are pre-distilled on; the others of the training split have
    none, and learning uses those. None: all have one, and learning uses the same prompts. epochs: of pre-distillation.
    base: the task whose teacher it has. like: the task whose tokenizer, base and settings it has: nothing is chosen on
    its own dev set, and it has ROWS_ALIKE beside the rows that are compared.
    """

    name: str
    prompt: str
    target: str
    labelled: int | None = 4000
    epochs: int = 20
    base: str | None = None
    like: str | None = None


TASKS = {
    "ende": Task("ende", "prompt", "target"),
    "ende-all": Task("ende-all", "prompt", "target", labelled=None, epochs=6, base="ende"),
    "deen": Task("deen", "target", "prompt", like="ende"),
}
TEACHER = {
    "epochs": 12, "batch_size": 64, "lr": 2e-3, "schedule": "linear", "warmup": 200, "weight_decay": 0.1,
    "dropout": False, "precision": "bfloat16", "eval_limit": 300, "eval_every": 453, "metric": "bleu,loss",
    "max_new_tokens": 64, "checkpoint_every": 200,
}  # fmt: skip
TEACHER_AGAIN = {"dropout": True, "lr": 1e-3, "epochs": 10}
"""What is different in its second stage."""
K = {"method": "ketchup", "tail": "jump"}
GAE, EXACT = {"weights": "gae", "lam": 0.7}, {"exact": True, "keep_top": KEEP_TOP}
NONE, CENTRED, ANCHORED = {"weights": "flat", "lam": 0.0}, {"cost": "centred"}, {"anchor": 1.0}
REVERSE_KL = {"method": "reverse-kl", "keep_top": KEEP_TOP, "baseline": "none"}
NEW: dict[str, tuple[Options, tuple[float, ...]]] = {
    "gae 0.7, centred": (GAE | CENTRED, (4e-4,)),
    "gae 0.7, centred, anchored": (GAE | CENTRED | ANCHORED, (1e-3,)),
    "exact": (EXACT | NONE, (3e-3,)),
    "exact, anchored": (EXACT | NONE | ANCHORED, (3e-3, 6e-3)),
    "exact, gae 0.7, centred, anchored": (EXACT | GAE | CENTRED | ANCHORED, (1e-3,)),
    "exact with cost kl, anchored": (EXACT | NONE | ANCHORED | {"cost": "kl"}, (3e-3, 6e-3)),
}
"""What the gradient diagnostic leaves: at every bias GAE is steadier than the comb and flat weights; and the anchor on
teacher outputs. With their learning rates."""
GROUPS: dict[str, dict[str, Options]] = {
    "llmr": {
        f"LLMR, {baseline}, {lr:g}": {"method": "llmr", "baseline": baseline, "lr": lr}
        for baseline in ("mean", "min-variance")
        for lr in (3e-5, 1e-4, 3e-4, 1e-3)
    },
    "paper": {f"K = {k}, {lr:g}": K | {"k": k, "lr": lr} for k in (2, 4, 8, 16) for lr in (1e-4, 4e-4)},
    "kl": {
        **{f"reverse KL, {lr:g}": REVERSE_KL | {"lr": lr} for lr in (1.5e-3, 3e-3, 6e-3, 1.2e-2)},
        **{
            f"MiniLLM, {lr:g}": {"method": "minillm", "keep_top": KEEP_TOP, "lr": lr} for lr in (3e-4, 1e-3, 3e-3, 6e-3)
        },
    },
    "new": {f"{name}, {lr:g}": {**options, "lr": lr} for name, (options, rates) in NEW.items() for lr in rates},
}
"""Each has 16 runs on the dev set: eight settings on two starts. A setting is called ROW, RATE."""


def row_of(setting: str) -> str:
    """Of the table, by the name of one of its settings."""
    return setting.rsplit(", ", 1)[0]


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
FRESH = "reverse KL, fresh"
ROWS_ALIKE = ("SeqKD continued", "reverse KL")
MARGIN = 0.3
"""BLEU by which the best policy gradient may be worse than FRESH (a one-sided test)."""
SEQKD_RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)
FEWER = (400, 800, 1600)
"""New outputs of rows that tell how many of them scoring is worth."""
LONGER = 4
"""How many times as long the longer of the rows of SeqKD on new outputs is."""


@dataclass(frozen=True)
class Row:
    """options: of `learn`, beside LEARN. source: what it learns from: rollouts of its own, refreshed, that begin with
    those in the cache; the teacher's outputs; own rollouts of the start alone; or those of another start."""

    options: Options
    source: Literal["refreshed", "outputs", "offline", "another's"] = "refreshed"


def rows(chosen: Mapping[str, Options], won: Mapping[str, str]) -> dict[str, Row]:
    """Those of `learn` in the table. chosen: of each row of the groups, the options with the rate that was best on the
    dev set. won: of each group, the row that was."""
    paper, reverse_kl = dict(chosen[won["paper"]]), dict(chosen["reverse KL"])
    rate = {"lr": reverse_kl["lr"]}
    released = AS_RELEASED | {"k": paper["k"], "lr": paper["lr"]}
    table = {
        "LLMR": Row({**chosen["LLMR, mean"], "baseline": "none"}),
        **{name: Row(options) for name, options in chosen.items()},
        FRESH: Row(reverse_kl | {"refresh_every": 1, "reuse": 1}),
        "KL": Row({"method": "kl", "keep_top": KEEP_TOP, "baseline": "none", **rate}, "outputs"),
        "JS": Row({"method": "js", "keep_top": KEEP_TOP, "baseline": "none", **rate}),
        "TVD": Row({"method": "tvd", "keep_top": KEEP_TOP, "baseline": "none", **rate}),
        "as released": Row(released),
        **{f"as released, {name}": Row(released | back) for name, back in TURNED_BACK.items()},
    }
    methods = {group: chosen[won[group]] for group in ("llmr", "paper", "new")}
    return table | cache_rows({**methods, "reverse KL": reverse_kl})


def cache_rows(methods: Mapping[str, Options]) -> dict[str, Row]:
    """What new rollouts for every step cost or gain, refreshed every 4, or every 16 and where the effective sample size
    falls; none at all; and a colleague's cache (experiment F)."""
    found = {}
    for name, options in methods.items():
        found[f"{name}, every 4"] = Row({**options, "refresh_every": 4, "reuse": 1})
        found[f"{name}, by ess"] = Row({**options, "reuse": 1, "refresh_below_ess": 0.5})
        alone = {**options, "refresh_every": None, "reuse": None}
        found |= {f"{name}, offline": Row(alone, "offline"), f"{name}, another's": Row(alone, "another's")}
    return found


def experiments(chosen: Mapping[str, Options]) -> dict[str, Options]:
    """B: the price of ending, by the weight of the future, of its last cost, and the cost. C: the anchor's weight. E:
    rollouts nearer to what is evaluated. F: how often each is used. chosen: as for `rows`."""
    found: dict[str, Options] = {}
    base = {**chosen["gae 0.7, centred"]}
    for lam, cost, end in ((0.1, "gap", None), (0.5, "gap", None), (0.5, "gap", 1.0), (0.5, "centred", None)):
        ending = "" if end is None else f", end weight {end:g}"
        found[f"B: flat {lam:g}, {cost}{ending}"] = base | {
            "weights": "flat", "lam": lam, "cost": cost, "end_weight": end,
        }  # fmt: skip
    for row in ("exact", "exact with cost kl, anchored", "LLMR, mean"):
        for beta in (0.1, 0.3, 1.0):
            found[f"C: {row.removesuffix(', anchored')}, anchor {beta:g}"] = {**chosen[row], "anchor": beta}
    draws: dict[str, Options] = {
        "temperature 0.5": {"temperature": 0.5}, "temperature 0.7": {"temperature": 0.7}, "top-p 0.9": {"top_p": 0.9},
        "greedy": {"greedy": True},
    }  # fmt: skip
    for name, draw in draws.items():
        found[f"E: exact, {name}"] = {**chosen["exact"], **draw}
    for reuse in (1, 8):
        found[f"F: exact, {reuse} uses"] = {**chosen["exact"], "refresh_every": 4 * reuse, "reuse": reuse}
    return found
