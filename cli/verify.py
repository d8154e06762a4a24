from __future__ import annotations

from dataclasses import replace

from ketchup_cache.config.commands import VerifyConfig

from .app import Result, command


@command(
    examples=[
        "ketchup-cache verify cache",
        "ketchup-cache verify s3://lab/xsum --deep",
        "ketchup-cache verify cache --clean",
        "ketchup-cache verify cache --deep --set-aside",
    ],
    positional=["cache"],
)
def verify(config: VerifyConfig) -> Result:
    """Check every byte of a cache, on disk or at an address; exit code 2 if one is wrong."""
    from ketchup_cache.cache.inspect import clean, set_aside, verify
    from ketchup_cache.sharing.remote_cache import open_cache

    cache = open_cache(config.cache)
    report = verify(cache, deep=config.deep)
    if config.set_aside:
        set_aside(cache, report.damaged)
        report = replace(report, aside=report.damaged)
    if config.clean:
        deleted, kept = clean(cache, hours=config.older_than, dry_run=config.dry_run)
        report = replace(report, deleted=deleted, kept=kept)
    return report
