"""Rows of similar length together, in batches of bounded size (`Batch.size` in `models/forward.py`)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

ENOUGH = 2048
"""Padded tokens of a batch that already keep the machine busy: from here on, padding is worth a batch of its own."""
WASTE = 1.15
"""Padded over real tokens that a batch of `ENOUGH` may have. At 256 rollouts of ordinary lengths the encoder reads 9 %
more than the prompts hold, and 28 % more with the budget alone (`benchmarks/micro_batches.py`)."""


def token_budget_batches(
    prompts: ArrayLike, completions: ArrayLike, limit: int, *, prompt_index: ArrayLike | None = None, once: bool = False
) -> list[NDArray[np.int64]]:
    """Every row once, in batches of similar lengths, each of at most `limit` tokens, or of a single row.

    Where rows are padded, a batch of at least `ENOUGH` tokens ends before a prompt that would make it mostly padding
    (`WASTE`). Rows of one prompt stand together, so that its encoder pass can be shared; they are separated only where
    they do not fit in one batch.

    prompts, completions: [B] lengths. prompt_index: [B], equal for rows of the same prompt; without it, rows of equal
    prompt length count as the same. once: as in `Batch.size`. Returns row indices; the same input gives the same
    batches.
    """
    prompts, completions = np.asarray(prompts, dtype=np.int64), np.asarray(completions, dtype=np.int64)
    groups = prompts if prompt_index is None else np.asarray(prompt_index, dtype=np.int64)
    batches: list[NDArray[np.int64]] = []
    first = longest_prompt = longest_completion = real = tokens = 0
    order = np.lexsort((np.arange(len(prompts)), completions, groups, prompts))
    for place, row in enumerate(order):
        another = place == 0 or groups[row] != groups[order[place - 1]]
        widest = (max(longest_prompt, prompts[row]), max(longest_completion, completions[row]))
        added = completions[row] + prompts[row] * another
        if place > first:
            padded = (place + 1 - first) * sum(widest)
            enough = (place - first) * (longest_prompt + longest_completion) >= ENOUGH
            wasteful = padded > WASTE * (real + prompts[row] + completions[row])
            full = tokens + added > limit if once else padded > limit or (another and enough and wasteful)
            if full:
                batches.append(order[first:place])
                first, widest, real, tokens = place, (prompts[row], completions[row]), 0, 0
                added = completions[row] + prompts[row]
        real += prompts[row] + completions[row]
        tokens += added
        longest_prompt, longest_completion = widest
    if len(order):
        batches.append(order[first:])
    return batches
