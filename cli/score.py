from __future__ import annotations

from ketchup_cache.config.commands import ScoreConfig

from .app import Result, command


@command(
    examples=[
        "ketchup-cache score --teacher google/flan-t5-xl --dtype bfloat16 --cache cache",
        "ketchup-cache score --teacher teacher/best --cache cache --json",
        "ketchup-cache score --teacher google/flan-t5-xl --cache cache --estimate",
        "",
        "# a teacher behind a vLLM, and whatever else answers as it does",
        "ketchup-cache score --teacher-url http://host:8000/v1 --teacher-name Qwen/Qwen3-32B --cache cache",
        "",
        "# the teacher stays loaded and scores what anybody's `learn --scores-from` puts there",
        "ketchup-cache score --follow --teacher google/flan-t5-xl --dtype bfloat16 --cache s3://lab/xsum",
        "",
        "# by workers on a Ray cluster, which may come and go",
        "ketchup-cache score --engine ray --ray-address head:6379 --teacher google/flan-t5-xl --cache s3://lab/xsum",
    ]
)
def score(config: ScoreConfig) -> Result:
    """Run the frozen teacher over all rollouts not scored yet; with --follow, over those that appear later too."""
    from ketchup_cache.scoring.estimate import estimate
    from ketchup_cache.scoring.score import score

    return estimate(config) if config.estimate else score(config)
