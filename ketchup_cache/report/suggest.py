"""Which K to learn with, from returns alone: how well Ĝ_1 points where the true gradient points. A pure function.

The law of total covariance splits returns by the first token a: Cov(X, Y) = Cov_a(E[X|a], E[Y|a]) + E_a Cov(X, Y|a).
With Q(a) = E[G_1|a] and Q_K(a) = E[Ĝ_1|a], and all moments within a prompt (docs/method.md has the derivation):

    C = Cov_a(Q_K, Q), S = Var_a(Q_K), V = Var(Ĝ_1), R = Var_a(Q)
    efficiency(m) = C² / (R (S + V / m))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 400
"""Bootstrap resamples of the prompts."""
AVERAGED = (1, 4, 16, 64, 256)
"""Values of m that are reported; the suggestion is for the first."""


@dataclass(frozen=True)
class KEfficiency:
    """One K. C, S and V in squared units of the return; see the module.

    efficiency: for each m of `AVERAGED`, between 0 (no use) and 1 (the true gradient).
    worth: rollouts that K = 1 needs for the efficiency that this K has with one; None where K never reaches it.
    wins: share of the bootstrap resamples in which this K is best at m = 1.
    """

    k: int
    covariance: float
    signal: float
    variance: float
    efficiency: tuple[float, ...]
    worth: float | None
    wins: float


@dataclass(frozen=True)
class Suggestion:
    """`k` is None where the data can't tell; `reason` says why in one line.

    prompts, rollouts: those used, of prompts where a first token came at least twice.
    signal: R = Var_a(Q), what there is to learn about the first token; signal_se: over bootstrap resamples.
    best: the best K for each m of `averaged`.
    """

    k: int | None
    reason: str
    prompts: int
    rollouts: int
    signal: float | None
    signal_se: float | None
    averaged: tuple[int, ...]
    best: tuple[int, ...]
    by_k: tuple[KEfficiency, ...]


def suggest_k(
    prompt: NDArray, token: NDArray, one_step: NDArray[np.float64], k_step: NDArray[np.float64], ks: Sequence[int]
) -> Suggestion:
    """The K whose return, with one rollout for each decision, points best where the expected G_1 points.

    Args:
        prompt, token: [N] int, the prompt and the first token of each rollout.
        one_step: [N], G_1. k_step: [N, K], Ĝ_1 for each of `ks`. Constants per prompt change nothing.
    """
    moments, used = _moments(prompt, token, np.column_stack([one_step, k_step]))
    if len(moments) < 2:
        reason = "no prompt" if not len(moments) else "only one prompt"
        return _none(f"{reason} has a first token that came twice: sample more, with --samples 16 or more", 0, 0)
    rng = np.random.default_rng(0)
    draws = rng.multinomial(len(moments), np.full(len(moments), 1 / len(moments)), size=RESAMPLES) / len(moments)
    point = moments.mean(0)
    resampled = np.einsum("rp,pik->rik", draws, moments)
    # K = 1 is not among `ks` always, so column 0 is G_1 itself
    signal, signal_se = float(point[0, 0]), float(resampled[:, 0, 0].std(ddof=1))
    efficiency = np.array([_efficiency(point, m) for m in AVERAGED])  # [m, K]
    first = int(efficiency[0].argmax())
    # that of a K-step return is known better than `signal`, which holds all the noise of G_1
    if signal <= 0 or point[0, 1 + first] <= 2 * resampled[:, 0, 1 + first].std(ddof=1):
        return _none(
            "returns do not differ between first tokens by more than chance "
            f"(variance {signal:.3g} ± {signal_se:.2g}): sample more prompts, or more rollouts of each",
            len(moments),
            used,
            signal,
            signal_se,
        )
    winners = _efficiency(resampled, 1).argmax(-1)
    by_k = tuple(
        KEfficiency(
            k=k,
            covariance=float(point[0, 1 + i]),
            signal=float(point[1, 1 + i]),
            variance=float(point[2, 1 + i]),
            efficiency=tuple(efficiency[:, i].tolist()),
            worth=_worth(float(efficiency[0, i]), signal, float(point[2, 0])),
            wins=float((winners == i).mean()),
        )
        for i, k in enumerate(ks)
    )
    best = by_k[first]
    worth = "more than any number of" if best.worth is None else f"as much as {best.worth:.2g}"
    reason = f"a rollout with K = {best.k} is worth {worth} with K = 1; best in {best.wins:.0%} of resamples"
    return Suggestion(
        k=best.k,
        reason=reason,
        prompts=len(moments),
        rollouts=used,
        signal=signal,
        signal_se=signal_se,
        averaged=AVERAGED,
        best=tuple(ks[i] for i in efficiency.argmax(1)),
        by_k=by_k,
    )


def _moments(prompt: NDArray, token: NDArray, returns: NDArray[np.float64]) -> tuple[NDArray[np.float64], int]:
    """[prompts, 3, 1 + K]: covariance with G_1 between tokens, variance between tokens, whole variance."""
    found, used = [], 0
    for p in np.unique(prompt):
        rows = np.flatnonzero(prompt == p)
        _, group, sizes = np.unique(token[rows], return_inverse=True, return_counts=True)
        within = len(rows) - len(sizes)
        if not within:
            continue
        x = returns[rows] - returns[rows].mean(0)
        means = np.zeros((len(sizes), x.shape[1]))
        np.add.at(means, group, x)
        rest = x - (means / sizes[:, None])[group]
        total, noise = (len(rows) - 1), within
        covariance = (x * x[:, :1]).sum(0) / total - (rest * rest[:, :1]).sum(0) / noise
        variance = (x**2).sum(0) / total
        found.append(np.stack([covariance, variance - (rest**2).sum(0) / noise, variance]))
        used += len(rows)
    return np.array(found).reshape(-1, 3, returns.shape[1]), used


def _efficiency(moments: NDArray[np.float64], m: float) -> NDArray[np.float64]:
    """[…, 3, 1 + K] → […, K]. A covariance below zero points the wrong way: no use."""
    truth = np.maximum(moments[..., 0, :1], 1e-300)
    covariance = np.maximum(moments[..., 0, 1:], 0)
    # Cauchy-Schwarz: an estimate of S may fall below what C and R allow
    signal = np.maximum(moments[..., 1, 1:], covariance**2 / truth)
    return covariance**2 / np.maximum(truth * (signal + moments[..., 2, 1:] / m), 1e-300)


def _worth(efficiency: float, signal: float, variance: float) -> float | None:
    """m for which R / (R + V_1 / m) equals the efficiency."""
    return None if efficiency >= 1 else efficiency * variance / (signal * (1 - efficiency))


def _none(
    reason: str, prompts: int, rollouts: int, signal: float | None = None, signal_se: float | None = None
) -> Suggestion:
    return Suggestion(None, reason, prompts, rollouts, signal, signal_se, AVERAGED, (), ())
