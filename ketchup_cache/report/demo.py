"""`demo`: the whole method on a shipped task, by the tool's own commands, each printed as a user would type it."""

from __future__ import annotations

import io
import json
import os
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ketchup_cache.config.commands import DemoConfig
from ketchup_cache.config.resolve import flag
from ketchup_cache.console import Report
from ketchup_cache.errors import KetchupError
from ketchup_cache.files import write_file
from ketchup_cache.shipped import task

RunCommand = Callable[[Sequence[str]], int]
"""The command line: takes its words, returns the exit code."""

RUNS: dict[str, tuple[object, ...]] = {
    "K = 1": ("--k", 1, "--baseline", "leave-one-out", "--lr", 1e-4),
    "K = 4": ("--k", 4, "--baseline", "leave-one-out", "--lr", 1e-3),
    "exact first step": ("--weights", "flat", "--lam", 0, "--exact", "--keep-top", 64, "--lr", 2e-3),
}
"""Rows of the table, and what `learn` is told. Rates are the best of those that were tried on dev (docs/log.md)."""
NEXT = (
    "  ketchup-cache rollout --student STUDENT --data train.jsonl --first 4096 --cache cache",
    "  ketchup-cache learn --student STUDENT --teacher TEACHER --cache cache --eval-data dev.jsonl --out run",
    "  ketchup-cache report run --out run.html",
)
LABELLED = 700
"""Sentences of prompts.jsonl that the student was pre-distilled on. Learning uses the others, nobody's translations."""
LEARNING = {"steps": 80, "refresh_every": 4, "batch_size": 512, "samples": 8, "warmup": 10, "schedule": "linear"}


@dataclass(frozen=True)
class DemoReport(Report):
    """rows: name → what `evaluate --json` printed, on the held-out test split. page: the report of the runs."""

    rows: dict[str, dict[str, Any]]
    pictures: tuple[str, ...]
    seconds: float

    @property
    def page(self) -> str:
        return self.pictures[0]

    def __str__(self) -> str:
        examples = next(iter(self.rows.values()))["examples"]
        lines = [f"On {examples} held-out sentences, greedy decoding. Return: G₁ under the teacher, in nats.", ""]
        lines += _table(self.rows)
        lines += [
            "",
            self._gained(),
            "",
            "Look at:",
            *(f"  {p}" for p in self.pictures),
            f"{self.seconds:.0f} s in all.",
        ]
        return "\n".join([*lines, "", "With models and prompts of your own (docs/tutorial.md):", *NEXT])

    def _gained(self) -> str:
        """What was learnt, in a sentence."""
        name = max(RUNS, key=lambda name: self.rows[name]["returns"]["mean"])
        start, best = (self.rows[of] for of in ("student before", name))
        returns, bleu = [r["returns"]["mean"] for r in (start, best)], [r["metrics"]["bleu"] for r in (start, best)]
        return (
            f"Of the three, `{name}` has the highest return: {returns[0]:.2f} before, {returns[1]:.2f} after, and "
            f"{bleu[0]:.1f} and {bleu[1]:.1f} BLEU. One seed: `python -m benchmarks.demo` has eight."
        )


def _table(rows: dict[str, dict[str, Any]]) -> list[str]:
    lines = [f"{'':<22}{'return':>8}{'s.d.':>7}{'length':>8}{'BLEU':>7}{'chrF':>7}{'TER':>7}{'exact %':>9}"]
    for name, row in rows.items():
        lines.append(
            f"{name:<22}{row['returns']['mean']:>8.2f}{row['returns']['sd']:>7.2f}{row['length_mean']:>8.1f}"
            "{bleu:>7.1f}{chrf:>7.1f}{ter:>7.1f}{exact:>9.1f}".format(**row["metrics"])
        )
    return lines


def demo(config: DemoConfig, run: RunCommand) -> DemoReport:
    """Score a student's rollouts, learn in three ways, evaluate. `run`: the command line.

    Raises KetchupError where a command fails.
    """
    began, out = time.monotonic(), config.out

    def shell(*words: object, save: Path | None = None) -> None:
        """Print a command and run it. save: a file for what it prints with --json."""
        texts = [*map(str, words), *(["--json"] if save else [])]
        shown = shlex.join(["ketchup-cache", *texts]) + (f" > {save}" if save else "")
        print(f"\n$ {shown}", flush=True)
        printed = io.StringIO()
        with redirect_stdout(printed) if save else nullcontext():
            code = run(texts)
        if code:
            raise KetchupError(f"the demo stopped: `{shown}` failed; run it again to go on")
        if save:
            write_file(save, printed.getvalue().encode())

    data = Path(os.path.relpath(task("translate")))
    if not data.exists():  # another drive, or no such folder from here
        data = task("translate")
    student, teacher, test, cache = data / "converged", data / "teacher", data / "test.jsonl", out / "cache"
    decoding = ("--max-new-tokens", 36, "--rollout-batch", 256)
    rows: dict[str, dict[str, Any]] = {}

    def evaluate(name: str, model: Path) -> None:
        """A row of the table."""
        result = out / f"{name.replace(' ', '')}.json"
        shell("evaluate", "--model", model, "--data", test, "--teacher", teacher, *decoding, save=result)
        rows[name] = json.loads(result.read_text())
        print("", *_table(rows), sep="\n", flush=True)

    print("A teacher translates a made-up language. A smaller student is to learn it from the teacher alone.")
    print("This takes two and a half minutes on two CPU cores; three runs of learning are most of it.")
    _title(f"1. A student that has learnt what {LABELLED:,} of the teacher's translations teach")
    print(f"It comes with the task; the two commands that made it are in {data / 'README.md'}.")
    for name, model in (("teacher", teacher), ("student before", student)):
        evaluate(name, model)

    _title("2. Rollouts of the student on other sentences, scored once by the teacher: the cache")
    shell("rollout", "--student", student, "--data", data / "prompts.jsonl", "--skip", LABELLED, "--first", 256,
          "--samples", 8, *decoding, "--cache", cache)  # fmt: skip
    shell("score", "--teacher", teacher, "--cache", cache)
    shell("score", "--teacher", teacher, "--cache", cache)
    shell("info", cache)
    shell("analyze", "--cache", cache, "--policy", student, "--out", out / "analysis")

    _title("3. Learning: K = 1 (LLMR), K = 4 (KETCHUP), and an exact first step, with fresh rollouts every 4 steps")
    runs = {name: out / name.split(" f")[0].replace(" = ", "").lower() for name in RUNS}
    learning = [part for name, value in LEARNING.items() for part in (flag(name), value)]
    for name, folder in runs.items():
        shell("learn", "--student", student, "--cache", cache, *RUNS[name], "--teacher", teacher,
              *learning, *decoding, "--out", folder)  # fmt: skip
        evaluate(name, folder / "best")

    shell("report", *runs.values(), "--out", out / "runs.html")
    _title("Result")
    pictures = str(out / "runs.html"), str(out / "analysis" / "analysis.png")
    return DemoReport(rows, pictures, round(time.monotonic() - began, 1))


def _title(text: str) -> None:
    print(f"\n— {text} —", flush=True)
