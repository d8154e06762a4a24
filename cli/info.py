from __future__ import annotations

from ketchup_cache.config.caches import InfoConfig

from .app import Result, command


@command(examples=["ketchup-cache info cache", "ketchup-cache info cache --json"], positional=["cache"])
def info(config: InfoConfig) -> Result:
    """Describe what a cache holds and who made it."""
    from ketchup_cache.cache.inspect import describe
    from ketchup_cache.sharing.remote_cache import open_cache

    return describe(open_cache(config.cache))
