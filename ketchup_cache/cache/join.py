"""Scores joined with the rollouts and prompts they belong to."""

from __future__ import annotations

from collections.abc import Iterator

from ketchup_cache.cache.index import ScoredRef
from ketchup_cache.types import Prompts, Rollouts, Row, ScoredRollouts, Scores


def join(ref: ScoredRef, prompts: Prompts, rollouts: Rollouts, scores: Scores, first_row: int) -> ScoredRollouts:
    """The rows of one reference, cut out of whole segments. `scores` begins at row `first_row` of `rollouts`."""
    offsets, rows = rollouts.completions.offsets, slice(ref.row_start, ref.row_stop)
    tokens = slice(offsets[ref.row_start], offsets[ref.row_stop])
    cut = Rollouts(
        prompt_index=rollouts.prompt_index[rows],
        completions=rollouts.completions.slice(ref.row_start, ref.row_stop),
        behavior_logprob=rollouts.behavior_logprob[tokens],
        forced=rollouts.forced[tokens],
        finished=rollouts.finished[rows],
    )
    own_rows = slice(ref.row_start - first_row, ref.row_stop - first_row)
    own_tokens = slice(tokens.start - offsets[first_row], tokens.stop - offsets[first_row])
    per_token = {name: values[own_tokens] for name, values in scores.of_tokens().items()}
    return ScoredRollouts(prompts, cut, Scores(**per_token, final_max_q=scores.final_max_q[own_rows]))


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
