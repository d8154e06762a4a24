"""The teacher-forced forward pass, up to the input of the language-model head.

The states are [N, D] for N completion tokens; logits would be [B, T, V] with the padding, a thousand times as much
for T5. What needs logits takes them from `models/head.py`, a chunk of states at a time.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from ketchup_cache.errors import DataError, ModelError
from ketchup_cache.models.batching import token_budget_batches
from ketchup_cache.models.load import evaluating, input_device, model_name
from ketchup_cache.models.shared_prompt import SharedRows, can_share
from ketchup_cache.models.t5_unpadded import int_tensor, is_ragged, t5_states
from ketchup_cache.types import Ragged, offsets_of


class Batch(NamedTuple):
    """Completions and the prompts they continue.

    prompts: unique prompts, each with at least one token. prompt_index: [B] int64, row of `prompts` of each
    completion. completions: B rows of token ids.
    """

    prompts: Ragged
    prompt_index: NDArray[np.int64]
    completions: Ragged

    def take(self, rows: NDArray[np.int64]) -> Batch:
        """The given rows, in the given order, with just the prompts they need, each once."""
        used, index = np.unique(self.prompt_index[rows], return_inverse=True)
        return Batch(self.prompts.take(used), index.astype(np.int64), self.completions.take(rows))

    def size(self, *, once: bool) -> int:
        """Tokens that go through a model: of the completions, and of the prompts once each; or, where every completion
        is a padded row with its prompt (`once` is false), rows × (longest prompt + longest completion)."""
        if once:
            return len(self.prompts.values) + len(self.completions.values)
        return len(self.completions) * int(self.prompts.lengths.max() + self.completions.lengths.max())

    def split(self, rows: NDArray[np.int64], budget: int, *, once: bool) -> list[NDArray[np.int64]]:
        """The given rows in parts, each of which is a batch of at most `budget` tokens (`token_budget_batches`)."""
        index = self.prompt_index[rows]
        lengths = self.prompts.lengths[index], self.completions.lengths[rows]
        return [rows[part] for part in token_budget_batches(*lengths, budget, prompt_index=index, once=once)]


def completion_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The input of the head at every completion token, as `states_and_next` gives it, alone."""
    return states_and_next(model, batch, np.zeros(len(batch.completions), np.bool_))[0]


def states_and_next(model: PreTrainedModel, batch: Batch, next_state: NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
    """The input of the head at every completion token: [N, D], rows end to end, in the dtype of the model's body.

    The state of token a_t is the one that predicts a_t: it has seen the prompt and a_1 … a_{t-1}.
    Then, of the rows in `next_state` ([B] bool), the states after their last token: [sum(next_state), D].

    Each prompt is computed once, however many completions it has; only a decoder-only model that can't share it
    (`can_share`) computes it anew for each. Padding is masked by length, never by token id. Gradients flow unless the
    caller switches them off.

    Raises DataError for a prompt without tokens or a row longer than the model has positions, and ModelError for a
    model without a decoder start token or a head.
    """
    if (empty := np.flatnonzero(batch.prompts.lengths == 0)).size:
        raise DataError(f"prompt {empty[0]} of the batch has no tokens; drop it or use a template that adds some")
    lengths = batch.completions.lengths
    read, mixed = lengths + next_state, longest_mixed(model)
    if mixed == math.inf:
        states, starts = _pass(model, batch, read)
    else:
        starts, found, behind = np.empty(len(lengths), np.int64), list[Tensor](), 0
        for rows in of_one_length(batch.prompts.lengths[batch.prompt_index] + read - 1, mixed):
            forget(model)
            states, first = _pass(model, batch.take(rows), read[rows])
            starts[rows] = first + behind
            behind += len(states)
            found.append(states)
        states = torch.cat(found)
    within = np.arange(lengths.sum()) - np.repeat(offsets_of(lengths)[:-1], lengths)
    places = np.repeat(starts, lengths) + within, (starts + lengths)[next_state]
    chosen, after = (states[int_tensor(place, states.device)] for place in places)
    return chosen, after


def training_states(model: PreTrainedModel, batch: Batch, precision: Literal["float32", "bfloat16"]) -> Tensor:
    """`completion_states` in float32, [N, D], with its products in `precision`, and those of their gradients.

    bfloat16 is torch's autocast: the weights are rounded for each product, and stay float32 themselves. Each is used
    once in a pass, so none is kept rounded.
    """
    how: dict[str, Any] = {"enabled": precision == "bfloat16", "cache_enabled": False}
    with torch.autocast(input_device(model).type, torch.bfloat16, **how):
        states = completion_states(model, batch)
    return states.float()


# --------------------------------------------------------------------------- passes: model, batch → (states, starts)
#
# states: [n, D]. starts: [B], the place in them of the state that predicts each completion's first token; the others
# of a row follow it. read: [B], how many states are wanted of each completion.


def _pass(model: PreTrainedModel, batch: Batch, read: NDArray[np.int64]) -> tuple[Tensor, NDArray]:
    """The one that the model can do."""
    if is_ragged(model):
        return _ragged_pass(model, batch, read)
    if can_share(model) and len(batch.prompts) < len(batch.completions):
        return _shared_pass(model, batch, read)
    return (_encoder_decoder_pass if model.config.is_encoder_decoder else _decoder_only_pass)(model, batch, read)


def _ragged_pass(model: PreTrainedModel, batch: Batch, read: NDArray[np.int64]) -> tuple[Tensor, NDArray]:
    """Of a T5, without padding."""
    order = np.argsort(batch.prompt_index, kind="stable")
    inputs = _decoder_inputs(model, (batch.completions[row] for row in order), read[order])
    states = t5_states(model, batch.prompts, inputs, batch.prompt_index[order])
    starts = np.empty(len(order), np.int64)
    starts[order] = inputs.offsets[:-1]
    return states, starts


def _encoder_decoder_pass(model: PreTrainedModel, batch: Batch, read: NDArray[np.int64]) -> tuple[Tensor, NDArray]:
    """By the model's own forward pass, in rows that are padded on the right."""
    check_positions(model, int(max(batch.prompts.lengths.max(initial=0), read.max(initial=0))))
    device = input_device(model)
    input_ids, prompt_mask = padded(batch.prompts, device)
    output = model.get_encoder()(input_ids=input_ids, attention_mask=prompt_mask, return_dict=True)
    encoded = output.last_hidden_state
    decoder_ids, decoder_mask = padded(_decoder_inputs(model, batch.completions, read), device)
    inputs: dict[str, Any] = {"decoder_input_ids": decoder_ids, "decoder_attention_mask": decoder_mask}
    inputs["attention_mask"] = prompt_mask[int_tensor(batch.prompt_index, device)]
    # some have a class with fields of their own that the decoder's side asks for (NLLB-MoE)
    of_rows = type(output)(last_hidden_state=encoded[int_tensor(batch.prompt_index, encoded.device)])
    states = head_input(model, encoder_outputs=of_rows, **inputs)
    return states.flatten(0, 1), np.arange(len(read)) * states.shape[1]


def _shared_pass(model: PreTrainedModel, batch: Batch, read: NDArray[np.int64]) -> tuple[Tensor, NDArray]:
    """Of a decoder-only model, the completions of a prompt behind it in one row."""
    rows = SharedRows.of(batch.prompts, batch.prompt_index, batch.completions, read)
    check_positions(model, int(rows.positions.values.max(initial=-1)) + 1)
    device = input_device(model)
    mask = rows.mask(model.get_input_embeddings().weight.dtype, device)
    inputs, positions = (padded(values, device)[0] for values in (rows.inputs, rows.positions))
    states = head_input(model, input_ids=inputs, attention_mask=mask, position_ids=positions)
    return states.flatten(0, 1), rows.row * states.shape[1] + rows.column


def _decoder_only_pass(model: PreTrainedModel, batch: Batch, read: NDArray[np.int64]) -> tuple[Tensor, NDArray]:
    """Prompt and completion in one row, padded on the right: the row's tokens stand at positions 0, 1, …, which is
    what every architecture (learned positions, rotary ones, ALiBi) assumes where it is told nothing else, and a causal
    model does not see what comes behind."""
    prompts = batch.prompts.lengths[batch.prompt_index]
    # the last prompt token predicts the first of the completion, whose last token is read for the state after it only
    fed = prompts + np.maximum(read - 1, 0)
    check_positions(model, int(fed.max(initial=0)))
    rows = zip(batch.prompt_index, batch.completions, fed, strict=True)
    inputs = Ragged.from_rows((np.append(batch.prompts[p], row)[:end] for p, row, end in rows), np.int64)
    input_ids, mask = padded(inputs, input_device(model))
    states = head_input(model, input_ids=input_ids, attention_mask=mask)
    return states.flatten(0, 1), np.arange(len(fed)) * states.shape[1] + prompts - 1


def _decoder_inputs(model: PreTrainedModel, completions: Iterable[NDArray], read: NDArray[np.int64]) -> Ragged:
    """What a decoder is fed: its start token, then a completion, as many as states are wanted."""
    start = decoder_start(model)
    rows = zip(completions, read, strict=True)
    return Ragged.from_rows((np.append(start, row)[:n] for row, n in rows), np.int64)


class _AtHead(BaseException):
    """Carries the head's input out of the model's forward pass, which ends here.

    A signal, not an error: no `except Exception` on the way may swallow it.
    """

    def __init__(self, states: Tensor) -> None:
        self.states = states


def head_input(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """What `model(**inputs)` would feed to its head. The head, and all that comes after it, is not run."""
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(model).__name__} has no language-model head")
    caller = threading.get_ident()

    def stop(_: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if threading.get_ident() == caller:  # another thread's forward pass of the same model goes on
            raise _AtHead(arguments[0])

    hook = head.register_forward_pre_hook(stop)
    try:
        model(**inputs, use_cache=False)
    except _AtHead as arrived:
        return arrived.states
    finally:
        hook.remove()
    raise ModelError(f"{type(model).__name__} does not use its head (get_output_embeddings) in its forward pass")


# ------------------------------------------------------------------------------------ rows that change their neighbours


def of_one_length(lengths: NDArray[np.int64], mixed: float) -> list[NDArray[np.int64]]:
    """Places of rows that may stand in one batch, the longest first: those of at most `mixed` tokens together, any
    longer ones with those of their length."""
    keys = np.where(lengths <= mixed, 0, lengths)
    return [np.flatnonzero(keys == key) for key in np.unique(keys)[::-1]]


def longest_mixed(model: PreTrainedModel) -> float:
    """Most tokens of a row that may stand beside rows of other lengths. Infinite for most models; where rotary
    positions are scaled by the longest row of a batch (dynamic NTK, longrope), those that need no scaling.

    Found out once for a model, by a row alone and beside one whose positions are far off.
    Raises ModelError for a model that can't be brought to compute the row again as it did.
    """
    if (found := MIXED.get(model)) is not None:
        return found
    config = model.config.get_text_config(decoder=True)
    rope, known = getattr(config, "rope_parameters", None), getattr(config, "max_position_embeddings", None)
    takes = inspect.signature(model.forward).parameters
    if not rope or known is None or "position_ids" not in takes or model.config.is_encoder_decoder:
        return MIXED.setdefault(model, math.inf)
    window = min([known, *_originals(config.to_dict())])
    # attention goes by distances and weighs different tokens, so the row has both
    near = np.linspace(0, window - 1, 8).astype(np.int64)
    places = int_tensor(np.stack([near, near + 2 * known]), input_device(model))
    ids = torch.arange(8, device=places.device).expand(2, -1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": places}
    with evaluating(model), torch.no_grad():
        alone, beside = (head_input(model, **{k: v[:n] for k, v in inputs.items()})[0].float() for n in (1, 2))
        forget(model)
        again = head_input(model, **{k: v[:1] for k, v in inputs.items()})[0].float()
    near_enough = (1e-3 if model.dtype == torch.float32 else 0.1) * alone.abs().max()
    if ((again - alone).abs() > near_enough).any():
        raise ModelError(f"{model_name(model)}: computes a row otherwise after a longer one: not supported")
    return MIXED.setdefault(model, math.inf if ((beside - alone).abs() <= near_enough).all() else window)


MIXED: WeakKeyDictionary[PreTrainedModel, float] = WeakKeyDictionary()
"""What `longest_mixed` has found out."""


def _originals(config: Any) -> Iterator[int]:
    """Positions of the training before they were stretched, wherever a config speaks of them."""
    for key, value in config.items() if isinstance(config, dict) else ():
        yield from [value] if key == "original_max_position_embeddings" and value else _originals(value)


@torch.no_grad()
def forget(model: PreTrainedModel) -> None:
    """Read one token: what a model keeps of the longest row so far (dynamic NTK) is as before its first row."""
    head_input(model, input_ids=torch.ones(1, 1, dtype=torch.long, device=input_device(model)))


# ----------------------------------------------------------------------------------------------------- about a model


def computes_prompts_once(model: PreTrainedModel) -> bool:
    """Whether a batch of rollouts costs each of its prompts once, and is measured so (`Batch.size`)."""
    return is_ragged(model) or can_share(model)


def check_positions(model: PreTrainedModel, longest: int) -> None:
    """Raises DataError where a row is longer than the positions that a model has learned (GPT-2, BART). Rotary ones and
    T5's go on. longest: of prompt and completion together; of an encoder-decoder, of the longer of the two."""
    config = model.config.get_text_config(decoder=True)
    known = getattr(config, "max_position_embeddings", None)
    if known is not None and getattr(config, "rope_parameters", None) is None and longest > known:
        row = "a prompt or a completion has" if model.config.is_encoder_decoder else "a prompt and its completion have"
        what = f"{row} {longest:,} tokens, but {model_name(model)} only {known:,} positions"
        todo = "lower --max-prompt-tokens (with --long-prompts truncate or drop) or --max-new-tokens"
        raise DataError(f"{what}: {todo}")


def decoder_start(model: PreTrainedModel) -> int:
    """Id of the token that the decoder is given before the first completion token. Raises ModelError without one."""
    for config in (model.config, model.generation_config):
        if (token := getattr(config, "decoder_start_token_id", None)) is not None:
            return int(token)
    raise ModelError(f"{model_name(model)}: its config has no decoder_start_token_id")


def padded(rows: Ragged, device: torch.device, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, [rows, longest] int64 each. The padding, id 0, is on the right, or on the left."""
    mask = np.arange(rows.lengths.max(initial=0)) < rows.lengths[:, None]
    mask = np.fliplr(mask).copy() if left else mask
    tokens = np.zeros(mask.shape, np.int64)
    tokens[mask] = rows.values
    return int_tensor(tokens, device), int_tensor(mask, device)
