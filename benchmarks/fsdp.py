"""What `--fsdp` saves: the peak of a process's memory in an optimizer step, with and without.

    python -m benchmarks.fsdp [--processes 4]

A T5 of 44M random weights learns the shipped sentences, in one process, and in parts in several. Measured is the
resident memory of the first process during the second optimizer step, over what it had before the model was read.
Beside it stands what weights, gradient and AdamW's moments take in float32: 16 bytes a weight, over the processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, T5_SMALL, forget_peak, options, peak, publish, rss, table
from benchmarks.processes import made_up
from ketchup_cache.config.commands import PretrainConfig
from ketchup_cache.parallel.group import group
from ketchup_cache.shipped import task
from ketchup_cache.training.pretrain import pretrain
from ketchup_cache.training.run import Callback, Run

SHORT = {"d_model": 64, "d_kv": 16, "d_ff": 256, "num_layers": 2, "num_heads": 4}


class Peak(Callback):
    """Of the second step."""

    def __init__(self) -> None:
        self.before, self.held = rss(), 0

    def on_step(self, run: Run, metrics: Any) -> None:
        if metrics["step"] == 1:
            self.held = peak() - self.before
        forget_peak()


def worker(folder: Path) -> None:
    """One process of a run."""
    count, measured = group().size, Peak()
    given = {"model": str(folder / "model"), "data": str(folder / "data.jsonl"), "out": folder / f"run-{count}"}
    given |= {"device": "cpu", "batch_size": 16, "epochs": 1, "limit": 48, "checkpoint_every": 0, "save_limit": 0}
    pretrain(PretrainConfig(**given, fsdp=count > 1), [measured])
    if group().first:
        (folder / f"{count}.json").write_text(json.dumps(measured.held))


def held(folder: Path, count: int) -> int:
    """Bytes of the first of so many processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    command = [sys.executable, *launcher, "-m", "benchmarks.fsdp", "--worker", str(folder)]
    # else the C library keeps what is freed, and it counts as held
    memory = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    subprocess.run(command, cwd=ROOT, env=os.environ | memory, check=True)
    return int(json.loads((folder / f"{count}.json").read_text()))


def measure() -> None:
    asked = options(__doc__, processes=(4, "at most"))
    shipped, counts = task("translate"), [1, 2] if asked.short else [n for n in (1, 2, 4, 8) if n <= asked.processes]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made_up(folder / "model", SHORT if asked.short else T5_SMALL, shipped / "tokenizer")
        prompts = [json.loads(line)["prompt"] for line in (shipped / "prompts.jsonl").read_text().splitlines()[:48]]
        (folder / "data.jsonl").write_text("".join(json.dumps({"prompt": p, "target": p}) + "\n" for p in prompts))
        weights = (folder / "model" / "model.safetensors").stat().st_size // 4
        rows = [(count, held(folder, count) / 2**20, 16 * weights / count / 2**20) for count in counts]
    print(
        table(
            ("processes", "peak in a step, MiB", "of which in parts, MiB"),
            [(n, f"{a:.0f}", f"{b:.0f}") for n, a, b in rows],
        )
    )
    names = ("processes", "peak_mib", "parts_mib")
    publish("fsdp", asked, weights=weights, rows=[dict(zip(names, row, strict=True)) for row in rows])


if __name__ == "__main__":
    worker(Path(sys.argv[2])) if sys.argv[1:2] == ["--worker"] else measure()
