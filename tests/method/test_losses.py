"""Losses and staleness against hand-computed values and the laws they estimate."""

import numpy as np
import pytest
import torch

from ketchup_cache.method.losses import Staleness, cross_entropy_loss, importance_ratio, policy_gradient_loss


def test_policy_gradient_of_a_softmax_by_hand():
    """One state, logits z, action a with advantage A and ratio ρ: ∂L/∂z = −ρ A (onehot(a) − π) / N."""
    z = torch.tensor([0.2, -1.0, 0.7], dtype=torch.float64, requires_grad=True)
    advantage, ratio, total = 1.7, 0.6, 5
    logprob = z.log_softmax(0)[1:2]
    policy_gradient_loss(logprob, torch.tensor([advantage]), torch.tensor([ratio]), total).backward()
    pi = np.exp([0.2, -1.0, 0.7]) / np.exp([0.2, -1.0, 0.7]).sum()
    expected = -ratio * advantage * (np.array([0, 1, 0]) - pi) / total
    np.testing.assert_allclose(z.grad.numpy(), expected, rtol=1e-7)


def test_no_gradient_flows_through_weights():
    logprob = torch.tensor([-1.0, -2.0], requires_grad=True)
    advantage = torch.tensor([3.0, 5.0], requires_grad=True)
    policy_gradient_loss(logprob, advantage, importance_ratio(logprob, torch.tensor([-1.5, -2.0]), 9.0), 2).backward()
    assert advantage.grad is None
    np.testing.assert_allclose(logprob.grad.numpy(), [-np.exp(0.5) * 3 / 2, -5 / 2], rtol=1e-6)


def test_losses_of_parts_add_up_to_the_loss_of_the_whole():
    rng = torch.Generator().manual_seed(0)
    logprob, advantage = torch.randn(7, generator=rng).double(), torch.randn(7, generator=rng).double()
    whole = policy_gradient_loss(logprob, advantage, None, 7)
    parts = sum(policy_gradient_loss(logprob[s], advantage[s], None, 7) for s in (slice(2), slice(2, 7)))
    assert float(whole) == pytest.approx(float(parts), abs=1e-15)
    assert float(cross_entropy_loss(logprob, 7)) == pytest.approx(-float(logprob.mean()), abs=1e-15)


def test_importance_ratio_is_truncated_from_above_only():
    got = importance_ratio(torch.tensor([-1.0, -1.0, -3.0]), torch.tensor([-1.0, -4.0, -1.0]), 2.0)
    np.testing.assert_allclose(got.numpy(), [1.0, 2.0, np.exp(-2.0)], rtol=1e-6)


def staleness(*parts: tuple[torch.Tensor, torch.Tensor]) -> Staleness:
    found = Staleness()
    for part in parts:
        found.add(*part)
    return found


def test_staleness_on_policy_and_over_micro_batches():
    on_policy = staleness((torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -2.0])))
    assert (on_policy.ratio, on_policy.ess, on_policy.kl) == (1.0, 1.0, 0.0)
    rho = np.array([0.5, 1.5, 2.0, 0.25])
    behavior = torch.tensor([-1.0, -2.0, -3.0, -0.5]).double()
    policy = behavior + torch.from_numpy(np.log(rho))
    stale = staleness((policy[:1], behavior[:1]), (policy[1:], behavior[1:]))
    assert stale.ratio == pytest.approx(rho.mean())
    assert stale.ess == pytest.approx(rho.sum() ** 2 / (4 * (rho**2).sum()))
    assert stale.kl == pytest.approx((rho - 1 - np.log(rho)).mean())


def test_kl_estimate_is_unbiased():
    """Its exact expectation over a categorical μ is KL(μ‖π)."""
    mu, pi = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    expected = (mu * np.log(mu / pi)).sum()
    total = 0.0
    for a in range(3):
        total += mu[a] * staleness((torch.tensor([pi[a]]).log(), torch.tensor([mu[a]]).log())).kl
    assert total == pytest.approx(expected, abs=1e-12)
