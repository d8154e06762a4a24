"""The optimizer step of KETCHUP and LLMR: K-step returns, baseline, importance ratios, policy gradient."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ketchup_cache.config.options import LossOptions
from ketchup_cache.errors import CacheError, NumericsError
from ketchup_cache.method.baselines import leave_one_out_baseline, mean_baseline, min_variance_baseline
from ketchup_cache.method.losses import Staleness, importance_ratio, policy_gradient_loss, squared_score
from ketchup_cache.method.returns import rollout_returns
from ketchup_cache.training.metrics import Signal, StepMetrics
from ketchup_cache.training.optimizer import Learner, all_rows
from ketchup_cache.types import ScoredRollouts

CHUNK = 1024
"""States whose logits are held at once."""


def learning_signal(batch: ScoredRollouts, options: LossOptions, weight: NDArray | None = None) -> Signal:
    """K-step returns, clipping and baseline of a whole optimizer-step batch.

    weight: [N] squared norms of the score (`score_weights`), for the min-variance baseline alone.
    """
    rollouts = batch.rollouts
    lengths = rollouts.completions.lengths
    estimate, one_step = rollout_returns(rollouts, batch.scores, (options.k, 1), **options.of_returns)
    kept = (rollouts.finished | (options.unfinished != "drop")) & (lengths > 0)
    forced = rollouts.completions.with_values(rollouts.forced).padded()
    inside = np.arange(forced.shape[1]) < lengths[:, None]
    real = inside & kept[:, None] & ~forced
    clipped = np.clip(estimate, -options.clip_return, options.clip_return)
    if options.baseline == "mean":
        clipped = clipped - mean_baseline(clipped, real)
    elif options.baseline == "min-variance":
        assert weight is not None
        padded = rollouts.completions.with_values(weight).padded()
        clipped = clipped - min_variance_baseline(clipped, real, padded)
    elif options.baseline == "leave-one-out":
        clipped = clipped - leave_one_out_baseline(clipped, real, rollouts.prompt_index)
    return Signal(clipped[inside].astype(np.float32), real[inside], kept, estimate[:, 0], one_step[:, 0])


def policy_gradient_step(learner: Learner[LossOptions], batch: ScoredRollouts, step: int) -> StepMetrics:
    """Accumulate the gradient of one batch over token-budget micro-batches and apply it.

    The loss is normalised by the action tokens of the whole batch, so the gradient does not depend on
    `micro_batch_tokens`. A batch with nothing in the loss (all dropped) changes nothing.

    Raises CacheError where the very first batch is dropped whole, NumericsError for a return, loss or gradient that
    is not finite; the weights are then as before.
    """
    rollouts, options = batch.rollouts, learner.options
    weight = score_weights(learner, batch) if options.baseline == "min-variance" else None
    signal = learning_signal(batch, options, weight)
    if not np.isfinite(signal.advantage[signal.in_loss]).all():
        raise NumericsError(f"step {step}: a return is not finite; check the cache with `ketchup-cache verify`")
    total = int(signal.in_loss.sum())
    if total == 0 and step == 0:
        raise CacheError(
            f"all {len(rollouts)} rollouts of the first step were cut at the length limit, and dropped: "
            "raise --max-new-tokens, pre-distil the student for longer, or use --unfinished bootstrap"
        )
    staleness = Staleness()

    def loss(places: NDArray, states: Tensor, targets: Tensor) -> Tensor:
        in_loss = torch.from_numpy(signal.in_loss[places]).to(states.device)
        logprob = learner.head.log_prob(states[in_loss], targets[in_loss])
        behavior = torch.from_numpy(rollouts.behavior_logprob[places]).to(logprob.device)[in_loss]
        advantage = torch.from_numpy(signal.advantage[places]).to(logprob.device)[in_loss]
        staleness.add(logprob, behavior)
        ratio = importance_ratio(logprob, behavior, options.max_ratio) if options.importance else None
        return policy_gradient_loss(logprob, advantage, ratio, total)

    loss_sum = learner.accumulate(all_rows(batch), np.flatnonzero(signal.kept), loss, step)
    norm, lr = learner.optimizer.step(step) if total else 0.0, learner.optimizer.lr(step)
    lengths = rollouts.completions.lengths
    tail = float(np.minimum(lengths, options.k).sum() / max(1, lengths.sum()))
    return StepMetrics.of(batch, signal, staleness, step=step, loss=loss_sum, grad_norm=norm, lr=lr, tail=tail)


@torch.no_grad()
def reweighted_return(learner: Learner[LossOptions], batch: ScoredRollouts) -> tuple[float, float]:
    """Mean G_1 of the policy as it is, from rollouts of another: self-normalised importance sampling over whole
    rollouts, w = Π_t π(a_t)/μ(a_t), Σ w G_1 / Σ w. Returns it, and the effective sample size (Σw)² / (B Σw²), a share.

    The product of many ratios varies much more than one: without a high share the mean says nothing.
    """
    rollouts, options = batch.rollouts, learner.options
    (one_step,) = rollout_returns(rollouts, batch.scores, (1,), **options.of_returns)
    kept = np.flatnonzero((rollouts.finished | (options.unfinished != "drop")) & (rollouts.completions.lengths > 0))
    log_ratio = np.zeros(len(rollouts.completions.values))
    for places, part in learner.micro_batches(all_rows(batch), kept):
        logprob = learner.head.log_prob(*learner.inputs(part)).double().cpu().numpy()
        log_ratio[places] = np.where(rollouts.forced[places], 0.0, logprob - rollouts.behavior_logprob[places])
    row = np.repeat(np.arange(len(rollouts)), rollouts.completions.lengths)
    log_weight = np.bincount(row, log_ratio, len(rollouts))[kept]
    weight = np.exp(log_weight - log_weight.max(initial=-np.inf))
    ess = weight.sum() ** 2 / max(len(rollouts) * (weight * weight).sum(), 1e-300)
    return float((weight * one_step[kept, 0]).sum() / max(weight.sum(), 1e-300)), float(ess)


@torch.no_grad()
def score_weights(learner: Learner[LossOptions], batch: ScoredRollouts) -> NDArray[np.float32]:
    """`squared_score` of every token of a batch under the policy as it is, [N]: one forward pass without gradient."""
    completions, head = batch.rollouts.completions, learner.head
    weight = np.zeros(len(completions.values), np.float32)
    for places, part in learner.micro_batches(all_rows(batch), np.flatnonzero(completions.lengths > 0)):
        pieces = zip(*(values.split(CHUNK) for values in learner.inputs(part)), strict=True)
        found = torch.cat([squared_score(head.logits(states), targets) for states, targets in pieces])
        weight[places] = found.cpu().numpy()
    return weight
