"""What stores over a network have in common: they try again, and errors are one line without credentials."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import TypeVar

from ketchup_cache.console import one_line
from ketchup_cache.errors import CacheError, KetchupError, WriteError

TRIES = 4
FIRST_PAUSE_S = 0.2
"""Before the second try; each later pause is four times as long."""
Value = TypeVar("Value")


def persistently(what: str, call: Callable[[], Value], *, writing: bool = False) -> Value:
    """Try a request again while the connection fails; what the server answers for good is raised at once.

    Raises FileNotFoundError and FileExistsError as they are, WriteError or CacheError for everything else.
    """
    failed = WriteError if writing else CacheError
    for attempt in range(TRIES):
        try:
            return call()
        except (FileNotFoundError, FileExistsError, KetchupError, ImportError):
            raise
        except PermissionError as error:
            raise failed(f"{what}: access is refused ({reason(error)}); check your credentials and rights") from None
        except Exception as error:  # clients raise errors of many libraries
            if attempt == TRIES - 1:
                advice = "check the connection and run the command again; what has arrived is kept"
                raise failed(f"{what}: can't be reached ({reason(error)}); {advice}") from None
            time.sleep(FIRST_PAUSE_S * 4**attempt)
    raise AssertionError("unreachable")


def reason(error: BaseException) -> str:
    """An error of a client in one line, without credentials or signed queries."""
    return one_line(scrub(one_line(error, 10_000)))


def scrub(text: str) -> str:
    """Cut `user:password@` and `?query` out of every address in a text."""
    text = re.sub(r"(\w+://)[^/\s@'\"]*@", r"\1", text)
    return re.sub(r"((?:\w+://|/)[^\s?'\"]*)\?[^\s'\")]*", r"\1", text)
