"""Decoding steps of a T5, from its own weights and modules.

Two things that its forward pass can't do. The keys and values of a prompt are there once for all its samples, whose
queries share them: copied to every sample they are most of what decoding reads and copies. And masks, position biases
and all that transformers works out anew at each step are worked out once.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MT5ForConditionalGeneration, PreTrainedModel, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from ketchup_cache.models.forward import decoder_start
from ketchup_cache.models.load import input_device

LEAVE = 0.25
"""Share of the prompts that have no sample left when they leave: the others' keys and values have to be copied then."""
ROOM = 32
"""Tokens of a row for which there is room at first; then twice as many, and so on."""

_agreed: weakref.WeakKeyDictionary[PreTrainedModel, bool] = weakref.WeakKeyDictionary()
"""Models that were compared with their own forward pass, and whether it came out the same."""


def can_step(model: PreTrainedModel) -> bool:
    """Whether `T5Rows` does what this model does: a T5 with nothing attached to what is passed by, checked once."""
    # half precision is clamped after every layer; not done here
    if type(model) not in (T5ForConditionalGeneration, MT5ForConditionalGeneration) or model.dtype == torch.float16:
        return False
    stack = model.decoder
    passed_by = [model, stack, *stack.block]
    passed_by += [part for block in stack.block for layer in block.layer[:2] for part in (layer, _attention(layer))]
    if any(part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in passed_by):
        return False
    if model not in _agreed:
        _agreed[model] = _agrees(model)
    return _agreed[model]


class T5Rows:
    """Rows of a T5 that are being decoded. logits: [rows, V] float32, of each row's next token."""

    logits: Tensor

    def __init__(self, model: PreTrainedModel, lengths: NDArray[np.int64], encoded: Tensor, longest: int) -> None:
        """One row for each prompt. lengths: [P]. encoded: [P, max(lengths), D], the encoder's states. longest: tokens
        that a row may be given, the first of which is read here."""
        self._model: Any = model
        self._stack: Any = model.decoder
        self._device = input_device(model)
        self._first = self._stack.block[0].layer[0].SelfAttention
        self._shape = (self._first.n_heads, self._first.key_value_proj_dim)
        self._longest, self._read = longest, 0
        # of the last position; all others' are parts of it, for it depends on the distance alone
        self._bias = self._first.compute_bias(1, longest, past_seen_tokens=longest - 1)
        self._lengths = torch.from_numpy(np.ascontiguousarray(lengths)).to(self._device)
        real = ~self._behind()
        self._across = [self._cross_keys(block.layer[1].EncDecAttention, encoded, real) for block in self._stack.block]
        self._mask = self._cross_mask(encoded.dtype)
        self._prompt, self._each, self._slot = torch.arange(len(lengths), device=self._device), 1, None
        room = min(ROOM, longest)
        self._along = [
            tuple(encoded.new_empty(len(lengths), self._shape[0], room, self._shape[1]) for _ in range(2))
            for _ in self._stack.block
        ]
        self.advance(torch.full((len(lengths),), decoder_start(model), device=self._device))

    def take(self, rows: Tensor) -> None:
        """Of the rows these alone. Not a new order, but one may come several times."""
        rows = rows.to(self._device)
        self.logits, self._prompt = self.logits[rows], self._prompt[rows]
        self._along = [(keys[rows], values[rows]) for keys, values in self._along]
        used, ordinal, counts = self._prompt.unique_consecutive(return_inverse=True, return_counts=True)
        if len(used) <= (1 - LEAVE) * len(self._lengths):
            self._lengths, self._prompt = self._lengths[used], ordinal
            width = int(self._lengths.max())
            self._across = [(keys[used, :, :width], values[used, :, :width]) for keys, values in self._across]
            self._mask = self._cross_mask(self._across[0][0].dtype)
        self._each = int(counts.max())
        self._slot = None
        if len(rows) < len(self._lengths) * self._each:
            rank = torch.arange(len(rows), device=self._device) - (counts.cumsum(0) - counts)[ordinal]
            self._slot = self._prompt * self._each + rank

    def advance(self, tokens: Tensor) -> None:
        """Read one more token of each row. tokens: [rows]."""
        rows, size = len(tokens), self._read + 1
        self._make_room(size)
        bias = self._bias[..., self._longest - size :]
        states = self._stack.embed_tokens(tokens)
        for block, along, across in zip(self._stack.block, self._along, self._across, strict=True):
            own, crossing, forward = block.layer
            attention, normed = own.SelfAttention, _norm(own, states)
            query = attention.q(normed).view(rows, *self._shape)
            for kept, projection in zip(along, (attention.k, attention.v), strict=True):
                kept[:, :, self._read] = projection(normed).view(rows, *self._shape)
            keys, values = (kept[:, :, :size] for kept in along)
            found = F.scaled_dot_product_attention(query[:, :, None], keys, values, attn_mask=bias, scale=1.0)
            states = states + attention.o(found.reshape(rows, -1))
            attention = crossing.EncDecAttention
            query = self._spread(attention.q(_norm(crossing, states)))
            found = F.scaled_dot_product_attention(query, *across, attn_mask=self._mask, scale=1.0)
            states = states + attention.o(self._gather(found))
            states = states + forward.DenseReluDense(_norm(forward, states))
        self._read = size
        states = self._stack.final_layer_norm(states)
        if getattr(self._model.config, "scale_decoder_outputs", False):  # T5, but not FLAN-T5 and mT5
            states = states * self._model.model_dim**-0.5
        self.logits = self._model.lm_head(states).to(self._device, torch.float32)

    def _spread(self, query: Tensor) -> Tensor:
        """[rows, H·d] → [P, H, most samples of a prompt, d]: empty places where a prompt has fewer."""
        if self._slot is not None:
            query = query.new_zeros(len(self._lengths) * self._each, query.shape[1]).index_copy_(0, self._slot, query)
        return query.view(len(self._lengths), self._each, *self._shape).transpose(1, 2)

    def _gather(self, found: Tensor) -> Tensor:
        """The way back."""
        found = found.transpose(1, 2).reshape(len(self._lengths) * self._each, -1)
        return found if self._slot is None else found[self._slot]

    def _make_room(self, size: int) -> None:
        room = self._along[0][0].shape[2]
        if size > room:
            more = min(2 * room, self._longest) - room
            self._along = [
                (F.pad(keys, (0, 0, 0, more)), F.pad(values, (0, 0, 0, more))) for keys, values in self._along
            ]

    def _cross_keys(self, attention: Any, encoded: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the prompts, [P, H, L, d] each, of the real tokens [P, L] alone."""
        states = encoded[real]

        def projected(projection: nn.Module) -> Tensor:
            found = projection(states)
            padded = found.new_zeros(*real.shape, found.shape[1])
            padded[real] = found
            return padded.view(*real.shape, *self._shape).transpose(1, 2)

        return projected(attention.k), projected(attention.v)

    def _behind(self) -> Tensor:
        """[P, L]: True behind a prompt's end."""
        return torch.arange(int(self._lengths.max()), device=self._device) >= self._lengths[:, None]

    def _cross_mask(self, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores of attention, [P, 1, 1, L]; None where all prompts have one length."""
        behind = self._behind()
        if not behind.any():
            return None
        mask = torch.zeros(behind.shape, dtype=dtype, device=self._device)
        return mask.masked_fill_(behind, torch.finfo(dtype).min)[:, None, None]


def _norm(layer: Any, states: Tensor) -> Tensor:
    """The layer's root-mean-square norm, in one call instead of the module's five."""
    return F.rms_norm(states, states.shape[1:], layer.layer_norm.weight, layer.layer_norm.variance_epsilon)


def _attention(layer: Any) -> Any:
    return layer.SelfAttention if hasattr(layer, "SelfAttention") else layer.EncDecAttention


@torch.no_grad()
def _agrees(model: PreTrainedModel) -> bool:
    """Two made-up prompts, three steps, rows that leave, against the model's own pass. Another version of transformers
    may have another T5: then decoding is its own, and slower."""
    generator = torch.Generator().manual_seed(0)
    device = input_device(model)
    encoded = torch.randn(2, 5, model.config.d_model, generator=generator).to(device, model.dtype)
    lengths, start = np.array([5, 3]), decoder_start(model)
    prompt, given = torch.tensor([0, 1]), torch.tensor([[start], [start]])
    mask = torch.arange(5) < torch.from_numpy(lengths)[:, None]
    try:
        rows = T5Rows(model, lengths, encoded, 3)
        for stay in ([0, 0, 1], [1, 2], None):
            own = (
                model(
                    encoder_outputs=BaseModelOutput(last_hidden_state=encoded[prompt.to(device)]),
                    attention_mask=mask[prompt].to(device),
                    decoder_input_ids=given.to(device),
                )
                .logits[:, -1]
                .float()
            )
            tolerance = (1e-3 if model.dtype == torch.float32 else 0.1) * own.abs().max()
            if not ((rows.logits - own).abs() <= tolerance).all():
                return False
            if stay is not None:
                rows.take(torch.tensor(stay))
                prompt, given = prompt[stay], given[stay]
                chosen = torch.arange(len(stay)) % model.config.vocab_size
                rows.advance(chosen.to(device))
                given = torch.cat([given, chosen[:, None]], 1)
    except (AttributeError, TypeError, RuntimeError):
        return False
    return True
