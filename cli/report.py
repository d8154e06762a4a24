from __future__ import annotations

from ketchup_cache.config.commands import ReportConfig

from .app import Result, command


@command(
    examples=["ketchup-cache report run --out run.html", "ketchup-cache report k1 k4 k8 --out runs.html"],
    positional=["runs"],
)
def report(config: ReportConfig) -> Result:
    """Write one HTML file of one run or several: curves, options, times, outputs, and every token's credit."""
    from ketchup_cache.report.page import report

    return report(config)
