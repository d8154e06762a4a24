"""What `learn` reports for each optimizer step: one line of metrics.jsonl (schemas/metrics.schema.json)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from ketchup_cache.method.losses import Staleness
from ketchup_cache.types import Ragged, ScoredRollouts


@dataclass(frozen=True)
class Signal:
    """Returns, advantages and masks of one batch, from the cache alone, before the student's forward pass. B rollouts,
    N tokens, rows end to end.

    advantage: [N] float32, clipped K-step returns minus baseline. in_loss: [N] bool, action tokens of rollouts that
    are not dropped. kept: [B] bool. first_return: [B] float64, Ĝ_1 before clipping; one_step: [B] float64, G_1. reward:
    [B] float64, R, without which there is none.
    """

    advantage: NDArray[np.float32]
    in_loss: NDArray[np.bool_]
    kept: NDArray[np.bool_]
    first_return: NDArray[np.float64]
    one_step: NDArray[np.float64]
    reward: NDArray[np.float64] | None = None


class StepMetrics(BaseModel):
    """One optimizer step. Returns are in the run's normalisation; means are over the rollouts that are not dropped.
    A figure that can't be had (no rollout was kept) is null."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    step: int = Field(ge=0)
    """Counted from 0."""
    return_mean: float | None
    """Mean of G_1, the one-step return of whole rollouts (Eq. 10): what learning is meant to raise."""
    return_sd: float | None
    """Standard deviation of G_1 over the rollouts."""
    k_return_mean: float | None
    """Mean of Ĝ_1, the K-step return that the gradient uses."""
    k_return_sd: float | None
    """Standard deviation of Ĝ_1 over the rollouts."""
    reward_mean: float | None = None
    """Mean of the task reward R (--reward), without its weight."""
    advantage_sd: float | None
    """Standard deviation of the advantages over action tokens, after clipping and baseline."""
    length_mean: float
    """Tokens per rollout, dropped ones included. A student that stops ever earlier hacks the reward."""
    unfinished: float = Field(ge=0, le=1)
    """Share of rollouts cut at the length limit."""
    dropped: float = Field(ge=0, le=1)
    """Share of rollouts left out of the loss."""
    teacher_kl: float | None
    """Mean of log μ(a_t) − log p_teacher(a_t), nats per token: an estimate of KL(μ‖teacher) from plain samples."""
    ratio_mean: float | None
    """Mean importance ratio π/μ before truncation. 1 on-policy."""
    ess: float | None
    """Effective sample size of the ratios, as a share. 1 on-policy."""
    behavior_kl: float | None
    """Estimate of KL(μ‖π), nats per token: how stale the rollouts are. 0 on-policy."""
    entropy: float | None = None
    """Estimate of the policy's entropy, nats per token: mean of −log π(a_t) over the tokens drawn, weighted by the
    importance ratios."""
    repetition: float = Field(default=0.0, ge=0, le=1)
    """Share of 4-grams that came before in the same rollout."""
    tail: float = Field(default=0.0, ge=0, le=1)
    """Share of tokens among the last K of their rollout."""
    loss: float
    grad_norm: float
    """Before clipping."""
    lr: float
    action_tokens: int = Field(ge=0)
    """Tokens in the loss."""
    refreshed: bool = False
    """Whether new rollouts were sampled just before this step."""
    sample_s: float = Field(default=0.0, ge=0)
    """Wall time of sampling new rollouts before this step."""
    engine_s: float = Field(default=0.0, ge=0)
    """Part of sample_s: wall time of giving the engine (--student-url) the student's weights."""
    score_s: float = Field(default=0.0, ge=0)
    """Wall time of scoring them, without reading the teacher's weights; with --scores-from, of waiting."""
    load_s: float = Field(default=0.0, ge=0)
    """Wall time of reading the teacher's weights for it."""
    train_s: float = Field(default=0.0, ge=0)
    """Wall time of the optimizer step itself."""
    alarms: tuple[str, ...] = ()
    """Names of the alarms that were raised after this step (training/alarms.py)."""

    @classmethod
    def of(cls, batch: ScoredRollouts, signal: Signal, staleness: Staleness, **given: Any) -> StepMetrics:
        """given: the figures that do not follow from these three, and those that replace what follows from them."""
        rollouts, kept = batch.rollouts, signal.kept
        figures: dict[str, Any] = {"advantage_sd": _mean_sd(signal.advantage[signal.in_loss])[1]}
        figures["return_mean"], figures["return_sd"] = _mean_sd(signal.one_step[kept])
        figures["k_return_mean"], figures["k_return_sd"] = _mean_sd(signal.first_return[kept])
        figures["reward_mean"] = None if signal.reward is None else _mean_sd(signal.reward[kept])[0]
        figures["ratio_mean"], figures["ess"], figures["behavior_kl"] = staleness.ratio, staleness.ess, staleness.kl
        figures["length_mean"] = float(rollouts.completions.lengths.mean())
        figures["unfinished"], figures["dropped"] = float(1 - rollouts.finished.mean()), float(1 - kept.mean())
        figures["teacher_kl"] = teacher_kl(batch, ~rollouts.forced)
        figures["entropy"], figures["repetition"] = staleness.entropy, repetition(rollouts.completions)
        figures["action_tokens"] = int(signal.in_loss.sum())
        return cls(**figures | given)


def teacher_kl(batch: ScoredRollouts, tokens: NDArray[np.bool_]) -> float | None:
    """`StepMetrics.teacher_kl` over some tokens, [N] bool; None where there are none."""
    kl = batch.rollouts.behavior_logprob - (batch.scores.q - batch.scores.logsumexp)
    return float(kl[tokens].mean(dtype=np.float64)) if tokens.any() else None


def repetition(completions: Ragged, n: int = 4) -> float:
    """Share of the n-grams of token ids that came before in the same completion; 0 where there are none."""
    if len(completions.values) < n:
        return 0.0
    row = np.repeat(np.arange(len(completions)), completions.lengths)
    windows = np.lib.stride_tricks.sliding_window_view(completions.values, n)
    grams = np.column_stack([row[: len(windows)], windows])[row[: len(windows)] == row[n - 1 :]]
    # as strings of bytes: ten times faster than np.unique by rows
    kinds = np.unique(np.ascontiguousarray(grams, np.int64).view(f"V{8 * (n + 1)}")) if len(grams) else grams
    return 1 - len(kinds) / max(len(grams), 1) if len(grams) else 0.0


def _mean_sd(values: NDArray) -> tuple[float | None, float | None]:
    """None for what can't be had or is not finite."""
    if not len(values):
        return None, None
    mean, sd = float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64))
    return mean if math.isfinite(mean) else None, sd if math.isfinite(sd) else None
