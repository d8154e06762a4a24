from __future__ import annotations

from ketchup_cache.config.commands import RolloutConfig

from .app import Result, command


@command(
    examples=[
        "# four samples per prompt from a student",
        "ketchup-cache rollout --student student/best --data train.jsonl --cache cache --samples 4",
        "",
        "# a teacher's greedy outputs are rollouts too",
        "ketchup-cache rollout --student teacher --greedy --data train.jsonl --cache sft",
        "",
        "# by a vLLM that serves the same weights",
        "ketchup-cache rollout --student student/best --data train.jsonl --cache cache \\",
        "    --student-url http://host:8000/v1 --student-name student",
        "",
        "# by workers on a Ray cluster, which may come and go",
        "ketchup-cache rollout --engine ray --student student/best --data train.jsonl --cache s3://lab/xsum",
    ]
)
def rollout(config: RolloutConfig) -> Result:
    """Sample completions from a policy into a cache."""
    from ketchup_cache.rollouts.rollout import rollout

    return rollout(config)
