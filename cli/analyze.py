from __future__ import annotations

from contextlib import nullcontext

from ketchup_cache.config.commands import AnalyzeConfig
from ketchup_cache.files import holding

from .app import Result, command


@command(
    examples=[
        "ketchup-cache analyze --cache cache",
        "ketchup-cache analyze --cache cache --ks 1,2,4,8,16,32 --out figures",
        "ketchup-cache analyze --cache cache --gradient --student student/best",
    ]
)
def analyze(config: AnalyzeConfig) -> Result:
    """Variance and bias of the returns, from a cache alone (Figure 2), or of the policy gradient (--gradient)."""
    with holding(config.out) if config.out else nullcontext():
        if config.gradient:
            from ketchup_cache.report.gradient import gradient_report

            return gradient_report(config)
        from ketchup_cache.report.analyze import analyze

        return analyze(config)
