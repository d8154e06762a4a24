from __future__ import annotations

from typing import TYPE_CHECKING

from ketchup_cache.config.commands import LearnConfig

from .app import Result, command

if TYPE_CHECKING:
    from ketchup_cache.training.source import ScoreRollouts


@command(
    examples=[
        "# offline, from what the cache holds; no teacher anywhere",
        "ketchup-cache learn --student student/model --cache cache --k 4 --epochs 2 --out run",
        "",
        "# on-policy: new rollouts every 8 steps, scored by the teacher",
        "ketchup-cache learn --student student/model --cache cache --k 4 --refresh-every 8 \\",
        "    --teacher google/flan-t5-xl --dtype bfloat16 --out run",
        "",
        "# the same, scored elsewhere by `ketchup-cache score --watch s3://lab/xsum --teacher google/flan-t5-xl`",
        "ketchup-cache learn --student student/model --cache cache --k 4 --refresh-every 8 \\",
        "    --scorer s3://lab/xsum --out run",
    ]
)
def learn(config: LearnConfig) -> Result:
    """Train a student by K-step REINFORCE on cached scores.

    With a teacher, here or elsewhere, new rollouts of the student are sampled and scored every N optimizer steps.
    Killed and run again with the same options, it goes on from the last checkpoint to the same weights.
    """
    from ketchup_cache.training.learn import learn

    if config.scorer is not None:
        from ketchup_cache.training.waiting import WaitForScores

        return learn(config, WaitForScores(config))
    return learn(config, _scorer(config) if config.teacher else None)


def _scorer(config: LearnConfig) -> ScoreRollouts:
    """The teacher enters here and nowhere else, so that offline learning never imports it."""
    from ketchup_cache.scoring.score import Scorer

    assert config.teacher is not None
    scorer = Scorer(config, config.teacher)

    def score_rollouts(cache, rollout_ids):  # type: ignore[no-untyped-def]
        scorer.ensure(cache, rollout_ids)
        return scorer.info.fingerprint

    return score_rollouts
