"""Rows of similar length together, in batches of bounded padded size."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

ENOUGH = 2048
"""Padded tokens of a batch that already keep the machine busy: from here on, padding is worth a batch of its own."""
WASTE = 1.15
"""Padded over real tokens that a batch of `ENOUGH` may have. At 256 rollouts of ordinary lengths the encoder reads 9 %
more than the prompts hold, and 28 % more with the budget alone (`benchmarks/micro_batches.py`)."""


def token_budget_batches(
    prompt_lengths: ArrayLike,
    completion_lengths: ArrayLike,
    budget: int,
    *,
    prompt_index: ArrayLike | None = None,
) -> list[NDArray[np.int64]]:
    """Every row once, in batches of similar lengths.

    A batch's padded size, rows × (longest prompt + longest completion), is at most `budget` tokens, unless it is a
    single row. A batch of at least `ENOUGH` tokens ends before a prompt that would make it mostly padding (`WASTE`).
    Rows of one prompt stand together, so that their encoder pass can be shared; they are separated only where they do
    not fit in one batch.

    prompt_lengths, completion_lengths: [B]. prompt_index: [B], equal for rows of the same prompt; without it, rows of
    equal prompt length count as the same. Returns row indices; the same input gives the same batches.
    """
    prompts = np.asarray(prompt_lengths, dtype=np.int64)
    completions = np.asarray(completion_lengths, dtype=np.int64)
    groups = prompts if prompt_index is None else np.asarray(prompt_index, dtype=np.int64)
    batches: list[NDArray[np.int64]] = []
    first = longest_prompt = longest_completion = real = 0
    order = np.lexsort((np.arange(len(prompts)), completions, groups, prompts))
    for place, row in enumerate(order):
        widest = (max(longest_prompt, prompts[row]), max(longest_completion, completions[row]))
        if place > first:
            padded = (place + 1 - first) * sum(widest)
            another = groups[row] != groups[order[place - 1]]
            enough = (place - first) * (longest_prompt + longest_completion) >= ENOUGH
            wasteful = padded > WASTE * (real + prompts[row] + completions[row])
            if padded > budget or (another and enough and wasteful):
                batches.append(order[first:place])
                first, widest, real = place, (prompts[row], completions[row]), 0
        real += prompts[row] + completions[row]
        longest_prompt, longest_completion = widest
    if len(order):
        batches.append(order[first:])
    return batches
