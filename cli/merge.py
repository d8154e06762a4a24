from __future__ import annotations

from ketchup_cache.config.commands import MergeConfig

from .app import Result, command


@command(examples=["ketchup-cache merge ana ben --into both"], positional=["a", "b"])
def merge(config: MergeConfig) -> Result:
    """Bring the segments of two caches together in one."""
    from ketchup_cache.sharing.transfer import merge as merge_caches

    return merge_caches([config.a, config.b], config.into, dry_run=config.dry_run)
