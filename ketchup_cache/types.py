"""The values that flow between the stages: prompts → rollouts → scores.

NumPy only, so that reading a cache never imports torch.

Notation (docs/method.md): B rollouts, T tokens of one completion, N tokens of all completions, P prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

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

    @classmethod
    def concatenate(cls, parts: Sequence[Ragged]) -> Ragged:
        if len(parts) == 1:
            return parts[0]
        lengths = np.concatenate([part.lengths for part in parts])
        return cls.from_lengths(np.concatenate([part.values for part in parts]), lengths)

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
        offsets = self.offsets[start : stop + 1]
        return Ragged(self.values[offsets[0] : offsets[-1]], offsets - offsets[0])

    def take(self, rows: Sequence[int] | NDArray[np.integer]) -> Ragged:
        """The given rows, in the given order."""
        places, offsets = self.places(rows)
        return Ragged(_gather(self.values, places), offsets)

    def places(self, rows: Sequence[int] | NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where the values of the given rows are in `values`, and the offsets of these rows laid end to end."""
        rows = np.asarray(rows, dtype=np.int64)
        starts = self.offsets[rows]
        lengths = self.offsets[rows + 1] - starts
        offsets = offsets_of(lengths)
        # a row's start, less its start in the result, plus the place in the result
        return np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1]), offsets

    def with_values(self, values: NDArray) -> Ragged:
        """Other values of the same row lengths."""
        if len(values) != len(self.values):
            raise ValueError(f"{len(values)} values for rows that hold {len(self.values)}")
        return Ragged(values, self.offsets)

    def padded(self, fill: float = 0) -> NDArray:
        """[rows, longest], with `fill` after each row's end."""
        lengths = self.lengths
        width = int(lengths.max(initial=0))
        out = np.full((len(self), width), fill, dtype=self.values.dtype)
        out[np.arange(width) < lengths[:, None]] = self.values
        return out


def _gather(values: NDArray, places: NDArray[np.int64]) -> NDArray:
    """values[places]. `Ragged.places` never leaves the array, and without a check of that NumPy is quicker."""
    return values.take(places, axis=0, mode="clip")


def offsets_of(lengths: ArrayLike) -> NDArray[np.int64]:
    """[rows] lengths → [rows + 1] offsets."""
    lengths = np.asarray(lengths, dtype=np.int64)
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


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

    @classmethod
    def concatenate(cls, parts: Sequence[Rollouts]) -> Rollouts:
        """One after another. `prompt_index` stays as it is."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            prompt_index=np.concatenate([part.prompt_index for part in parts]),
            completions=Ragged.concatenate([part.completions for part in parts]),
            behavior_logprob=np.concatenate([part.behavior_logprob for part in parts]),
            forced=np.concatenate([part.forced for part in parts]),
            finished=np.concatenate([part.finished for part in parts]),
        )

    def take(self, rows: NDArray[np.integer]) -> Rollouts:
        """The given rows, in the given order. `prompt_index` stays as it is."""
        return self._take(rows, *self.completions.places(rows))

    def _take(self, rows: NDArray[np.integer], places: NDArray[np.int64], offsets: NDArray[np.int64]) -> Rollouts:
        return Rollouts(
            prompt_index=self.prompt_index[rows],
            completions=Ragged(_gather(self.completions.values, places), offsets),
            behavior_logprob=_gather(self.behavior_logprob, places),
            forced=_gather(self.forced, places),
            finished=self.finished[rows],
        )


@dataclass(frozen=True)
class Scores:
    """The teacher's view of each completion token a_t in its state s_t. All float32, in logit units.

    q: [N] raw logit of the token. max_q: [N] largest logit. logsumexp: [N]. mean_q: [N] mean logit.
    final_max_q: [B] largest logit in the state after the last token of an unfinished rollout; 0 for finished ones.
    Maximum, logsumexp and mean are over the real vocabulary (the tokenizer's), not over padding rows of the head.
    top_q: [N, top] float32, the `top` largest logits of each state, largest first; top_ids: [N, top] int32, their
        tokens. top is 0 where they were not kept (`score --keep-top`).
    rest_logsumexp: [N] float32, logsumexp over all tokens but these; logsumexp itself where top is 0, and -inf where
        top is the whole vocabulary.
    """

    q: NDArray[np.float32]
    max_q: NDArray[np.float32]
    logsumexp: NDArray[np.float32]
    mean_q: NDArray[np.float32]
    final_max_q: NDArray[np.float32]
    top_q: NDArray[np.float32] = None  # type: ignore[assignment]  # __post_init__ makes it [N, 0]
    top_ids: NDArray[np.int32] = None  # type: ignore[assignment]
    rest_logsumexp: NDArray[np.float32] = None  # type: ignore[assignment]  # needed where there is a top_q

    def __post_init__(self) -> None:
        for name, dtype in (("top_q", np.float32), ("top_ids", TOKEN_DTYPE)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, np.zeros((len(self.q), 0), dtype))
        if self.rest_logsumexp is None:
            if self.top:
                raise ValueError("top_q without rest_logsumexp")
            object.__setattr__(self, "rest_logsumexp", self.logsumexp)

    @property
    def top(self) -> int:
        """How many of the largest logits are kept of each state."""
        return int(self.top_q.shape[1])

    def with_top(self, top: int) -> Scores:
        """The same scores with only so many of the largest logits; there must be as many. The others join the rest."""
        if top > self.top:
            raise ValueError(f"{top} logits of scores that keep {self.top}")
        if top == self.top:
            return self
        rest = self.logsumexp
        if top:
            largest = self.top_q[:, top]
            mass = np.exp(self.top_q[:, top:] - largest[:, None]).sum(axis=1, dtype=np.float64)
            rest = np.logaddexp(largest + np.log(mass), self.rest_logsumexp).astype(np.float32)
        return replace(self, top_q=self.top_q[:, :top], top_ids=self.top_ids[:, :top], rest_logsumexp=rest)

    @classmethod
    def empty(cls, tokens: int, rows: int, top: int = 0) -> Scores:
        q, max_q, logsumexp, mean_q, final_max_q = (
            np.zeros(n, np.float32) for n in (tokens, tokens, tokens, tokens, rows)
        )
        top_q, top_ids = np.zeros((tokens, top), np.float32), np.zeros((tokens, top), TOKEN_DTYPE)
        return cls(q, max_q, logsumexp, mean_q, final_max_q, top_q, top_ids, np.zeros(tokens, np.float32))

    @classmethod
    def concatenate(cls, parts: Sequence[Scores]) -> Scores:
        """One after another. Of the largest logits as many are kept as every part has."""
        if len(parts) == 1:
            return parts[0]
        parts = [p.with_top(min(p.top for p in parts)) for p in parts]
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)))

    def per_token(self) -> dict[str, NDArray[np.float32]]:
        """The arrays with one value for each token, by name."""
        return {name: getattr(self, name) for name in ("q", "max_q", "logsumexp", "mean_q")}

    def of_tokens(self) -> dict[str, NDArray]:
        """The arrays with one value, or one row, for each token, by name."""
        top = {name: getattr(self, name) for name in ("top_q", "top_ids", "rest_logsumexp")}
        return {**self.per_token(), **top}

    def take(self, completions: Ragged, rows: NDArray[np.integer]) -> Scores:
        """The given rows of these scores of `completions`, in the given order."""
        if len(self.q) != len(completions.values):
            raise ValueError(f"scores of {len(self.q)} tokens for completions that hold {len(completions.values)}")
        return self._take(rows, completions.places(rows)[0])

    def _take(self, rows: NDArray[np.integer], places: NDArray[np.int64]) -> Scores:
        arrays = self.of_tokens() if self.top else self.per_token()  # without a top, the rest is logsumexp itself
        return Scores(
            **{name: _gather(values, places) for name, values in arrays.items()}, final_max_q=self.final_max_q[rows]
        )


@dataclass(frozen=True)
class ScoredRollouts:
    """One score segment joined with the rollouts and prompts it belongs to: what `learn` trains on."""

    prompts: Prompts
    rollouts: Rollouts
    scores: Scores

    def __len__(self) -> int:
        return len(self.rollouts)

    def take(self, rows: NDArray[np.integer]) -> ScoredRollouts:
        """The given rows, in the given order, with all prompts."""
        places, offsets = self.rollouts.completions.places(rows)  # once for all arrays
        return ScoredRollouts(self.prompts, self.rollouts._take(rows, places, offsets), self.scores._take(rows, places))


@dataclass(frozen=True)
class Row:
    """One scored rollout: 1-D arrays, and a few facts. See `Rollouts` and `Scores` for the meaning of each."""

    prompt_id: str
    prompt_tokens: NDArray[np.int32]
    completion_tokens: NDArray[np.int32]
    behavior_logprob: NDArray[np.float32]
    forced: NDArray[np.bool_]
    finished: bool
    q: NDArray[np.float32]
    max_q: NDArray[np.float32]
    logsumexp: NDArray[np.float32]
    mean_q: NDArray[np.float32]
    final_max_q: float
    policy: str
    teacher: str
