"""The optimizer step of the methods that match distributions, from the cached largest logits: SeqKD, KL, reverse KL, JS
and TVD."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ketchup_cache.config.options import LossOptions
from ketchup_cache.method import divergences
from ketchup_cache.method.losses import Staleness
from ketchup_cache.method.returns import rollout_returns
from ketchup_cache.training.metrics import Signal, StepMetrics, teacher_kl
from ketchup_cache.training.optimizer import Learner, all_rows, of_all_processes
from ketchup_cache.types import Ragged, ScoredRollouts


def divergence_step(
    learner: Learner[LossOptions], batch: ScoredRollouts, from_teacher: NDArray[np.bool_], step: int
) -> StepMetrics:
    """Accumulate the gradient of one batch over token-budget micro-batches and apply it.

    The loss is the mean over the batch's tokens; where it holds teacher outputs and student samples, half the mean
    over the ones and half that over the others (f-distill, Wen et al. 2023), however long they are. So it does not
    depend on `micro_batch_tokens`. Forced tokens are left out; rollouts cut at the length limit are in, because
    every token of them has a divergence of its own. The states are constants: no gradient flows through the sampling,
    and there are no importance ratios.

    from_teacher: [B] bool. Returns metrics whose returns and ratios are of the student samples, null without them.
    Raises NumericsError for a loss or gradient that is not finite; the weights are then as before.
    """
    head, options = learner.head, learner.options
    batch = replace(batch, scores=batch.scores.with_top(min(options.top_needed, head.vocab_size)))
    rollouts, top = batch.rollouts, batch.scores.top
    completions = rollouts.completions
    weight = token_weights(from_teacher, completions, rollouts.forced)
    of_teacher = np.repeat(from_teacher, completions.lengths)
    staleness = Staleness()

    def tensor(values: NDArray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(head.device)

    def loss(places: NDArray, states: Tensor, targets: Tensor) -> Tensor:
        inside = np.flatnonzero(weight[places] > 0)
        places, chosen = places[inside], torch.from_numpy(inside).to(states.device)
        states, targets = states[chosen], targets[chosen]
        if options.method not in divergences.TERMS:  # SeqKD
            logprob = head.log_prob(states, targets)
            terms = -logprob
        else:
            assert top is not None
            q, ids, rest = (tensor(values[places]) for values in (top.q, top.ids, top.rest_logsumexp))
            student, logprob = head.buckets(states, ids.long(), targets)
            teacher = divergences.teacher_buckets(q, rest, head.vocab_size)
            terms = token_terms(options.method, teacher, student[:, : teacher.shape[1]], tensor(of_teacher[places]))
        values, logprob = terms * tensor(weight[places].astype(np.float32)), logprob.detach()
        if (mine := ~of_teacher[places]).any():
            staleness.add(logprob[tensor(mine)], tensor(rollouts.behavior_logprob[places[mine]]))
        return values.sum()

    loss_sum = learner.accumulate(all_rows(batch), np.flatnonzero(completions.lengths > 0), loss, step)
    staleness = of_all_processes(staleness)
    norm, lr = learner.optimizer.step(step) if weight.any() else 0.0, learner.optimizer.lr(step)
    (one_step,) = rollout_returns(rollouts, batch.scores, (1,), **options.of_returns)
    kept = (rollouts.finished | (options.unfinished != "drop")) & (completions.lengths > 0) & ~from_teacher
    signal = Signal(np.zeros(len(weight), np.float32), weight > 0, kept, one_step[:, 0], one_step[:, 0])
    nothing = ["k_return_mean", "k_return_sd", "advantage_sd"]
    nothing += [] if staleness.tokens else ["ratio_mean", "ess", "behavior_kl"]
    given: dict[str, Any] = {"step": step, "loss": loss_sum, "grad_norm": norm, "lr": lr} | dict.fromkeys(nothing)
    given |= {"dropped": 0.0, "teacher_kl": teacher_kl(batch, ~of_teacher & ~rollouts.forced)}
    return StepMetrics.of(batch, signal, staleness, **given)


def token_weights(
    from_teacher: NDArray[np.bool_], completions: Ragged, forced: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """[N] weight of each token's term in the loss; they sum to 1, over each kind of rollout to the same."""
    teacher = np.repeat(from_teacher, completions.lengths)
    kinds = [kind for kind in (teacher & ~forced, ~teacher & ~forced) if kind.any()]
    return sum((kind / (kind.sum() * len(kinds)) for kind in kinds), np.zeros(len(forced)))


def token_terms(method: str, teacher: Tensor, student: Tensor, from_teacher: Tensor) -> Tensor:
    """Each token's term of the loss, [n], in nats. teacher, student: [n, m] log-probabilities of the buckets.
    from_teacher: [n] bool."""
    terms = [term(teacher, student) for term in dict.fromkeys(divergences.TERMS[method]) if term]
    return terms[0] if len(terms) == 1 else torch.where(from_teacher, terms[0], terms[1])
