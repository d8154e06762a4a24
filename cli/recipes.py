from __future__ import annotations

from ketchup_cache.config.commands import RecipesConfig

from .app import Result, command


@command(
    examples=["ketchup-cache recipes", "ketchup-cache recipes gsm8k", "ketchup-cache recipes xsum-qwen --json"],
    positional=["name"],
)
def recipes(config: RecipesConfig) -> Result:
    """List the published settings that --recipe takes, or print one with the commands to run."""
    from ketchup_cache.config.catalogue import catalogue, one_recipe

    return catalogue() if config.name is None else one_recipe(config.name)
