from __future__ import annotations

from ketchup_cache.config import ScoreConfig

from .app import Result, command


@command(
    examples=[
        "ketchup-cache score --teacher google/flan-t5-xl --dtype bfloat16 --cache cache",
        "ketchup-cache score --teacher teacher/model --cache cache --json",
    ]
)
def score(config: ScoreConfig) -> Result:
    """Run the frozen teacher over all rollouts not scored yet."""
    from ketchup_cache.score import score

    return score(config)
