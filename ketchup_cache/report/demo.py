"""`demo`: the whole method on a shipped task, by the tool's own commands, each printed as a user would type it."""

from __future__ import annotations

import io
import json
import os
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ketchup_cache.config.commands import DemoConfig
from ketchup_cache.errors import KetchupError
from ketchup_cache.files import write_file
from ketchup_cache.report.plots import Panel, plot_learning_curves
from ketchup_cache.shipped import task

RunCommand = Callable[[Sequence[str]], int]
"""The command line: takes its words, returns the exit code."""

KS = (1, 4)
LABELLED = 1_500
"""Sentences of prompts.jsonl that the student was pre-distilled on. Learning uses the others, nobody's translations."""
CURVES = (
    Panel("return_mean", "return G₁ of the rollouts\n(nats)"),
    Panel("k_return_sd", "s.d. of the return\nin the gradient (nats)"),
    Panel("length_mean", "length (tokens)"),
    Panel("teacher_kl", "KL(student‖teacher)\n(nats per token)"),
)


@dataclass(frozen=True)
class DemoReport:
    """rows: name → what `evaluate --json` printed, on the held-out test split."""

    rows: dict[str, dict[str, Any]]
    pictures: tuple[str, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        first = next(iter(self.rows.values()))
        lines = [
            f"On {first['examples']} held-out sentences, greedy decoding. Return: G₁ under the teacher, in nats.",
            "",
            f"{'':<22}{'return':>8}{'s.d.':>7}{'length':>8}{'BLEU':>7}{'chrF':>7}{'TER':>7}{'exact %':>9}",
        ]
        for name, row in self.rows.items():
            r, m = row["returns"], row["metrics"]
            lines.append(
                f"{name:<22}{r['mean']:>8.2f}{r['sd']:>7.2f}{row['length_mean']:>8.1f}"
                f"{m['bleu']:>7.1f}{m['chrf']:>7.1f}{m['ter']:>7.1f}{m['exact']:>9.1f}"
            )
        return "\n".join([*lines, "", "Pictures:", *(f"  {p}" for p in self.pictures), f"{self.seconds:.0f} s in all."])


class _Shell:
    """Prints a command, runs it, and keeps what it printed where asked to."""

    def __init__(self, run: RunCommand) -> None:
        self._run = run

    def __call__(self, *words: object, save: Path | None = None) -> None:
        texts = [str(word) for word in words]
        shown = shlex.join(["ketchup-cache", *texts]) + (f" --json > {save}" if save else "")
        print(f"\n$ {shown}", flush=True)
        if save is None:
            code = self._run(texts)
        else:
            with redirect_stdout(io.StringIO()) as output:
                code = self._run([*texts, "--json"])
            if code == 0:
                write_file(save, output.getvalue().encode())
        if code:
            raise KetchupError(f"the demo stopped: `{shown}` failed; run it again to go on")


def demo(config: DemoConfig, run: RunCommand) -> DemoReport:
    """Score a student's rollouts, learn with K = 1 and K > 1, evaluate. `run`: the command line.

    Raises KetchupError where a command fails.
    """
    began = time.monotonic()
    shell, out = _Shell(run), config.out
    data = Path(os.path.relpath(task("translate")))
    if not data.exists():  # another drive, or no such folder from here
        data = task("translate")
    teacher, prompts, test = data / "teacher", data / "prompts.jsonl", data / "test.jsonl"
    cache = out / "cache"

    print("A teacher translates a made-up language. A smaller student is to learn it from the teacher alone.")
    decoding = ("--max-new-tokens", 36, "--rollout-batch", 256)
    _title(f"1. A pre-distilled student: it learned the teacher's own translations of {LABELLED:,} sentences")
    print(f"It comes with the task; the two commands that made it are in {data / 'README.md'}.")
    student = data / "predistilled"

    _title("2. Rollouts of the student on other sentences, scored once by the teacher: the cache")
    shell("rollout", "--student", student, "--data", prompts, "--skip", LABELLED, "--first", 256, "--samples", 8,
          *decoding, "--cache", cache)  # fmt: skip
    shell("score", "--teacher", teacher, "--cache", cache)
    shell("score", "--teacher", teacher, "--cache", cache)
    shell("info", cache)
    shell("analyze", "--cache", cache, "--policy", student, "--out", out / "analysis")

    _title("3. Learning: K = 1 (LLMR) and K = 4 (KETCHUP) from the same cache, with fresh rollouts every 4 steps")
    for k in KS:
        shell("learn", "--student", student, "--cache", cache, "--k", k, "--teacher", teacher, "--refresh-every", 4,
              "--steps", 120, "--batch-size", 512, "--samples", 8, "--baseline", "leave-one-out", "--lr", 5e-4,
              "--warmup", 20, "--schedule", "linear", *decoding, "--out", out / f"k{k}")  # fmt: skip

    _title("4. Evaluation on sentences nobody has seen")
    models = {"student before": student, **{f"K = {k}": out / f"k{k}" / "student" for k in KS}, "teacher": teacher}
    rows = {}
    for name, model in models.items():
        result = out / f"{name.replace(' ', '')}.json"
        shell("evaluate", "--model", model, "--data", test, "--teacher", teacher, *decoding, save=result)
        rows[name] = json.loads(result.read_text())

    curves = out / "learning-curves.png"
    runs = {f"K = {k}": _metrics(out / f"k{k}" / "metrics.jsonl") for k in KS}
    plot_learning_curves(runs, curves, CURVES, window=5, title="The demo's two runs, from the same student and cache")
    pictures = (str(curves), str(out / "analysis" / "analysis.png"))
    report = DemoReport(rows, pictures, round(time.monotonic() - began, 1))
    _title("Result")
    return report


def _metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _title(text: str) -> None:
    print(f"\n— {text} —", flush=True)
