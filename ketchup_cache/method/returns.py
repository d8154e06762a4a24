"""K-step returns from cached Q-values: the method itself, as a pure function of arrays.

Works on NumPy arrays and torch tensors (any device, differentiable) alike and imports neither torch nor a config.

Notation (docs/method.md), for one rollout with tokens a_1 … a_T:
    q_t     teacher's raw logit of a_t in state s_t
    m_t     largest logit in s_t;  gap_t = m_t − q_t ≥ 0
    G_t     one-step return, Eq. 10: Σ_{i≥t} (q_i − m_{i+1}) with m_{T+1} = 0; telescopes to q_t − Σ_{i>t} gap_i
    Ĝ_t     K-step return, Algorithm 1 or Eq. 7: q_t − Σ of the gaps that its jumps land on
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
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
    k: int,
    *,
    tail: Literal["one-step", "jump"] = "one-step",
    normalization: Literal["raw", "centred", "logprob"] = "raw",
    mean_q: Array | None = None,
    logsumexp: Array | None = None,
    finished: Any | None = None,
    unfinished: Literal["drop", "bootstrap", "zero"] = "bootstrap",
    final_max_q: Any | None = None,
) -> Array:
    """K-step return of every token of every rollout (KETCHUP, Algorithm 1). K = 1 is LLMR.

    Both tails obey Ĝ_t = q_t − gap_{t+K} − gap_{t+2K} − …; "one-step" (Algorithm 1) adds every gap after the last
    jump that fits, "jump" (Eq. 7) adds none.

    Args:
        q: [B, T] float, the teacher's logit of each token. float16 and bfloat16 are computed in float32.
        max_q: [B, T] float, the largest logit in each token's state.
        lengths: [B] int, tokens of each rollout, 0 … T. What `q` and `max_q` hold after them is never used.
        k: steps per jump, ≥ 1; larger than T is allowed.
        tail: the last K steps: "one-step" as Algorithm 1, or "jump" over the end as Eq. 7.
        normalization: subtract from Ĝ_t a baseline that depends on the state only: nothing ("raw"), `mean_q`
            ("centred") or `logsumexp` ("logprob"). It equals normalising all logits beforehand.
        mean_q, logsumexp: [B, T] float, needed by "centred" and "logprob".
        finished: [B] bool, whether each rollout ended by itself. Without it, all did.
        unfinished: value V of the state where a rollout was cut. "bootstrap": V = final_max_q, the teacher's own
            value, which cancels against the m_{T+1} that the last reward subtracts, so that Ĝ_T = q_T; "zero":
            V = 0, so that Ĝ_T = q_T − m_{T+1}; "drop": the row's returns are zero, leave it out of the loss.
        final_max_q: [B] float, m_{T+1} of unfinished rollouts; needed by "zero".

    Returns:
        [B, T], the kind, device and floating dtype of `q`; zero after each rollout's end.

    Raises:
        ValueError: k < 1, a shape that does not fit, an unknown option, or an array an option needs is missing.
    """
    xp = _library(q)
    _check(q, max_q, lengths, k, tail, normalization, unfinished)
    batch, width = q.shape
    dtype = q.dtype
    q, max_q = _computable(xp, q), _computable(xp, max_q)
    lengths = _cast(xp, _like(xp, lengths, q), xp.int32).reshape(batch, 1)
    position = _like(xp, np.arange(width, dtype=np.int32), q)
    outside = position >= lengths

    # With the token's own gap counted in, Ĝ_t = q_t − gap_{t+K} − … becomes m_t − gap_t − gap_{t+K} − …
    gap = xp.where(outside, 0, max_q - q)
    if tail == "one-step" and k > 1:
        # A rollout's last K tokens step one by one, so each pays for every gap behind it, and whoever jumps
        # onto one of them pays all of that too. No later jump fits, so the sum below adds nothing more to them.
        gap = xp.where(position >= lengths - k, _stride_sum(xp, gap, 1, reach=k), gap)
    returns = max_q - _stride_sum(xp, gap, k, reach=width)

    if normalization != "raw":
        name, offset = ("mean_q", mean_q) if normalization == "centred" else ("logsumexp", logsumexp)
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


def rollout_returns(rollouts: Rollouts, scores: Scores, ks: Sequence[int], **options: Any) -> list[NDArray[np.float64]]:
    """K-step returns of scored rollouts, [B, T] for each K, zero past each rollout's end.

    options: `tail`, `normalization` and `unfinished` of `k_step_returns`.
    In float64, so that differences between large returns keep their digits.
    """
    completions = rollouts.completions
    for name, values in scores.per_token().items():
        options[name] = completions.with_values(values).padded().astype(np.float64)
    options["final_max_q"] = scores.final_max_q.astype(np.float64)
    return [k_step_returns(**options, lengths=completions.lengths, finished=rollouts.finished, k=k) for k in ks]


def _stride_sum(xp: Any, x: Array, stride: int, reach: int) -> Array:
    """[B, T] → [B, T]: element t becomes x_t + x_{t+stride} + x_{t+2·stride} + … up to x_{t+reach-1} at least.

    By doubling: after step i each element holds the sum of 2^i terms, so log2(reach / stride) vectorised steps do,
    and rounding errors grow with that number, not with T.
    """
    width = x.shape[1]
    reach = min(reach, width)
    while stride < reach:
        y = xp.empty_like(x)
        y[:, width - stride :] = x[:, width - stride :]
        xp.add(x[:, : width - stride], x[:, stride:], out=y[:, : width - stride])
        x, stride = y, 2 * stride
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


def _check(q: Any, max_q: Any, lengths: Any, k: Any, tail: str, normalization: str, unfinished: str) -> None:
    if isinstance(k, bool) or int(k) != k or k < 1:
        raise ValueError(f"k must be a whole number, 1 or more, not {k!r}")
    if len(q.shape) != 2 or tuple(q.shape) != tuple(max_q.shape):
        raise ValueError(f"q and max_q must have one shape [B, T], not {tuple(q.shape)} and {tuple(max_q.shape)}")
    if tuple(np.shape(lengths)) != (q.shape[0],):
        raise ValueError(f"lengths must have shape [{q.shape[0]}], not {list(np.shape(lengths))}")
    for name, value, allowed in (
        ("tail", tail, ("one-step", "jump")),
        ("normalization", normalization, ("raw", "centred", "logprob")),
        ("unfinished", unfinished, ("drop", "bootstrap", "zero")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")
