from __future__ import annotations

from ketchup_cache.config.commands import DemoConfig
from ketchup_cache.files import holding

from .app import Result, command, main


@command(examples=["ketchup-cache demo", "ketchup-cache demo --out /tmp/demo"])
def demo(config: DemoConfig) -> Result:
    """Distil a shipped teacher into a small student, from start to end."""
    from ketchup_cache.report.demo import demo

    with holding(config.out):
        return demo(config, main)
