"""Baselines: what is subtracted from the returns before the policy gradient. Pure functions of NumPy arrays.

All work per time step t on one optimizer-step batch, so that micro-batching can't change them.
B rollouts, T time steps; `real` [B, T] bool says which entries are action tokens of rollouts in the loss.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def mean_baseline(returns: NDArray, real: NDArray[np.bool_]) -> NDArray:
    """b_t: mean of the returns at step t over the batch ("mean baseline" of the paper, after Rosenberg 2021).

    Shapes: returns [B, T], real [B, T] → [B, T], the same in every row; zero for steps nobody reaches.
    """
    counts = real.sum(axis=0)
    means = np.where(real, returns, 0).sum(axis=0, dtype=np.float64) / np.maximum(counts, 1)
    return np.broadcast_to(means, returns.shape).astype(returns.dtype)


def batch_mean_baseline(returns: NDArray, real: NDArray[np.bool_]) -> NDArray:
    """b: mean of the returns of all action tokens of the batch, one number: what the authors' program subtracts.

    Shapes: returns [B, T], real [B, T] → [B, T], the same everywhere; 0 where there are none.
    """
    value = returns[real].mean(dtype=np.float64) if real.any() else 0.0
    return np.full_like(returns, value)


def min_variance_baseline(returns: NDArray, real: NDArray[np.bool_], weight: NDArray) -> NDArray:
    """b_t = Σ w G / Σ w over the batch: the constant of step t that gives the policy gradient the least variance
    (Greensmith et al. 2004).

    weight: [B, T], w = ‖∇ log π(a_t|s_t)‖² of each token, here in logit space (`losses.squared_score`). Where all
    weights of a step are zero, no constant changes the gradient, and b_t is 0.

    Shapes: returns [B, T], real [B, T] → [B, T], the same in every row.
    """
    weight = np.where(real, weight, 0).astype(np.float64)
    total = weight.sum(axis=0)
    value = (weight * np.where(real, returns, 0)).sum(axis=0) / np.where(total > 0, total, 1)
    return np.broadcast_to(value, returns.shape).astype(returns.dtype)


def leave_one_out_baseline(returns: NDArray, real: NDArray[np.bool_], group: NDArray[np.integer]) -> NDArray:
    """b_t of a rollout: mean of the returns at step t of the other rollouts of its prompt (RLOO, Ahmadian et al. 2024).

    Other samples of a prompt are independent of this one's actions, so the gradient stays unbiased. Where no other
    sample reaches step t, the mean over the other prompts' rollouts takes its place.

    Shapes: returns [B, T], real [B, T], group [B] (equal for rollouts of one prompt) → [B, T].
    """
    value = np.where(real, returns, 0).astype(np.float64)
    _, group = np.unique(group, return_inverse=True)
    totals = np.zeros((group.max(initial=-1) + 1, returns.shape[1]))
    counts = np.zeros_like(totals)
    np.add.at(totals, group, value)
    np.add.at(counts, group, real)
    others, other_counts = totals[group] - value, counts[group] - real
    elsewhere, elsewhere_counts = value.sum(0) - totals[group], real.sum(0) - counts[group]
    same_prompt, other_prompts = others / np.maximum(other_counts, 1), elsewhere / np.maximum(elsewhere_counts, 1)
    return np.where(other_counts > 0, same_prompt, other_prompts).astype(returns.dtype)
