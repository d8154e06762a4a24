"""The optimizer step of KETCHUP, LLMR and their relatives: returns, baseline, importance ratios, policy gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ketchup_cache.config.options import LossOptions
from ketchup_cache.errors import CacheError, NumericsError
from ketchup_cache.method.baselines import (
    batch_mean_baseline,
    leave_one_out_baseline,
    mean_baseline,
    min_variance_baseline,
)
from ketchup_cache.method.divergences import FLOOR
from ketchup_cache.method.losses import (
    Staleness,
    all_action_value,
    cross_entropy_loss,
    importance_ratio,
    policy_gradient_loss,
    squared_score,
)
from ketchup_cache.method.returns import rollout_returns
from ketchup_cache.parallel.group import group
from ketchup_cache.training.metrics import Signal, StepMetrics
from ketchup_cache.training.optimizer import CHUNK, Learner, all_rows, of_all_processes
from ketchup_cache.types import ScoredRollouts

Each = NDArray | None
"""A value of each rollout or token."""


def learning_signal(
    batch: ScoredRollouts, options: LossOptions, weight: Each = None, logprob: Each = None, reward: Each = None
) -> Signal:
    """Returns, clipping and baseline of a whole optimizer-step batch. With `exact`, the advantage is the future's part
    alone.

    weight: [N] squared norms of the score, for the min-variance baseline alone. logprob: [N] log π(a_t) of the policy
    as it is, for the cost kl alone. reward: [B] R of each rollout, outside of the K-step weights and the clip.
    """
    rollouts, scores = batch.rollouts, batch.scores
    completions, lengths = rollouts.completions, rollouts.completions.lengths
    kept = (rollouts.finished | (options.unfinished != "drop")) & (lengths > 0)
    forced = completions.with_values(rollouts.forced).padded()
    position = np.arange(forced.shape[1])
    inside = position < lengths[:, None]
    real = inside & kept[:, None] & ~forced
    kind: dict[str, Any] = dict(options.of_estimate)
    if options.cost == "kl":
        assert logprob is not None
        own = completions.with_values(np.where(rollouts.forced, 0, logprob)).padded().astype(np.float64)
        distance = np.where(rollouts.forced, 0, logprob - (scores.q - scores.logsumexp))
        kind["cost"] = completions.with_values(distance).padded().astype(np.float64)
    elif options.cost == "centred":
        gap = completions.with_values(scores.max_q.astype(np.float64) - scores.q).padded()
        ends = rollouts.finished[:, None] & (position == lengths[:, None] - 1)
        middle = inside & (position > 0) & ~ends
        price = gap[middle & kept[:, None]].mean() if (middle & kept[:, None]).any() else 0.0
        kind["cost"] = np.where(middle, gap - price, gap)
    now = {"weights": "flat", "lam": 0.0, "unfinished": "bootstrap"}
    kinds = (kind, 1, now) if options.exact else (kind, 1)
    estimate, one_step, *first = rollout_returns(rollouts, scores, kinds, **options.of_returns)
    future = estimate - first[0] if first else estimate
    advantage = np.clip(future, -options.clip_return, options.clip_return)
    if options.cost == "kl":
        estimate = estimate - own
        advantage = advantage if options.exact else np.clip(estimate, -options.clip_return, options.clip_return)
    if reward is not None:
        advantage = advantage + options.reward_weight * reward[:, None]
    if options.baseline == "mean":
        advantage = advantage - mean_baseline(advantage, real)
    elif options.baseline == "batch-mean":
        advantage = advantage - batch_mean_baseline(advantage, real)
    elif options.baseline == "min-variance":
        assert weight is not None
        advantage = advantage - min_variance_baseline(advantage, real, completions.with_values(weight).padded())
    elif options.baseline == "leave-one-out":
        advantage = advantage - leave_one_out_baseline(advantage, real, rollouts.prompt_index)
    return Signal(advantage[inside].astype(np.float32), real[inside], kept, estimate[:, 0], one_step[:, 0], reward)


def policy_gradient_step(
    learner: Learner[LossOptions], batch: ScoredRollouts, step: int, from_teacher: Each = None, reward: Each = None
) -> StepMetrics:
    """Accumulate the gradient of one batch over token-budget micro-batches and apply it.

    from_teacher: [B] bool, the teacher outputs of `anchor`, whose loss is their mean cross-entropy times that. The
    metrics, but for the loss and its tokens, are of the other rollouts. reward: [B], as `learning_signal` takes it.

    Raises as `policy_gradient` does; the weights are then as before. A batch with nothing in the loss (all dropped)
    changes nothing.
    """
    options, anchored = learner.options, 0
    if options.anchor and from_teacher is not None:
        value, anchored = anchor(learner, batch.take(np.flatnonzero(from_teacher)), step)
        batch, reward = batch.take(np.flatnonzero(~from_teacher)), None if reward is None else reward[~from_teacher]
    signal, staleness, loss = policy_gradient(learner, batch, step, reward)
    loss += value if anchored else 0.0
    norm = learner.optimizer.step(step) if signal.in_loss.any() or anchored else 0.0
    lr = learner.optimizer.lr(step)
    lengths = batch.rollouts.completions.lengths
    last = options.k if options.weights == "comb" else 0
    tail = float(np.minimum(lengths, last).sum() / max(1, lengths.sum()))
    given: dict[str, Any] = {"action_tokens": int(signal.in_loss.sum()) + anchored, "tail": tail}
    return StepMetrics.of(batch, signal, staleness, step=step, loss=loss, grad_norm=norm, lr=lr, **given)


def anchor(learner: Learner[LossOptions], outputs: ScoredRollouts, step: int) -> tuple[float, int]:
    """Add the gradient of `anchor` times the mean cross-entropy of the tokens that the teacher chose; returns its value
    in nats, and how many they are."""
    rollouts = outputs.rollouts
    chosen = ~rollouts.forced
    total = int(chosen.sum())

    def loss(places: NDArray, states: Tensor, targets: Tensor) -> Tensor:
        inside = torch.from_numpy(np.flatnonzero(chosen[places])).to(states.device)
        logprob = learner.head.log_prob(states[inside], targets[inside])
        return learner.options.anchor * cross_entropy_loss(logprob, max(total, 1))

    return learner.accumulate(all_rows(outputs), np.flatnonzero(rollouts.completions.lengths > 0), loss, step), total


def policy_gradient(
    learner: Learner[LossOptions], batch: ScoredRollouts, step: int, reward: Each = None
) -> tuple[Signal, Staleness, float]:
    """Add the policy gradient of a batch to the parameters' `grad`; returns what it came from, and the loss.

    The loss is normalised by the action tokens of the whole batch, so the gradient does not depend on
    `micro_batch_tokens`. With `exact`, the first step is Σ_a π(a) v(a) over the teacher's kept logits, v(a) = q(a) − m
    (with the cost kl: log p(a) − log π(a)), and a token outside of them counts as sampled: unbiased for every number of
    logits kept, where the rollouts are the policy's own.

    Raises CacheError where the very first batch is dropped whole, NumericsError for a return or loss that is not
    finite.
    """
    rollouts, scores, options, head = batch.rollouts, batch.scores, learner.options, learner.head
    weight = score_weights(learner, batch) if options.baseline == "min-variance" else None
    logprobs = student_logprob(learner, batch) if options.cost == "kl" else None
    signal = learning_signal(batch, options, weight, logprobs, reward)
    if not np.isfinite(signal.advantage[signal.in_loss]).all():
        raise NumericsError(f"step {step}: a return is not finite; check the cache with `ketchup-cache verify`")
    total = int(signal.in_loss.sum())
    if total == 0 and step == 0:
        raise CacheError(
            f"all {len(rollouts)} rollouts of the first step were cut at the length limit, and dropped: "
            "raise --max-new-tokens, pre-distil the student for longer, or use --unfinished bootstrap"
        )
    staleness = Staleness()
    entropy = options.cost == "kl"
    offset = scores.logsumexp if entropy else scores.max_q
    top = scores.with_top(min(options.top_needed, head.vocab_size)).top if options.exact else None

    def tensor(values: NDArray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(head.device)

    def exact(states: Tensor, targets: Tensor, places: NDArray) -> tuple[Tensor, Tensor, Tensor]:
        """[n] each: log π(a_t), the kept tokens' part of the first step, the value of a_t where it is not kept."""
        assert top is not None
        ids, value = tensor(top.ids[places]).long(), tensor(top.q[places] - offset[places, None]).clamp(min=FLOOR)
        kept, logprob = head.buckets(states, ids, targets)
        sampled = tensor(scores.q[places] - offset[places]).clamp(min=FLOOR) - (logprob.detach() if entropy else 0)
        outside = ~(ids == targets.to(head.device)[:, None]).any(1)
        return logprob, all_action_value(kept[:, :-1], value, entropy=entropy), sampled * outside

    def loss(places: NDArray, states: Tensor, targets: Tensor) -> Tensor:
        inside = np.flatnonzero(signal.in_loss[places])
        in_loss, places = torch.from_numpy(inside).to(states.device), places[inside]
        advantage, behavior = tensor(signal.advantage[places]), tensor(rollouts.behavior_logprob[places])
        if options.exact:
            logprob, first, sampled = exact(states[in_loss], targets[in_loss], places)
            advantage = advantage + sampled
        else:
            logprob, first = head.log_prob(states[in_loss], targets[in_loss]), None
        staleness.add(logprob, behavior)
        ratio = importance_ratio(logprob, behavior, options.max_ratio) if options.importance else None
        value = policy_gradient_loss(logprob, advantage, ratio, total)
        return value if first is None else value - first.sum() / total

    found = learner.accumulate(all_rows(batch), np.flatnonzero(signal.kept), loss, step)
    return signal, of_all_processes(staleness), found


@torch.no_grad()
def reweighted_return(learner: Learner[LossOptions], batch: ScoredRollouts) -> tuple[float, float]:
    """Mean G_1 of the policy as it is, from rollouts of another: self-normalised importance sampling over whole
    rollouts, w = Π_t π(a_t)/μ(a_t), Σ w G_1 / Σ w. Returns it, and the effective sample size (Σw)² / (B Σw²), a share.

    The product of many ratios varies much more than one: without a high share the mean says nothing.
    """
    rollouts, options = batch.rollouts, learner.options
    (one_step,) = rollout_returns(rollouts, batch.scores, (1,), **options.of_returns)
    kept = np.flatnonzero((rollouts.finished | (options.unfinished != "drop")) & (rollouts.completions.lengths > 0))
    drawn = ~rollouts.forced
    log_ratio = np.where(drawn, student_logprob(learner, batch) - rollouts.behavior_logprob.astype(np.float64), 0.0)
    row = np.repeat(np.arange(len(rollouts)), rollouts.completions.lengths)
    log_weight = np.bincount(row, log_ratio, len(rollouts))[kept]
    weight = np.exp(log_weight - log_weight.max(initial=-np.inf))
    ess = weight.sum() ** 2 / max(len(rollouts) * (weight * weight).sum(), 1e-300)
    return float((weight * one_step[kept, 0]).sum() / max(weight.sum(), 1e-300)), float(ess)


@torch.no_grad()
def score_weights(learner: Learner[LossOptions], batch: ScoredRollouts) -> NDArray[np.float32]:
    """`squared_score` of every token of a batch under the policy as it is, [N]: one forward pass without gradient."""

    def squared(states: Tensor, targets: Tensor) -> Tensor:
        pieces = zip(states.split(CHUNK), targets.split(CHUNK), strict=True)
        return torch.cat([squared_score(learner.head.logits(some), chosen) for some, chosen in pieces])

    return _each_token(learner, batch, squared)


def student_logprob(learner: Learner[LossOptions], batch: ScoredRollouts) -> NDArray[np.float32]:
    """log π(a_t) of every token of a batch under the policy as it is, [N]: one forward pass without gradient."""
    return _each_token(learner, batch, learner.head.log_prob)


@torch.no_grad()
def _each_token(
    learner: Learner[LossOptions], batch: ScoredRollouts, function: Callable[[Tensor, Tensor], Tensor]
) -> NDArray[np.float32]:
    """function: of states [n, D] and tokens [n] → [n]."""
    lengths = batch.rollouts.completions.lengths
    values = np.zeros(lengths.sum(), np.float32)
    for places, part in learner.micro_batches(all_rows(batch), np.flatnonzero(lengths > 0)):
        values[places] = function(*learner.inputs(places, part)).cpu().numpy()
    return group().summed(values)
