"""Two processes, pinned to a core each, against one on one core: `rollout`, `score`, `learn`, and a refreshed run.

    python -m benchmarks.processes [--prompts 1024] [--steps 16] [--rounds 3]

Both are started by torchrun and have one thread a process. A refreshed run (`learn --teacher --refresh-every 4`) has
three phases, sampling, scoring and training, one after the other and each on both cores; its time is their sum. Times
are of the work itself: without start-up, and without reading the models. The models are T5s of about 4M and 22M random
weights with the shipped tokenizer, unless others are given: with the shipped ones of 0.2M, Python between the
operations is most of the time. What two cores can do at most is measured too: two single processes that know nothing of
each other, each with the whole work. The three take turns, and the table has the median of the rounds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import ROOT, options, publish, t5, table
from ketchup_cache.cli import main
from ketchup_cache.shipped import task

STUDENT = {"d_model": 256, "d_ff": 1024, "d_kv": 64, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 2}
TEACHER = {"d_model": 512, "d_ff": 2048, "d_kv": 64, "num_heads": 8, "num_layers": 3, "num_decoder_layers": 3}


def worker() -> int:
    """A command of ours on one core."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["LOCAL_RANK"]) % len(cores)]})
    return main(sys.argv[2:])


def report(processes: int, core: int | None, *words: object) -> dict[str, Any]:
    """What a command reports that so many processes run; or one on this core, without a launcher."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes] if core is None else []
    command = [sys.executable, *launcher, "-m", "benchmarks.processes", "--worker", *words, "--device", "cpu", "--json"]
    thread = {**os.environ, "OMP_NUM_THREADS": "1"} | ({} if core is None else {"LOCAL_RANK": str(core)})
    done = subprocess.run([*map(str, command)], cwd=ROOT, env=thread, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def seconds(processes: int, asked: Any, core: int | None = None) -> dict[str, float]:
    """Of each command, from an empty cache on."""
    with tempfile.TemporaryDirectory() as folder:
        return seconds_in(Path(folder), processes, core, asked)


def seconds_in(folder: Path, processes: int, core: int | None, asked: Any) -> dict[str, float]:
    cache, student = folder / "cache", asked.student
    data = {"--data": asked.data, "--limit": asked.prompts, "--max-new-tokens": 24, "--samples": 4}
    how = processes, core
    rolled = report(*how, "rollout", "--student", student, "--cache", cache, *(w for p in data.items() for w in p))
    scored = report(*how, "score", "--teacher", asked.teacher, "--cache", cache)
    steps = ("--steps", asked.steps, "--batch-size", asked.batch_size, "--lr", 1e-4)
    learned = report(*how, "learn", "--student", student, "--cache", cache, "--out", folder / "run", *steps)
    # prompts come into a cache with rollouts alone; those of another policy are left aside
    words, fresh = [w for p in data.items() for w in p], folder / "fresh"
    report(*how, "rollout", "--student", asked.teacher, "--cache", fresh, *words, "--first", 1)
    refreshed = ("--teacher", asked.teacher, "--refresh-every", 4, "--samples", 4, "--max-new-tokens", 24)
    whole = report(*how, "learn", "--student", student, "--cache", fresh, "--out", folder / "on", *steps, *refreshed)
    return {
        "rollout": rolled["seconds"],
        "score": scored["seconds"] - scored["load_s"],
        "learn": learned["train_s"],
        "learn, refreshed": sum(whole[part] for part in ("sample_s", "score_s", "train_s")),
    }


def run() -> None:
    shipped = task("translate")
    asked = options(
        __doc__,
        student=("", "model that samples and learns"),
        teacher=("", "model that scores"),
        data=(str(shipped / "prompts.jsonl"), "prompts"),
        prompts=(1024, "how many prompts, with 4 samples each"),
        steps=(16, "optimizer steps"),
        batch_size=(256, "rollouts per step"),
        rounds=(3, "how often all is measured"),
    )
    if asked.short:
        asked.prompts, asked.steps, asked.batch_size, asked.rounds = 64, 2, 64, 1
    with tempfile.TemporaryDirectory() as folder:
        for name, shape in (("student", STUDENT), ("teacher", TEACHER)):
            if not getattr(asked, name):
                setattr(asked, name, made_up(Path(folder) / name, shape, shipped / "tokenizer"))
        measure(asked)


def made_up(folder: Path, shape: dict[str, int], tokenizer: Path) -> Path:
    """A model of random weights, saved; its tokenizer is the one of this folder."""
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(tokenizer)
    words.save_pretrained(folder)
    t5(shape, vocab_size=len(words)).save_pretrained(folder)
    return folder


def measure(asked: Any) -> None:
    rounds = []
    for _ in range(asked.rounds):
        one, two = (seconds(processes, asked) for processes in (1, 2))
        with ThreadPoolExecutor(2) as pool:
            apart = list(pool.map(lambda core: seconds(1, asked, core), (0, 1)))
        rounds.append({n: (one[n], two[n], one[n] / two[n], 4 * one[n] / sum(each[n] for each in apart)) for n in one})
    rows = [(name, *np.median([each[name] for each in rounds], axis=0)) for name in rounds[0]]
    texts = [(name, *(f"{value:.2f}" for value in values)) for name, *values in rows]
    print(table(("command", "one process, s", "two, s", "times as fast", "two apart"), texts))
    names = ("command", "one_s", "two_s", "speedup", "apart")
    sizes = {name: getattr(asked, name) for name in ("prompts", "steps", "batch_size", "rounds")}
    publish("processes", asked, sizes=sizes, rows=[dict(zip(names, row, strict=True)) for row in rows])


if __name__ == "__main__":
    sys.exit(worker() if "--worker" in sys.argv[1:2] else run())
