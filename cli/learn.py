from __future__ import annotations

from ketchup_cache.config.commands import LearnConfig

from .app import Result, command


@command(
    examples=[
        "# offline, from what the cache holds; no teacher anywhere",
        "ketchup-cache learn --student student/best --cache cache --k 4 --epochs 2 --out run",
        "",
        "# on-policy: new rollouts every 8 steps, scored by the teacher",
        "ketchup-cache learn --student student/best --cache cache --k 4 --refresh-every 8 \\",
        "    --teacher google/flan-t5-xl --dtype bfloat16 --out run",
        "",
        "# the same, scored elsewhere by `score --follow --cache s3://lab/xsum --teacher google/flan-t5-xl`",
        "ketchup-cache learn --student student/best --cache cache --k 4 --refresh-every 8 \\",
        "    --scores-from s3://lab/xsum --out run",
        "",
        "# new rollouts by a vLLM that serves the student, and gets its weights at every refresh",
        "ketchup-cache learn --student student/best --cache cache --k 4 --refresh-every 16 \\",
        "    --teacher Qwen/Qwen3-32B --student-url http://127.0.0.1:8000/v1 --student-name student --out run",
    ]
)
def learn(config: LearnConfig) -> Result:
    """Train a student by K-step REINFORCE on cached scores.

    With a teacher, here or elsewhere, new rollouts of the student are sampled and scored every N optimizer steps.
    Killed and run again with the same options, it goes on from the last checkpoint to the same weights.
    """
    from ketchup_cache.training.learn import learn

    return learn(config)
