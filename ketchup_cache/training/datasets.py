"""A cache for loops of one's own: a PyTorch dataset of scored rollouts, and the batches it makes of them.

rows = ScoredRows("cache", seed=0)
for batch in DataLoader(rows, batch_size=64, collate_fn=Collator(k=4)):
    ...  # batch["returns"], [B, T]; examples/own_loop.py is a whole loop
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from ketchup_cache.cache.cache import Cache
from ketchup_cache.method.returns import k_step_returns
from ketchup_cache.sharing.remote_cache import open_cache
from ketchup_cache.types import PER_TOKEN, Row


class ScoredRows(IterableDataset[Row]):
    """Scored rollouts, one pass over those that are there when the pass begins.

    address: a folder or an address. teacher, policy, keep_top: as `Cache.scored`. seed: of the order, in which the rows
    of a segment stay together; None: the order of commits. Set `epoch` for another order. shard: (i, n) for the i-th of
    n processes. Processes share the rows out, and so do the workers of a DataLoader in each.

    Raises CacheError, when the pass begins, as `Cache.scored` does.
    """

    def __init__(
        self,
        address: str | os.PathLike[str],
        *,
        teacher: str | None = None,
        policy: str | None = None,
        keep_top: int = 0,
        seed: int | None = None,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        self.address, self.selected, self.seed, self.shard = address, (teacher, policy, keep_top), seed, shard
        self.epoch = 0

    def __iter__(self) -> Iterator[Row]:
        cache: Cache = open_cache(self.address)
        teacher, policy, keep_top = self.selected
        refs = cache.scored(teacher, policy, keep_top=keep_top)
        rng = None if self.seed is None else np.random.default_rng([self.seed, self.epoch])
        worker = get_worker_info()
        index, count = self.shard
        if worker:
            index, count = index + count * worker.id, count * worker.num_workers
        first = 0
        for place in range(len(refs)) if rng is None else rng.permutation(len(refs)):
            rows: NDArray[np.int64] = np.arange(refs[place].rows)
            rows = rows if rng is None else rng.permutation(rows)
            mine = rows[(first + np.arange(len(rows))) % count == index]
            first += len(rows)
            if len(mine):
                part, ref = cache.load_scored(refs[place]), refs[place]
                yield from (Row.of(part, int(row), ref.policy.name, ref.teacher.name) for row in mine)


@dataclass(frozen=True)
class Collator:
    """Padded tensors of a batch of rows, with their K-step returns. Options and defaults are those of `learn`.

    k, weights, lam, end_weight, tail, normalization, unfinished: as `k_step_returns` has them. clip_return: to plus or
    minus this. pad: token id after each row's end; prompts are padded in front.

    A batch has, for B rows, the longest prompt P and the longest completion T:
    prompt_ids, completion_ids: [B, P], [B, T] int64. prompt_mask, completion_mask: the same, bool, True for real
    tokens. in_loss: [B, T] bool, True for tokens that the policy chose, in rows that are not dropped. returns,
    behavior_logprob, q, max_q, logsumexp, mean_q: [B, T] float32, 0 after each row's end. finished: [B] bool.
    top_q, top_ids: [B, T, n] where every row keeps n of the largest logits.
    """

    k: int = 4
    weights: Literal["comb", "flat", "gae", "mean"] = "comb"
    lam: float = 0.25
    end_weight: float | None = None
    tail: Literal["one-step", "jump"] = "one-step"
    normalization: Literal["raw", "centred", "logprob", "advantage"] = "logprob"
    unfinished: Literal["drop", "bootstrap", "zero"] = "bootstrap"
    clip_return: float = 100.0
    pad: int = 0

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        prompts = [row.prompt_tokens for row in rows]
        lengths = np.array([len(row.completion_tokens) for row in rows])
        finished = np.array([row.finished for row in rows])
        scores = {name: _padded([getattr(row, name) for row in rows]) for name in PER_TOKEN}
        exact: Mapping[str, Any] = {name: values.astype(np.float64) for name, values in scores.items()}
        final = np.array([row.final_max_q for row in rows])
        estimate: dict[str, Any] = {
            name: getattr(self, name) for name in ("k", "weights", "lam", "end_weight", "tail", "unfinished")
        }
        given: dict[str, Any] = {"normalization": self.normalization, "finished": finished, "final_max_q": final}
        returns = k_step_returns(**exact, lengths=lengths, **estimate, **given)
        mask = np.arange(lengths.max(initial=0)) < lengths[:, None]
        kept = finished | (self.unfinished != "drop")
        batch: dict[str, NDArray] = {
            "prompt_ids": _padded(prompts, self.pad, front=True).astype(np.int64),
            "prompt_mask": _padded([np.ones(len(prompt), np.bool_) for prompt in prompts], front=True),
            "completion_ids": _padded([row.completion_tokens for row in rows], self.pad).astype(np.int64),
            "completion_mask": mask,
            "in_loss": mask & kept[:, None] & ~_padded([row.forced for row in rows]),
            "returns": np.clip(returns, -self.clip_return, self.clip_return).astype(np.float32),
            "behavior_logprob": _padded([row.behavior_logprob for row in rows]),
            "finished": finished,
            **scores,
        }
        tops = [row.top for row in rows]
        if len({top.q.shape[1] if top else 0 for top in tops}) == 1 and tops[0]:
            batch["top_q"] = _padded([top.q for top in tops if top])
            batch["top_ids"] = _padded([top.ids for top in tops if top]).astype(np.int64)
        return {name: torch.from_numpy(values) for name, values in batch.items()}


def _padded(rows: Sequence[NDArray], fill: int = 0, *, front: bool = False) -> NDArray:
    """[B, longest, …], with `fill` after, or in front of, each row."""
    longest = max(map(len, rows), default=0)
    out = np.full((len(rows), longest, *rows[0].shape[1:]), fill, rows[0].dtype)
    for line, row in zip(out, rows, strict=True):
        start = longest - len(row) if front else 0
        line[start : start + len(row)] = row
    return out
