"""What is run: tasks, the rows of the table, the ablations. Everything else in this folder reads it from here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ketchup_cache.config.methods import METHODS

Options = dict[str, Any]
"""Options of a command, by their YAML names."""

SEEDS = range(5)
ABLATION_SEEDS = range(3)


@dataclass(frozen=True)
class Metric:
    """A column of the table: where `evaluate --json` has it, its title, and which direction is better."""

    key: str
    title: str
    higher: bool = True


@dataclass(frozen=True)
class Task:
    """A shipped task (data/NAME) and the options that its runs share.

    labelled: prompts whose teacher outputs the student was pre-distilled on, and which the offline methods learn
    from. Reinforcement learning uses the prompts after them: the teacher scores there, and never generates.
    """

    name: str
    title: str
    labelled: int
    metrics: tuple[Metric, ...]
    decoding: Options
    pretrain: Options
    """How the shipped student was pre-distilled; the runs of other lengths and sizes change a part of it."""
    evaluation: Options = field(default_factory=dict)
    """Of `evaluate`, over the decoding."""
    reinforce: Options = field(default_factory=dict)
    """Of `learn` by reinforcement, over REINFORCE; chosen on the dev split (docs/log.md)."""
    rates: dict[str, float] = field(default_factory=dict)
    """Method → learning rate, of those that match distributions; chosen likewise, up to 8e-3."""

    @property
    def headline(self) -> Metric:
        return self.metrics[0]


TASKS = {
    task.name: task
    for task in (
        Task(
            "translate",
            "translate (as Europarl)",
            labelled=1500,
            metrics=(Metric("bleu", "BLEU"), Metric("chrf", "chrF"), Metric("ter", "TER", higher=False)),
            decoding={"max_new_tokens": 36, "rollout_batch": 256},
            pretrain={"epochs": 130, "batch_size": 64, "lr": 3e-3, "warmup": 50, "schedule": "linear",
                      "weight_decay": 0},
            reinforce={"steps": 64, "batch_size": 512},
            rates={"seqkd": 8e-3, "kl": 8e-3, "reverse-kl": 8e-3, "js": 8e-3, "tvd": 8e-3},
        ),
        Task(
            "reason",
            "reason (as GSM8K, with the calculator)",
            labelled=2000,
            metrics=(Metric("gsm8k", "accuracy"),),
            decoding={"max_new_tokens": 48, "rollout_batch": 256, "calculator": True},
            pretrain={"epochs": 60, "batch_size": 64, "lr": 4e-3, "warmup": 30, "schedule": "linear",
                      "weight_decay": 0},
            evaluation={"metrics": "gsm8k"},
            reinforce={"lr": 2e-4},
            rates={"seqkd": 8e-3, "kl": 8e-3, "reverse-kl": 4e-3, "js": 8e-3, "tvd": 4e-3},
        ),
        Task(
            "summarise",
            "summarise (as XSum)",
            labelled=2000,
            metrics=(Metric("rougeL", "ROUGE-L"), Metric("rouge1", "ROUGE-1"), Metric("rouge2", "ROUGE-2")),
            decoding={"max_new_tokens": 24, "rollout_batch": 256},
            pretrain={"epochs": 15, "batch_size": 64, "lr": 4e-3, "warmup": 30, "schedule": "linear",
                      "weight_decay": 0},
            reinforce={"lr": 1e-3},
            rates={"seqkd": 8e-3, "kl": 8e-3, "reverse-kl": 3e-4, "js": 8e-3, "tvd": 4e-3},
        ),
    )
}  # fmt: skip

REINFORCE: Options = {
    "steps": 48,
    "batch_size": 256,
    "samples": 1,
    "refresh_every": 4,
    "lr": 5e-4,
    "warmup": 10,
    "schedule": "linear",
    "unfinished": "drop",
}
"""`learn` for every method that learns from the student's own samples. Chosen on the dev splits (docs/log.md). Few of
these rollouts are cut; `drop` was the default when the first of them ran."""

KEEP_TOP = 64
DIVERGENCE: Options = {"steps": 188, "batch_size": 64, "warmup": 10, "schedule": "linear", "keep_top": KEEP_TOP}
"""`learn` for the methods that learn from teacher outputs: as many steps as eight epochs of 1,500 outputs take."""

ON_SAMPLES: Options = {"samples": 1, "refresh_every": 16}
"""The same for those that also learn from the student's own samples."""


@dataclass(frozen=True)
class Row:
    """One row of a table: a learned student. `options`: of `learn`, over the shared ones."""

    name: str
    options: Options
    student: str = "predistilled"
    """Folder of the task that it starts from, or the name of a student that `students` makes."""
    against: str = ""
    """A row of the same table that differs from it in K alone: they are compared too."""

    @property
    def method(self) -> str:
        return str(self.options.get("method", "ketchup"))

    @property
    def needs_outputs(self) -> bool:
        """Whether it learns from the teacher's own outputs."""
        return METHODS[self.method].outputs

    @property
    def needs_samples(self) -> bool:
        """Whether it learns from the student's own samples, which are refreshed and scored."""
        return METHODS[self.method].samples

    def learning(self, task: Task, seed: int) -> Options:
        """All options of `learn` on a task."""
        shared = {**REINFORCE, **task.reinforce}
        if self.method == "reverse-kl":
            shared |= {"keep_top": KEEP_TOP}
        if self.needs_outputs:
            shared = {**DIVERGENCE, **(ON_SAMPLES if self.needs_samples else {})}
        if self.method in task.rates:
            shared |= {"lr": task.rates[self.method]}
        return {**shared, **self.options, "seed": seed}

    def fresh_rollouts(self, options: Options) -> int:
        """Rollouts of the student between two refreshes."""
        of_student = options["batch_size"] // (2 if self.needs_outputs else 1)
        return int(options["refresh_every"] // options.get("reuse", 1) * of_student)


KS = (2, 4, 8, 16)
TABLE = (
    Row("SeqKD", {"method": "seqkd"}),
    Row("KL", {"method": "kl"}),
    Row("JS", {"method": "js"}),
    Row("TVD", {"method": "tvd"}),
    Row("reverse KL", {"method": "reverse-kl"}),  # not in the paper: what on-policy distillation does today
    Row("LLMR (K = 1)", {"method": "llmr"}),
    Row("LLMR + mean", {"method": "llmr", "baseline": "mean"}),
    Row("LLMR + min-variance", {"method": "llmr", "baseline": "min-variance"}),
    *(Row(f"KETCHUP, K = {k}", {"k": k}) for k in KS),
    *(Row(f"K = 4 + {b}", {"k": 4, "baseline": b}, against=f"LLMR + {b}") for b in ("mean", "min-variance")),
)
REFERENCE = "LLMR (K = 1)"
"""The row that every other one is compared with; `against` names a second one."""


@dataclass(frozen=True)
class Ablation:
    """One question that the paper leaves open: what is varied, from which setting, and on which task."""

    title: str
    rows: tuple[Row, ...]
    task: str = "reason"  # completions of 25 tokens: long enough for K to matter


DEFAULT = Row("KETCHUP, K = 4", {"k": 4})
"""What each ablation varies. Rows of the table keep their names here, so that they run once."""

ABLATIONS = (
    Ablation(
        "tail",
        tuple(
            row
            for k in (4, 8, 16)
            for row in (Row(f"KETCHUP, K = {k}", {"k": k}), Row(f"K = {k}, tail jump", {"k": k, "tail": "jump"}))
        ),
    ),
    Ablation(
        "normalisation (no baseline)", (DEFAULT, *(Row(n, {"k": 4, "normalization": n}) for n in ("raw", "centred")))
    ),
    Ablation(
        "refresh period N, with and without importance correction",
        (
            DEFAULT,
            *(
                Row(f"N = {n}{'' if on else ', uncorrected'}", {"k": 4, "refresh_every": n, "importance": on})
                for n, on in ((1, True), (16, True), (48, True), (4, False), (16, False), (48, False))
            ),
        ),
    ),
    Ablation(
        "refresh period N at a quarter of the learning rate",
        (DEFAULT, *(Row(f"N = {n}, lr 5e-5", {"k": 4, "refresh_every": n, "lr": 5e-5}) for n in (4, 16, 48))),
    ),
    Ablation(
        "each rollout used several times",
        (
            DEFAULT,
            *(
                Row(f"N = {n}, each {uses} times", {"k": 4, "refresh_every": n, "reuse": uses})
                for n, uses in ((4, 2), (4, 4), (16, 4))
            ),
        ),
    ),
    Ablation(
        "sampled or greedy rollouts",
        (DEFAULT, Row("8 of each prompt", {"k": 4, "samples": 8}), Row("greedy", {"k": 4, "greedy": True})),
    ),
    Ablation(
        "unfinished rollouts (cut at 20 tokens)",
        tuple(Row(u, {"k": 4, "unfinished": u, "max_new_tokens": 20}) for u in ("drop", "bootstrap", "zero")),
    ),
    Ablation(
        "distances of distributions at a learning rate like reinforcement's (the table's: 8e-3, TVD 4e-3)",
        tuple(Row(f"{row.name}, lr 5e-4", {**row.options, "lr": 5e-4}) for row in TABLE if row.needs_outputs),
    ),
    Ablation(
        "pre-distillation",
        (
            Row("LLMR (K = 1)", {"method": "llmr"}),
            DEFAULT,
            *(Row(f"short pre-distillation, K = {k}", {"k": k}, student="short") for k in (1, 4)),
        ),
    ),
    Ablation(
        "normalisation (leave-one-out baseline, 8 of each prompt)",
        tuple(
            Row(f"{n}, leave-one-out", {"k": 4, "normalization": n, "baseline": "leave-one-out", "samples": 8})
            for n in ("logprob", "raw", "centred")
        ),
    ),
)


@dataclass(frozen=True)
class Student:
    """A student other than the shipped one: more or less pre-distilled, or of another size."""

    name: str
    share: float = 1.0
    """Of the shipped student's epochs of pre-distillation."""
    size: Options = field(default_factory=dict)
    """Fields of the shipped student's T5 configuration that are changed."""
    pretrain: Options = field(default_factory=dict)
    """Of `pretrain`, over the shipped student's."""


LENGTHS = (Student("early", share=1 / 8), Student("short", share=1 / 3))
"""Figure 2 and the ablation of pre-distillation: students at other distances from the teacher."""
SIZES = (
    Student("small", size={"d_model": 32, "d_kv": 8, "d_ff": 64}),
    Student("large", size={"d_model": 128, "d_kv": 32, "d_ff": 256}, pretrain={"lr": 1e-3}),
)
"""Figure 3."""
FIGURE_3_TASK = "reason"
FIGURE_3_KS = (1, 4, 8)


def table_runs() -> Iterator[tuple[str, Row, int]]:
    """(task, row, seed) of the paper's table, a seed of everything before the next, so that a part is of use."""
    for seed in SEEDS:
        for task in TASKS:
            for row in TABLE:
                yield task, row, seed


def ablation_runs() -> Iterator[tuple[str, Row, int]]:
    for seed in ABLATION_SEEDS:
        seen = set()
        for ablation in ABLATIONS:
            for row in ablation.rows:
                if row.name not in seen:
                    seen.add(row.name)
                    yield ablation.task, row, seed
