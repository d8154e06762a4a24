"""Who is alive, by the clock of the store alone: a note that is written again and again while its owner lives.

Times are those at which the store says that notes were written, compared with that of one's own note. Clocks of
machines are never looked at, so it does not matter how far they are off.
"""

from __future__ import annotations

import threading
import time
import uuid
from contextlib import suppress
from types import TracebackType
from typing import Generic, TypeVar, get_args

from ketchup_cache.errors import CacheError, KetchupError, WriteError
from ketchup_cache.sharing.board import Board, Folder, ScorerNote, WaitingNote, parse

BEAT_S = 5.0
"""Between two writes of a note that says that its owner lives."""
DEAD_BEATS = 6
"""So many beats without a write: its owner is taken for dead."""
JOIN_S = 10.0
"""How long the end waits for a beat that is on its way."""
OLD_S = 24 * 3600.0
PATIENCE_S = 600.0
"""How long a store may be out of reach before waiting for it is given up."""

Beating = TypeVar("Beating", ScorerNote, WaitingNote)


class Presence:
    """One's own note, written by a thread, so that long work does not look like death. A context manager."""

    def __init__(self, board: Board, folder: Folder, data: bytes) -> None:
        self.id = uuid.uuid4().hex
        self._board, self._folder, self._data = board, folder, data
        self._name = f"{folder}/{self.id}.json"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Presence:
        """Raises CacheError or WriteError where the board can't be written."""
        self._board.write(self._name, self._data)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join(JOIN_S)
        forget(self._board, self._name)

    def now(self) -> float | None:
        """The store's clock at one's own last beat; None while one's note is not there."""
        return self._board.list(self._folder).get(f"{self.id}.json")

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            with suppress(KetchupError):  # the next beat tries again; whoever waits for the store notices by itself
                self._board.write(self._name, self._data)


class Living(Generic[Beating]):
    """The notes of a folder whose owners live. What was read once is remembered: of a note, only its time changes."""

    def __init__(self, board: Board, folder: Folder, kind: type[Beating]) -> None:
        self._board, self._folder = board, folder
        self._kind: type[Beating] = kind
        self._known: dict[str, Beating] = {}

    def look(self, now: float | None) -> dict[str, Beating]:
        """id → note. now: the store's clock (`Presence.now`); None counts everybody as alive."""
        listed = self._board.list(self._folder)
        self._known = {name: note for name, note in self._known.items() if name in listed}
        found = {}
        for name, modified in listed.items():
            if name not in self._known and (note := parse(self._board.read(f"{self._folder}/{name}"), self._kind)):
                self._known[name] = note
            if (note := self._known.get(name)) is None:
                continue
            # one that was written in the future was left by a store whose clock was set back: the living write again
            if now is None or abs(now - modified) <= DEAD_BEATS * note.beat_s:
                found[name.removesuffix(".json")] = note
        return found


class Patience:
    """For work that outlives an outage of the store."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._tries = 0

    def worked(self) -> None:
        self._since, self._tries = None, 0

    def failed(self, error: CacheError | WriteError) -> float:
        """Seconds to wait before the next try. Raises `error` where it has gone on for too long."""
        now = time.monotonic()
        if self._since is None:
            self._since = now
        if now - self._since > PATIENCE_S:
            raise error
        self._tries += 1
        return float(min(2**self._tries, 30))


def tidy(board: Board, now: float | None) -> None:
    """Delete notes that nobody has written for a day: `gc` does this for folders only. now: as in `Living.look`."""
    for folder in get_args(Folder) if now is not None else ():
        for name, modified in board.list(folder).items():
            if now is not None and now - modified > OLD_S:
                board.delete(f"{folder}/{name}")


def forget(board: Board, name: str) -> None:
    """Delete a note, if that is possible: what stays is old soon."""
    with suppress(KetchupError):
        board.delete(name)
