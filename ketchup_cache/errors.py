"""Every error a user can cause, one line each.

The command line prints `str(error)` and exits with code 2; `--debug` shows the traceback.
A message says what is wrong, where (path, row, key) and what to do.
"""

from __future__ import annotations

from typing import Any


def printable(text: str) -> str:
    """Without control characters: names in files of others must not steer the terminal, or add lines of ours."""
    return "".join(c if c.isprintable() else "�" for c in text)


class KetchupError(Exception):
    """Base of all errors this package raises on purpose. Its text has a line for each argument."""

    def __str__(self) -> str:
        return "\n".join(printable(str(problem)) for problem in self.args)


class ConfigError(KetchupError):
    """Raised when options, from flags or a YAML file, are unknown, missing or out of range.

    Holds one line per problem, so that all of them are reported at once.
    """

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__(*problems)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (list(self.args),)


class DataError(KetchupError):
    """Raised when a prompt file is missing, empty, malformed, lacks a field or holds a prompt that is too long."""


class ModelError(KetchupError):
    """Raised when a model or tokenizer can't be loaded or its logits can't be reproduced exactly."""


class CacheError(KetchupError):
    """Raised when a cache is missing, of another format version, or holds nothing that fits the request."""


class CorruptError(CacheError):
    """Raised when bytes in a cache are not the bytes its manifests promise."""


class MismatchError(KetchupError):
    """Raised when two parts do not belong together: teacher and student tokenizers, cache and teacher, pins."""


class NumericsError(KetchupError):
    """Raised when a NaN or infinity appears in logits, returns, loss or gradient."""


class ProcessError(KetchupError):
    """Raised when another of the processes that were started together has ended, or can't be met."""


class ServerError(KetchupError):
    """Raised when a model's server does not answer, or answers what can't be. What came before is kept.

    places, done: the rows that were done, and what came of them.
    """

    places: Any = None
    done: Any = None


class WriteError(KetchupError):
    """Raised when the disk is full, read-only or failing. What was committed before is kept."""
