"""The values that flow between the stages: prompts → rollouts → scores.

NumPy only, so that reading a cache never imports torch.

Notation (docs/method.md): B rollouts, T tokens of one completion, N tokens of all completions, P prompts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

Part = TypeVar("Part")
Places = slice | NDArray[np.integer]
"""Rows, or tokens, by their numbers; a slice from start to stop is taken without copying."""
TOKEN_DTYPE = np.int32
"""Token ids in memory. On disk they are uint16 where the vocabulary allows."""


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths, stored end to end: row i is `values[offsets[i]:offsets[i + 1]]`.

    values: [N], any dtype. offsets: [rows + 1] int64, starting at 0, non-decreasing, ending at N.
    """

    values: NDArray
    offsets: NDArray[np.int64]

    @classmethod
    def from_rows(cls, rows: Iterable[ArrayLike], dtype: DTypeLike) -> Ragged:
        arrays = [np.asarray(row, dtype=dtype) for row in rows]
        values = np.concatenate(arrays) if arrays else np.empty(0, dtype)
        return cls.from_lengths(values, [len(a) for a in arrays])

    @classmethod
    def from_lengths(cls, values: NDArray, lengths: ArrayLike) -> Ragged:
        return cls(values, offsets_of(lengths))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> NDArray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[NDArray]:
        return (self[row] for row in range(len(self)))

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    def slice(self, start: int, stop: int) -> Ragged:
        """Rows start..stop, without copying the values."""
        return self.take(slice(start, stop))

    def take(self, rows: Places | Sequence[int]) -> Ragged:
        """The given rows, in the given order. A slice of rows is a view."""
        places, offsets = self.places(rows)
        return Ragged(_gather(self.values, places), offsets)

    def places(self, rows: Places | Sequence[int]) -> tuple[Any, NDArray[np.int64]]:
        """Where the values of the given rows are in `values`, and the offsets of these rows laid end to end."""
        if isinstance(rows, slice):
            offsets = self.offsets[rows.start : rows.stop + 1]
            return slice(offsets[0], offsets[-1]), offsets - offsets[0]
        rows = np.asarray(rows, dtype=np.int64)
        starts = self.offsets[rows]
        lengths = self.offsets[rows + 1] - starts
        offsets = offsets_of(lengths)
        # a row's start, less its start in the result, plus the place in the result
        return np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1]), offsets

    def ranges(self, start: int, stop: int, values: int, rows: int = sys.maxsize) -> Iterator[range]:
        """Rows start..stop in contiguous ranges of at most so many values and rows; a single row may have more."""
        while start < stop:
            fits = int(np.searchsorted(self.offsets, self.offsets[start] + values, side="right")) - 1
            end = min(max(fits, start + 1), start + rows, stop)
            yield range(start, end)
            start = end

    def with_values(self, values: NDArray) -> Ragged:
        """Other values of the same row lengths."""
        if len(values) != len(self.values):
            raise ValueError(f"{len(values)} values for rows that hold {len(self.values)}")
        return Ragged(values, self.offsets)

    def padded(self, fill: float = 0) -> NDArray:
        """[rows, longest], with `fill` after each row's end."""
        inside = np.arange(self.lengths.max(initial=0)) < self.lengths[:, None]
        out = np.full(inside.shape, fill, dtype=self.values.dtype)
        out[inside] = self.values
        return out


def _gather(values: NDArray, places: Places) -> NDArray:
    """values[places]. `Ragged.places` never leaves the array, and without a check of that NumPy is quicker."""
    return values[places] if isinstance(places, slice) else values.take(places, axis=0, mode="clip")


def offsets_of(lengths: ArrayLike) -> NDArray[np.int64]:
    """[rows] lengths → [rows + 1] offsets."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def concatenated(parts: Sequence[Part]) -> Part:
    """Arrays, ragged rows, or records of these one after another, field by field. One part comes back as it is."""
    first: Any = parts[0]
    if len(parts) == 1 or first is None:
        return first
    if isinstance(first, np.ndarray):
        return np.concatenate(parts)  # type: ignore[arg-type, return-value]
    if isinstance(first, Ragged):
        values, lengths = (concatenated([getattr(part, name) for part in parts]) for name in ("values", "lengths"))
        return Ragged.from_lengths(values, lengths)  # type: ignore[return-value]
    return type(first)(*(concatenated([getattr(part, f.name) for part in parts]) for f in fields(first)))


@dataclass(frozen=True)
class Prompts:
    """Tokenised prompts. `ids` [P, 16] uint8: first 16 bytes of SHA-256 of the prompt's text."""

    ids: NDArray[np.uint8]
    tokens: Ragged

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Rollouts:
    """Completions sampled from a policy for the prompts of one prompts segment.

    prompt_index: [B] int64, row of the prompts segment.
    completions: B rows of token ids; the last is EOS exactly where `finished`.
    behavior_logprob: [N] float32, log-probability (nats) under the distribution each token was really drawn from;
        0 for greedy choices and forced tokens.
    forced: [N] bool, tokens the policy did not choose (calculator output): never in the loss.
    finished: [B] bool; False where the length limit cut the rollout.
    """

    prompt_index: NDArray[np.int64]
    completions: Ragged
    behavior_logprob: NDArray[np.float32]
    forced: NDArray[np.bool_]
    finished: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.completions)

    def rows(self, start: int, stop: int) -> Rollouts:
        """Rows start..stop, without copying. `prompt_index` stays as it is."""
        return self.take(slice(start, stop))

    def take(self, rows: Places) -> Rollouts:
        """The given rows, in the given order. `prompt_index` stays as it is."""
        places, offsets = self.completions.places(rows)
        of_tokens = (self.completions.values, self.behavior_logprob, self.forced)
        tokens, behavior, forced = (_gather(values, places) for values in of_tokens)
        return Rollouts(self.prompt_index[rows], Ragged(tokens, offsets), behavior, forced, self.finished[rows])


PER_TOKEN = ("q", "max_q", "logsumexp", "mean_q")
"""The arrays of `Scores` with one number a token."""


@dataclass(frozen=True)
class TopLogits:
    """The largest logits of each state (`score --keep-top`), n of them.

    q: [N, n] float32, largest first. ids: [N, n] int32, their tokens.
    rest_logsumexp: [N] float32, logsumexp over all other tokens; -inf where n is the whole vocabulary.
    """

    q: NDArray[np.float32]
    ids: NDArray[np.int32]
    rest_logsumexp: NDArray[np.float32]


@dataclass(frozen=True)
class Scores:
    """The teacher's view of each completion token a_t in its state s_t. All float32, in logit units.

    q: [N] raw logit of the token. max_q: [N] largest logit. logsumexp: [N]. mean_q: [N] mean logit.
    final_max_q: [B] largest logit in the state after the last token of an unfinished rollout; 0 for finished ones.
    top: the largest logits of each state, where they were kept.
    Maximum, logsumexp and mean are over the real vocabulary (the tokenizer's), not over padding rows of the head.
    Of a teacher behind a server, all are of log-probabilities: logsumexp is 0, and mean_q an upper bound.
    """

    q: NDArray[np.float32]
    max_q: NDArray[np.float32]
    logsumexp: NDArray[np.float32]
    mean_q: NDArray[np.float32]
    final_max_q: NDArray[np.float32]
    top: TopLogits | None = None

    @property
    def keep_top(self) -> int:
        """Number of largest logits kept per state."""
        return self.top.q.shape[1] if self.top else 0

    def with_top(self, n: int) -> Scores:
        """The same scores with only n of the largest logits. Raises ValueError for n > keep_top."""
        if n > self.keep_top:
            raise ValueError(f"{n} logits of scores that keep {self.keep_top}")
        if n == self.keep_top:
            return self
        if not n or self.top is None:
            return replace(self, top=None)
        largest = self.top.q[:, n]
        mass = np.exp(self.top.q[:, n:] - largest[:, None]).sum(axis=1, dtype=np.float64)
        rest = np.logaddexp(largest + np.log(mass), self.top.rest_logsumexp).astype(np.float32)
        return replace(self, top=TopLogits(self.top.q[:, :n], self.top.ids[:, :n], rest))

    @classmethod
    def empty(cls, tokens: int, rows: int, keep_top: int = 0) -> Scores:
        """Zeros, to be filled in."""
        per_token = {name: np.zeros(tokens, np.float32) for name in PER_TOKEN}
        width, rest = (tokens, keep_top), np.zeros(tokens, np.float32)
        top = TopLogits(np.zeros(width, np.float32), np.zeros(width, TOKEN_DTYPE), rest) if keep_top else None
        return cls(**per_token, final_max_q=np.zeros(rows, np.float32), top=top)

    @classmethod
    def concatenate(cls, parts: Sequence[Scores]) -> Scores:
        """One after another. Of the largest logits as many are kept as every part has."""
        n = min(part.keep_top for part in parts)
        return concatenated([part.with_top(n) for part in parts])

    def per_token(self) -> dict[str, NDArray[np.float32]]:
        """The arrays with one number a token, by name."""
        return {name: getattr(self, name) for name in PER_TOKEN}

    def rows(self, completions: Ragged, start: int, stop: int) -> Scores:
        """Rows start..stop of these scores of `completions`, without copying."""
        return self.take(completions, slice(start, stop))

    def take(self, completions: Ragged, rows: Places) -> Scores:
        """The given rows of these scores of `completions`, in the given order."""
        if len(self.q) != len(completions.values):
            raise ValueError(f"scores of {len(self.q)} tokens for completions that hold {len(completions.values)}")
        places, _ = completions.places(rows)
        top = TopLogits(*(_gather(values, places) for values in vars(self.top).values())) if self.top else None
        cut = {name: _gather(values, places) for name, values in self.per_token().items()}
        return Scores(**cut, final_max_q=self.final_max_q[rows], top=top)


@dataclass(frozen=True)
class ScoredRollouts:
    """One score segment joined with the rollouts and prompts it belongs to: what `learn` trains on."""

    prompts: Prompts
    rollouts: Rollouts
    scores: Scores

    def __len__(self) -> int:
        return len(self.rollouts)

    def take(self, rows: Places) -> ScoredRollouts:
        """The given rows, in the given order, with all prompts."""
        return ScoredRollouts(self.prompts, self.rollouts.take(rows), self.scores.take(self.rollouts.completions, rows))


@dataclass(frozen=True)
class UnscoredRow:
    """One rollout: 1-D arrays of its T tokens, and a few facts. See `Rollouts` for the meaning of each."""

    prompt_id: str
    prompt_tokens: NDArray[np.int32]
    completion_tokens: NDArray[np.int32]
    behavior_logprob: NDArray[np.float32]
    forced: NDArray[np.bool_]
    finished: bool
    policy: str

    @staticmethod
    def facts(part: ScoredRollouts, policy: str) -> dict[str, Any]:
        """The fields of the only row of `part`, as views."""
        rollouts, prompt = part.rollouts, part.rollouts.prompt_index[0]
        known: dict[str, Any] = {"prompt_id": part.prompts.ids[prompt].tobytes().hex(), "policy": policy}
        known |= {"prompt_tokens": part.prompts.tokens[prompt], "completion_tokens": rollouts.completions.values}
        known |= {"behavior_logprob": rollouts.behavior_logprob, "forced": rollouts.forced}
        return known | {"finished": bool(rollouts.finished[0])}


@dataclass(frozen=True)
class Row(UnscoredRow):
    """One scored rollout. See `Scores` for the meaning of each array; all are [T]. top: the largest logits of each
    state, [T, n], where they were kept."""

    q: NDArray[np.float32]
    max_q: NDArray[np.float32]
    logsumexp: NDArray[np.float32]
    mean_q: NDArray[np.float32]
    final_max_q: float
    teacher: str
    top: TopLogits | None = None

    @classmethod
    def of(cls, part: ScoredRollouts, row: int, policy: str, teacher: str) -> Row:
        """A row of scored rollouts. Its arrays are views."""
        one = part.take(slice(row, row + 1))
        scores: dict[str, Any] = {
            **one.scores.per_token(),
            "final_max_q": float(one.scores.final_max_q[0]),
            "top": one.scores.top,
        }
        return cls(**cls.facts(one, policy), **scores, teacher=teacher)
