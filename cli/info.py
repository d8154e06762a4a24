from __future__ import annotations

from ketchup_cache.config.commands import InfoConfig

from .app import Result, command


@command(examples=["ketchup-cache info cache", "ketchup-cache info cache s3://lab/xsum"], positional=["cache", "other"])
def info(config: InfoConfig) -> Result:
    """Describe what a cache holds and who made it; of two caches, what each has that the other lacks."""
    from ketchup_cache.cache.inspect import compare, describe
    from ketchup_cache.sharing.remote_cache import open_cache

    cache = open_cache(config.cache)
    return describe(cache) if config.other is None else compare(cache, open_cache(config.other))
