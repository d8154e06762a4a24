from __future__ import annotations

from ketchup_cache.config.commands import PushConfig

from .app import Result, command


@command(
    examples=[
        "ketchup-cache push cache s3://lab/xsum",
        "ketchup-cache push cache hf://datasets/lab/xsum --license cc-by-4.0",
        "ketchup-cache push run/best hf://lab/student      # a trained model and its card",
    ],
    positional=["cache", "url"],
)
def push(config: PushConfig) -> Result:
    """Copy the segments that another place lacks to it. Interrupted and run again, it goes on.

    The folder of a trained model goes to a model repository of the Hub, with its card.
    """
    if config.of_a_model:
        from ketchup_cache.sharing.hub_model import push_model

        return push_model(str(config.cache), config.url, dry_run=config.dry_run)
    from ketchup_cache.sharing.transfer import copy

    return copy(config.cache, config.url, dry_run=config.dry_run, license_id=config.license)
