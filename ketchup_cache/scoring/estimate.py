"""`score --estimate`: what scoring would take, from a few rows that the teacher reads."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ketchup_cache.cache import rules, zarr_files
from ketchup_cache.config.commands import ScoreConfig
from ketchup_cache.console import Report, size_text
from ketchup_cache.parallel.group import alone
from ketchup_cache.scoring.score import load_with_prompts, opened
from ketchup_cache.types import Ragged, Rollouts, Scores

PLACES, ROWS, LEAST_S = 4, 32, 2.0
"""Segments that the timed rows are of; their first number, which is doubled until they take so many seconds: a batch
that is not full does not tell the rate of full ones."""


@dataclass(frozen=True)
class Estimate(Report):
    """What `score` would do in one process. Counted: rows, their completion tokens, their prompts' tokens (once in each
    segment). Extrapolated from timed_rows: seconds, without loading, and bytes."""

    teacher: str
    rows: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    segments: int = 0
    bytes: int = 0
    seconds: float = 0.0
    timed_rows: int = 0

    def __str__(self) -> str:
        if not self.rows:
            return f"nothing to do: all rollouts are scored by teacher {self.teacher}"
        return (
            f"{self.rows:,} rollouts wait for teacher {self.teacher}: {self.tokens:,} completion tokens, "
            f"{self.prompt_tokens:,} prompt tokens; about {self.seconds:,.0f} s beside loading, "
            f"and {size_text(self.bytes)} in {self.segments:,} segments (judged by {self.timed_rows:,} rollouts)"
        )


def estimate(config: ScoreConfig) -> Estimate:
    """Nothing is committed. Raises what `score` raises before its first commit."""
    cache, scorer = opened(config)
    if not (parts := list(scorer.parts(cache, scorer.unscored(cache)))):
        return Estimate(str(scorer))

    def of(rollouts_id: str, rows: range) -> tuple[Ragged, Rollouts, NDArray[np.int64]]:
        """Prompts, rollouts, and their rows, tokens and prompt tokens."""
        rollouts, prompts = load_with_prompts(cache, rollouts_id)
        some = rollouts.rows(rows.start, rows.stop)
        counts = len(some), len(some.completions.values), prompts.lengths[np.unique(some.prompt_index)].sum()
        return prompts, some, np.array(counts)

    def stored(scores: Scores) -> int:
        info = scorer.described(parts[0][0], 0, len(scores.final_max_q))
        return len(zarr_files.pack(zarr_files.encode(rules.pack(scores, info))))

    counts, chosen = np.sum([of(*part)[2] for part in parts], axis=0), parts[:: -(-len(parts) // PLACES)]
    timed_s, count = 0.0, 1
    with alone():
        scorer.stay()
        # at first a row of each, which sets libraries up
        while count == 1 or (timed_s < LEAST_S and count < 2 * max(len(part) for _, part in chosen)):
            timed_s, timed, samples = 0.0, np.zeros(3, np.int64), []
            for rollouts_id, part in chosen:
                prompts, some, these = of(rollouts_id, part[:count])
                began = time.monotonic()
                samples.append((scorer.scores(prompts, some, scorer.keep_top), some.completions))
                timed_s, timed = timed_s + time.monotonic() - began, timed + these
            count = max(2 * count, ROWS // len(chosen))
    many, completions = max(samples, key=lambda sample: len(sample[0].q))
    one = many.rows(completions, 0, 1)
    each = (stored(many) - stored(one)) / max(len(many.q) - len(one.q), 1)
    size = (stored(one) - each * len(one.q)) * len(parts) + each * counts[1]
    seconds = timed_s * counts[1:].sum() / max(timed[1:].sum(), 1)
    rows, tokens, prompt_tokens = counts.tolist()
    counted = rows, tokens, prompt_tokens, len(parts), round(size)
    return Estimate(str(scorer), *counted, float(seconds), int(timed[0]))
