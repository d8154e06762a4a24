"""T5 without padding: every token of a batch once, rows end to end, and each prompt once for all its completions.

A transformer mixes tokens in its attention alone. All other layers take one long row of tokens, [N, D], as well as a
padded batch [B, T, D], and compute nothing behind the shorter rows. The attention takes its rows in groups of similar
length. Keys and values of a prompt are computed once, however many completions attend to it.

The layers are the model's own modules, so weights, gradients, adapters and what a module does in its own way stay
theirs. Only the order of things is written anew here, for the T5 family; `Head.of` checks it against the model's own
forward pass whenever a model is loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ketchup_cache.types import Ragged, offsets_of

OUTPUT_SCALED = {
    transformers.T5ForConditionalGeneration: lambda config: config.scale_decoder_outputs,
    transformers.MT5ForConditionalGeneration: lambda config: False,
    transformers.UMT5ForConditionalGeneration: lambda config: config.tie_word_embeddings,
}
"""The models whose order of layers this is, and whether they scale the states before their head."""

SCORES_AT_ONCE = {"cuda": 2**28, "cpu": 2**20}
"""Attention scores (heads × queries × keys) of a group of rows, by kind of device; other kinds take what a CPU takes.
4 MB: on a CPU the scores of a few long rows stay in its cache, and short rows still come by the dozen."""
HIDDEN_AT_ONCE = 2**20
"""Numbers that a feed-forward layer holds on a CPU: 4 MB, which the allocator hands out again and again. Larger
blocks come fresh from the operating system each time, and their first touch takes longer than the activation."""


def is_ragged(model: transformers.PreTrainedModel) -> bool:
    """Whether `t5_states` knows this model: one of T5's family, whole on one device."""
    return type(model) in OUTPUT_SCALED and len(set(getattr(model, "hf_device_map", {"": 0}).values())) == 1


def t5_states(model: Any, prompts: Ragged, inputs: Ragged, owner: NDArray[np.int64]) -> Tensor:
    """The head's input at every token of the decoder, [N, D], rows end to end.

    prompts: P rows of token ids. inputs: B rows of the decoder's token ids. owner: [B], the prompt of each of them, in
    ascending order.
    """
    device = model.shared.weight.device
    most = SCORES_AT_ONCE.get(device.type, SCORES_AT_ONCE["cpu"]) // model.config.num_heads
    encoded = _stack(model.encoder, prompts.values, Rows.of(prompts.lengths, prompts.lengths, most, device))
    # the queries of a prompt are all tokens of its completions, which stand side by side
    queries = np.bincount(owner, inputs.lengths, len(prompts)).astype(np.int64)
    across = Rows.of(queries, prompts.lengths, most, device)
    rows = Rows.of(inputs.lengths, inputs.lengths, most, device)
    states = _stack(model.decoder, inputs.values, rows, encoded, across)
    return states * model.model_dim**-0.5 if OUTPUT_SCALED[type(model)](model.config) else states


def _stack(
    stack: Any, ids: NDArray[np.int64], rows: Rows, encoded: Tensor | None = None, across: Rows | None = None
) -> Tensor:
    """The encoder, or the decoder with the encoder's states and the rows that attend to them: ids [N] → [N, D]."""
    weight = stack.embed_tokens.weight
    states = stack.embed_tokens(int_tensor(ids, weight.device))
    states = stack.dropout(states.float() if _widened(weight) else states)
    bias = _Bias(rows.longest, causal=across is not None)
    for block in map(_computing, stack.block):
        computed = getattr(block, "unpadded", partial(compute_block, block))
        given = states, rows, bias, encoded, across
        again = stack.gradient_checkpointing
        states = checkpoint(computed, *given, use_reentrant=False) if again else computed(*given)
    return stack.dropout(_norm(_computing(stack.final_layer_norm), states))


def compute_block(
    block: Any, states: Tensor, rows: Rows, bias: _Bias, encoded: Tensor | None, across: Rows | None
) -> Tensor:
    """One layer, [N, D] → [N, D]. A block may have it as a method of its own, `unpadded`, with FSDP's hooks around."""
    states = _attend(block.layer[0], states, rows, bias=bias)
    if across is not None:
        states = _attend(block.layer[1], states, across, others=encoded)
    return _feed_forward(block.layer[-1], states)


# -------------------------------------------------------------------------------------------------------- layers


def _widened(weight: Tensor) -> bool:
    """Whether to compute in float32 with bfloat16 weights: on a processor that has no bfloat16 products they take much
    longer, and round more. Never where gradients flow, which belong to the weights themselves."""
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu" or torch.is_grad_enabled():
        return False
    return not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _computing(module: Any) -> Any:
    """The module itself, or for as long as it is needed a copy in float32."""
    return copy.deepcopy(module).float() if _widened(next(module.parameters())) else module


def _norm(norm: Any, states: Tensor) -> Tensor:
    """T5's norm as one kernel: on a GPU, its five small ones read and write all states again and again."""
    if states.device.type != "cuda":
        return norm(states)
    return F.rms_norm(states, (states.shape[-1],), norm.weight, norm.variance_epsilon)


def _feed_forward(layer: Any, states: Tensor) -> Tensor:
    """The layer with its norm and its residual, [N, D] → [N, D]."""
    if torch.is_grad_enabled() or states.device.type != "cpu":
        return states + layer.dropout(layer.DenseReluDense(_norm(layer.layer_norm, states)))
    chunk = max(HIDDEN_AT_ONCE // layer.DenseReluDense.wo.in_features, 64)
    return torch.cat([layer(part) for part in states.split(chunk)])


# ------------------------------------------------------------------------------------------------------ attention


@dataclass(frozen=True)
class Padded:
    """The tokens of rows in groups of R rows of similar length, padded to W tokens, and back.

    places: of each group [R × W], places of its tokens among all; behind a row's end any place. real: of each group
    [R, W] bool, False behind a row's end. back: [N], where each token is in the groups end to end; of those that are in
    no group any place. nowhere: [N] bool, these; or None.
    """

    places: list[Tensor]
    real: list[NDArray[np.bool_]]
    back: Tensor
    nowhere: Tensor | None

    def spread(self, values: Tensor) -> Iterable[Tensor]:
        """[N, D] → [R × W, D] of each group, one after the other where no gradient needs all of them."""
        if not values.requires_grad:
            return (values[places] for places in self.places)
        spread = _Gather.apply(values, self._flat[0], self.back, self.nowhere)
        return spread.split([len(places) for places in self.places])

    def collect(self, parts: Sequence[Tensor]) -> Tensor:
        """The way back."""
        values = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        return _Gather.apply(values, self.back, *self._flat) if values.requires_grad else values[self.back]

    @cached_property
    def _flat(self) -> tuple[Tensor, Tensor]:
        """Of all groups end to end: the places, and which of them are behind a row's end."""
        behind = np.concatenate([~real.reshape(-1) for real in self.real])
        return torch.cat(self.places), torch.from_numpy(behind).to(self.back.device)


class _Gather(torch.autograd.Function):
    """values[places], whose gradient is gathered too: gradient[back], and 0 at `none`. torch's own has to sort the
    places and add up: a token may come again behind a row's end. Nothing that counts depends on what is there, so no
    gradient comes from there."""

    @staticmethod
    def forward(context: Any, values: Tensor, places: Tensor, back: Tensor, none: Tensor | None) -> Tensor:
        context.save_for_backward(back, none)
        return values[places]

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        back, none = context.saved_tensors
        found = gradient[back]
        return found if none is None else found.masked_fill_(none[:, None], 0), None, None, None


@dataclass(frozen=True)
class Rows:
    """The groups of a batch, whose rows attend together: Q queries and K keys a row.

    seen: of each group [R, 1, 1, K] bool, which keys are real; None where all are. longest: most keys of a row.
    """

    queries: Padded
    keys: Padded
    seen: list[Tensor | None]
    longest: int

    @classmethod
    def of(cls, queries: NDArray[np.int64], keys: NDArray[np.int64], most: int, device: torch.device) -> Rows:
        """queries, keys: [R] tokens of each row; rows stand end to end. most: of queries × keys in a group."""
        together = list(groups_of(queries, keys, most))
        asking, asked = _padded(queries, together, device, backwards=True), _padded(keys, together, device)
        seen = [None if real.all() else torch.from_numpy(real[:, None, None]).to(device) for real in asked.real]
        return cls(asking, asked, seen, int(keys.max()))


def _padded(
    lengths: NDArray[np.int64], together: list[NDArray[np.int64]], device: torch.device, *, backwards: bool = False
) -> Padded:
    """Where the tokens of rows go. together: the rows of each group. backwards: a row's last token first, behind its
    padding."""
    starts = offsets_of(lengths)
    places, real, back, done = [], [], np.full(starts[-1], -1), 0
    for rows in together:
        within = np.arange(_aligned(int(lengths[rows].max()), device))[:: -1 if backwards else 1]
        there = within < lengths[rows, None]
        at = starts[rows, None] + np.minimum(within, lengths[rows, None] - 1)
        back[at[there]] = done + np.flatnonzero(there)
        done += at.size
        places.append(int_tensor(at.reshape(-1), device))
        real.append(there)
    nowhere = torch.from_numpy(back < 0).to(device) if (back < 0).any() else None
    return Padded(places, real, int_tensor(np.maximum(back, 0), device), nowhere)


def _aligned(width: int, device: torch.device) -> int:
    """On a GPU the fused kernels take masks whose rows begin at multiples of 16 bytes; others are copied, or slow."""
    return -(-width // 8) * 8 if device.type == "cuda" else width


def groups_of(queries: NDArray[np.int64], keys: NDArray[np.int64], most: int) -> Iterator[NDArray[np.int64]]:
    """Every row with queries once, in groups of at most `most` queries × keys, padded, or of a single row. Rows without
    queries have nothing to attend."""
    order = np.lexsort((queries, keys))
    order = order[queries[order] > 0]
    first, widest = 0, 0
    for place, row in enumerate(order):
        widest = max(widest, int(queries[row]))
        if place > first and (place + 1 - first) * widest * int(keys[row]) > most:
            yield order[first:place]
            first, widest = place, int(queries[row])
    if len(order):
        yield order[first:]


class _Bias:
    """T5's relative position bias. It depends on the distance of two tokens alone: with the queries of a row backwards,
    each one sees the distances that the one before it saw, shifted by one. So all of it is one row of distances, looked
    at through a window that moves, and takes no memory of its own. Shorter rows take a corner of it.

    Layers without a bias of their own take that of the layer before, as T5's do.
    """

    def __init__(self, longest: int, *, causal: bool = False) -> None:
        self._longest, self._causal = longest, causal
        self._full: Tensor | None = None
        self._masked: dict[int, Tensor] = {}

    def of(self, attention: Any, states: Tensor) -> None:
        if not attention.has_relative_attention_bias or not self._longest:
            return
        n = _aligned(self._longest, states.device)
        # a token with n − 1 tokens on either side sees every distance once
        every = attention.compute_bias(1, 2 * n - 1, device=states.device, past_seen_tokens=n - 1)[:, :, 0]
        if self._causal:
            every = every.masked_fill(torch.arange(1 - n, n, device=states.device) > 0, -torch.inf)
        # heads come last in it: in any other order than this, attention would make a copy of the whole window
        full = every.to(states.dtype).contiguous().unfold(2, n, 1)
        # the fused kernels of GPUs refuse masks whose rows overlap
        self._full = full if full.device.type == "cpu" else full.contiguous()
        self._masked.clear()

    def corner(self, rows: Rows, number: int) -> Tensor:
        """[1 or R, H, Q, K] of a group of self-attention, its queries backwards."""
        assert self._full is not None
        seen, queries, keys = rows.seen[number], rows.queries.real[number].shape[1], rows.keys.real[number].shape[1]
        corner = self._full[:, :, self._full.shape[2] - queries :, :keys]
        if seen is None or self._causal:  # what is behind a row's end is in its future
            return corner
        if number not in self._masked:
            corner = torch.where(seen, corner, corner.new_full((), -torch.inf))
            if corner.device.type == "cpu" and not torch.is_grad_enabled():
                return corner  # little work, and it stays in the cache of a processor
            self._masked[number] = corner  # the layers share it; each would keep its own for the backward pass
        return self._masked[number]


def _attend(
    layer: Any, states: Tensor, rows: Rows, *, others: Tensor | None = None, bias: _Bias | None = None
) -> Tensor:
    """One attention layer with its norm and its residual, [N, D] → [N, D]. others: [M, D], what is attended to; None
    for the states themselves."""
    attention = layer.SelfAttention if others is None else layer.EncDecAttention
    normed = _norm(layer.layer_norm, states)
    source = normed if others is None else others
    query, key, value = attention.q(normed), attention.k(source), attention.v(source)
    if bias is not None:
        bias.of(attention, query)
    if not rows.seen:
        return states
    parts, dropout = [], attention.dropout if attention.training else 0.0
    spread = (rows.queries.spread(query), rows.keys.spread(key), rows.keys.spread(value))
    del normed, source, query, key, value  # a tensor of all tokens each: most of what a pass holds at its peak
    for number, tokens in enumerate(zip(*spread, strict=True)):
        heads = (len(rows.keys.real[number]), -1, attention.n_heads, attention.key_value_proj_dim)
        mask = bias.corner(rows, number) if bias is not None else rows.seen[number]
        query, key, value = (values.view(heads).transpose(1, 2) for values in tokens)
        mixed = F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=attention.scaling)
        parts.append(mixed.transpose(1, 2).reshape(len(tokens[0]), -1))
    return states + layer.dropout(attention.o(rows.queries.collect(parts)))


def int_tensor(array: NDArray, device: torch.device) -> Tensor:
    """An int64 copy: arrays of a cache are read-only."""
    return torch.tensor(array, dtype=torch.long, device=device)
