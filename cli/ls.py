from __future__ import annotations

from ketchup_cache.config.caches import LsConfig

from .app import Result, command


@command(examples=["ketchup-cache ls cache", "ketchup-cache ls s3://lab/xsum --json"], positional=["cache"])
def ls(config: LsConfig) -> Result:
    """List the segments of a cache, one a line."""
    from ketchup_cache.cache.listing import listing
    from ketchup_cache.sharing.remote_cache import open_cache

    return listing(open_cache(config.cache))
