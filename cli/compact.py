from __future__ import annotations

from ketchup_cache.config.caches import CompactConfig

from .app import Result, command


@command(
    examples=[
        "ketchup-cache compact cache --into small",
        "ketchup-cache compact cache --into merged --storage lossless",
    ],
    positional=["cache"],
)
def compact(config: CompactConfig) -> Result:
    """Rewrite a cache in float16, or in fewer segments, into another one."""
    from ketchup_cache.sharing.compact import compact

    return compact(config)
