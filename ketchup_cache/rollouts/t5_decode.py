"""Decoding steps of a T5, from its own weights and modules, faster than by its forward pass.

The keys and values of a prompt are held once for all its samples, whose queries share them: copied to every sample
they are most of what decoding reads and copies. Masks and position biases are worked out once, not at each step.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
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
    passed_by = [model, model.decoder, *model.decoder.block]
    for block in model.decoder.block:
        own, crossing, _ = block.layer
        passed_by += [own, own.SelfAttention, crossing, crossing.EncDecAttention]
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
        first = self._stack.block[0].layer[0].SelfAttention
        self._shape = (first.n_heads, first.key_value_proj_dim)
        self._longest, self._read = longest, 0
        # of the last position; all others' are parts of it, for it depends on the distance alone
        self._bias = first.compute_bias(1, longest, past_seen_tokens=longest - 1)
        self._set_lengths(torch.from_numpy(np.ascontiguousarray(lengths)).to(self._device), encoded.dtype)
        self._across = [self._cross_keys(block.layer[1].EncDecAttention, encoded) for block in self._stack.block]
        self._prompt, self._each, self._slot = torch.arange(len(lengths), device=self._device), 1, None
        # keys and values of the tokens read: [2, rows, H, room, d] of each layer
        self._along = [encoded.new_empty(2, len(lengths), self._shape[0], 0, self._shape[1]) for _ in self._across]
        self.advance(torch.full((len(lengths),), decoder_start(model), device=self._device))

    def take(self, rows: Tensor) -> None:
        """Of the rows these alone. Not a new order, but one may come several times."""
        rows = rows.to(self._device)
        self.logits, self._prompt = self.logits[rows], self._prompt[rows]
        self._along = [kept[:, rows] for kept in self._along]
        used, ordinal, counts = self._prompt.unique_consecutive(return_inverse=True, return_counts=True)
        if len(used) <= (1 - LEAVE) * len(self._lengths):
            self._set_lengths(self._lengths[used], self._across[0][0].dtype)
            self._prompt, width = ordinal, self._behind.shape[1]
            self._across = [(keys[used, :, :width], values[used, :, :width]) for keys, values in self._across]
        self._each, self._slot = int(counts.max()), None
        if len(rows) < len(self._lengths) * self._each:
            rank = torch.arange(len(rows), device=self._device) - (counts.cumsum(0) - counts)[ordinal]
            self._slot = self._prompt * self._each + rank

    def advance(self, tokens: Tensor) -> None:
        """Read one more token of each row. tokens: [rows]."""
        rows, size = len(tokens), self._read + 1
        if size > (room := self._along[0].shape[3]):
            more = min(max(2 * room, ROOM), self._longest) - room
            self._along = [F.pad(kept, (0, 0, 0, more)) for kept in self._along]
        bias = self._bias[..., self._longest - size :]
        states = self._stack.embed_tokens(tokens)
        for block, along, across in zip(self._stack.block, self._along, self._across, strict=True):
            own, crossing, forward = block.layer
            attention, normed = own.SelfAttention, _norm(own, states)
            query, *new = (part(normed).view(rows, *self._shape) for part in (attention.q, attention.k, attention.v))
            along[0, :, :, self._read], along[1, :, :, self._read] = new
            keys, values = along[..., :size, :]
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

    def _cross_keys(self, attention: Any, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the prompts, [P, H, L, d] each, of the real tokens alone."""
        real = ~self._behind
        states = encoded[real]
        padded = states.new_zeros(2, *real.shape, attention.inner_dim)
        padded[0, real], padded[1, real] = attention.k(states), attention.v(states)
        keys, values = padded.view(2, *real.shape, *self._shape).transpose(2, 3)
        return keys, values

    def _set_lengths(self, lengths: Tensor, dtype: torch.dtype) -> None:
        """lengths: [P], of the prompts. Sets `_behind` [P, L], True behind a prompt's end, and `_mask` [P, 1, 1, L],
        what is added to the scores of attention; None where all prompts have one length."""
        self._lengths = lengths
        self._behind = torch.arange(int(lengths.max()), device=self._device) >= lengths[:, None]
        mask = torch.zeros(self._behind.shape, dtype=dtype, device=self._device)
        mask = mask.masked_fill_(self._behind, torch.finfo(dtype).min)[:, None, None]
        self._mask = mask if self._behind.any() else None


def _norm(layer: Any, states: Tensor) -> Tensor:
    """The layer's root-mean-square norm, in one call instead of the module's five."""
    return F.rms_norm(states, states.shape[1:], layer.layer_norm.weight, layer.layer_norm.variance_epsilon)


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
            states = BaseModelOutput(last_hidden_state=encoded[prompt.to(device)])
            real, ids = mask[prompt].to(device), given.to(device)
            own = model(encoder_outputs=states, attention_mask=real, decoder_input_ids=ids)
            logits = own.logits[:, -1].float()
            tolerance = (1e-3 if model.dtype == torch.float32 else 0.1) * logits.abs().max()
            if not ((rows.logits - logits).abs() <= tolerance).all():
                return False
            if stay is not None:
                rows.take(torch.tensor(stay))
                chosen = torch.arange(len(stay)) % model.config.vocab_size
                rows.advance(chosen.to(device))
                prompt, given = prompt[stay], torch.cat([given[stay], chosen[:, None]], 1)
    except (AttributeError, TypeError, RuntimeError):
        return False
    return True
