"""The commands on a GPU, on the shipped task `translate`: that they do there what they do on a CPU.

    python -m benchmarks.gpu_commands [--device cuda]

`rollout`, `score`, `learn` and `evaluate` as a user runs them, in processes of their own. Prints the largest difference
between scores of the same rollouts made on the device and on the CPU (both float32), and what the same on-policy run
ends at on the dev split: on the device in float32 and with `--precision bfloat16`, and on the CPU. The models are so
small that a GPU is no faster with them: times say nothing.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import ROOT, machine, options, publish, table
from ketchup_cache import open_cache

TASK = ROOT / "data" / "translate"
DECODING = {"max-new-tokens": 36, "rollout-batch": 256}


def command(name: str, **words: Any) -> dict[str, Any]:
    """`ketchup-cache NAME …`, and what it reports."""
    flags = [str(part) for key, value in words.items() for part in (f"--{key.replace('_', '-')}", value)]
    line = [sys.executable, "-m", "ketchup_cache", name, *flags, "--json"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{' '.join(line)} failed:\n{done.stderr[-2000:]}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def scores(path: Path) -> dict[str, np.ndarray]:
    cache = open_cache(path)
    parts = [cache.load_scored(ref).scores for ref in sorted(cache.scored(), key=lambda ref: ref.rollouts_id)]
    names = ("q", "max_q", "logsumexp", "mean_q")
    return {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}


def evaluated(model: Path, device: str, limit: int) -> tuple[float, float]:
    found = command("evaluate", model=model, data=TASK / "dev.jsonl", teacher=TASK / "teacher", metrics="exact",
                    limit=limit, device=device, **DECODING)  # fmt: skip
    return found["returns"]["mean"], found["metrics"]["exact"]


def main() -> None:
    chosen = options(
        __doc__,
        device=("cuda" if torch.cuda.is_available() else "cpu", "the device to compare with the CPU"),
        prompts=(500, "prompts, 2 completions of each, to score on both"),
        steps=(32, "optimizer steps of 256 rollouts"),
        dev=(300, "dev sentences to evaluate on"),
    )
    if chosen.short:
        chosen.prompts, chosen.steps, chosen.dev = 20, 2, 10
    device, start = chosen.device, TASK / "predistilled"
    prompts = {"data": TASK / "prompts.jsonl", "skip": 1500}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        command("rollout", student=start, cache=folder / "gpu", limit=chosen.prompts, samples=2, device=device,
                **prompts, **DECODING)  # fmt: skip
        shutil.copytree(folder / "gpu", folder / "cpu")
        for cache, where in (("gpu", device), ("cpu", "cpu")):
            command("score", teacher=TASK / "teacher", cache=folder / cache, device=where)
        here, there = scores(folder / "cpu"), scores(folder / "gpu")
        differences = {name: float(np.abs(there[name] - values).max()) for name, values in here.items()}
        print(f"scores of {len(here['q']):,} tokens, {device} against CPU: largest difference "
              + ", ".join(f"{name} {value:.1e}" for name, value in differences.items()) + "\n", flush=True)  # fmt: skip

        rows = [("before", *evaluated(start, device, chosen.dev))]
        for name, where, precision in (
            (f"{device}, float32", device, "float32"),
            (f"{device}, bfloat16", device, "bfloat16"),
            ("cpu, float32", "cpu", "float32"),
        ):
            cache, out = folder / f"cache {name}", folder / f"run {name}"
            # for its prompts: `learn` leaves aside rollouts of another policy
            command("rollout", student=TASK / "student", cache=cache, first=1, limit=4096, device=where, **prompts,
                    **DECODING)  # fmt: skip
            command("learn", student=start, teacher=TASK / "teacher", cache=cache, out=out, k=4, steps=chosen.steps,
                    batch_size=256, samples=8, baseline="leave-one-out", refresh_every=8, reuse=2, lr=5e-4, warmup=4,
                    precision=precision, device=where, **DECODING)  # fmt: skip
            rows.append((name, *evaluated(out / "best", where, chosen.dev)))
            print(rows[-1], file=sys.stderr, flush=True)
    print(table(("", "return on dev", "exact, %"), [(name, f"{g:.2f}", f"{exact:.1f}") for name, g, exact in rows]))
    where = torch.cuda.get_device_name(device) if device.startswith("cuda") else machine()
    publish("gpu_commands", chosen, device=where, steps=chosen.steps, differences=differences,
            runs=[{"name": name, "return": g, "exact": exact} for name, g, exact in rows])  # fmt: skip


if __name__ == "__main__":
    main()
