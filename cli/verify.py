from __future__ import annotations

from ketchup_cache.config import VerifyConfig

from .app import Result, command


@command(examples=["ketchup-cache verify cache"], positional=["cache"])
def verify(config: VerifyConfig) -> Result:
    """Check every byte of a cache; exit code 2 if one is wrong."""
    from ketchup_cache.store.cache import open_cache
    from ketchup_cache.store.inspect import verify

    return verify(open_cache(config.cache))
