"""A sweep over K and baselines from one scored cache, against as many runs with a live teacher.

    python -m benchmarks.sweep [--steps 8]

K ∈ {1, 2, 4, 8, 16} × baseline ∈ {mean, leave-one-out} on the shipped task `translate`. From the cache: one
`rollout`, one `score`, ten offline runs. Live: ten runs that sample and score at every step. Equal steps on
equally many rollouts; all in one process, so that no start-up is counted. Offline trains on the start policy's
rollouts: the figures are cost, not quality.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from benchmarks.common import ROOT, options, publish, table, timed
from ketchup_cache.config.commands import LearnConfig, RolloutConfig, ScoreConfig
from ketchup_cache.rollouts.rollout import rollout
from ketchup_cache.scoring.score import score
from ketchup_cache.training.learn import learn

TASK = ROOT / "data" / "translate"
SAMPLES = 8


def main() -> None:
    chosen = options(__doc__, steps=(8, "optimizer steps of each run"), batch_size=(64, "rollouts per step"))
    steps = 1 if chosen.short else chosen.steps
    ks = (1, 16) if chosen.short else (1, 2, 4, 8, 16)
    student, teacher = str(TASK / "predistilled"), str(TASK / "teacher")
    drawing = {"samples": SAMPLES, "max_new_tokens": 36, "rollout_batch": 256}
    data = {"data": str(TASK / "prompts.jsonl"), "skip": 1500, "limit": steps * chosen.batch_size // SAMPLES}
    learning = {"steps": steps, "batch_size": chosen.batch_size, "student": student, **drawing}

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        cache = folder / "cache"
        # the prompts alone, for the live runs to begin with; also imports everything that is imported late
        prompts = RolloutConfig(student=str(TASK / "student"), cache=folder / "prompts", first=1, **data, **drawing)
        rollout(prompts)
        parts: dict[str, dict[str, float]] = {"cache": {}, "live": {}}

        def count(way: str, what: str, wall: float, cpu: float) -> None:
            for key, value in ((f"{what}_seconds", wall), (f"{what}_cpu_seconds", cpu)):
                parts[way][key] = parts[way].get(key, 0) + value

        count(
            "cache",
            "rollout",
            *timed(lambda: rollout(RolloutConfig(student=student, cache=cache, **data, **drawing)))[:2],
        )
        count("cache", "score", *timed(lambda: score(ScoreConfig(teacher=teacher, cache=cache)))[:2])
        runs = 0
        for k in ks:
            for baseline in ("mean", "leave-one-out"):
                runs += 1
                options_ = {**learning, "k": k, "baseline": baseline}
                offline = LearnConfig(cache=cache, out=folder / f"offline-{runs}", **options_)
                count("cache", "learn", *timed(lambda: learn(offline))[:2])  # noqa: B023
                own = folder / f"cache-{runs}"
                shutil.copytree(folder / "prompts", own)
                live = LearnConfig(cache=own, out=folder / f"live-{runs}", teacher=teacher, refresh_every=1, **options_)
                count("live", "learn", *timed(lambda: learn(live))[:2])  # noqa: B023
                shutil.rmtree(own)
    total = {way: sum(v for key, v in found.items() if "cpu" not in key) for way, found in parts.items()}
    busy = {way: sum(v for key, v in found.items() if "cpu" in key) for way, found in parts.items()}
    ratio, cpu_ratio = total["live"] / total["cache"], busy["live"] / busy["cache"]
    print(
        table(
            (f"{runs} runs of {steps} steps", "wall s", "CPU s"),
            [
                (
                    "rollout, once",
                    f"{parts['cache']['rollout_seconds']:.1f}",
                    f"{parts['cache']['rollout_cpu_seconds']:.1f}",
                ),
                ("score, once", f"{parts['cache']['score_seconds']:.1f}", f"{parts['cache']['score_cpu_seconds']:.1f}"),
                (
                    "learn, offline",
                    f"{parts['cache']['learn_seconds']:.1f}",
                    f"{parts['cache']['learn_cpu_seconds']:.1f}",
                ),
                ("**from one cache, in all**", f"{total['cache']:.1f}", f"{busy['cache']:.1f}"),
                ("**live**", f"{total['live']:.1f}", f"{busy['live']:.1f}"),
                ("live / cache", f"{ratio:.1f}", f"{cpu_ratio:.1f}"),
            ],
        )
    )
    publish("sweep", chosen, runs=runs, steps=steps, batch_size=chosen.batch_size, parts=parts, ratio=ratio,
            cpu_ratio=cpu_ratio)  # fmt: skip


if __name__ == "__main__":
    main()
