"""What the phases of a run with a live teacher take of the rate of a plain matrix product.

    python -m benchmarks.phases [--rounds 3] [--short]

`learn` with new rollouts at every fourth step, teacher and student of live_teacher.py's part `proportion` (T5-base's
shape and a twelfth of its cost; prompts around 180 tokens, 4 completions of 25). Seconds are those of metrics.jsonl,
summed over the run, the median of the rounds. Operations are the products that PyTorch carries out in the same phases
(`FlopCounterMode`, in a run of its own): a rate above the useful one where something is computed twice. The matrix
product, 2048 × 2048, is measured before and after each round.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import options, publish, table
from benchmarks.live_teacher import pair_in_proportion
from benchmarks.scoring import matrix_rate
from ketchup_cache.config.commands import LearnConfig, RolloutConfig
from ketchup_cache.rollouts.rollout import rollout
from ketchup_cache.training import learn as learning
from ketchup_cache.training.source import OnPolicy

PHASES = ("sample", "score", "train")
HEAD = ("phase", "seconds", "of the run", "10⁹ operations", "of the matrix rate")


def learned(folder: Path, name: str, data: Path, steps: int) -> dict[str, float]:
    """Seconds of each phase."""
    decoding: dict[str, Any] = {"max_new_tokens": 25, "rollout_batch": 64, "device": "cpu"}
    # prompts come into a cache with rollouts alone; those of another policy are left aside
    rollout(RolloutConfig(student=str(folder / "other"), cache=folder / name, data=str(data), first=1, **decoding))
    learning.learn(
        LearnConfig(
            student=str(folder / "student"), teacher=str(folder / "teacher"), cache=folder / name,
            out=folder / f"{name}-run", steps=steps, refresh_every=4, batch_size=8, samples=4, unfinished="bootstrap",
            checkpoint_every=0, batch_tokens=4096, micro_batch_tokens=4096, **decoding,
        )
    )  # fmt: skip
    lines = [json.loads(line) for line in (folder / f"{name}-run/metrics.jsonl").read_text().splitlines()]
    return {phase: sum(line[f"{phase}_s"] for line in lines) for phase in PHASES}


def counted(run: Callable[[], Any]) -> dict[str, int]:
    """Operations of each phase of a run."""
    found: dict[str, int] = defaultdict(int)

    def counting(phase: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            with FlopCounterMode(display=False) as counter:
                result = real(*given, **named)
            found[phase] += counter.get_total_flops()
            return result

        return call

    with (
        patch.object(OnPolicy, "_sample", counting("sample", OnPolicy._sample)),
        patch.object(OnPolicy, "_take", counting("score", OnPolicy._take)),
        patch.object(learning, "policy_gradient_step", counting("train", learning.policy_gradient_step)),
    ):
        run()
    return dict(found)


def main() -> None:
    chosen = options(__doc__, rounds=(3, "runs that are timed"))
    steps, rounds = (4, 1) if chosen.short else (16, chosen.rounds)
    seconds, rates = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = pair_in_proportion(folder, steps * 8 // 4, chosen.short)
        operations = counted(lambda: learned(folder, "counted", data, steps))
        for number in range(rounds):
            rates.append(matrix_rate())
            seconds.append(learned(folder, str(number), data, steps))
            rates.append(matrix_rate())
            print(f"round {number}: {seconds[-1]}", file=sys.stderr, flush=True)
    rate = statistics.median(rates)
    parts = {phase: statistics.median(found[phase] for found in seconds) for phase in PHASES}
    rows = [
        (phase, f"{took:.1f}", f"{took / sum(parts.values()):.0%}", f"{operations[phase] / 1e9:.0f}",
         f"{operations[phase] / took / rate:.0%}")
        for phase, took in parts.items()
    ]  # fmt: skip
    print(table(HEAD, rows), f"{rate / 1e9:.0f} GFLOP/s on {torch.get_num_threads()} threads", sep="\n\n")
    publish("phases", chosen, steps=steps, rounds=seconds, operations=operations, matrix_flops=rates)


if __name__ == "__main__":
    main()
