"""One optimizer step: returns, baseline, importance ratios, and the policy gradient over micro-batches."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from ketchup_cache.config.commands import LearnConfig
from ketchup_cache.errors import CacheError, NumericsError
from ketchup_cache.method.baselines import leave_one_out_baseline, mean_baseline, min_variance_baseline
from ketchup_cache.method.losses import Staleness, importance_ratio, policy_gradient_loss, squared_score
from ketchup_cache.method.returns import rollout_returns
from ketchup_cache.models.batching import token_budget_batches
from ketchup_cache.models.forward import Batch, computes_prompts_once, training_states
from ketchup_cache.models.head import Head
from ketchup_cache.training.metrics import Signal, StepMetrics
from ketchup_cache.training.optimizer import Optimizer
from ketchup_cache.types import Ragged, ScoredRollouts

CHUNK = 1024
"""States whose logits are held at once."""


def learning_signal(batch: ScoredRollouts, config: LearnConfig, weight: NDArray | None = None) -> Signal:
    """K-step returns, clipping and baseline of a whole optimizer-step batch.

    weight: [N] squared norms of the score (`score_weights`), for the min-variance baseline alone.
    """
    rollouts = batch.rollouts
    lengths = rollouts.completions.lengths
    estimate, one_step = rollout_returns(
        rollouts,
        batch.scores,
        (config.k, 1),
        tail=config.tail,
        normalization=config.normalization,
        unfinished=config.unfinished,
    )
    kept = (rollouts.finished | (config.unfinished != "drop")) & (lengths > 0)
    forced = rollouts.completions.with_values(rollouts.forced).padded()
    inside = np.arange(forced.shape[1]) < lengths[:, None]
    real = inside & kept[:, None] & ~forced
    clipped = np.clip(estimate, -config.clip_return, config.clip_return)
    if config.baseline == "mean":
        clipped = clipped - mean_baseline(clipped, real)
    elif config.baseline == "min-variance":
        assert weight is not None
        padded = rollouts.completions.with_values(weight).padded()
        clipped = clipped - min_variance_baseline(clipped, real, padded)
    elif config.baseline == "leave-one-out":
        clipped = clipped - leave_one_out_baseline(clipped, real, rollouts.prompt_index)
    return Signal(clipped[inside].astype(np.float32), real[inside], kept, estimate[:, 0], one_step[:, 0])


def train_step(
    model: PreTrainedModel, head: Head, optimizer: Optimizer, batch: ScoredRollouts, config: LearnConfig, step: int
) -> StepMetrics:
    """Accumulate the gradient of one batch over token-budget micro-batches and apply it.

    The loss is normalised by the action tokens of the whole batch, so the gradient does not depend on
    `micro_batch_tokens`. A batch with nothing in the loss (all dropped) changes nothing.

    Raises CacheError where the very first batch is dropped whole, NumericsError for a return, loss or gradient that
    is not finite; the weights are then as before.
    """
    rollouts = batch.rollouts
    weight = score_weights(model, head, batch, config) if config.baseline == "min-variance" else None
    signal = learning_signal(batch, config, weight)
    if not np.isfinite(signal.advantage[signal.in_loss]).all():
        raise NumericsError(f"step {step}: a return is not finite; check the cache with `ketchup-cache verify`")
    total = int(signal.in_loss.sum())
    if total == 0 and step == 0:
        raise CacheError(
            f"all {len(rollouts)} rollouts of the first step were cut at the length limit, and dropped: "
            "raise --max-new-tokens, pre-distil the student for longer, or use --unfinished bootstrap"
        )
    staleness, loss_sum = Staleness(), 0.0
    for rows in micro_batches(model, batch, np.flatnonzero(signal.kept), config):
        loss = _micro_batch_loss(model, head, batch, rows, signal, total, config, staleness)
        loss_sum += backward(loss, step)
    norm = optimizer.step(step) if total else 0.0
    return StepMetrics.of(step, batch, signal, staleness, loss=loss_sum, grad_norm=norm, lr=optimizer.lr(step))


def micro_batches(
    model: PreTrainedModel, batch: ScoredRollouts, rows: NDArray[np.int64], config: LearnConfig
) -> Iterator[NDArray[np.int64]]:
    """The given rows of a batch, in parts of at most `micro_batch_tokens` tokens."""
    prompt_index = batch.rollouts.prompt_index[rows]
    parts = token_budget_batches(
        batch.prompts.tokens.lengths[prompt_index],
        batch.rollouts.completions.lengths[rows],
        config.micro_batch_tokens,
        prompt_index=prompt_index,
        once=computes_prompts_once(model),
    )
    return (rows[part] for part in parts)


def backward(loss: torch.Tensor, step: int) -> float:
    """Add the gradient of a micro-batch; returns its loss. Raises NumericsError where that is not finite."""
    value = float(loss.detach())
    if not np.isfinite(value):
        raise NumericsError(f"step {step}: the loss is {value}; the weights were not changed. Lower --lr")
    loss.backward()
    return value


@torch.no_grad()
def score_weights(
    model: PreTrainedModel, head: Head, batch: ScoredRollouts, config: LearnConfig
) -> NDArray[np.float32]:
    """`squared_score` of every token of a batch under the policy as it is, [N]: one forward pass without gradient."""
    rollouts = batch.rollouts
    completions = rollouts.completions
    places = completions.with_values(np.arange(len(completions.values)))
    weight = np.zeros(len(completions.values), np.float32)
    for rows in micro_batches(model, batch, np.flatnonzero(completions.lengths > 0), config):
        part = Batch.of_rows(batch.prompts.tokens, rollouts.prompt_index, completions, rows)
        states = training_states(model, part, config.precision)
        targets = torch.from_numpy(part.completions.values).long().to(head.device)
        pieces = zip(states.split(CHUNK), targets.split(CHUNK), strict=True)
        found = torch.cat([squared_score(head.logits(some), chosen) for some, chosen in pieces])
        weight[places.take(rows).values] = found.cpu().numpy()
    return weight


def _micro_batch_loss(
    model: PreTrainedModel,
    head: Head,
    batch: ScoredRollouts,
    rows: NDArray[np.int64],
    signal: Signal,
    total: int,
    config: LearnConfig,
    staleness: Staleness,
) -> torch.Tensor:
    rollouts = batch.rollouts
    part = Batch.of_rows(batch.prompts.tokens, rollouts.prompt_index, rollouts.completions, rows)

    def tokens(values: NDArray) -> torch.Tensor:
        return torch.from_numpy(Ragged(values, rollouts.completions.offsets).take(rows).values)

    states = training_states(model, part, config.precision)
    in_loss = tokens(signal.in_loss).to(states.device)
    targets = torch.from_numpy(part.completions.values).long().to(states.device)
    logprob = head.log_prob(states[in_loss], targets[in_loss])
    behavior = tokens(rollouts.behavior_logprob).to(logprob.device)[in_loss]
    advantage = tokens(signal.advantage).to(logprob.device)[in_loss]
    staleness.add(logprob, behavior)
    ratio = importance_ratio(logprob, behavior, config.max_ratio) if config.importance else None
    return policy_gradient_loss(logprob, advantage, ratio, total)
