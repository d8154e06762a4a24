"""Run the experiments, or draw tables and figures from their results.

    python -m benchmarks.paper run            # everything that is not done yet: table, ablations, figures
    python -m benchmarks.paper run --only table --task translate
    python -m benchmarks.paper run --only table --row "K = 4 + mean" --seeds 2    # a part, in the order of the rows
    python -m benchmarks.paper draw           # tables and pictures again, from the JSON
    python -m benchmarks.paper try --task reason --set k=16 --set tail=jump    # settings, on the dev split

From the repository's folder. Stopped at any moment, `run` goes on where it was; what benchmarks/results holds is not
run again, unless with `--again`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: a process for each core, not a thread

from benchmarks.paper.runs import Run, analyses, execute
from benchmarks.paper.settings import (
    ABLATION_SEEDS,
    ABLATIONS,
    FIGURE_3_KS,
    FIGURE_3_TASK,
    LENGTHS,
    SIZES,
    TASKS,
    Row,
    ablation_runs,
    table_runs,
)

RESULTS = Path("benchmarks/results")
PAPER = RESULTS / "paper.json"
PARTS = ("table", "ablation", "figures")
ANALYSED = {"prompts": 256, "samples": 32}


def runs_of(part: str) -> Iterator[Run]:
    if part == "table":
        for task in TASKS:
            yield from (Run(task, None, model=model) for model in ("teacher", "student", "predistilled"))
        yield from (Run(*run) for run in table_runs())
    elif part == "ablation":
        yield Run(ABLATIONS[0].task, None, model="short")
        yield from (Run(*run) for run in ablation_runs())
    else:
        from benchmarks.paper.pictures import size_row

        for seed in ABLATION_SEEDS:
            for size in SIZES:
                for k in FIGURE_3_KS:
                    yield Run(FIGURE_3_TASK, Row(size_row(size.name, k), {"k": k}, student=size.name), seed)


def missing(parts: Iterable[str], tasks: Sequence[str], records: Iterable[dict[str, Any]]) -> list[Run]:
    """The runs of some parts and tasks that have no record yet, each once: parts share some."""
    held = {record["key"] for record in records}
    listed = {r.key: r for part in parts for r in runs_of(part) if r.task in tasks}
    return [r for key, r in listed.items() if key not in held]


def attempt(task: str, words: list[str], seed: int, work: Path) -> None:
    """Reinforcement with other options of `learn`, on the dev split: for choosing settings. Not in the results."""
    options = {
        name: json.loads(value) if _is_json(value) else value for name, _, value in (w.partition("=") for w in words)
    }
    record = execute(Run(task, Row(" ".join(words), options), seed, split="dev"), work)
    found = record["evaluation"]
    print(f"{task}, {record['row'] or 'as in the table'}, seed {seed}, dev: return {found['returns']['mean']:.2f}, "
          f"length {found['length_mean']:.1f}, "
          + ", ".join(f"{m.title} {found['metrics'][m.key]:.1f}" for m in TASKS[task].metrics))  # fmt: skip


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def chosen(wanted: Iterable[Run], rows: Sequence[str], seeds: int | None) -> list[Run]:
    """Those of some rows (none named: all), in their order, and of the first seeds."""
    left = [r for r in wanted if (not rows or r.name in rows) and (seeds is None or r.seed < seeds)]
    return sorted(left, key=lambda r: (r.seed, rows.index(r.name))) if rows else left


def run(wanted: Sequence[Run], parts: Sequence[str], tasks: Sequence[str], work: Path, workers: int) -> None:
    began, records = time.monotonic(), []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting = {pool.submit(execute, r, work): r for r in wanted}
        if "figures" in parts:
            students = [*(s.name for s in LENGTHS), "predistilled"]
            drawn = [pool.submit(analyses, TASKS[t], students, **ANALYSED, work=work) for t in tasks]
        for n, future in enumerate(as_completed(waiting), start=1):
            record = future.result()
            records.append(record)
            save([record], [])  # so that whatever ends this, what was measured is in the results
            print(
                f"[{n}/{len(waiting)}, {(time.monotonic() - began) / 60:.0f} min] {record['task']}, {record['row']}, "
                f"seed {record['seed']}: return {record['evaluation']['returns']['mean']:.2f}, "
                f"{TASKS[record['task']].headline.title} "
                f"{record['evaluation']['metrics'][TASKS[record['task']].headline.key]:.2f}",
                flush=True,
            )
        figures = [future.result() for future in drawn] if "figures" in parts else []
    save(records, figures)


def load() -> dict[str, Any]:
    """What the results hold by now."""
    return json.loads(PAPER.read_text()) if PAPER.exists() else {"records": [], "figure_2": []}


def save(records: list[dict[str, Any]], figures: list[dict[str, Any]]) -> None:
    """Into the results, in place of what is there of the same runs."""
    from ketchup_cache.version import __version__

    held = load()
    by_key = {r["key"]: r for r in [*held["records"], *records]}
    by_task = {f["task"]: f for f in [*held["figure_2"], *figures]}
    import torch
    import transformers

    content = {
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, {platform.system()}; one thread for each run",
        "versions": {
            "ketchup-cache": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "records": sorted(by_key.values(), key=lambda r: (r["task"], r["row"], r["seed"])),
        "figure_2": [by_task[task] for task in sorted(by_task)],
    }
    RESULTS.mkdir(exist_ok=True)
    lines = [json.dumps(record, ensure_ascii=False) for record in content["records"]]
    head = json.dumps({k: v for k, v in content.items() if k != "records"}, ensure_ascii=False, indent=1)
    PAPER.write_text(head[:-2] + ',\n "records": [\n' + ",\n".join(lines) + "\n]}\n", encoding="utf-8")


def draw() -> None:
    from benchmarks.paper.pictures import figure_1, figure_2, figure_3
    from benchmarks.paper.tables import ablation_tables, paper_table, summary_table

    if not PAPER.exists():
        sys.exit(f"{PAPER}: not there yet; make it with `python -m benchmarks.paper run`")
    results = load()
    records = results["records"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    head = f"Test split, greedy decoding, mean ± standard error over seeds. {results['machine']}; {versions}.\n"
    (RESULTS / "paper-table.md").write_text(
        f"# The paper's Table 1 on the shipped tasks\n\n{head}\n{paper_table(records)}"
    )
    (RESULTS / "paper-summary.md").write_text(f"# All methods on all tasks\n\n{head}\n{summary_table(records)}\n")
    (RESULTS / "ablations.md").write_text(f"# What the paper leaves open\n\n{head}\n{ablation_tables(records)}")
    figure_1(records, RESULTS / "figure-1.png")
    for analysis in results["figure_2"]:
        for tail, found in analysis["analysis"].items():
            figure_2(found, RESULTS / f"figure-2-{analysis['task']}-{tail}.png")
    figure_3(records, RESULTS / "figure-3.png")
    print((RESULTS / "paper-table.md").read_text())
    print((RESULTS / "ablations.md").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("action", choices=("run", "draw", "try"))
    parser.add_argument("--only", choices=PARTS, action="append", help="a part of it; may be given several times")
    parser.add_argument("--task", choices=tuple(TASKS), action="append")
    parser.add_argument("--row", action="append", default=[], help="a row of the tables; may be given several times")
    parser.add_argument("--seeds", type=int, help="only the first so many")
    parser.add_argument("--work", type=Path, default=Path("benchmarks/work"), help="where unfinished work lies")
    parser.add_argument("--workers", type=int, default=2, help="runs at once, a thread each")
    parser.add_argument("--again", action="store_true", help="also what the results hold already")
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", help="with `try`: of `learn`")
    parser.add_argument("--seed", type=int, default=0, help="with `try`")
    arguments = parser.parse_args()
    if arguments.action == "try":
        for task in arguments.task or list(TASKS):
            attempt(task, arguments.set, arguments.seed, arguments.work)
        return
    if arguments.action == "run":
        parts, tasks = arguments.only or list(PARTS), arguments.task or list(TASKS)
        wanted = missing(parts, tasks, [] if arguments.again else load()["records"])
        run(chosen(wanted, arguments.row, arguments.seeds), parts, tasks, arguments.work, arguments.workers)
    draw()


if __name__ == "__main__":
    main()
