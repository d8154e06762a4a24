"""ketchup-cache: distil language models by reinforcement learning, from a teacher's scores computed once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "k_step_returns", "open_cache"]

if TYPE_CHECKING:
    from ketchup_cache.method.returns import k_step_returns
    from ketchup_cache.sharing.remote_cache import open_cache

_HOME = {"k_step_returns": "ketchup_cache.method.returns", "open_cache": "ketchup_cache.sharing.remote_cache"}


def __getattr__(name: str) -> Any:
    """Import the public functions on first use, so that `ketchup-cache --help` does not wait for Zarr."""
    if name not in _HOME:
        raise AttributeError(f"module 'ketchup_cache' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
