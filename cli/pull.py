from __future__ import annotations

from ketchup_cache.config.commands import PullConfig

from .app import Result, command


@command(
    examples=["ketchup-cache pull s3://lab/xsum cache", "ketchup-cache pull /lab/xsum cache --dry-run"],
    positional=["url", "cache"],
)
def pull(config: PullConfig) -> Result:
    """Copy the segments that a cache lacks from another place. Every byte is checked on arrival."""
    from ketchup_cache.sharing.transfer import copy

    return copy(config.url, config.cache, dry_run=config.dry_run)
