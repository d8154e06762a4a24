from __future__ import annotations

from ketchup_cache.config.commands import EnvConfig

from .app import Result, command


@command(examples=["ketchup-cache env", "ketchup-cache env --json"])
def env(config: EnvConfig) -> Result:
    """Print the versions and the machine: what the report of a bug needs."""
    from ketchup_cache.report.environment import environment

    return environment()
