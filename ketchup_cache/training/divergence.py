"""One optimizer step of the methods that match distributions, off the cached largest logits: SeqKD, KL, reverse KL, JS
and TVD."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ketchup_cache.config.commands import LearnConfig
from ketchup_cache.method import divergences
from ketchup_cache.method.losses import Staleness
from ketchup_cache.method.returns import rollout_returns
from ketchup_cache.models.forward import Batch, training_states
from ketchup_cache.models.head import Head
from ketchup_cache.training.metrics import Signal, StepMetrics
from ketchup_cache.training.optimizer import Optimizer
from ketchup_cache.training.policy_gradient import CHUNK, backward, micro_batches
from ketchup_cache.types import Ragged, ScoredRollouts

ON_TEACHER = {"kl": divergences.forward_kl, "js": divergences.js_teacher_half, "tvd": divergences.tvd}
ON_STUDENT = {"reverse-kl": divergences.reverse_kl, "js": divergences.js_student_half, "tvd": divergences.tvd}
"""Each method's term on teacher outputs, and on student samples, where it learns from those."""


def divergence_step(
    model: PreTrainedModel,
    head: Head,
    optimizer: Optimizer,
    batch: ScoredRollouts,
    from_teacher: NDArray[np.bool_],
    config: LearnConfig,
    step: int,
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
    batch = replace(batch, scores=batch.scores.with_top(min(config.top_needed, head.vocab_size)))
    rollouts = batch.rollouts
    completions = rollouts.completions
    weight = token_weights(from_teacher, completions, rollouts.forced)
    staleness, loss_sum = Staleness(), 0.0
    for rows in micro_batches(model, batch, np.flatnonzero(completions.lengths > 0), config):
        loss = _micro_batch_loss(model, head, batch, rows, weight, from_teacher, config, staleness)
        loss_sum += backward(loss, step)
    norm = optimizer.step(step) if weight.any() else 0.0
    return _metrics(batch, from_teacher, weight, config, staleness, step, loss_sum, norm, optimizer.lr(step))


def token_weights(
    from_teacher: NDArray[np.bool_], completions: Ragged, forced: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """[N] weight of each token's term in the loss; they sum to 1, over each kind of rollout to the same."""
    teacher = np.repeat(from_teacher, completions.lengths)
    kinds = [kind for kind in (teacher & ~forced, ~teacher & ~forced) if kind.any()]
    return sum((kind / (kind.sum() * len(kinds)) for kind in kinds), np.zeros(len(forced)))


def token_terms(
    method: str,
    logits: Tensor,
    targets: Tensor,
    from_teacher: Tensor,
    *top: Tensor,
) -> tuple[Tensor, Tensor]:
    """Each token's term of the loss [n], in nats, and the student's log-probability of the token [n].

    logits: [n, V] float32 of the student. targets: [n] int64. from_teacher: [n] bool. top: the teacher's
    `TopLogits`, q and ids [n, top], rest_logsumexp [n]; none for seqkd.
    """
    logprob = logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(1)
    if method == "seqkd":
        return -logprob, logprob
    top_q, top_ids, rest_logsumexp = top
    teacher = divergences.teacher_buckets(top_q, rest_logsumexp, logits.shape[1])
    student = divergences.student_buckets(logits, top_ids.long())
    functions = dict.fromkeys(of[method] for of in (ON_TEACHER, ON_STUDENT) if method in of)
    terms = [function(teacher, student) for function in functions]
    return (terms[0] if len(terms) == 1 else torch.where(from_teacher, terms[0], terms[1])), logprob


def _micro_batch_loss(
    model: PreTrainedModel,
    head: Head,
    batch: ScoredRollouts,
    rows: NDArray[np.int64],
    weight: NDArray[np.float64],
    from_teacher: NDArray[np.bool_],
    config: LearnConfig,
    staleness: Staleness,
) -> Tensor:
    rollouts, scores = batch.rollouts, batch.scores
    completions = rollouts.completions
    part = Batch.of_rows(batch.prompts.tokens, rollouts.prompt_index, completions, rows)
    states = training_states(model, part, config.precision)
    places = completions.with_values(np.arange(len(completions.values))).take(rows).values
    inside = np.flatnonzero(weight[places] > 0)
    states, places = states[torch.from_numpy(inside).to(states.device)], places[inside]
    teacher = np.repeat(from_teacher, completions.lengths)[places]

    def tensor(values: NDArray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(head.device)

    def terms(states: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return token_terms(config.method, head.logits(states), *rest)

    losses, logprobs = [states.new_zeros(0, dtype=torch.float32)], []
    for start in range(0, len(places), CHUNK):
        chunk = slice(start, start + CHUNK)
        some = places[chunk]
        # each chunk's logits are computed again in the backward pass: [n, V] is never held for the whole batch
        values, logprob = checkpoint(
            terms,
            states[chunk],
            tensor(completions.values[some]).long(),
            tensor(teacher[chunk]),
            *(tensor(values[some]) for values in (vars(scores.top).values() if scores.top else ())),
            use_reentrant=False,
        )
        losses.append(values * tensor(weight[some].astype(np.float32)))
        logprobs.append(logprob.detach())
    if logprobs and not teacher.all():
        mine = tensor(~teacher)
        staleness.add(torch.cat(logprobs)[mine], tensor(rollouts.behavior_logprob[places[~teacher]]))
    return torch.cat([values.to(losses[-1].device) for values in losses]).sum()


def _metrics(
    batch: ScoredRollouts,
    from_teacher: NDArray[np.bool_],
    weight: NDArray[np.float64],
    config: LearnConfig,
    staleness: Staleness,
    step: int,
    loss: float,
    norm: float,
    lr: float,
) -> StepMetrics:
    rollouts = batch.rollouts
    _, one_step = rollout_returns(
        rollouts,
        batch.scores,
        (1, 1),
        tail=config.tail,
        normalization=config.normalization,
        unfinished=config.unfinished,
    )
    lengths = rollouts.completions.lengths
    kept = (rollouts.finished | (config.unfinished != "drop")) & (lengths > 0) & ~from_teacher
    signal = Signal(np.zeros(len(weight), np.float32), weight > 0, kept, one_step[:, 0], one_step[:, 0])
    metrics = StepMetrics.of(step, batch, signal, staleness, loss=loss, grad_norm=norm, lr=lr)
    mine = np.repeat(~from_teacher, lengths) & ~rollouts.forced
    kl = rollouts.behavior_logprob - (batch.scores.q - batch.scores.logsumexp)
    blank = {} if staleness.tokens else {"ratio_mean": None, "ess": None, "behavior_kl": None}
    return metrics.model_copy(
        update={
            "k_return_mean": None,
            "k_return_sd": None,
            "advantage_sd": None,
            "dropped": 0.0,
            "teacher_kl": float(kl[mine].mean(dtype=np.float64)) if mine.any() else None,
            **blank,
        }
    )
