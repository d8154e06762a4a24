"""Tables on real text, by the public commands: Multi30k, with teachers and students of our own making.

    python -m benchmarks.real --task ende --minutes 10      work for ten minutes; run it again to go on
    python -m benchmarks.real --write                       write the tables of what there is, into the docs too

Jobs are done in order, each when those before it that it needs are done. A job's record goes to
`benchmarks/results/real/TASK.json` when it is finished, and is never made again; models and caches stay in `--work`.
Several may work at once: each job is locked. Nothing of the data is written to the results.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.real import jobs, tables
from benchmarks.real.choices import (
    affordable,
    best_rate,
    bootstrap,
    chosen,
    comparisons,
    grid_name,
    inherited,
    seeds_by_row,
    table_rows,
)
from benchmarks.real.place import Place, Stopped, locked
from benchmarks.real.settings import (
    DEV_SEEDS,
    FEWER,
    GROUPS,
    LONGER,
    OTHER_SEEDS,
    RATES,
    SEEDS,
    SEQKD_RATES,
    TASKS,
    Row,
    experiments,
)

Job = tuple[str, Callable[[], Any]]
CONVERGED = (*DEV_SEEDS, SEEDS[0])
"""Starts on which twice the epochs are tried, and the experiments are made."""


def order(place: Place) -> Iterator[Job]:
    """Names and what to do, in order. A job comes once those that it needs are done: ask again after each."""
    done = place.records()
    for name, of in ("data", jobs.data), ("teacher", jobs.teacher), ("outputs", jobs.outputs), ("base", jobs.base):
        yield name, lambda of=of: of(place)
        if name not in done:
            return
    if place.task.like:
        yield from alike(place, done)
        return
    for lr in RATES:
        yield grid_name(lr), lambda lr=lr: jobs.start(place, DEV_SEEDS[0], lr, place.task.epochs, grid_name(lr))
    if any(grid_name(lr) not in done for lr in RATES):
        return
    lr = best_rate(done)
    yield from starts(place, done, lr, DEV_SEEDS)
    yield from diagnosed(place, done, DEV_SEEDS[:1])
    yield from on_dev(place, done)
    yield from starts(place, done, lr, SEEDS)
    if "chosen" in done:
        yield from table(place, done, SEEDS)
    yield from doubled(place, lr, CONVERGED)
    if "chosen" in done:
        yield from (job for job in table(place, done, OTHER_SEEDS) if job[0].startswith("run/SeqKD"))
    yield from diagnosed(place, done, OTHER_SEEDS)
    if "chosen" in done:
        yield from table(place, done, OTHER_SEEDS)
        yield from tried(place, done)


def alike(place: Place, done: dict[str, Any]) -> Iterator[Job]:
    """Of a task that has the settings of another."""
    yield "inherited", lambda: inherited(place.like().records())
    if "inherited" not in done:
        return
    yield "chosen", lambda: done["inherited"]["chosen"]
    lr = best_rate(done)
    yield from starts(place, done, lr, SEEDS)
    if "chosen" in done:
        yield from table(place, done, SEEDS)
    yield from doubled(place, lr, OTHER_SEEDS)
    yield from diagnosed(place, done, OTHER_SEEDS)
    if "chosen" in done:
        yield from table(place, done, OTHER_SEEDS)


def doubled(place: Place, lr: float, seeds: Sequence[int]) -> Iterator[Job]:
    for seed in seeds:
        name = f"doubled/{seed}"
        yield name, lambda s=seed, n=name: jobs.start(place, s, lr, 2 * place.task.epochs, n)


def starts(place: Place, done: dict[str, Any], lr: float, seeds: Sequence[int]) -> Iterator[Job]:
    for seed in seeds:
        name = f"starts/{seed}"
        yield name, lambda s=seed, n=name: jobs.start(place, s, lr, place.task.epochs, n)
        if name in done:
            yield f"begun/{seed}", lambda s=seed: jobs.begun(place, s)


def diagnosed(place: Place, done: dict[str, Any], seeds: Sequence[int]) -> Iterator[Job]:
    """Experiment A, before settings are chosen, and the figures of bias and variance."""
    for seed in seeds:
        if f"starts/{seed}" in done:
            yield f"offline/{seed}", lambda s=seed: jobs.offline(place, s)
            yield f"variance/{seed}", lambda s=seed: jobs.variance(place, s)
        if f"offline/{seed}" in done:
            yield f"gradient/{seed}", lambda s=seed: jobs.gradient(place, s)


def on_dev(place: Place, done: dict[str, Any]) -> Iterator[Job]:
    ready = [seed for seed in DEV_SEEDS if f"begun/{seed}" in done]
    for group, settings in GROUPS.items():
        for label, options in settings.items():
            for seed in ready:
                name = f"dev/{group}/{label}/{seed}"
                yield name, lambda n=name, o=options, s=seed: jobs.run(place, n, Row(o), s, test=False)
    if any(f"dev/{g}/{label}/{s}" not in done for g, given in GROUPS.items() for label in given for s in DEV_SEEDS):
        return
    more = affordable(done)
    for lr in SEQKD_RATES:
        for seed in DEV_SEEDS:
            name = f"dev/seqkd/{lr:g}/{seed}"
            given = {"lr": lr, "outputs": more, "test": False}
            yield name, lambda n=name, s=seed, g=given: jobs.continued(place, n, s, **g)
    if all(f"dev/seqkd/{lr:g}/{s}" in done for lr in SEQKD_RATES for s in DEV_SEEDS):
        yield "chosen", lambda: chosen(done)


def table(place: Place, done: dict[str, Any], of: Sequence[int]) -> Iterator[Job]:
    """The rows that are on the starts `of`: those that are compared, with the tests, or the others."""
    given, more = {"lr": done["chosen"]["seqkd"]["options"]["lr"], "test": True}, affordable(done)
    seqkd = {
        "SeqKD continued": given | {"outputs": 0},
        "SeqKD, new outputs": given | {"outputs": more},
        "SeqKD, new outputs, longer": given | {"outputs": more, "times": LONGER},
        **{f"SeqKD, {outputs:,} new outputs": given | {"outputs": outputs} for outputs in FEWER},
    }
    rows = table_rows(done)
    seeds = seeds_by_row(done, ("start", *seqkd, *rows))
    todo = [(label, seed) for label, given in seeds.items() if given == of for seed in of]
    for label, seed in todo:
        name = f"run/{label}/{seed}"
        if f"begun/{seed}" not in done:
            continue
        if label == "start":
            yield name, lambda s=seed: {"seed": s, **jobs.evaluated(place, f"starts/{s}")}
        elif label in seqkd:
            yield name, lambda n=name, s=seed, g=seqkd[label]: jobs.continued(place, n, s, **g)
        elif rows[label].source in ("refreshed", "outputs") or all(f"offline/{s}" in done for s in OTHER_SEEDS):
            yield name, lambda n=name, r=rows[label], s=seed: jobs.run(place, n, r, s, test=True)
    for one, other in comparisons(done) if of == SEEDS else ():
        if all(f"run/{row}/{seed}" in done for row in (one, other) for seed in SEEDS):
            yield f"compared/{one}/{other}", lambda pair=(one, other): bootstrap(place, *pair)


def tried(place: Place, done: dict[str, Any]) -> Iterator[Job]:
    """Experiments B, C, E and the uses of a rollout, on the dev set."""
    for label, options in experiments(done["chosen"]["rows"]).items():
        for seed in CONVERGED:
            name = f"tried/{label}/{seed}"
            yield name, lambda n=name, o=options, s=seed: jobs.run(place, n, Row(o), s, test=False)


def needs(name: str) -> Iterator[str]:
    """The jobs whose models and caches a run uses, in their order."""
    yield from ("data", "teacher", "outputs", "base")
    kind, *_, seed = name.split("/")
    if kind in ("dev", "run", "tried", "begun", "offline", "variance", "gradient") and seed.isdigit():
        yield from (f"starts/{seed}", f"begun/{seed}")
    if kind == "gradient" or "offline" in name or "another's" in name:
        yield from (f"offline/{s}" for s in (seed, *map(str, OTHER_SEEDS)))


def work(place: Place, until: float) -> int:
    """Do jobs until the time is over; returns how many were finished.

    Where a record is there and its models are not, as in a new clone, they are made again, without a new record.
    """
    finished = 0
    while time.time() < until:
        known = place.records()
        todo = dict(order(place))
        for wanted in todo:
            if wanted in known:
                continue
            missing = (need for need in needs(wanted) if need in known and not place.file_of("made", need).exists())
            name = next(missing, wanted)
            with locked(place.file_of("locks", name), wait=False) as mine:
                if not mine or wanted in place.records():
                    continue
                began = time.monotonic()
                try:
                    record = todo[name]()
                except Stopped:
                    return finished
                if name == wanted:
                    place.add(name, record)
                made = place.file_of("made", name)
                made.parent.mkdir(parents=True, exist_ok=True)
                made.touch()
                print(f"{name}: {time.monotonic() - began:.0f} s{told(record, known.get(name))}", flush=True)
                finished += 1
                break
        else:
            return finished
    return finished


def told(record: Any, known: Any) -> str:
    """Of a model that was made again, whether it is the same: its last value on the dev set beside the known one."""
    if known is None:
        return ""
    runs = [of.get("pretrain", of) for of in (record, known) if isinstance(of, dict)]
    curves = [of["curve"][-1] for of in runs if "curve" in of]
    if len(curves) < 2:
        return ", made again"
    return ", made again: BLEU on dev " + ", then ".join(f"{curve['bleu']:.4f}" for curve in reversed(curves))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="ende")
    parser.add_argument("--data", type=Path, default=Path("multi30k"), help="folder with train, dev and test.jsonl")
    parser.add_argument("--work", type=Path, default=Path("real-run"), help="folder for models and caches")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--write", action="store_true", help="write the tables of the results, and do nothing else")
    given = parser.parse_args()
    if given.write:
        tables.write()
        return
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
