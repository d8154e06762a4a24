"""Several teachers as one. Pure functions of NumPy arrays.

Every K-step return is a sum of q, max_q, logsumexp, mean_q and final_max_q with fixed factors: so the weighted sum of
the teachers' returns is the return of the weighted sums of their scores, whatever K, weights, tail, normalization and
`unfinished` are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ketchup_cache.types import PER_TOKEN, Ragged, Scores, TopLogits


def weighted_scores(parts: Sequence[Scores], weights: NDArray[np.float64], completions: Ragged, vocab: int) -> Scores:
    """The scores whose returns are Σ_i w_i Ĝ_i, of the same completions by each teacher.

    weights: [teachers, B], of each row, 0 or more. vocab: tokens of the vocabulary. Where all keep them, the largest
    logits become those of the mixture Σ_i w_i p_i / Σ_i w_i (`mixture_top`), not of the weighted sums.
    """
    of_tokens = np.repeat(weights, completions.lengths, axis=1)
    summed = {name: _sum([getattr(part, name) for part in parts], of_tokens) for name in PER_TOKEN}
    top = mixture_top([part.top for part in parts if part.top], of_tokens, vocab) if parts[0].keep_top else None
    return Scores(**summed, final_max_q=_sum([part.final_max_q for part in parts], weights), top=top)


def mixture_top(parts: Sequence[TopLogits], weights: NDArray[np.float64], vocab: int) -> TopLogits:
    """The largest log-probabilities of Σ_i w_i p_i / Σ_i w_i, as many as each teacher keeps.

    weights: [teachers, N], of each state, not all 0. A token that a teacher does not keep has an even part of what that
    teacher gives to all such tokens: exact where all of the vocabulary is kept, else wrong by less than that rest.
    """
    ids = np.concatenate([part.ids for part in parts], axis=1)
    mass = np.zeros(ids.shape)
    for part, weight in zip(parts, weights / weights.sum(0), strict=True):
        n = part.q.shape[1]
        total = np.logaddexp(np.logaddexp.reduce(part.q.astype(np.float64), axis=1), part.rest_logsumexp)
        order = np.argsort(part.ids, axis=1)
        own = np.take_along_axis(part.ids, order, 1)
        # rows apart in one sorted array
        row = np.arange(len(ids), dtype=np.int64)[:, None] * vocab
        place = np.minimum(np.searchsorted((own + row).ravel(), ids + row), own.size - 1)
        kept = (own + row).ravel()[place] == ids + row
        prob = np.exp(np.take_along_axis(part.q.astype(np.float64), order, 1) - total[:, None])
        rest = np.exp(part.rest_logsumexp.astype(np.float64) - total) / max(vocab - n, 1)
        mass += weight[:, None] * np.where(kept, prob.ravel()[place], rest[:, None])
    order = np.argsort(ids, axis=1, kind="stable")  # of a token that several keep, one
    again = np.zeros(ids.shape, np.bool_)
    sorted_ids = np.take_along_axis(ids, order, 1)
    np.put_along_axis(again, order[:, 1:], sorted_ids[:, 1:] == sorted_ids[:, :-1], 1)
    largest = np.argsort(np.where(again, 1.0, -mass), axis=1, kind="stable")[:, : parts[0].q.shape[1]]
    chosen = np.take_along_axis(mass, largest, 1)
    with np.errstate(divide="ignore"):
        rest_logsumexp = (
            np.log(np.maximum(1 - chosen.sum(1), 0)) if largest.shape[1] < vocab else np.full(len(ids), -np.inf)
        )
        return TopLogits(
            np.log(chosen).astype(np.float32), np.take_along_axis(ids, largest, 1), rest_logsumexp.astype(np.float32)
        )


def _sum(values: Sequence[NDArray], weights: NDArray[np.float64]) -> NDArray[np.float32]:
    return sum(weight * value for weight, value in zip(weights, values, strict=True)).astype(np.float32)
