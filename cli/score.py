from __future__ import annotations

from ketchup_cache.config.commands import ScoreConfig

from .app import Result, command


@command(
    examples=[
        "ketchup-cache score --teacher google/flan-t5-xl --dtype bfloat16 --cache cache",
        "ketchup-cache score --teacher teacher/best --cache cache --json",
        "",
        "# a teacher behind a vLLM, and whatever else answers as it does",
        "ketchup-cache score --teacher-url http://host:8000/v1 --teacher-name Qwen/Qwen3-32B --cache cache",
        "",
        "# the teacher stays loaded and scores what anybody's `learn --scores-from` puts there",
        "ketchup-cache score --follow --teacher google/flan-t5-xl --dtype bfloat16 --cache s3://lab/xsum",
    ]
)
def score(config: ScoreConfig) -> Result:
    """Run the frozen teacher over all rollouts not scored yet; with --follow, over those that appear later too."""
    from ketchup_cache.scoring.score import score

    return score(config)
