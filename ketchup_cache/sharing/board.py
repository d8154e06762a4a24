"""A board of small notes that may change, under watch/ beside the segments of a shared cache, which never do.

It holds who scores, who waits, which rows somebody is at work on, and what can't be scored. It is no part of the
cache's content. Anybody who may write to the cache may write notes: what is no valid note is as if it were not there.

watch/scorers/<id>.json                                   a teacher in memory; written again every few seconds
watch/waiting/<id>.json                                   a `learn` that waits for scores; likewise
watch/claims/<teacher>-<rollouts>-<first row>.<n>.json    rows that a scorer is at work on, made only where absent
watch/refused/<teacher>-<rollouts>.json                   why a scorer can't score a rollouts segment
"""

from __future__ import annotations

import os
from typing import Annotated, Literal, Protocol, TypeVar

from pydantic import Field, StringConstraints, ValidationError

from ketchup_cache.errors import CacheError
from ketchup_cache.provenance import Record, Sha256, TeacherInfo
from ketchup_cache.sharing.folder import LocalBoard, LocalRemote
from ketchup_cache.sharing.object_store import ObjectBoard, ObjectRemote
from ketchup_cache.sharing.stores import open_remote

MAX_NOTE_BYTES = 2**17
MAX_WAITING = 1500
"""Rollouts that one note asks for, so that it stays below MAX_NOTE_BYTES. More are scored too, in their turn."""
TEACHER_DIGITS = 12
"""Of a teacher's fingerprint, in the names of notes."""

Folder = Literal["scorers", "waiting", "claims", "refused"]
BeatSeconds = Annotated[float, Field(gt=0, le=60, allow_inf_nan=False)]


class Board(Protocol):
    """Notes by name, `<folder>/<name>`. All methods raise CacheError or WriteError where the place can't be reached."""

    url: str

    def list(self, folder: Folder) -> dict[str, float]:
        """The notes of a folder: name → when it was last written, in seconds by the clock of the store."""

    def read(self, name: str) -> bytes | None:
        """At most MAX_NOTE_BYTES + 1 bytes; None where there is no such note."""

    def create(self, name: str, data: bytes) -> bool:
        """Make a note where there is none, whole or not at all. Of several who try at once, one gets True."""

    def write(self, name: str, data: bytes) -> None:
        """Make a note or replace it as a whole."""

    def delete(self, name: str) -> None:
        """No error where it is gone already."""


class ScorerNote(Record):
    teacher: TeacherInfo
    tokenizer: Sha256
    """Fingerprint of the teacher's tokenizer."""
    keep_top: int = Field(ge=0, lt=2**48)
    """Largest logits that its scores keep."""
    beat_s: BeatSeconds
    """Seconds between two writes of this note."""


class WaitingNote(Record):
    rollouts: tuple[Sha256, ...] = Field(max_length=MAX_WAITING)
    """Segments whose scores are waited for."""
    beat_s: BeatSeconds


class ClaimNote(Record):
    scorer: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
    start: int = Field(ge=0, lt=2**48)
    stop: int = Field(ge=0, lt=2**48)
    """Rows start..stop of the rollouts segment."""


class RefusalNote(Record):
    scorer: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
    message: Annotated[str, StringConstraints(max_length=2000)]


Note = TypeVar("Note", ScorerNote, WaitingNote, ClaimNote, RefusalNote)


def parse(data: bytes | None, kind: type[Note]) -> Note | None:
    """None for anything that is no such note."""
    if data is None or len(data) > MAX_NOTE_BYTES:
        return None
    try:
        return kind.model_validate_json(data)
    except ValidationError:
        return None


def open_board(address: str | os.PathLike[str]) -> Board:
    """The board of the cache at an address. Raises CacheError where nothing can be written there."""
    remote = open_remote(address)
    if isinstance(remote, LocalRemote):
        return LocalBoard(remote.path, MAX_NOTE_BYTES)
    if isinstance(remote, ObjectRemote):
        return ObjectBoard(remote, MAX_NOTE_BYTES)
    raise CacheError(
        f"{remote.url}: scoring for others needs a place where small files change: a path, s3://, gs:// or az://"
    )
