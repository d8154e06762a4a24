"""What the differences between the authors' program and the paper's text are worth, each turned back alone.

    python -m benchmarks.released [--seeds 5] [--minutes 10]

On the shipped translation, from its converged start: KETCHUP with K = 4 as the paper's text has it, as the authors'
program has it (`AS_RELEASED` in real/settings.py says what that is), and that with one difference turned back. Every
row learns in 40 steps of 256 completions, each of which is used twice. Its rate is the best of four in BLEU on the dev
split, by a seed that is in no row. Then seeds 0, 1, … on the test split, in pairs by seed. Works for so many minutes,
keeps each run in benchmarks/results/released.json and goes on when it is run again.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import ttest_rel

from benchmarks.common import held, options, publish, table
from benchmarks.paper.statistics import holm
from benchmarks.real.settings import AS_RELEASED, TURNED_BACK, K
from ketchup_cache.config.commands import EvaluateConfig, RolloutConfig
from ketchup_cache.config.resolve import resolve
from ketchup_cache.evaluation.evaluate import evaluate
from ketchup_cache.report.demo import LABELLED
from ketchup_cache.rollouts.rollout import rollout
from ketchup_cache.shipped import task
from ketchup_cache.training.learn import learn

RATES = (3e-5, 1e-4, 3e-4, 1e-3)
DEV_SEED = 100
STEPS, BATCH = 40, 256
LEARNING = {
    "steps": STEPS,
    "batch_size": BATCH,
    "refresh_every": 8,
    "reuse": 2,
    "schedule": "linear",
    "weight_decay": 0.0,
}
DECODING = {"max_new_tokens": 36, "rollout_batch": 256}
RELEASED = AS_RELEASED | {"k": 4}
ROWS: dict[str, Mapping[str, Any]] = {
    "start": {},
    "K = 4": K | {"k": 4, "baseline": "mean"},
    "as released": RELEASED,
    **{f"as released, {name}": RELEASED | back for name, back in TURNED_BACK.items()},
}
MEASURES = ("bleu", "return", "length")
Run = dict[str, float]


def one(row: str, seed: int, lr: float, split: str, *, steps: int, limit: int) -> Run:
    """Train and evaluate: BLEU, return and length of greedy outputs, of the last step."""
    folder, teacher = task("translate"), str(task("translate") / "teacher")
    student = model = folder / "converged"
    given = {name: value for name, value in ROWS[row].items() if value is not None}
    with tempfile.TemporaryDirectory() as place:
        if given:
            common = {"student": str(student), "cache": Path(place) / "cache", "seed": seed, **DECODING}
            first = {"data": str(folder / "prompts.jsonl"), "skip": LABELLED, "first": BATCH}
            rollout(RolloutConfig(**common, **first, greedy=given.get("greedy", False)))
            asked = {**common, **LEARNING, **given, "steps": steps, "lr": lr, "teacher": teacher}
            learn(resolve("learn", None, {**asked, "out": Path(place) / "run"}))
            model = Path(place) / "run" / "best"
        asked = {"model": str(model), "data": str(folder / f"{split}.jsonl"), "teacher": teacher, "limit": limit}
        found = evaluate(EvaluateConfig(**asked, **DECODING))
    return {"bleu": found.metrics["bleu"], "return": found.returns.mean, "length": found.length_mean}


def todo(done: Mapping[str, Run], seeds: int) -> Iterator[tuple[str, str, int, float, str]]:
    """Names of the runs that are left, with what each is: of a row the rates on dev, then the seeds at the best."""
    for row in ROWS:
        tried = {lr: f"dev/{row}/{lr:g}" for lr in (RATES if row != "start" else ())}
        for lr, name in tried.items():
            if name not in done:
                yield name, row, DEV_SEED, lr, "dev"
    for seed in range(seeds):
        for row in ROWS:
            name, rates = f"test/{row}/{seed}", {lr: done.get(f"dev/{row}/{lr:g}") for lr in RATES}
            if name not in done and (row == "start" or all(rates.values())):
                yield name, row, seed, rate(done, row), "test"


def rate(done: Mapping[str, Run], row: str) -> float:
    return 0.0 if row == "start" else max(RATES, key=lambda lr: done[f"dev/{row}/{lr:g}"]["bleu"])


def drawn(done: Mapping[str, Run], seeds: int) -> str:
    """The table: means ± standard errors over seeds, and the paired differences to the row as released, with p of a
    t-test, by Holm over the rows."""
    values = {
        row: {m: np.array([done[f"test/{row}/{seed}"][m] for seed in range(seeds)]) for m in MEASURES} for row in ROWS
    }
    base, others = values["as released"], [row for row in ROWS if row != "as released"]
    apart: dict[str, list[str]] = {"as released": ["", ""]}
    for m in MEASURES[:2]:
        found = holm([float(ttest_rel(values[row][m], base[m]).pvalue) for row in others])
        for row, p in zip(others, found, strict=True):
            gain = values[row][m] - base[m]
            apart.setdefault(row, []).append(f"{gain.mean():+.1f} ± {error(gain):.1f} (p = {p:.2f})")
    lines = []
    for row, of in values.items():
        cells = [f"{of[m].mean():.1f} ± {error(of[m]):.1f}" for m in MEASURES]
        lines.append((row, f"{rate(done, row):g}" if row != "start" else "", *cells, *apart[row]))
    head = ("", "rate", "BLEU", "return", "length", "BLEU − as released", "return − as released")
    return table(head, lines)


def error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / len(values) ** 0.5)


def main() -> None:
    chosen = options(__doc__, seeds=(5, "how many"), minutes=(10.0, "no run is begun after these"))
    began, steps, limit = time.monotonic(), STEPS, 0
    if chosen.short:
        chosen.seeds, steps, limit = 2, 4, 50
    done: dict[str, Run] = held("released", chosen).get("runs", {})
    while (job := next(todo(done, chosen.seeds), None)) and time.monotonic() < began + 60 * chosen.minutes:
        name, row, seed, lr, split = job
        done[name] = one(row, seed, lr, split, steps=steps, limit=limit)
        publish("released", chosen, steps=steps, runs=done)
    if job is None:
        print(drawn(done, chosen.seeds))


if __name__ == "__main__":
    main()
