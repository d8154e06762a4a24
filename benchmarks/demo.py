"""The demo's table over eight seeds: what each way of learning gains over the start, and over K = 1.

    python -m benchmarks.demo [--seeds 8] [--minutes 10]

Start, rollouts and options are the demo's; seeds are of the rollouts and of `learn`. Works for so many minutes, keeps
each seed in benchmarks/results/demo.json and goes on when it is run again. Pairs are by seed.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import ttest_rel

from benchmarks.common import held, options, publish, table
from ketchup_cache.config.commands import EvaluateConfig, RolloutConfig
from ketchup_cache.config.resolve import resolve
from ketchup_cache.evaluation.evaluate import evaluate
from ketchup_cache.report.demo import LABELLED, LEARNING, RUNS
from ketchup_cache.rollouts.rollout import rollout
from ketchup_cache.shipped import task
from ketchup_cache.training.learn import learn

MEASURES = ("return", "bleu")


def given(words: tuple[object, ...]) -> dict[str, Any]:
    """Options of `learn` from the words of a command line; one without a value is a switch."""
    found: dict[str, Any] = {}
    for word, after in zip(words, [*words[1:], "--"], strict=True):
        if str(word).startswith("--"):
            found[str(word)[2:].replace("-", "_")] = True if str(after).startswith("--") else after
    return found


def one(seed: int, steps: int, limit: int) -> dict[str, dict[str, float]]:
    """Row → return and BLEU of greedy outputs of the test split."""
    folder, decoding = task("translate"), {"max_new_tokens": 36, "rollout_batch": 256}
    student, teacher = folder / "converged", str(folder / "teacher")

    def measured(model: Path) -> dict[str, float]:
        asked = {"model": str(model), "data": str(folder / "test.jsonl"), "teacher": teacher, "limit": limit}
        found = evaluate(EvaluateConfig(**asked, **decoding))
        return {"return": found.returns.mean, "bleu": found.metrics["bleu"], "length": found.length_mean}

    rows = {"start": measured(student)}
    with tempfile.TemporaryDirectory() as place:
        common = {"student": str(student), "cache": Path(place) / "cache", "seed": seed, **decoding}
        data = {"data": str(folder / "prompts.jsonl"), "skip": LABELLED, "first": 256, "samples": 8}
        rollout(RolloutConfig(**common, **data))
        for name, words in RUNS.items():
            asked = {**common, **LEARNING, **given(words), "steps": steps, "teacher": teacher}
            learn(resolve("learn", None, {**asked, "out": Path(place) / name}))
            rows[name] = measured(Path(place) / name / "best")
    return rows


def main() -> None:
    chosen = options(__doc__, seeds=(8, "how many"), minutes=(10.0, "no seed is begun after these"))
    began, steps, limit = time.monotonic(), int(LEARNING["steps"]), 0
    if chosen.short:
        chosen.seeds, steps, limit = 2, 4, 50
    runs: list[dict[str, Any]] = held("demo", chosen).get("runs", [])
    for seed in range(len(runs), chosen.seeds):
        if time.monotonic() > began + 60 * chosen.minutes:
            break
        runs.append(one(seed, steps, limit))
        publish("demo", chosen, steps=steps, runs=runs, gains=gains(runs))
    print(table(("", "against", "return", "wins", "BLEU", "wins", "length"), [*lines(runs)]))


def gains(runs: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Row, then what it is compared with, then measure: mean of the paired differences, their standard error, wins, and
    p of a paired t-test."""
    found: dict[str, Any] = {}
    for name in RUNS if len(runs) > 1 else ():
        for other in ("start", *RUNS):
            if other == name:
                continue
            for measure in MEASURES:
                mine, theirs = (np.array([run[row][measure] for run in runs]) for row in (name, other))
                apart = mine - theirs
                found.setdefault(name, {}).setdefault(other, {})[measure] = {
                    "mean": apart.mean(), "error": apart.std(ddof=1) / len(runs) ** 0.5,
                    "wins": int((apart > 0).sum()), "p": float(ttest_rel(mine, theirs).pvalue),
                }  # fmt: skip
    return found


def lines(runs: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    found = []
    for name, against in gains(runs).items():
        length = np.mean([run[name]["length"] for run in runs])
        for other, by in against.items():
            cells = [f(by[m]) for m in MEASURES for f in (shown, lambda x: f"{x['wins']:.0f} of {len(runs)}")]
            found.append((name, other, *cells, f"{length:.1f}"))
    return found


def shown(gain: dict[str, float]) -> str:
    return f"{gain['mean']:+.2f} ± {gain['error']:.2f}"


if __name__ == "__main__":
    main()
