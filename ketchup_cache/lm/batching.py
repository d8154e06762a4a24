"""Rows of similar length together, in batches of bounded padded size."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def token_budget_batches(
    prompt_lengths: ArrayLike,
    completion_lengths: ArrayLike,
    budget: int,
    *,
    prompt_index: ArrayLike | None = None,
) -> list[NDArray[np.int64]]:
    """Every row once, in batches of similar lengths.

    A batch's padded size, rows × (longest prompt + longest completion), is at most `budget` tokens, unless it is a
    single row. Rows of one prompt stand together, so that their encoder pass can be shared; they are
    separated only where they do not fit in one batch.

    prompt_lengths, completion_lengths: [B]. prompt_index: [B], equal for rows of the same prompt; without it, rows of
    equal prompt length count as the same. Returns row indices; the same input gives the same batches.
    """
    prompts = np.asarray(prompt_lengths, dtype=np.int64)
    completions = np.asarray(completion_lengths, dtype=np.int64)
    groups = prompts if prompt_index is None else np.asarray(prompt_index, dtype=np.int64)
    batches: list[NDArray[np.int64]] = []
    first = longest_prompt = longest_completion = 0
    order = np.lexsort((np.arange(len(prompts)), completions, groups, prompts))
    for place, row in enumerate(order):
        widest = (max(longest_prompt, prompts[row]), max(longest_completion, completions[row]))
        if place > first and (place + 1 - first) * sum(widest) > budget:
            batches.append(order[first:place])
            first, widest = place, (prompts[row], completions[row])
        longest_prompt, longest_completion = widest
    if len(order):
        batches.append(order[first:])
    return batches
