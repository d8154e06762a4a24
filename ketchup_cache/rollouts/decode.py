"""Batched decoding that drops finished rows; `generate` keeps computing them until the whole batch ends.

A prompt is computed once for all its samples, with an encoder or without. What a row draws depends on numbers of its
own, and not on who stands beside it or has left.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin, LogitsProcessor, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ketchup_cache.models.batching import token_budget_batches
from ketchup_cache.models.forward import decoder_start, padded
from ketchup_cache.models.load import input_device
from ketchup_cache.rollouts.draw import draw, number_type
from ketchup_cache.rollouts.t5_decode import T5Rows, can_step
from ketchup_cache.types import Ragged

LEAVE = 0.25
"""Share of the rows that has ended when they leave: the others' keys and values have to be copied then."""

CPU_TOKENS = 1024
"""Padded prompt tokens that are encoded at once on a CPU: more of them are no faster there, and padding costs."""

OWN_WAYS = ("generate", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
"""Methods by which an architecture tells `generate` that decoding it takes more than tokens, mask and positions."""


def can_decode(model: PreTrainedModel) -> bool:
    """Whether `decode` knows all that this model needs from step to step. Where not, `generate` does."""
    own = (n for n in OWN_WAYS if n in vars(model) or getattr(type(model), n, None) is not getattr(GenerationMixin, n))
    if model.is_remote_code() or any(own):
        return False
    takes = inspect.signature(model.forward).parameters
    if not _cache_name(takes) or (model.config.is_encoder_decoder and "encoder_outputs" not in takes):
        return False
    # a state that is not keys and values of each token (Mamba's) could be selected too, but is not tested here
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in _empty_cache(model).layers)


class Decoding(NamedTuple):
    """How a batch of B rows is decoded: prompts × `samples`; the samples of a prompt stand together.

    longest: most tokens of a row. eos: ids that end one. uniform: [B, longest] float64 in [0, 1), what each row draws
    its tokens by; None for the likeliest token. processors: called one after the other with the tokens so far, behind
    one of no meaning, and the scores [rows, V] float32. on_leave: called whenever rows leave, with the places of the
    others among the rows of the last call.
    """

    samples: int
    longest: int
    eos: list[int]
    uniform: Tensor | None
    processors: Sequence[LogitsProcessor]
    on_leave: Callable[[list[int]], None] | None


@torch.no_grad()
def decode(model: PreTrainedModel, prompts: Ragged, how: Decoding) -> tuple[Tensor, Tensor]:
    """Tokens [B, T] int64 and their log-probabilities [B, T] float32 (greedy: 0), T ≤ `longest`; after the first EOS
    of a row anything."""
    longest = how.longest
    if can_step(model):
        encoded = _encode(model, prompts).last_hidden_state
        rows: T5Rows | _Rows = T5Rows(model, prompts.lengths, encoded, longest)
    else:
        rows = _Rows(model, prompts)
    rows.take(torch.arange(len(prompts)).repeat_interleave(how.samples))
    device, size = rows.logits.device, len(prompts) * how.samples
    uniform = None if how.uniform is None else how.uniform.to(device, number_type(device))
    place = torch.arange(size, device=device)
    going = torch.ones(size, dtype=torch.bool, device=device)
    ends = torch.tensor(how.eos, device=device)
    tokens = torch.zeros(size, longest + 1, dtype=torch.long, device=device)
    logprob = torch.zeros(size, longest, device=device)
    for step in range(longest):
        scores, so_far = rows.logits, tokens[place, : step + 1]
        for processor in how.processors:
            scores = processor(so_far, scores)
        if uniform is None:
            chosen = scores.argmax(1)
        else:
            chosen, logprob[place, step] = draw(scores, uniform[place, step])
        tokens[place, step + 1] = chosen
        going &= ~torch.isin(chosen, ends)
        left = int(going.sum())
        if not left or step + 1 == longest:
            break
        if left <= (1 - LEAVE) * len(place):
            stay = going.nonzero()[:, 0]
            rows.take(stay)
            place, chosen, going = place[stay], chosen[stay], going[stay]
            if how.on_leave is not None:
                how.on_leave(stay.tolist())
        rows.advance(chosen)
    return tokens[:, 1 : step + 2], logprob[:, : step + 1]


class _Rows:
    """What a model holds of rows that are being decoded. logits: [rows, V] float32, of each row's next token."""

    logits: Tensor

    def __init__(self, model: PreTrainedModel, prompts: Ragged) -> None:
        """One row for each prompt, read up to its end."""
        self._model, self._device = model, input_device(model)
        self._encoded: Any = None
        self._takes = inspect.signature(model.forward).parameters
        self._name = _cache_name(self._takes)
        self._cache: Any = _empty_cache(model)
        # a decoder-only model goes on at the right end, so the padding is on the left
        tokens, self._mask = padded(prompts, self._device, left=not model.config.is_encoder_decoder)
        if model.config.is_encoder_decoder:
            # the encoder's states have no window, whatever layers the decoder has (T5Gemma)
            self._cache = EncoderDecoderCache(self._cache, DynamicCache())
            self._encoded = _encode(model, prompts)
            tokens = torch.full((len(prompts), 1), decoder_start(model), device=self._device)
        self._read(tokens)

    def take(self, rows: Tensor) -> None:
        """Of the rows these alone, in this order; one may come several times."""
        rows = rows.to(self._device)
        self._cache.reorder_cache(rows)
        self._mask, self.logits = self._mask[rows], self.logits[rows]
        if self._encoded is not None:
            states = self._encoded.last_hidden_state
            self._encoded = type(self._encoded)(last_hidden_state=states[rows.to(states.device)])

    def advance(self, tokens: Tensor) -> None:
        """Read one more token of each row."""
        if self._encoded is None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], 1)
        self._read(tokens[:, None])

    def _read(self, tokens: Tensor) -> None:
        inputs: dict[str, Any] = {"attention_mask": self._mask, self._name: self._cache, "use_cache": True}
        if self._encoded is not None:
            inputs |= {"encoder_outputs": self._encoded, "decoder_input_ids": tokens}
        else:
            positions = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            # Bloom counts from the mask by itself; and logits of a whole prompt would be [P, L, V]
            known = {"position_ids": positions, "logits_to_keep": 1}
            inputs |= {"input_ids": tokens, **{name: value for name, value in known.items() if name in self._takes}}
        logits = self._model(**inputs, return_dict=True).logits[:, -1]
        self.logits = logits.to(self._device, torch.float32)


def _cache_name(takes: Container[str]) -> str:
    """What a model's `forward` calls its keys and values: `cache` since transformers 5.24; "": it takes none."""
    return next((name for name in ("cache", "past_key_values") if name in takes), "")


def _empty_cache(model: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def _encode(model: PreTrainedModel, prompts: Ragged) -> Any:
    """The encoder's output of every prompt, with its states [P, longest, D] alone: behind a prompt's end anything.
    Long prompts are encoded apart from short ones."""
    device, lengths, longest = input_device(model), prompts.lengths, int(prompts.lengths.max())
    budget = max(longest, CPU_TOKENS) if device.type == "cpu" else longest * len(prompts)
    kind, encoded = None, torch.empty(0)
    for places in token_budget_batches(lengths, np.zeros_like(lengths), budget):
        input_ids, mask = padded(prompts.take(places), device)
        output = model.get_encoder()(input_ids=input_ids, attention_mask=mask, return_dict=True)
        states = output.last_hidden_state
        if kind is None:  # some have fields of their own that the decoder's side asks for
            kind, encoded = type(output), states.new_zeros(len(prompts), longest, states.shape[2])
        encoded[torch.from_numpy(places).to(states.device), : states.shape[1]] = states
    assert kind is not None
    return kind(last_hidden_state=encoded)
