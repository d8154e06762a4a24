"""What the program says: reports, warnings, printable text, sizes, and the progress of long work.

Progress has a rate and the time left: a bar on a terminal, a line every half minute in a log.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

LOG_EVERY_S = 30.0


class Report:
    """What a command returns, a frozen dataclass: `str()` is for people, `to_dict()` for `--json`."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON: the fields, and the properties that the class defines."""
        derived = {name: getattr(self, name) for name, kind in vars(type(self)).items() if isinstance(kind, property)}
        return asdict(self) | derived  # type: ignore[call-overload]


def say(text: str) -> None:
    """One line on stderr."""
    print(f"ketchup-cache: {printable(text)}", file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """One line on stderr that the user should act on."""
    say(f"warning: {text}")


def one_line(error: object, longest: int = 200) -> str:
    """An error's text without line breaks; its type where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= longest else text[: longest - 1] + "…"


def printable(text: str) -> str:
    """Without control characters: names in files that others wrote must not steer the terminal."""
    return "".join(c if c.isprintable() else "�" for c in text)


def size_text(count: float) -> str:
    """Bytes in words: `1.5 MB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


class Bar:
    """What a worker holds: `advance(n)` after n more units, `note(text)` for a figure beside the bar."""

    def __init__(self, label: str, total: int | None, unit: str) -> None:
        self.label, self.total, self.unit, self.done, self.text = label, total, unit, 0, ""
        self.began = self._logged = time.monotonic()

    def advance(self, n: int = 1) -> None:
        self.done += n
        now = time.monotonic()
        if now - self._logged >= LOG_EVERY_S:
            self._logged = now
            self._log(now)

    def note(self, text: str) -> None:
        self.text = text

    @property
    def rate(self) -> float:
        """Units per second since the start."""
        return self.done / max(time.monotonic() - self.began, 1e-9)

    def _log(self, now: float) -> None:
        left = ""
        if self.total and self.done:
            seconds = (self.total - self.done) * (now - self.began) / self.done
            left = f", {seconds / 60:.1f} min left"
        of = f" of {self.total:,}" if self.total else ""
        print(
            f"{self.label}: {self.done:,}{of} {self.unit} ({self.rate:,.0f}/s{left}) {self.text}".rstrip(),
            file=sys.stderr,
            flush=True,
        )


class _RichBar(Bar):
    def __init__(self, label: str, total: int | None, unit: str, rich: RichProgress) -> None:
        super().__init__(label, total, unit)
        self.rich = rich
        self.task = rich.add_task(label, total=total, unit=unit, rate="", text="")

    def advance(self, n: int = 1) -> None:
        self.done += n
        self.rich.update(self.task, completed=self.done, rate=f"{self.rate:,.0f} {self.unit}/s", text=self.text)

    def note(self, text: str) -> None:
        super().note(text)
        self.rich.update(self.task, text=text)


_shown: RichProgress | None = None
"""The display on the terminal, while there is one: work within work adds a line to it."""


@contextmanager
def progress(label: str, total: int | None = None, unit: str = "tokens") -> Iterator[Bar]:
    """Show progress on stderr while the block runs. `total`: units to do, None where that is not known."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Bar(label, total, unit)
        return
    with _display(console) as rich:
        bar = _RichBar(label, total, unit, rich)
        try:
            yield bar
        finally:
            rich.remove_task(bar.task)


@contextmanager
def _display(console: Console) -> Iterator[RichProgress]:
    global _shown
    if _shown is not None:
        yield _shown
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}", table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
        # the only one that may be cut where the terminal is narrow
        TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
    )
    with RichProgress(*columns, console=console, transient=True, expand=True) as _shown:
        try:
            yield _shown
        finally:
            _shown = None
