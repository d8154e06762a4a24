from __future__ import annotations

from ketchup_cache.config.caches import DiffConfig

from .app import Result, command


@command(
    examples=["ketchup-cache diff cache s3://lab/xsum"],
    positional=["a", "b"],
)
def diff(config: DiffConfig) -> Result:
    """Say what each of two caches has that the other lacks."""
    from ketchup_cache.sharing.transfer import diff as diff_caches

    return diff_caches(config.a, config.b)
