"""Scores joined with the rollouts and prompts they belong to."""

from __future__ import annotations

from collections.abc import Iterator

from ketchup_cache.cache.index import ScoredRef
from ketchup_cache.types import Prompts, Rollouts, Row, ScoredRollouts, Scores


def join(ref: ScoredRef, prompts: Prompts, rollouts: Rollouts, scores: Scores, first_row: int) -> ScoredRollouts:
    """The rows of one reference, cut out of whole segments. `scores` begins at row `first_row` of `rollouts`."""
    own = rollouts.completions.slice(first_row, first_row + len(scores.final_max_q))
    cut = scores.rows(own, ref.row_start - first_row, ref.row_stop - first_row)
    return ScoredRollouts(prompts, rollouts.rows(ref.row_start, ref.row_stop), cut)


def rows_of(scored: ScoredRollouts, ref: ScoredRef) -> Iterator[Row]:
    """One `Row` per rollout. Its arrays are views."""
    prompts, rollouts, scores = scored.prompts, scored.rollouts, scored.scores
    offsets = rollouts.completions.offsets
    for row, prompt in enumerate(rollouts.prompt_index):
        tokens = slice(offsets[row], offsets[row + 1])
        yield Row(
            prompt_id=prompts.ids[prompt].tobytes().hex(),
            prompt_tokens=prompts.tokens[prompt],
            completion_tokens=rollouts.completions[row],
            behavior_logprob=rollouts.behavior_logprob[tokens],
            forced=rollouts.forced[tokens],
            finished=bool(rollouts.finished[row]),
            q=scores.q[tokens],
            max_q=scores.max_q[tokens],
            logsumexp=scores.logsumexp[tokens],
            mean_q=scores.mean_q[tokens],
            final_max_q=float(scores.final_max_q[row]),
            policy=ref.policy.name,
            teacher=ref.teacher.name,
        )
