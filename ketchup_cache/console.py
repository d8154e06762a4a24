"""What the program says: reports, warnings, printable text, sizes, and the progress of long work.

Progress has a rate and the time left: a bar on a terminal, a line a minute in a log.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any, ClassVar

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from ketchup_cache.errors import printable as printable

LOG_EVERY_S = 60.0


size_text = decimal
"""Bytes in words: `1.5 MB`."""


class Report:
    """What a command returns, a frozen dataclass: `str()` is for people, `to_dict()` for `--json`.

    shaded: whether `str()` colours text, and so leaves out control characters of others itself.
    """

    shaded: ClassVar[bool] = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON: the fields, and the properties that the class defines."""
        derived = {name: getattr(self, name) for name, kind in vars(type(self)).items() if isinstance(kind, property)}
        return asdict(self) | derived  # type: ignore[call-overload]


def is_first() -> bool:
    """Whether this process speaks: of those that a launcher (torchrun) started together, the first."""
    return os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"


def say(text: str) -> None:
    """One line on stderr, of the first process alone."""
    if is_first():
        print(f"ketchup-cache: {printable(text)}", file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """One line on stderr that the user should act on."""
    say(f"warning: {text}")


def one_line(error: object, longest: int = 200) -> str:
    """An error's text without line breaks and control characters; its type where it says nothing."""
    text = printable(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= longest else text[: longest - 1] + "…"


def silence(*logs: Any) -> ExitStack:
    """Libraries write no log and show no bars until its end; what matters in them is raised as an error here.

    logs: their `logging` modules.
    """
    loud = ExitStack()
    for log in logs:
        loud.callback(log.set_verbosity, log.get_verbosity())
        log.set_verbosity(log.CRITICAL)
        if getattr(log, "is_progress_bar_enabled", bool)():
            loud.callback(log.enable_progress_bar)
            log.disable_progress_bar()
    return loud


class Bar:
    """What a worker holds: `advance(n)` after n more units, `note(text)` for a figure beside the bar."""

    def __init__(
        self, label: str, total: int | None, unit: str, shown: Progress | None = None, done: int = 0, workers: int = 1
    ) -> None:
        """shown: the bars on the terminal; without them progress is lines in a log. workers: processes that advance as
        this one does."""
        self._workers = workers
        self.label, self.total, self.unit, self.text, self._shown = label, total, unit, "", shown
        self.done = self._before = done
        self.began = time.monotonic()
        self._logged = self.began if is_first() else math.inf
        self.task = shown.add_task(label, total=total, completed=done, rate="", text="") if shown else None

    def advance(self, n: int = 1) -> None:
        self.done += n * self._workers
        for call in _listeners if is_first() else ():
            call(self.label, self.done, self.total)
        if self._shown and self.task is not None:
            self._shown.update(self.task, completed=self.done, rate=self.rate, text=self.text)
        elif time.monotonic() - self._logged >= LOG_EVERY_S:
            self._logged = time.monotonic()
            seconds = (self._logged - self.began) / max(self.done - self._before, 1)
            of = f" of {self.total:,}" if self.total else ""
            left = f", {(self.total - self.done) * seconds / 60:.1f} min left" if self.total and self.done else ""
            line = f"{self.label}: {self.done:,}{of} {self.unit} ({self.rate}{left}) {self.text}"
            print(line.rstrip(), file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        self.text = text
        if self._shown and self.task is not None:
            self._shown.update(self.task, text=text)

    @property
    def rate(self) -> str:
        """Units a second since the start, or the seconds that one takes."""
        each = (time.monotonic() - self.began) / max(self.done - self._before, 1e-9)
        return f"{1 / max(each, 1e-9):,.0f}/s" if each <= 1 else f"{each:,.1f} s each"


_console = Console(stderr=True)
_listeners: list[Callable[[str, int, int | None], None]] = []


@contextmanager
def on_progress(call: Callable[[str, int, int | None], None]) -> Iterator[None]:
    """While the block runs, every command calls `call(what, done, total)` as it goes on. what: rollouts, scoring, the
    name of a run's command and the like. total: None where it is not known. What it raises ends the command."""
    _listeners.append(call)
    try:
        yield
    finally:
        _listeners.remove(call)


@contextmanager
def progress(
    label: str, total: int | None = None, unit: str = "tokens", *, done: int = 0, workers: int = 1
) -> Iterator[Bar]:
    """Show progress on stderr while the block runs. `total`: units to do, None where that is not known. `done`: units
    that were done before; the rate is of the others. `workers`: as of `Bar`."""
    if not (_console.is_terminal and is_first()):
        yield Bar(label, total, unit, done=done, workers=workers)
        return
    text = TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1))
    columns = ("{task.description}", BarColumn(8), MofNCompleteColumn(), "{task.fields[rate]}", TimeRemainingColumn())
    with Progress(*columns, text, console=_console, transient=True, expand=True) as shown:
        yield Bar(label, total, unit, shown, done, workers)
