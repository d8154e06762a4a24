from __future__ import annotations

from ketchup_cache.config.commands import AnalyzeConfig

from .app import Result, command


@command(
    examples=[
        "ketchup-cache analyze --cache cache",
        "ketchup-cache analyze --cache cache --ks 1,2,4,8,16,32 --out figures",
    ]
)
def analyze(config: AnalyzeConfig) -> Result:
    """Variance and bias against K, from a cache alone (Figure 2)."""
    from ketchup_cache.report.analyze import analyze

    return analyze(config)
