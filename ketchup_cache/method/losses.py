"""Losses and the measures of staleness: pure functions of torch tensors, one entry per action token."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


def policy_gradient_loss(logprob: Tensor, advantage: Tensor, ratio: Tensor | None, total_tokens: int) -> Tensor:
    """−Σ ρ_t A_t log π_θ(a_t | s_t) / total_tokens (REINFORCE, Eq. 8).

    Args:
        logprob: [n] float32, log π_θ of this micro-batch's action tokens, in nats; carries the gradient.
        advantage: [n] float32, clipped returns minus baseline.
        ratio: [n] float32 truncated importance ratios, constants of the gradient; None where rollouts count as
            on-policy.
        total_tokens: action tokens of the whole optimizer-step batch, over all micro-batches and processes, so that
            the sum of the micro-batches' losses does not depend on how the batch was cut.

    Returns: scalar.
    """
    weight = advantage if ratio is None else ratio * advantage
    return -(weight.detach() * logprob).sum() / total_tokens


def all_action_value(logprob: Tensor, value: Tensor, *, entropy: bool = False) -> Tensor:
    """Σ_a π(a) v(a) over the given tokens: its gradient is Σ_a ∇π(a) v(a), the policy gradient's expectation over
    these tokens, without the noise of a sample (all-action policy gradient; Sutton et al. 2001).

    logprob: [n, m] float32, log π(a), carries the gradient. value: [n, m] float32. entropy: v(a) − log π(a) in place of
    v(a), as a constant: with v = log p that is the gradient of −KL(π‖p).

    Returns: [n].
    """
    value = value - logprob if entropy else value
    return (logprob.exp() * value.detach()).sum(1)


def cross_entropy_loss(logprob: Tensor, total_tokens: int) -> Tensor:
    """−Σ log π_θ(y_t | y_<t) / total_tokens. Shapes: logprob [n] → scalar. Normalised as the policy gradient is."""
    return -logprob.sum() / total_tokens


def importance_ratio(logprob: Tensor, behavior_logprob: Tensor, max_ratio: float) -> Tensor:
    """min(π_θ(a_t|s_t) / μ(a_t|s_t), max_ratio), without gradient: truncated per-token importance sampling.

    Truncation bounds the variance that a stale token can add; it only ever lowers a weight (Ionides 2008).
    Shapes: [n], [n] → [n].
    """
    return (logprob.detach() - behavior_logprob).exp().clamp(max=max_ratio)


def squared_score(logits: Tensor, targets: Tensor) -> Tensor:
    """‖∂ log π(a)/∂ logits‖² = 1 − 2 π(a) + Σ_b π(b)², between 0 and 2, for the min-variance baseline.

    Shapes: logits [n, V], targets [n] int64 → [n].
    """
    prob = logits.softmax(1)
    chosen = prob.gather(1, targets[:, None]).squeeze(1)
    return (1 - chosen).square() + ((prob * prob).sum(1) - chosen * chosen).clamp(min=0)


@dataclass
class Staleness:
    """How far the policy has moved from the one that sampled, summed up over micro-batches.

    Over the action tokens of one optimizer step, before truncation:
        ratio: mean of ρ = π/μ; 1 on-policy, and 1 in expectation always: a drift away says noise or mismatch.
        ess: effective sample size (Σρ)² / (n Σρ²), a share of n; 1 on-policy.
        kl: mean of ρ − 1 − log ρ, nats per token: unbiased, never negative estimate of KL(μ‖π) (Schulman 2020, "k3").
        entropy: Σ ρ (−log π) / Σρ, nats per token: self-normalised estimate of H(π), from tokens drawn from μ.
    """

    tokens: int = 0
    sum_ratio: float = 0.0
    sum_ratio_squared: float = 0.0
    sum_kl: float = 0.0
    sum_surprise: float = 0.0

    def add(self, logprob: Tensor, behavior_logprob: Tensor) -> None:
        log_ratio = (logprob.detach() - behavior_logprob).double()
        ratio = log_ratio.exp()
        self.tokens += len(ratio)
        self.sum_ratio += float(ratio.sum())
        self.sum_ratio_squared += float((ratio * ratio).sum())
        self.sum_kl += float((ratio - 1 - log_ratio).sum())
        self.sum_surprise -= float((ratio * logprob.detach().double()).sum())

    @property
    def ratio(self) -> float:
        return self.sum_ratio / max(self.tokens, 1)

    @property
    def ess(self) -> float:
        return self.sum_ratio**2 / max(self.tokens * self.sum_ratio_squared, 1e-300)

    @property
    def kl(self) -> float:
        return self.sum_kl / max(self.tokens, 1)

    @property
    def entropy(self) -> float | None:
        return self.sum_surprise / self.sum_ratio if self.sum_ratio else None
