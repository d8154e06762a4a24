"""What the three kinds of segment hold: their arrays, and the rules that every one of them keeps.

The rules are checked before a segment is written and again after it is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ketchup_cache.cache.manifest import Info, RolloutsInfo, ScoresInfo
from ketchup_cache.errors import CacheError, NumericsError
from ketchup_cache.provenance import TokenizerInfo
from ketchup_cache.types import PER_TOKEN, TOKEN_DTYPE, Prompts, Ragged, Rollouts, Scores, TopLogits

Segment = Prompts | Rollouts | Scores

IN_MEMORY: Mapping[str, DTypeLike] = {"uint16": TOKEN_DTYPE, "uint32": TOKEN_DTYPE, "float16": np.float32}
"""Dtype on disk → dtype in memory, where they differ. Ids too large for an int32 turn negative, and are refused."""
OPTIONAL = {"forced"}
"""Left out where all its elements are False."""
MAX_VOCABULARY = 2**31
"""Token ids are int32 in memory."""
LARGEST = float(np.finfo(np.float16).max)
ROUNDING = 2.0**-11
"""Largest relative error of the nearest float16."""
TOLERANCE = 1e-3
"""Relative: how far float32 rounding may bend an inequality between scores."""
APART = {"float32": 2 * TOLERANCE, "bfloat16": 2.0**-4}
"""By dtype of the teacher's body: how far scores of two machines may be apart, in float16 too. A share of the largest
of a token's numbers, or of 1."""


def layout(info: Info, rows: int, tokens: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """All arrays a segment of this kind and size may hold: dtype and shape."""
    token = "uint16" if info.tokenizer.vocab_size <= 2**16 else "uint32"
    compact = getattr(info, "storage", "lossless") == "compact"
    per_row, per_token, real = (rows,), (tokens,), "float16" if compact else "float32"
    shapes: dict[str, tuple[str, tuple[int, ...]]]
    match info.kind:
        case "prompts":
            shapes = {"ids": ("uint8", (rows, 16)), "tokens": (token, per_token), "offsets": ("int64", (rows + 1,))}
        case "rollouts":
            shapes = {"completion_tokens": (token, per_token), "completion_offsets": ("int64", (rows + 1,))}
            shapes |= {"prompt_index": ("int64", per_row), "finished": ("bool", per_row)}
            shapes |= {"behavior_logprob": (real, per_token), "forced": ("bool", per_token)}
        case "scores":
            names = ("q", "gap", "logsumexp_gap", "mean_gap") if compact else ("q", "max_q", "logsumexp", "mean_q")
            shapes = dict.fromkeys(names, (real, per_token))
            shapes["final_max_q"] = ("float32", per_row)
            if info.keep_top:
                top_q, rest = ("top_gap", "rest_gap") if compact else ("top_q", "rest_logsumexp")
                shapes |= {top_q: (real, (tokens, info.keep_top)), "top_ids": (token, (tokens, info.keep_top))}
                if info.keep_top < info.tokenizer.vocab_size:
                    shapes[rest] = (real, per_token)
    return shapes


def pack(segment: Segment, info: Info) -> dict[str, NDArray]:
    """The arrays to store, of a segment that passed `check`. Raises NumericsError where float16 can't hold a value."""
    arrays = _arrays(segment)
    if isinstance(segment, Scores) and isinstance(info, ScoresInfo) and info.storage == "compact":
        arrays = to_float16(segment)
    if isinstance(segment, Rollouts) and not segment.forced.any():
        del arrays["forced"]
    stored = layout(info, *size(segment))
    return {name: array.astype(stored[name][0], copy=False) for name, array in arrays.items() if name in stored}


def unpack(info: Info, arrays: Mapping[str, NDArray]) -> Segment:
    """The segment that `pack` made these arrays of, given in the dtypes of memory. Its arrays are read-only, because
    loaded segments are shared."""
    segment: Segment
    match info.kind:
        case "prompts":
            segment = Prompts(arrays["ids"], Ragged(arrays["tokens"], arrays["offsets"]))
        case "rollouts":
            completions = Ragged(arrays["completion_tokens"], arrays["completion_offsets"])
            forced = arrays.get("forced", np.zeros(len(completions.values), np.bool_))
            prompt_index, behavior_logprob = arrays["prompt_index"], arrays["behavior_logprob"]
            segment = Rollouts(prompt_index, completions, behavior_logprob, forced, arrays["finished"])
        case "scores" if info.storage == "compact":
            segment = from_float16(arrays)
        case "scores":
            top = None
            if info.keep_top:
                nothing = np.full(len(arrays["q"]), -np.inf, np.float32)
                top = TopLogits(arrays["top_q"], arrays["top_ids"], arrays.get("rest_logsumexp", nothing))
            segment = Scores(**{name: arrays[name] for name in (*PER_TOKEN, "final_max_q")}, top=top)
    for array in _arrays(segment).values():
        array.flags.writeable = False
    return segment


def _arrays(segment: Segment) -> dict[str, NDArray]:
    """All arrays of a segment as they are in memory, by the names that the format has for them."""
    if isinstance(segment, Prompts):
        return {"ids": segment.ids, "tokens": segment.tokens.values, "offsets": segment.tokens.offsets}
    if isinstance(segment, Rollouts):
        tokens = {"completion_tokens": segment.completions.values, "completion_offsets": segment.completions.offsets}
        rest = ("prompt_index", "behavior_logprob", "finished", "forced")
        return tokens | {name: getattr(segment, name) for name in rest}
    arrays: dict[str, NDArray] = {**segment.per_token(), "final_max_q": segment.final_max_q}
    if top := segment.top:
        arrays |= {"top_q": top.q, "top_ids": top.ids, "rest_logsumexp": top.rest_logsumexp}
    return arrays


def size(segment: Segment) -> tuple[int, int]:
    """Rows and tokens, as a manifest counts them."""
    if isinstance(segment, Scores):
        return len(segment.final_max_q), len(segment.q)
    ragged = segment.tokens if isinstance(segment, Prompts) else segment.completions
    return len(ragged), len(ragged.values)


def check(segment: Segment, info: Info, parent: Rollouts | None = None) -> None:
    """Raise CacheError for the first rule the segment breaks, NumericsError where a number is not finite.

    parent: for scores, the rollouts they belong to.
    """
    kinds = {"prompts": Prompts, "rollouts": Rollouts, "scores": Scores}
    if not isinstance(segment, kinds[info.kind]):
        raise CacheError(f"{type(segment).__name__} can't be a segment of kind {info.kind}")
    rows, tokens = size(segment)
    if isinstance(info, ScoresInfo) and isinstance(segment, Scores):
        rows = info.row_stop - info.row_start
        if segment.keep_top != info.keep_top:
            raise CacheError(f"top_q has {segment.keep_top} logits of each state, must be {info.keep_top}")
    exact = info if info.kind == "prompts" else info.model_copy(update={"storage": "lossless"})
    wanted = layout(exact, rows, tokens)
    for name, array in _arrays(segment).items():
        if name in wanted:  # rest_logsumexp of nothing is not stored
            _check_array(name, array, *wanted[name])
    if isinstance(segment, Prompts):
        _check_tokens("tokens", segment.tokens, info.tokenizer)
    elif isinstance(segment, Rollouts) and isinstance(info, RolloutsInfo):
        _check_tokens("completion_tokens", segment.completions, info.tokenizer)
        _check_rollouts(segment, info)
    elif isinstance(segment, Scores) and isinstance(info, ScoresInfo):
        _check_scores(segment, info)
        assert parent is not None
        _check_pair(segment, info, parent)


def _check_rollouts(rollouts: Rollouts, info: RolloutsInfo) -> None:
    outside = (rollouts.prompt_index < info.prompt_start) | (rollouts.prompt_index >= info.prompt_stop)
    _refuse("prompt_index", outside, f"is outside its prompts, {info.prompt_start} to {info.prompt_stop}")
    _refuse("behavior_logprob", rollouts.behavior_logprob > TOLERANCE, "is the logarithm of more than 1")
    empty = rollouts.finished & (rollouts.completions.lengths == 0)
    _refuse("finished", empty, "is a finished rollout without a token; the last one must be EOS")
    if info.finished not in (None, int(rollouts.finished.sum())):
        raise CacheError(f"finished has {int(rollouts.finished.sum())} True, must be {info.finished}")


def _check_scores(scores: Scores, info: ScoresInfo) -> None:
    max_q = scores.max_q
    rounding = ROUNDING if info.storage == "compact" else 0
    highest = max_q + np.float32(math.log(info.tokenizer.vocab_size) * (1 + rounding))
    for name, low, high, reason in (
        ("q", scores.q, max_q, "is larger than max_q"),
        ("mean_q", scores.mean_q, max_q, "is larger than max_q"),
        ("logsumexp", max_q, scores.logsumexp, "is smaller than max_q"),
        ("logsumexp", scores.logsumexp, highest, "is larger than max_q + log(vocab_size)"),
    ):
        if (low > high).any():  # rare; what rounding may bend is worked out only then
            _refuse(name, low > high + TOLERANCE * np.maximum(1, np.abs(max_q)), reason)
    if info.keep_top:
        _check_top(scores, info)


def _check_top(scores: Scores, info: ScoresInfo) -> None:
    assert scores.top is not None
    top_q, top_ids, rest = vars(scores.top).values()
    slack = TOLERANCE * np.maximum(1, np.abs(scores.max_q))
    bound = rest - top_q[:, -1] - slack
    if info.storage == "compact":  # logsumexp, and the logits that weigh, lie within log(vocab_size) of the maximum
        slack += 3 * ROUNDING * math.log(info.tokenizer.vocab_size)
        # of every distance that was rounded: of the last logit and logsumexp from the maximum, of the rest from that
        far = 2 * scores.logsumexp - top_q[:, -1] - rest
        bound -= 2 * ROUNDING * np.abs(far)
    _refuse("top_ids", _beyond(top_ids, info.tokenizer), f"holds an id that {info.tokenizer.name} does not have")
    _refuse("top_ids", np.diff(np.sort(top_ids, axis=1), axis=1) == 0, "holds a token twice")
    _refuse("top_q", np.diff(top_q, axis=1) > 0, "does not fall from the largest logit to the smallest")
    _refuse("top_q", top_q[:, 0] != scores.max_q, "does not begin with max_q")
    others = info.tokenizer.vocab_size - info.keep_top
    if others:
        _refuse("rest_logsumexp", bound > math.log(others), "is more than so many smaller logits can have")
    # together, the kept tokens and the others have the mass of all
    mass = np.exp(top_q - scores.max_q[:, None], dtype=np.float64).sum(1)
    mass += np.exp(rest - scores.max_q, dtype=np.float64)
    differs = np.abs(np.log(mass) + scores.max_q - scores.logsumexp) > slack
    _refuse("top_q", differs, "and rest_logsumexp do not add up to logsumexp")


def _check_pair(scores: Scores, info: ScoresInfo, rollouts: Rollouts) -> None:
    rows = slice(info.row_start, info.row_stop)
    offsets = rollouts.completions.offsets
    tokens = offsets[info.row_stop] - offsets[info.row_start]
    if tokens != len(scores.q):
        raise CacheError(f"scores of {len(scores.q)} tokens for rollouts that have {tokens}")
    valued = rollouts.finished[rows] & (scores.final_max_q != 0)
    _refuse("final_max_q", valued, "is not 0, though the rollout is finished")
    if top := scores.top:
        chosen = top.ids == rollouts.completions.slice(info.row_start, info.row_stop).values[:, None]
        slack = TOLERANCE * np.maximum(1, np.abs(scores.max_q))
        if info.storage == "compact":  # both were rounded
            slack += 2 * ROUNDING * np.abs(scores.max_q - scores.q)
        differs = chosen & (np.abs(top.q - scores.q[:, None]) > slack[:, None])
        _refuse("top_q", differs, "is not q where top_ids is the token")


def apart(dtype: str, one: Scores, other: Scores) -> tuple[int, float]:
    """Of two scores of the same rows by one teacher, whose body ran in `dtype`: how many numbers differ by more than
    rounding on two machines makes them (`APART`), and the largest difference."""
    size = np.maximum(1, np.abs([one.q, one.max_q, one.mean_q]).max(axis=0))
    pairs = [(values, getattr(other, name), size) for name, values in one.per_token().items()]
    pairs.append((one.final_max_q, other.final_max_q, np.maximum(1, np.abs(one.final_max_q))))
    if one.top and other.top:
        both = slice(min(one.keep_top, other.keep_top))
        pairs.append((one.top.q[:, both], other.top.q[:, both], size[:, None]))
    far = [(np.abs(a - b), APART.get(dtype, max(APART.values())) * scale) for a, b, scale in pairs]
    return int(sum((gap > most).sum() for gap, most in far)), max(float(gap.max(initial=0)) for gap, _ in far)


def _check_tokens(name: str, ragged: Ragged, tokenizer: TokenizerInfo) -> None:
    values, offsets = ragged.values, ragged.offsets
    if offsets[0] != 0 or offsets[-1] != len(values) or (np.diff(offsets) < 0).any():
        raise CacheError(f"offsets of {name} do not rise from 0 to {len(values)}, the number of tokens")
    unknown = f"is not a token id of {tokenizer.name}, which has {tokenizer.vocab_size}"
    _refuse(name, _beyond(values, tokenizer), unknown)


def _beyond(ids: NDArray[np.int32], tokenizer: TokenizerInfo) -> NDArray[np.bool_]:
    """Where there is no id of this tokenizer. As unsigned numbers, negative ones are too large."""
    return ids.view(np.uint32) >= min(tokenizer.vocab_size, MAX_VOCABULARY)


def _check_array(name: str, array: NDArray, stored: str, shape: tuple[int, ...]) -> None:
    dtype = np.dtype(IN_MEMORY.get(stored, stored))
    if array.dtype != dtype or array.shape != shape:
        raise CacheError(f"{name} is {array.dtype} {list(array.shape)}, must be {dtype} {list(shape)}")
    if dtype.kind == "f" and not np.isfinite(array).all():
        place = tuple(np.argwhere(~np.isfinite(array))[0])
        raise NumericsError(f"{name}[{int(place[0])}] is {array[place]}: scores and log-probabilities must be finite")


def _refuse(name: str, wrong: NDArray[np.bool_], reason: str) -> None:
    """wrong: [n], or [n, m] for an array of rows."""
    if wrong.any():
        raise CacheError(f"{name}[{int(np.argwhere(wrong)[0, 0])}] {reason}")


# ---------------------------------------------------------------------------------------------------- scores in float16
#
# A float16 has 11 significant bits, so values are stored in the form in which they are small: `q` as it is, everything
# else as its distance from the largest logit, which is what returns are made of. Rounding errs by 2⁻¹¹ of the stored
# number at most (0.002 for a gap of 4 to 8, 0.004 up to 16). Token ids are not touched. Distances are never negative,
# so whatever is read back keeps q ≤ max_q, mean_q ≤ max_q and max_q ≤ logsumexp exactly.


def half(name: str, values: NDArray[np.float32]) -> NDArray[np.float16]:
    """The nearest float16 of each value. Raises NumericsError, naming the first, where one is too large for it."""
    with np.errstate(over="ignore"):  # looked for below
        rounded = values.astype(np.float16)
    if (wrong := ~np.isfinite(rounded)).any():
        place, value = int(np.argwhere(wrong)[0, 0]), values[wrong][0]
        raise NumericsError(f"{name}[{place}] is {value}, float16 ends at {LARGEST:.0f}: keep these scores lossless")
    return rounded


def to_float16(scores: Scores) -> dict[str, NDArray]:
    """What a compact segment stores. Raises NumericsError where float16 overflows.

    Lossless scores may have a distance of less than 0 by a rounding error; it becomes 0.
    """
    max_q = scores.max_q
    stored: dict[str, NDArray] = {"q": half("q", scores.q), "final_max_q": scores.final_max_q}
    apart = {"gap": (max_q, scores.q), "logsumexp_gap": (scores.logsumexp, max_q), "mean_gap": (max_q, scores.mean_q)}
    if top := scores.top:
        # where there is no rest, its distance is 0 here, and not stored
        rest = np.where(np.isfinite(top.rest_logsumexp), top.rest_logsumexp, scores.logsumexp)
        apart |= {"top_gap": (max_q[:, None], top.q), "rest_gap": (scores.logsumexp, rest)}
        stored["top_ids"] = top.ids
    with np.errstate(over="ignore"):  # an infinity is refused by `half`
        return stored | {name: half(name, np.maximum(a - b, np.float32(0))) for name, (a, b) in apart.items()}


def from_float16(arrays: Mapping[str, NDArray]) -> Scores:
    """The scores, in float32, that `to_float16` made these arrays of, within its error."""
    names = ("q", "gap", "logsumexp_gap", "mean_gap")
    q, gap, logsumexp_gap, mean_gap = (arrays[name].astype(np.float32, copy=False) for name in names)
    with np.errstate(invalid="ignore"):  # of infinities, which the rules of the format refuse
        max_q = q + gap
        scores = Scores(q, max_q, max_q + logsumexp_gap, max_q - mean_gap, arrays["final_max_q"])
        if "top_gap" in arrays:
            rest = scores.logsumexp - (arrays["rest_gap"] if "rest_gap" in arrays else np.full_like(q, np.inf))
            scores = replace(scores, top=TopLogits(max_q[:, None] - arrays["top_gap"], arrays["top_ids"], rest))
    return scores
