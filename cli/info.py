from __future__ import annotations

from ketchup_cache.config.commands import InfoConfig

from .app import Result, command


@command(
    examples=["ketchup-cache info cache", "ketchup-cache info cache s3://lab/xsum"],
    positional=["cache", "other"],
)
def info(config: InfoConfig) -> Result:
    """Describe what a cache holds and who made it; of two caches, what only one of them has."""
    from ketchup_cache.cache.inspect import describe
    from ketchup_cache.sharing.remote_cache import open_cache
    from ketchup_cache.sharing.transfer import diff

    return diff(config.cache, config.other) if config.other else describe(open_cache(config.cache))
