from __future__ import annotations

from ketchup_cache.config.caches import VerifyConfig

from .app import Result, command


@command(examples=["ketchup-cache verify cache", "ketchup-cache verify s3://lab/xsum --deep"], positional=["cache"])
def verify(config: VerifyConfig) -> Result:
    """Check every byte of a cache, on disk or at an address; exit code 2 if one is wrong."""
    from ketchup_cache.cache.inspect import verify
    from ketchup_cache.sharing.remote_cache import open_cache

    return verify(open_cache(config.cache), deep=config.deep)
