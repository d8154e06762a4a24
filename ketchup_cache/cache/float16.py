"""Scores and log-probabilities in float16, for compact segments.

A float16 has 11 significant bits, so values are stored in the form in which they are small: `q` as it is, everything
else as its distance from the largest logit, which is what returns are made of. Rounding errs by 2⁻¹¹ of the stored
number at most (0.002 for a gap of 4 to 8, 0.004 up to 16). Token ids are not touched. Distances are never negative,
so whatever is read back keeps q ≤ max_q, mean_q ≤ max_q and max_q ≤ logsumexp exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ketchup_cache.errors import NumericsError
from ketchup_cache.types import Scores, TopLogits

LARGEST = float(np.finfo(np.float16).max)
ROUNDING = 2.0**-11
"""Largest relative error of the nearest float16."""


def half(name: str, values: NDArray[np.float32]) -> NDArray[np.float16]:
    """The nearest float16 of each value. Raises NumericsError, naming the first, where one is too large for it."""
    with np.errstate(over="ignore"):  # looked for below
        rounded = values.astype(np.float16)
    if (wrong := ~np.isfinite(rounded)).any():
        place, value = int(np.argwhere(wrong)[0, 0]), values[wrong][0]
        raise NumericsError(f"{name}[{place}] is {value}, float16 ends at {LARGEST:.0f}: keep these scores lossless")
    return rounded


def shrink(scores: Scores) -> dict[str, NDArray]:
    """What a compact segment stores. Raises NumericsError where float16 overflows.

    Lossless scores may have a distance of less than 0 by a rounding error; it becomes 0.
    """
    max_q = scores.max_q
    arrays: dict[str, NDArray] = {
        "q": half("q", scores.q),
        "gap": _distance("gap", max_q, scores.q),
        "logsumexp_gap": _distance("logsumexp_gap", scores.logsumexp, max_q),
        "mean_gap": _distance("mean_gap", max_q, scores.mean_q),
        "final_max_q": scores.final_max_q,
    }
    if top := scores.top:
        # where there is no rest, its distance is 0 here, and not stored
        rest = np.where(np.isfinite(top.rest_logsumexp), top.rest_logsumexp, scores.logsumexp)
        arrays["top_gap"] = _distance("top_gap", max_q[:, None], top.q)
        arrays["rest_gap"] = _distance("rest_gap", scores.logsumexp, rest)
        arrays["top_ids"] = top.ids
    return arrays


def restore(arrays: Mapping[str, NDArray]) -> Scores:
    """The scores, in float32, that `shrink` made these arrays of, within its error."""
    q, gap, logsumexp_gap, mean_gap = (
        arrays[name].astype(np.float32, copy=False) for name in ("q", "gap", "logsumexp_gap", "mean_gap")
    )
    with np.errstate(invalid="ignore"):  # of infinities, which the rules of the format refuse
        max_q = q + gap
        scores = Scores(q, max_q, max_q + logsumexp_gap, max_q - mean_gap, arrays["final_max_q"])
        if "top_gap" in arrays:
            rest = scores.logsumexp - (arrays["rest_gap"] if "rest_gap" in arrays else np.full_like(q, np.inf))
            scores = replace(scores, top=TopLogits(max_q[:, None] - arrays["top_gap"], arrays["top_ids"], rest))
    return scores


def _distance(name: str, above: NDArray[np.float32], below: NDArray[np.float32]) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):  # an infinity is refused by `half`
        return half(name, np.maximum(above - below, np.float32(0)))
