"""What a dev set costs, and whether alarms are quiet: `python -m benchmarks.dev_set [--steps 200]`.

A run with K = 4 of the shipped pre-distilled student, evaluated ten times and at its start on the task's 500 dev
sentences. The cost is the time of all evaluations over that of the rest of the same run. No alarm may be raised.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.common import options, publish, table
from ketchup_cache.config.commands import LearnConfig, RolloutConfig
from ketchup_cache.rollouts.rollout import rollout
from ketchup_cache.shipped import task
from ketchup_cache.training.learn import learn

LABELLED = 1_500
"""Prompts that the student has seen the teacher's outputs of."""
LEARNING = {"refresh_every": 4, "batch_size": 512, "samples": 8, "baseline": "leave-one-out", "lr": 5e-4, "warmup": 20,
            "schedule": "linear"}  # fmt: skip


def main() -> None:
    chosen = options(__doc__, steps=(200, "optimizer steps"))
    steps = 20 if chosen.short else chosen.steps
    folder, decoding = task("translate"), {"max_new_tokens": 36, "rollout_batch": 256}
    with tempfile.TemporaryDirectory() as place:
        common = {"student": str(folder / "predistilled"), "cache": Path(place) / "cache", **decoding}
        data = {"data": str(folder / "prompts.jsonl"), "skip": LABELLED, "first": 256, "samples": 8}
        rollout(RolloutConfig(**common, **data))
        given = {**common, **LEARNING, "k": 4, "steps": steps, "out": Path(place) / "run"}
        dev = {"eval_data": str(folder / "dev.jsonl"), "eval_every": steps // 10, "metric": "bleu,chrf"}
        report = learn(LearnConfig(teacher=str(folder / "teacher"), **given, **dev))
    assert report.dev is not None
    names = [alarm["name"] for alarm in report.alarms]
    values = [report.dev[at]["metrics"]["bleu"] for at in ("start", "best", "last")]
    share = report.eval_s / (report.seconds - report.eval_s)
    found = {"steps": steps, "evaluations": report.dev["evaluations"], "sentences": report.dev["examples"]}
    found |= {"run_s": report.seconds, "eval_s": report.eval_s, "share": share, "alarms": names, "bleu": values}
    cells = [found[name] for name in ("steps", "evaluations", "sentences", "run_s", "eval_s")]
    shown = [*cells, f"{share:.1%}", ", ".join(names) or "none", " / ".join(f"{v:.1f}" for v in values)]
    head = ["steps", "evaluations", "sentences", "run, s", "evaluating, s", "share of the rest", "alarms"]
    print(table([*head, "BLEU: start / best / last"], [shown]))
    publish("dev_set", chosen, **found)


if __name__ == "__main__":
    main()
