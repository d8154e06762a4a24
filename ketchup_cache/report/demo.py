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
    "K = 1": ("--k", 1),
    "K = 4": ("--k", 4),
    "exact first step": ("--weights", "flat", "--lam", 0, "--exact", "--keep-top", 64),
}
"""Rows of the table, and what `learn` is told."""
LABELLED = 1_500
"""Sentences of prompts.jsonl that the student was pre-distilled on. Learning uses the others, nobody's translations."""
LEARNING = {"refresh_every": 4, "batch_size": 512, "samples": 8, "baseline": "leave-one-out", "lr": 5e-4, "warmup": 20,
            "schedule": "linear"}  # fmt: skip
"""The recommended setting for this task."""


@dataclass(frozen=True)
class DemoReport(Report):
    """rows: name → what `evaluate --json` printed, on the held-out test split."""

    rows: dict[str, dict[str, Any]]
    pictures: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        examples = next(iter(self.rows.values()))["examples"]
        lines = [f"On {examples} held-out sentences, greedy decoding. Return: G₁ under the teacher, in nats.", ""]
        lines.append(f"{'':<22}{'return':>8}{'s.d.':>7}{'length':>8}{'BLEU':>7}{'chrF':>7}{'TER':>7}{'exact %':>9}")
        for name, row in self.rows.items():
            lines.append(
                f"{name:<22}{row['returns']['mean']:>8.2f}{row['returns']['sd']:>7.2f}{row['length_mean']:>8.1f}"
                "{bleu:>7.1f}{chrf:>7.1f}{ter:>7.1f}{exact:>9.1f}".format(**row["metrics"])
            )
        return "\n".join([*lines, "", "Look at:", *(f"  {p}" for p in self.pictures), f"{self.seconds:.0f} s in all."])


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
    student, teacher, test, cache = data / "predistilled", data / "teacher", data / "test.jsonl", out / "cache"
    decoding = ("--max-new-tokens", 36, "--rollout-batch", 256)

    print("A teacher translates a made-up language. A smaller student is to learn it from the teacher alone.")
    _title(f"1. A pre-distilled student: it learned the teacher's own translations of {LABELLED:,} sentences")
    print(f"It comes with the task; the two commands that made it are in {data / 'README.md'}.")

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
        shell("learn", "--student", student, "--cache", cache, *RUNS[name], "--teacher", teacher, "--steps", 120,
              *learning, *decoding, "--out", folder)  # fmt: skip

    _title("4. Evaluation on sentences nobody has seen")
    learned = {name: folder / "best" for name, folder in runs.items()}
    rows = {}
    for name, model in {"student before": student, **learned, "teacher": teacher}.items():
        result = out / f"{name.replace(' ', '')}.json"
        shell("evaluate", "--model", model, "--data", test, "--teacher", teacher, *decoding, save=result)
        rows[name] = json.loads(result.read_text())

    shell("report", *runs.values(), "--out", out / "runs.html")
    _title("Result")
    pictures = str(out / "runs.html"), str(out / "analysis" / "analysis.png")
    return DemoReport(rows, pictures, round(time.monotonic() - began, 1))


def _title(text: str) -> None:
    print(f"\n— {text} —", flush=True)
