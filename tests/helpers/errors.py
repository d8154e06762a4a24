"""Errors as everybody sees them: one line."""

from collections.abc import Callable

import pytest

from ketchup_cache.cli import main


def refuses(error: type[BaseException], match: str, call: Callable[..., object], /, *given, **options) -> str:
    """That a call raises this error with one line that matches (`re.search`); and the line."""
    with pytest.raises(error, match=match) as caught:
        call(*given, **options)
    (line,) = str(caught.value).splitlines()
    return line


def fails(capsys, *words: object) -> str:
    """That a command of ours prints one line, on stderr, and ends with code 2; and the line."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    shown = capsys.readouterr()
    (line,) = shown.err.splitlines()
    assert not shown.out
    return line
