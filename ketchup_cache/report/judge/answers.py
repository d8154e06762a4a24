"""Answers on disk: one line each, appended when they come, so that a killed run has lost none and asks none again."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

from ketchup_cache.errors import DataError
from ketchup_cache.files import writing


def key(request: dict[str, Any]) -> str:
    """Hash of model, messages and settings."""
    return hashlib.sha256(json.dumps(request, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class Answers:
    """A JSONL file of {"key", "answer"}. Several threads, and several processes, may append to it."""

    def __init__(self, path: Path) -> None:
        """Raises DataError where the file holds something else; a line cut short by a kill is left out."""
        self.path, self._lock = path, threading.Lock()
        self._known: dict[str, str] = {}
        content = path.read_bytes() if path.exists() else b""
        self._torn = bool(content) and not content.endswith(b"\n")
        for number, line in enumerate(content.split(b"\n"), start=1):
            try:
                record = json.loads(line) if line.strip() else None
            except ValueError:
                continue
            if record is None:
                continue
            if not isinstance(record, dict) or not {"key", "answer"} <= set(record):
                raise DataError(f"{path}: line {number}: not an answer of a judge; give another file with --answers")
            self._known[record["key"]] = record["answer"]

    def __contains__(self, wanted: str) -> bool:
        return wanted in self._known

    def __getitem__(self, wanted: str) -> str:
        return self._known[wanted]

    def add(self, new: str, answer: str) -> None:
        """Returns when the line is on the disk. Raises WriteError where it can't be."""
        line = json.dumps({"key": new, "answer": answer}, ensure_ascii=False).encode(errors="replace") + b"\n"
        with self._lock, writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(b"\n" + line if self._torn else line)
                file.flush()
                os.fsync(file.fileno())
            self._torn = False
            self._known[new] = answer
