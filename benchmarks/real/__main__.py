"""Tables on real text, by the public commands: Multi30k, with teachers and students of our own making.

    python -m benchmarks.real --task ende --minutes 10      work for ten minutes; run it again to go on
    python -m benchmarks.real --task ende --table           print what there is

Jobs are done in order, each when those before it that it needs are done. A job's record goes to
`benchmarks/results/real/TASK.json` when it is finished, and is never made again; models and caches stay in `--work`.
Several may work at once: each job is locked. Nothing of the data is written to the results.
"""

from __future__ import annotations

import argparse
import fcntl
import io
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.real import models
from benchmarks.real.settings import (
    DECODING,
    DEV,
    DEV_SEEDS,
    EPOCHS,
    GROUPS,
    KEEP_TOP,
    LABELLED,
    LEARN,
    PRETRAIN,
    RATES,
    REFRESH,
    SEEDS,
    TASKS,
    TEACHER,
    Options,
    Task,
)

RESULTS = Path(__file__).resolve().parents[1] / "results" / "real"
NEEDED = ("train", "dev", "test")


class Stopped(Exception):
    """The time is over; what was done is kept."""


@dataclass(frozen=True)
class Place:
    """Where a task's files are. record: of a finished job, by its name."""

    task: Task
    work: Path
    source: Path

    def __truediv__(self, name: str) -> Path:
        return self.work / self.task.name / name

    @property
    def results(self) -> Path:
        return RESULTS / f"{self.task.name}.json"

    def records(self) -> dict[str, Any]:
        return json.loads(self.results.read_text(encoding="utf-8")) if self.results.exists() else {}

    def add(self, name: str, record: Any) -> None:
        """Into the results, with those of other processes."""
        with locked(self / "results"):
            records = dict(sorted({**self.records(), name: record}.items()))
            self.results.parent.mkdir(parents=True, exist_ok=True)
            partial = self.results.with_suffix(".part")
            partial.write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            os.replace(partial, self.results)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def tool(command: str, **options: Any) -> dict[str, Any]:
    """One of the program's commands, with `--json`. Raises Stopped where it was interrupted, RuntimeError where it
    fails."""
    from ketchup_cache.cli import main

    words = [command]
    for name, value in options.items():
        flag = name.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    print("$ ketchup-cache", *words, file=sys.stderr, flush=True)
    with redirect_stdout(io.StringIO()) as out:
        code = main([*words, "--json"])
    if code == 130:
        raise Stopped
    if code:
        raise RuntimeError(f"ketchup-cache {' '.join(words)}: exit code {code}")
    return json.loads(out.getvalue())


# ------------------------------------------------------------------------------------------------------------- jobs


def data(place: Place) -> dict[str, Any]:
    """The splits, in the direction of the task; the prompts without labels apart."""
    rows: dict[str, list[dict[str, str]]] = {}
    for split in NEEDED:
        lines = (place.source / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        read = [json.loads(line) for line in lines]
        rows[split] = [{"prompt": row[place.task.prompt], "target": row[place.task.target]} for row in read]
    rows |= {"labelled": rows["train"][:LABELLED], "unlabelled": rows["train"][LABELLED:]}
    for name, part in rows.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (place / f"{name}.jsonl").parent.mkdir(parents=True, exist_ok=True)
        (place / f"{name}.jsonl").write_text(text, encoding="utf-8")
    models.make_tokenizer([place / "train.jsonl"], place / "tokenizer")
    return {name: len(part) for name, part in rows.items()}


def teacher(place: Place) -> dict[str, Any]:
    models.make_t5("teacher", 0, place / "tokenizer", place / "teacher-untrained")
    given = {"data": place / "train.jsonl", "eval_data": place / "dev.jsonl", **TEACHER}
    report = tool("pretrain", model=place / "teacher-untrained", out=place / "teacher", **given)
    return {"pretrain": report, **evaluated(place, "teacher")}


def evaluated(place: Place, model: str) -> dict[str, Any]:
    """On both splits, with the return under the teacher, and the outputs beside the model."""
    found = {}
    for split in ("dev", "test"):
        outputs = place / f"{model}/{split}-outputs.jsonl"
        given = {"teacher": place / "teacher/best", "metrics": "bleu,chrf", "outputs": outputs, **DECODING}
        found[split] = tool("evaluate", model=place / f"{model}/best", data=place / f"{split}.jsonl", **given)
    return found


def outputs(place: Place) -> dict[str, Any]:
    """The teacher's greedy outputs for the labelled prompts, with what the divergences need of its logits."""
    best = place / "teacher/best"
    given = {"greedy": True, "data": place / "labelled.jsonl", "cache": place / "outputs", **DECODING}
    made = tool("rollout", student=best, **given)
    return {"rollout": made, "score": tool("score", teacher=best, cache=place / "outputs", keep_top=KEEP_TOP)}


def start(place: Place, seed: int, lr: float, epochs: int, name: str) -> dict[str, Any]:
    models.make_t5("student", seed, place / "tokenizer", place / f"untrained/{seed}")
    given = {"cache": place / "outputs", "seed": seed, "lr": lr, "epochs": epochs, **PRETRAIN, **DEV}
    given |= {"eval_data": place / "dev.jsonl", "out": place / name, "max_new_tokens": 64, "rollout_batch": 256}
    return tool("pretrain", model=place / f"untrained/{seed}", **given)


def begun(place: Place, seed: int) -> dict[str, Any]:
    """A cache with the unlabelled prompts, and the first rollouts of a start."""
    given = {"data": place / "unlabelled.jsonl", "first": LEARN["batch_size"] * REFRESH, "seed": seed, **DECODING}
    return tool("rollout", student=place / f"starts/{seed}/best", cache=place / f"begun/{seed}", **given)


def run(place: Place, name: str, options: Options, seed: int, *, test: bool) -> dict[str, Any]:
    """`learn` from a start, in a copy of its cache; on the test split only where settings are not being chosen."""
    out, cache = place / name, place / f"{name}-cache"
    if not cache.exists():
        shutil.copytree(place / f"begun/{seed}", cache)
    best = place / "teacher/best"
    given = {"teacher": best, **LEARN, **options, "seed": seed, "eval_data": place / "dev.jsonl", "out": out}
    began = time.monotonic()
    record = {"learn": tool("learn", student=place / f"starts/{seed}/best", cache=cache, **given)}
    record["seconds"] = round(time.monotonic() - began, 1)
    record["bytes"] = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    record |= evaluated(place, name) if test else {}
    shutil.rmtree(cache)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return {"options": dict(options), "seed": seed, **record}


# ------------------------------------------------------------------------------------------------------------ order


def jobs(place: Place) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names and what to do, in order. A job comes once those that it needs are done: ask again after each."""
    done = place.records()
    yield "data", lambda: data(place)
    if "data" in done:
        yield "teacher", lambda: teacher(place)
    if "teacher" in done:
        yield "outputs", lambda: outputs(place)
    if "outputs" not in done:
        return
    for lr in RATES:
        yield grid_name(lr, 1, 5), lambda lr=lr: start(place, 5, lr, EPOCHS, grid_name(lr, 1, 5))
    if any(grid_name(lr, 1, 5) not in done for lr in RATES):
        return
    rate = best_rate(done)
    for times in (1, 2):
        for seed in (5, 6, 7):
            name = grid_name(rate, times, seed)
            yield name, lambda s=seed, t=times, n=name: start(place, s, rate, EPOCHS * t, n)
    for seed in (*DEV_SEEDS, *SEEDS):
        name = f"starts/{seed}"
        yield name, lambda s=seed, n=name: start(place, s, rate, EPOCHS, n)
        if name in done:
            yield f"begun/{seed}", lambda s=seed: begun(place, s)
    for seed in DEV_SEEDS:
        for group, settings in GROUPS.items():
            for label, options in settings.items():
                name = f"dev/{group}/{label}/{seed}"
                if f"begun/{seed}" in done:
                    yield name, lambda n=name, o=options, s=seed: run(place, n, o, s, test=False)


def grid_name(lr: float, times: int, seed: int) -> str:
    return f"grid/{lr:g} x{times}/{seed}"


def dev_best(record: dict[str, Any]) -> float:
    return record["dev"]["best"]["metrics"]["bleu"]


def best_rate(done: dict[str, Any]) -> float:
    return max(RATES, key=lambda lr: dev_best(done[grid_name(lr, 1, 5)]))


def work(place: Place, until: float) -> int:
    """Do jobs until the time is over; returns how many were finished."""
    finished = 0
    while time.time() < until:
        for name, job in jobs(place):
            if name in place.records():
                continue
            with locked(place / f"locks/{name.replace('/', '+')}", wait=False) as mine:
                if not mine or name in place.records():
                    continue
                began = time.monotonic()
                try:
                    place.add(name, job())
                except Stopped:
                    return finished
                print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
                finished += 1
                break
        else:
            return finished
    return finished


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="ende")
    parser.add_argument("--data", type=Path, default=Path("multi30k"), help="folder with train, dev and test.jsonl")
    parser.add_argument("--work", type=Path, default=Path("real-run"), help="folder for models and caches")
    parser.add_argument("--minutes", type=float, default=10.0)
    given = parser.parse_args()
    place = Place(TASKS[given.task], given.work.resolve(), given.data.resolve())
    if not (place.source / "train.jsonl").exists():
        sys.exit(f"{place.source}: has no train.jsonl; give --data a folder with Multi30k (train, dev, test .jsonl)")
    until = time.time() + 60 * given.minutes
    # what is being trained is saved when the time is over
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    signal.setitimer(signal.ITIMER_REAL, 60 * given.minutes)
    print(f"{work(place, until)} jobs finished")


if __name__ == "__main__":
    main()
