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

import numpy as np

from benchmarks.real import models
from benchmarks.real.settings import (
    COMPARED,
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
    TEACHER_AGAIN,
    Options,
    Task,
    rows,
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
        """Into the results, with those of other processes. Paths are those in the folder of the work."""
        known = json.loads(json.dumps(record, ensure_ascii=False).replace(f"{self.work / self.task.name}/", ""))
        with locked(self / "results"):
            records = dict(sorted({**self.records(), name: known}.items()))
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


def tool(command: str, *arguments: Any, **options: Any) -> dict[str, Any]:
    """One of the program's commands, with `--json`. An option that is None is left out.

    Raises Stopped where it was interrupted, RuntimeError where it fails.
    """
    from ketchup_cache.cli import main

    words = [command, *map(str, arguments)]
    for name, value in options.items():
        if value is None:
            continue
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
    """In two stages: dropout from the start keeps a model of this size from learning which word belongs to which."""
    models.make_t5("teacher", 0, place / "tokenizer", place / "teacher-untrained")
    given = {"data": place / "train.jsonl", "eval_data": place / "dev.jsonl"}
    first = tool("pretrain", model=place / "teacher-untrained", out=place / "teacher-begun", **given, **TEACHER)
    again = TEACHER | TEACHER_AGAIN
    report = tool("pretrain", model=place / "teacher-begun/best", out=place / "teacher", **given, **again)
    return {"begun": first, "pretrain": report, **evaluated(place, "teacher")}


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


def continued(place: Place, name: str, seed: int, outputs: int) -> dict[str, Any]:
    """SeqKD from a start for as many completions as `learn` trains on: on the outputs it has, and on `outputs` more."""
    cache, best = place / f"{name}-cache", place / "teacher/best"
    if not cache.exists():
        shutil.copytree(place / "outputs", cache)
    began = time.monotonic()
    if outputs:
        given = {"greedy": True, "data": place / "unlabelled.jsonl", "first": outputs, "limit": outputs, **DECODING}
        tool("rollout", student=best, cache=cache, **given)
    epochs = max(1, round(LEARN["steps"] * LEARN["batch_size"] / (LABELLED + outputs)))
    given = {"cache": cache, "seed": seed, "lr": 1e-3, "epochs": epochs, **PRETRAIN, **DEV, "batch_size": 192}
    given |= {"eval_data": place / "dev.jsonl", "out": place / name, "max_new_tokens": 64, "rollout_batch": 256}
    record = {"learn": tool("pretrain", model=place / f"starts/{seed}/best", **given)}
    record["seconds"] = round(time.monotonic() - began, 1)
    shutil.rmtree(cache)
    return {"outputs": outputs, "seed": seed, **record, **evaluated(place, name)}


def affordable(done: dict[str, Any]) -> int:
    """Teacher outputs that cost as many teacher seconds as the scoring of the paper's best row did, on average."""
    label = done["chosen"]["paper"]["label"]
    scoring = [done[f"dev/paper/{label}/{seed}"]["learn"]["score_s"] for seed in DEV_SEEDS]
    made = done["outputs"]["rollout"]
    return round(sum(scoring) / len(scoring) * made["rollouts"] / made["seconds"])


def chosen(done: dict[str, Any]) -> dict[str, Any]:
    """Of each group, and of each method of the group kl, the setting with the highest mean dev BLEU."""
    found = {}
    for group, settings in GROUPS.items():
        kinds = {group: settings}
        if group == "kl":
            kinds |= {f"method {m}": {k: o for k, o in settings.items() if o["method"] == m}
                      for m in ("reverse-kl", "minillm")}  # fmt: skip
        for kind, given in kinds.items():
            mean = {k: sum(dev_best(done[f"dev/{group}/{k}/{s}"]["learn"]) for s in DEV_SEEDS) for k in given}
            label = max(mean, key=lambda k: mean[k])
            found[kind] = {"label": label, "dev_bleu": mean[label] / len(DEV_SEEDS), "options": dict(given[label])}
    return found


def run(place: Place, name: str, options: Options, seed: int, *, test: bool) -> dict[str, Any]:
    """`learn` from a start, in a copy of its cache; on the test split only where settings are not being chosen."""
    out, cache = place / name, place / f"{name}-cache"
    alone = options.get("method") == "kl"  # it learns from the teacher's outputs, without the teacher
    if not cache.exists():
        shutil.copytree(place / ("outputs" if alone else f"begun/{seed}"), cache)
    if options.get("method") in ("js", "tvd"):
        tool("merge", cache, place / "outputs", into=cache)
    best = place / "teacher/best"
    given = {
        "teacher": None if alone else best,
        **LEARN,
        **options,
        "seed": seed,
        "eval_data": place / "dev.jsonl",
        "out": out,
    } | ({"refresh_every": None} if alone else {})
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
    wanted = [f"dev/{group}/{label}/{s}" for s in DEV_SEEDS for group, given in GROUPS.items() for label in given]
    if any(name not in done for name in wanted):
        return
    yield "chosen", lambda: chosen(done)
    if "chosen" not in done:
        return
    table = rows({kind: won["options"] for kind, won in done["chosen"].items()})
    for seed in SEEDS:
        if f"begun/{seed}" not in done:
            continue
        yield f"run/start/{seed}", lambda s=seed: {"seed": s, **evaluated(place, f"starts/{s}")}
        for label, more in (("SeqKD continued", 0), ("SeqKD, new outputs", affordable(done))):
            name = f"run/{label}/{seed}"
            yield name, lambda n=name, s=seed, m=more: continued(place, n, s, m)
        for label, options in table.items():
            name = f"run/{label}/{seed}"
            yield name, lambda n=name, o=options, s=seed: run(place, n, o, s, test=True)
    for one, other in COMPARED:
        name = f"compared/{one}/{other}"
        rows_ = [winner(done, group) for group in (one, other)]
        if all(f"run/{row}/{seed}" in done for row in rows_ for seed in SEEDS):
            yield name, lambda r=rows_: bootstrap(place, *r)


def grid_name(lr: float, times: int, seed: int) -> str:
    return f"grid/{lr:g} x{times}/{seed}"


def dev_best(record: dict[str, Any]) -> float:
    return record["dev"]["best"]["metrics"]["bleu"]


def best_rate(done: dict[str, Any]) -> float:
    return max(RATES, key=lambda lr: dev_best(done[grid_name(lr, 1, 5)]))


def winner(done: dict[str, Any], group: str) -> str:
    """The row of the table that a group's winner is; a row's own name stays."""
    if group not in GROUPS:
        return group
    options = done["chosen"][group]["options"]
    table = rows({kind: won["options"] for kind, won in done["chosen"].items()})
    return next(label for label, given in table.items() if dict(given) == options)


def bootstrap(place: Place, one: str, other: str, samples: int = 1000) -> dict[str, Any]:
    """BLEU of one row less that of the other on the test split, starts and sentences drawn anew together, in pairs.

    p: twice the smaller share of differences on one side of zero.
    """
    from sacrebleu.metrics.bleu import BLEU

    def statistics(row: str, seed: int) -> np.ndarray:
        folder = f"starts/{seed}" if row == "start" else f"run/{row}/{seed}"
        lines = (place / f"{folder}/test-outputs.jsonl").read_text(encoding="utf-8").splitlines()
        pairs = [json.loads(line) for line in lines]
        bleu = BLEU()
        refs = [[pair["target"] for pair in pairs]]
        return np.array(bleu._extract_corpus_statistics([pair["output"] for pair in pairs], refs))

    stats = np.stack([[statistics(row, seed) for seed in SEEDS] for row in (one, other)])
    rng, found = np.random.default_rng(0), []
    for sample in range(samples + 1):
        starts = rng.integers(len(SEEDS), size=len(SEEDS)) if sample else np.arange(len(SEEDS))
        sentences = rng.integers(stats.shape[2], size=stats.shape[2]) if sample else np.arange(stats.shape[2])
        drawn = stats[:, starts][:, :, sentences].sum(2)
        scores = [[BLEU()._compute_score_from_stats(list(map(int, row))).score for row in side] for side in drawn]
        found.append(float(np.mean(scores[0]) - np.mean(scores[1])))
    whole, resampled = found[0], np.array(found[1:])
    low, high = np.quantile(resampled, [0.025, 0.975])
    p = 2 * min((resampled <= 0).mean(), (resampled >= 0).mean())
    return {"one": one, "other": other, "difference": whole, "low": float(low), "high": float(high),
            "p": float(max(p, 1 / samples))}  # fmt: skip


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
