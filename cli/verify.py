from __future__ import annotations

from ketchup_cache.config.commands import VerifyConfig

from .app import Result, command


@command(
    examples=[
        "ketchup-cache verify cache",
        "ketchup-cache verify s3://lab/xsum --deep",
        "ketchup-cache verify cache --clean --dry-run",
    ],
    positional=["cache"],
)
def verify(config: VerifyConfig) -> Result:
    """Check every byte of a cache, on disk or at an address; exit code 2 if one is wrong.

    With --clean, delete what crashes have left in a folder instead. Segments are never touched.
    """
    from ketchup_cache.cache.garbage import collect
    from ketchup_cache.cache.inspect import verify
    from ketchup_cache.errors import CacheError
    from ketchup_cache.sharing.remote_cache import open_cache
    from ketchup_cache.sharing.stores import is_url, open_remote

    if not config.clean:
        return verify(open_cache(config.cache), deep=config.deep)
    if is_url(str(config.cache)):
        where = open_remote(config.cache).url
        raise CacheError(f"{where}: --clean is for folders; the next push completes what a killed one left")
    return collect(open_cache(config.cache), hours=config.older_than, dry_run=config.dry_run)
