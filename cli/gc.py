from __future__ import annotations

from ketchup_cache.config import GcConfig

from .app import Result, command


@command(examples=["ketchup-cache gc cache --dry-run", "ketchup-cache gc cache --older-than 48"], positional=["cache"])
def gc(config: GcConfig) -> Result:
    """Delete what crashes have left in a cache; segments are never touched."""
    from ketchup_cache.store.cache import open_cache
    from ketchup_cache.store.garbage import collect

    return collect(open_cache(config.cache), hours=config.older_than, dry_run=config.dry_run)
