"""Which segments a run used, so that it can be repeated with exactly these: OUT/pins.json."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from ketchup_cache.cache.cache import Cache
from ketchup_cache.errors import MismatchError
from ketchup_cache.files import write_file

NAME = "pins.json"


class Pins:
    """Writes the ids down before the first batch of new segments is trained on."""

    def __init__(self, out: Path, cache: Cache, *, resumed: bool) -> None:
        """resumed: the run goes on, so what it used before counts too."""
        self._path, self._address = out / NAME, cache.address
        self._ids: dict[str, None] = dict.fromkeys(read(self._path)) if resumed and self._path.exists() else {}

    def add(self, ids: Sequence[str]) -> None:
        """Raises WriteError."""
        if not self._ids.keys() >= set(ids):
            self._ids.update(dict.fromkeys(ids))
            record = {"cache": self._address, "segments": list(self._ids)}
            write_file(self._path, (json.dumps(record, indent=2) + "\n").encode())


def read(path: Path) -> list[str]:
    """The ids in a file of pins. Raises MismatchError where it is none."""
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))["segments"]
        if ids and all(re.fullmatch("[0-9a-f]{64}", id_) for id_ in ids):
            return list(ids)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MismatchError(f"{path}: is no list of pins ({error}); take pins.json from the folder of a run") from None
    raise MismatchError(f"{path}: holds no segment ids; take pins.json from the folder of a run")


def restrict(cache: Cache, pin: Path | None) -> None:
    """Make a cache show the pinned segments alone, and take no new ones.

    Raises MismatchError where it lacks one of them.
    """
    if pin is None:
        return
    cache.pin(read(pin))
