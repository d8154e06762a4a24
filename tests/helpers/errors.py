"""Errors as everybody sees them: one line."""

from collections.abc import Callable

import pytest


def refuses(error: type[BaseException], match: str, call: Callable[..., object], /, *given, **options) -> str:
    """That a call raises this error with one line that matches (`re.search`); and the line."""
    with pytest.raises(error, match=match) as caught:
        call(*given, **options)
    (line,) = str(caught.value).splitlines()
    return line
