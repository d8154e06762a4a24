"""Where the tables on real text are worked on, and how: folders, records, locks, and the program's commands."""

from __future__ import annotations

import fcntl
import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.real.settings import TASKS, Task

RESULTS = Path(__file__).resolve().parents[1] / "results" / "real"


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

    def like(self) -> Place:
        """Of the task that this one is like."""
        return replace(self, task=TASKS[self.task.like or self.task.name])

    @property
    def results(self) -> Path:
        return RESULTS / f"{self.task.name}.json"

    def records(self) -> dict[str, Any]:
        return json.loads(self.results.read_text(encoding="utf-8")) if self.results.exists() else {}

    def file_of(self, kind: str, name: str) -> Path:
        """A file that says something of a job: a lock, or that what it makes is in this folder."""
        return self / f"{kind}/{name.replace('/', '+')}"

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
