"""K-step returns from cached Q-values: the method itself, as a pure function of arrays.

Works on NumPy arrays and torch tensors (any device, differentiable) alike and imports neither torch nor a config.

Notation (docs/method.md), for one rollout with tokens a_1 … a_T:
    q_t     teacher's raw logit of a_t in state s_t
    m_t     largest logit in s_t;  gap_t = m_t − q_t ≥ 0
    G_t     one-step return, Eq. 10: Σ_{i≥t} (q_i − m_{i+1}) with m_{T+1} = 0; telescopes to q_t − Σ_{i>t} gap_i
    Ĝ_t     K-step return, Algorithm 1 or Eq. 7: q_t − Σ of the gaps that its jumps land on

The family: every return here is q_t − Σ_{i>t} w_{i−t} c_i. The paper's has c = gap, and w_j = 1 where K divides j.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from ketchup_cache.types import Rollouts, Scores

Array = TypeVar("Array", bound=Any)
"""A NumPy array or a torch tensor."""


def k_step_returns(
    q: Array,
    max_q: Array,
    lengths: Any,
    k: int = 1,
    *,
    weights: Literal["comb", "flat", "gae", "mean"] = "comb",
    lam: float = 1.0,
    end_weight: float | None = None,
    cost: Array | None = None,
    tail: Literal["one-step", "jump"] = "one-step",
    normalization: Literal["raw", "centred", "logprob", "advantage"] = "raw",
    mean_q: Array | None = None,
    logsumexp: Array | None = None,
    finished: Any | None = None,
    unfinished: Literal["drop", "bootstrap", "zero"] = "bootstrap",
    final_max_q: Any | None = None,
) -> Array:
    """K-step return of every token of every rollout (KETCHUP, Algorithm 1). K = 1 is LLMR.

    Both tails obey Ĝ_t = q_t − gap_{t+K} − gap_{t+2K} − …; "one-step" (Algorithm 1) adds every gap after the last
    jump that fits, "jump" (Eq. 7) adds none. Other `weights` weigh the later gaps otherwise.

    Args:
        q: [B, T] float, the teacher's logit of each token. float16 and bfloat16 are computed in float32.
        max_q: [B, T] float, the largest logit in each token's state.
        lengths: [B] int, tokens of each rollout, 0 … T. What `q` and `max_q` hold after them is never used.
        k: steps per jump, ≥ 1, of the weights "comb"; larger than T is allowed.
        weights: w_j of the cost j tokens later. "comb": 1 where k divides j (the paper). "flat": `lam` for every j; it
            is the mean of the k combs shifted by 1 … k where lam = 1/k, and lam · G_t + (1 − lam) · q_t. "gae": lam^j,
            which is GAE(λ) with the teacher's max-Q as critic (Schulman et al. 2016). "mean": one over the number of
            later tokens (MiniLLM's normalisation by length, Gu et al. 2024).
        lam: λ of "flat" and "gae", in [0, 1]. 0: no future; 1: LLMR.
        end_weight: of the cost of the last token (EOS) of a finished rollout, in place of its w_j.
        cost: [B, T] float, c_i of each token; without it, gap_i.
        tail: the last K steps of "comb": "one-step" as Algorithm 1, or "jump" over the end as Eq. 7.
        normalization: subtract from Ĝ_t a baseline that depends on the state only: nothing ("raw"), `mean_q`
            ("centred"), `logsumexp` ("logprob") or `max_q` ("advantage"). It equals normalising all logits beforehand.
        mean_q: [B, T] float, needed by "centred".
        logsumexp: [B, T] float, needed by "logprob".
        finished: [B] bool, whether each rollout ended by itself. Without it, all did.
        unfinished: value V of the state where a rollout was cut. "bootstrap": V = final_max_q, the teacher's own
            value, which cancels against the m_{T+1} that the last reward subtracts, so that Ĝ_T = q_T; "zero":
            V = 0, so that Ĝ_T = q_T − m_{T+1}; "drop": the row's returns are zero, leave it out of the loss.
        final_max_q: [B] float, m_{T+1} of unfinished rollouts; needed by "zero".

    Returns:
        [B, T], the kind, device and floating dtype of `q`; zero after each rollout's end.

    Raises:
        ValueError: k < 1, λ outside [0, 1], a shape that does not fit, an unknown option, or an array an option needs
            is missing.
    """
    xp = _library(q)
    _check(q, max_q, lengths, k, lam, weights, tail, normalization, unfinished)
    batch, width = q.shape
    dtype = q.dtype
    q, max_q = _computable(xp, q), _computable(xp, max_q)
    lengths = _cast(xp, _like(xp, lengths, q), xp.int32).reshape(batch, 1)
    position = _like(xp, np.arange(width, dtype=np.int32), q)
    outside = position >= lengths

    # With the token's own cost counted in, Ĝ_t = q_t − gap_{t+K} − … becomes m_t − gap_t − gap_{t+K} − …
    cost, top = (max_q - q, max_q) if cost is None else (_computable(xp, cost), q + _computable(xp, cost))
    cost = xp.where(outside, 0, cost)
    if end_weight is not None:
        ended = lengths > 0 if finished is None else _like(xp, finished, q).reshape(batch, 1) & (lengths > 0)
        last = (position == lengths - 1) & ended
        end = xp.where(last, cost, 0).sum(1).reshape(batch, 1)
        cost, top = xp.where(last, 0, cost), top - xp.where(last, 1, end_weight) * end
    if weights == "mean":
        later = _stride_sum(xp, cost, 1, reach=width) - cost
        total = cost + later / xp.where(lengths - position > 1, lengths - 1 - position, 1)
    elif weights == "flat":
        total = (1 - lam) * cost + lam * _stride_sum(xp, cost, 1, reach=width)
    elif weights == "gae":
        total = _stride_sum(xp, cost, 1, reach=width, decay=lam)
    else:
        if tail == "one-step" and k > 1:
            # A rollout's last K tokens step one by one, so each pays for every gap behind it, and whoever jumps
            # onto one of them pays all of that too. No later jump fits, so the sum below adds nothing more to them.
            cost = xp.where(position >= lengths - k, _stride_sum(xp, cost, 1, reach=k), cost)
        total = _stride_sum(xp, cost, k, reach=width)
    returns = top - total

    if normalization != "raw":
        name, offset = {"centred": ("mean_q", mean_q), "logprob": ("logsumexp", logsumexp)}.get(
            normalization, ("max_q", max_q)
        )
        if offset is None or tuple(offset.shape) != (batch, width):
            raise ValueError(f"normalization={normalization!r} needs {name} of shape {(batch, width)}")
        returns = returns - _computable(xp, offset)
    if finished is not None and unfinished != "bootstrap":
        cut = ~_like(xp, finished, q).reshape(batch, 1)
        if unfinished == "drop":
            outside = outside | cut
        elif final_max_q is None:
            raise ValueError("unfinished='zero' needs final_max_q")
        else:
            final = _computable(xp, _like(xp, final_max_q, q)).reshape(batch, 1)
            returns = returns - xp.where(cut, final, 0)
    return _cast(xp, xp.where(outside, 0, returns), dtype)


def rollout_returns(
    rollouts: Rollouts, scores: Scores, kinds: Sequence[int | Mapping[str, Any]], **options: Any
) -> list[NDArray[np.float64]]:
    """Returns of scored rollouts, [B, T] of each kind, zero past each rollout's end.

    kinds: K of the paper's, or the arguments of `k_step_returns` that it has for itself.
    options: arguments of `k_step_returns` that all of them have.
    In float64, so that differences between large returns keep their digits.
    """
    completions = rollouts.completions
    for name, values in scores.per_token().items():
        options[name] = completions.with_values(values).padded().astype(np.float64)
    options["final_max_q"] = scores.final_max_q.astype(np.float64)
    options |= {"lengths": completions.lengths, "finished": rollouts.finished}
    return [k_step_returns(**options | (dict(kind) if isinstance(kind, Mapping) else {"k": kind})) for kind in kinds]


def _stride_sum(xp: Any, x: Array, stride: int, reach: int, decay: float = 1.0) -> Array:
    """[B, T] → [B, T]: element t becomes x_t + d·x_{t+stride} + d²·x_{t+2·stride} + … up to x_{t+reach-1} at least,
    with d = `decay`.

    By doubling: after step i each element holds the sum of 2^i terms, so log2(reach / stride) vectorised steps do,
    and rounding errors grow with that number, not with T.
    """
    width = x.shape[1]
    reach = min(reach, width)
    while stride < reach:
        y = xp.empty_like(x)
        y[:, width - stride :] = x[:, width - stride :]
        later = x[:, stride:] if decay == 1 else decay * x[:, stride:]
        xp.add(x[:, : width - stride], later, out=y[:, : width - stride])
        x, stride, decay = y, 2 * stride, decay * decay
    return x


def _library(array: Any) -> Any:
    """numpy, or torch where the array is a tensor: so that this module never has to import torch."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and isinstance(array, torch.Tensor) else np


def _like(xp: Any, values: Any, reference: Any) -> Any:
    """`values` in the same library and on the same device as `reference`."""
    return np.asarray(values) if xp is np else xp.as_tensor(values, device=reference.device)


def _computable(xp: Any, x: Any) -> Any:
    """Half precision as float32: sums of gaps over a long rollout need more than 11 bits."""
    return _cast(xp, x, xp.float32) if x.dtype.itemsize < 4 else x


def _cast(xp: Any, x: Any, dtype: Any) -> Any:
    return x.astype(dtype, copy=False) if xp is np else x.to(dtype)


def _check(q: Any, max_q: Any, lengths: Any, k: Any, lam: float, *options: str) -> None:
    """options: weights, tail, normalization and unfinished."""
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must be between 0 and 1, not {lam!r}")
    if isinstance(k, bool) or int(k) != k or k < 1:
        raise ValueError(f"k must be a whole number, 1 or more, not {k!r}")
    if len(q.shape) != 2 or tuple(q.shape) != tuple(max_q.shape):
        raise ValueError(f"q and max_q must have one shape [B, T], not {tuple(q.shape)} and {tuple(max_q.shape)}")
    if tuple(np.shape(lengths)) != (q.shape[0],):
        raise ValueError(f"lengths must have shape [{q.shape[0]}], not {list(np.shape(lengths))}")
    choices = {
        "weights": ("comb", "flat", "gae", "mean"),
        "tail": ("one-step", "jump"),
        "normalization": ("raw", "centred", "logprob", "advantage"),
        "unfinished": ("drop", "bootstrap", "zero"),
    }
    for value, (name, allowed) in zip(options, choices.items(), strict=True):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
