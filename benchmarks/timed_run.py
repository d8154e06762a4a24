"""`rollout`, `score` and `learn` in processes of their own, with their time divided into parts.

    python -m benchmarks.timed_run COMMAND '{"options": "as JSON"}' TIMES.json

`in_parts` starts it and returns the whole process's `seconds` (wall), `cpu_seconds` and `peak_bytes`, and of the
command's own work: `load` (reading models), `work` (everything else, also in CPU seconds), and of the latter `score`
(the teacher) and `train` (optimizer steps), as the reports of the commands have them; what remains is mostly sampling.
`learn` frees its teacher after each refresh and reads it again for the next; a loop with a live teacher would keep it,
and a long run reads its models once. Therefore `work` is without reading.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import run

PARTS = ("load", "work", "score", "train")
UNITS = ("seconds", "cpu_seconds")
KEEP_TOP = 64
"""Logits per token, for ways that have a method of their own: the default of `learn`."""


def in_parts(command: str, **options: Any) -> dict[str, Any]:
    """One command, measured. options: as in ketchup_cache.config.commands."""
    with tempfile.TemporaryDirectory() as temporary:
        times = Path(temporary) / "times.json"
        found: dict[str, Any] = run(
            sys.executable, "-m", "benchmarks.timed_run", command, json.dumps(options, default=str), times
        )
        return found | json.loads(times.read_text())


def together(*measured: dict[str, Any]) -> dict[str, Any]:
    """Commands that ran one after the other: times add up, of the peaks the largest counts."""
    total: dict[str, Any] = {unit: sum(one[unit] for one in measured) for unit in UNITS}
    total["peak_bytes"] = max(one["peak_bytes"] for one in measured)
    for part in PARTS:
        total[part] = {unit: sum(one[part][unit] for one in measured) for unit in measured[0][part]}
    return total


@dataclass(frozen=True)
class Way:
    """How a student learns: `live`, `offline`, or steps between new rollouts; `x16`: each is used so often; `@1e-4`: at
    that learning rate. `offlinex16@1e-4` goes 16 times over a cache of a sixteenth of the rollouts. `reverse-kl:live`:
    by that method, which has no K and no baseline, from one sample of each prompt."""

    every: int | None
    """None: offline."""
    uses: int = 1
    lr: float | None = None
    method: str | None = None

    @classmethod
    def of(cls, word: str) -> Way:
        way, _, lr = word.partition("@")
        method, _, way = way.rpartition(":")
        base, _, uses = way.partition("x")
        every = {"live": 1, "offline": None}[base] if base in ("live", "offline") else int(base)
        return cls(every, int(uses or 1), float(lr) if lr else None, method or None)

    @property
    def name(self) -> str:
        base = {None: "offline", 1: "live"}.get(self.every, f"every {self.every} steps")
        used = f", each rollout {self.uses} times" if self.uses > 1 else ""
        by = f"{self.method}, " if self.method else ""
        return by + base + used + (f", lr {self.lr:g}" if self.lr else "")

    def learning(self, learning: dict[str, Any]) -> dict[str, Any]:
        changed = dict(learning)
        if self.lr:
            changed["lr"] = self.lr
        if self.method:
            changed = {key: value for key, value in changed.items() if key not in ("k", "baseline")}
            changed |= {"method": self.method, "samples": 1, "keep_top": KEEP_TOP}
        return changed


def by(
    way: Way, folder: Path, teacher: Path, other: Path, data: dict[str, Any], learning: dict[str, Any]
) -> tuple[dict[str, Any], Path]:
    """One run, measured; and the student's folder. data, learning: options of `rollout` (`limit` is the number of
    rollouts) and `learn`. other: as `refreshed` wants it."""
    learning = way.learning(learning)
    data = data | {"limit": data["limit"] // learning["samples"]}
    if way.every is None:
        return offline(way, folder, teacher, data, learning)
    return refreshed(way, folder, teacher, other, data, learning)


def refreshed(
    way: Way, folder: Path, teacher: Path, other: Path, data: dict[str, Any], learning: dict[str, Any]
) -> tuple[dict[str, Any], Path]:
    """`learn` with new, live-scored rollouts at every so many steps.

    other: a model that is not the student; `rollout` puts prompts into a cache only together with rollouts, and `learn`
    leaves those of another policy aside.
    """
    cache, out = folder / f"cache, {way.name}", folder / f"out, {way.name}"
    limits = {key: learning[key] for key in ("max_new_tokens", "rollout_batch")}
    in_parts("rollout", student=other, cache=cache, first=1, **data, **limits)
    found = in_parts("learn", cache=cache, out=out, teacher=teacher, refresh_every=way.every, reuse=way.uses,
                     **learning)  # fmt: skip
    return {"name": way.name, "method": way.method, **found}, out / "best"


def offline(
    way: Way, folder: Path, teacher: Path, data: dict[str, Any], learning: dict[str, Any]
) -> tuple[dict[str, Any], Path]:
    """`rollout`, `score` and `learn` together, and each in `parts`."""
    cache, out = folder / f"cache, {way.name}", folder / f"out, {way.name}"
    sampling = {key: learning[key] for key in ("student", "samples", "max_new_tokens", "rollout_batch")}
    scoring = {key: learning[key] for key in ("batch_tokens", "keep_top") if key in learning}
    fewer = data | {"limit": data["limit"] // way.uses}
    parts = {
        "rollout": in_parts("rollout", cache=cache, seed=learning.get("seed", 0), **fewer, **sampling),
        "score": in_parts("score", cache=cache, teacher=teacher, **scoring),
        "learn": in_parts("learn", cache=cache, out=out, **learning),
    }
    return {"name": way.name, "method": way.method, **together(*parts.values()), "parts": parts}, out / "best"


def rows(runs: list[dict[str, Any]], rollouts: int) -> list[list[str]]:
    """Of each run, its cells under `HEAD`; offline ones have a second row for their `learn` alone. `× live` is against
    the live run of the same method, where there is one, else against that of KETCHUP."""
    shown = []
    for entry in runs:
        shown.append(entry)
        if "parts" in entry:
            shown.append({**entry, **entry["parts"]["learn"], "name": f"{entry['name']}, learning alone"})
    lives: dict[str | None, dict[str, float]] = {}
    for entry in sorted(shown, key=lambda entry: "lr" in entry["name"]):  # one at the common rate before others
        if "live" in entry["name"].split(", "):
            lives.setdefault(entry.get("method"), entry["work"])
    cells = []
    for entry in shown:
        work, known = entry["work"], "score" in entry
        live = lives.get(entry.get("method"), lives.get(None))
        cells.append([entry["name"], f"{work['seconds']:.1f}", f"{work['cpu_seconds']:.1f}"])
        if known:
            teacher, training = (entry[part]["seconds"] for part in ("score", "train"))
            cells[-1] += [f"{work['seconds'] - teacher - training:.1f}", f"{teacher:.1f}", f"{training:.1f}"]
        else:
            cells[-1] += [""] * 3
        cells[-1] += [f"{rollouts / work['seconds']:.1f}"]
        cells[-1] += [f"{live[unit] / work[unit]:.2f}" if live else "" for unit in UNITS]
        cells[-1] += [f"{entry['peak_bytes'] / 1e6:.0f}"]
    return cells


HEAD = ("", "wall s", "CPU s", "sampling, reading, writing (s)", "teacher (s)", "training (s)", "rollouts/s",
        "× live (wall)", "× live (CPU)", "peak MB")  # fmt: skip


def main() -> None:
    command, options, times = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
    # all imports before the clock starts
    from ketchup_cache.config.commands import LearnConfig, RolloutConfig, ScoreConfig
    from ketchup_cache.models.load import load_model
    from ketchup_cache.rollouts.rollout import rollout
    from ketchup_cache.scoring.score import score
    from ketchup_cache.training.learn import learn

    seconds = dict.fromkeys(PARTS, 0.0)
    if command == "rollout":  # its report does not say how long it read the model
        began = time.perf_counter()
        load_model(options["student"])
        seconds["load"] = time.perf_counter() - began
    wall, cpu = time.perf_counter(), time.process_time()
    if command == "rollout":
        rollout(RolloutConfig(**options))
    elif command == "score":
        scored = score(ScoreConfig(**options))
        seconds |= {"load": scored.load_s, "score": scored.seconds - scored.load_s}
    else:
        learned = learn(LearnConfig(**options))
        seconds |= {"load": learned.load_s, "score": learned.score_s, "train": learned.train_s}
    seconds["work"] = time.perf_counter() - wall - seconds["load"]
    parts = {part: {"seconds": value} for part, value in seconds.items()}
    # reading models keeps one processor busy
    parts["work"]["cpu_seconds"] = time.process_time() - cpu - seconds["load"]
    times.write_text(json.dumps(parts))


if __name__ == "__main__":
    main()
