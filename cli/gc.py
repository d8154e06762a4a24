from __future__ import annotations

from ketchup_cache.config.caches import GcConfig

from .app import Result, command


@command(examples=["ketchup-cache gc cache --dry-run", "ketchup-cache gc cache --older-than 48"], positional=["cache"])
def gc(config: GcConfig) -> Result:
    """Delete what crashes have left in a cache; segments are never touched."""
    from ketchup_cache.cache.cache import open_cache
    from ketchup_cache.cache.garbage import collect
    from ketchup_cache.errors import CacheError
    from ketchup_cache.sharing.stores import is_url, open_remote

    if is_url(str(config.cache)):
        where = open_remote(config.cache).url
        raise CacheError(f"{where}: gc tidies folders; data of a push that was killed is completed by the next push")
    return collect(open_cache(config.cache), hours=config.older_than, dry_run=config.dry_run)
