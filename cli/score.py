from __future__ import annotations

from ketchup_cache.config.commands import ScoreConfig

from .app import Result, command


@command(
    examples=[
        "ketchup-cache score --teacher google/flan-t5-xl --dtype bfloat16 --cache cache",
        "ketchup-cache score --teacher teacher/model --cache cache --json",
        "",
        "# a lab teacher: stays loaded and scores what anybody's `learn --scorer` puts there",
        "ketchup-cache score --teacher google/flan-t5-xl --dtype bfloat16 --watch s3://lab/xsum",
    ]
)
def score(config: ScoreConfig) -> Result:
    """Run the frozen teacher over all rollouts not scored yet.

    With --watch it stays loaded and scores what appears, until Ctrl-C. Several of them share the work, and take over
    that of one that died.
    """
    from ketchup_cache.scoring.score import Scorer, score

    if config.watch is not None:
        from ketchup_cache.scoring.watch import watch

        return watch(config, Scorer(config, config.teacher, commit_tokens=config.commit_tokens))
    return score(config)
