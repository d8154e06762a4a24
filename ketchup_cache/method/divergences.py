"""Divergences between teacher and student, per token, from the teacher's largest logits. Pure functions.

A distribution over V tokens becomes one over m buckets: one for each of the teacher's `top` most likely tokens, and one
for all others together (the tail) where there are any. With top = V nothing is lumped, and the values are exact.
Lumping never raises a divergence (data-processing inequality), so what is computed is a lower bound of the exact one.

All are in nats, of log-probabilities: teacher [n, m], without gradient, -inf allowed; student [n, m], finite.
Values and gradients are finite for every such input.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

FLOOR = -1000.0
"""Nats. Lower log-probabilities than any that a teacher means."""


def teacher_buckets(top_q: Tensor, rest_logsumexp: Tensor, vocab_size: int) -> Tensor:
    """Log-probabilities of the teacher's buckets.

    top_q: [n, top] float32 largest logits. rest_logsumexp: [n] float32 over all others. → [n, top + 1] float32 with the
    tail last, [n, top] where top is the whole vocabulary. They are normalised here, in float64: what is missing to 1
    would have the rounding of a float32 logsumexp (2e-6 for logits near 40), all of it in the tail.
    """
    logits = top_q.double()
    if top_q.shape[1] < vocab_size:
        logits = torch.cat([logits, rest_logsumexp.double()[:, None]], dim=1)
    return logits.log_softmax(1).float()


def student_buckets(logits: Tensor, top_ids: Tensor) -> Tensor:
    """Log-probabilities that the student gives the teacher's buckets.

    logits: [n, V] float32. top_ids: [n, top] int64, distinct in a row. → [n, top + 1], or [n, top] where top = V.
    The tail is summed in logarithms over the tokens outside, so that a small one is as exact as a large one.
    """
    logprob = logits.gather(1, top_ids)
    if top_ids.shape[1] < logits.shape[1]:
        outside = logits.scatter(1, top_ids, -torch.inf)
        logprob = torch.cat([logprob, outside.logsumexp(1, keepdim=True)], dim=1)
    return logprob - logits.logsumexp(1, keepdim=True)


def forward_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(p‖π) = Σ p (log p − log π), → [n]. What sequence-level KL distillation sums over teacher outputs."""
    return _weighted(teacher, teacher - student)


def reverse_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(π‖p) = Σ π (log π − log p), → [n], on student samples: the loss of on-policy distillation (GKD, Agarwal et al.
    2024, with β = 1). Below `FLOOR`, log p counts as that, so that what the teacher rules out (-inf) has a price too.
    """
    return _weighted(student, student - teacher.clamp(min=FLOOR))


def js_teacher_half(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(p‖m) with m = ½(p + π), → [n]: the term of the Jensen-Shannon divergence on teacher outputs."""
    return _weighted(teacher, teacher - _mixture(teacher, student))


def js_student_half(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(π‖m) with m = ½(p + π), → [n]: the term of the Jensen-Shannon divergence on student samples."""
    return _weighted(student, student - _mixture(teacher, student))


def tvd(teacher: Tensor, student: Tensor) -> Tensor:
    """Total variation distance ½ Σ |p − π|, → [n], between 0 and 1. Where p = π its subgradient is taken as 0."""
    return (teacher.exp() - student.exp()).abs().sum(1) / 2


TERMS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor] | None, Callable[[Tensor, Tensor], Tensor] | None]] = {
    "kl": (forward_kl, None),
    "reverse-kl": (None, reverse_kl),
    "js": (js_teacher_half, js_student_half),
    "tvd": (tvd, tvd),
}
"""Each method's term of the loss on teacher outputs, and on samples of the student. None: it has no such rollouts."""


def _weighted(logprob: Tensor, values: Tensor) -> Tensor:
    """Σ exp(logprob) · values, where a bucket without mass adds 0 whatever its value, to the gradient too."""
    return (logprob.exp() * values.masked_fill(logprob == -torch.inf, 0)).sum(1)


def _mixture(teacher: Tensor, student: Tensor) -> Tensor:
    return torch.logaddexp(teacher, student) - math.log(2)
