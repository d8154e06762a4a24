"""Completions sampled from a policy, each token with its log-probability under the distribution it was drawn from.

Rows are decoded by `rollouts/decode.py`, which drops those that have ended; a model that needs more than it knows goes
through transformers' `generate`, to the same tokens. Prompts of similar length stand in one batch, for what a row draws
depends on its prompt's place and on which of its samples it is (`rollouts/draw.py`), not on the batch.

The distribution is ours alone: a checkpoint's own generation defaults (temperature, repetition penalty, beams, minimum
length) would silently make another policy of it, so they are set aside, and only the end-of-sequence and decoder start
ids are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ketchup_cache.errors import ConfigError, DataError, ModelError, NumericsError
from ketchup_cache.models.forward import check_positions, decoder_start
from ketchup_cache.models.load import input_device
from ketchup_cache.provenance import Sampling
from ketchup_cache.rollouts.calculator import Calculator, ForcedResults
from ketchup_cache.rollouts.decode import can_decode, decode
from ketchup_cache.rollouts.draw import draw, number_type, uniforms
from ketchup_cache.types import TOKEN_DTYPE, Ragged, Rollouts


def sample_completions(
    model: PreTrainedModel,
    vocab_size: int,
    prompts: Ragged,
    sampling: Sampling,
    *,
    first_prompt: int,
    batch: int,
    calculator: Calculator | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Rollouts:
    """`sampling.samples` completions of every prompt: consecutive rows, in the order of the prompts.

    vocab_size: the tokenizer's; ids beyond it (padding rows of the head) are never drawn.
    first_prompt: absolute place of the first of the prompts: with the seed it decides what random numbers a row has,
    whatever else is sampled beside it or was before. batch: completions generated at once. The same weights, prompts,
    `sampling`, `first_prompt` and `batch` give the same rollouts; another batch, or a part of the prompts, gives them
    too but for the last bits of products. torch's global random state is neither used nor changed.
    calculator: of the model's tokenizer; needed where `sampling.calculator` is set, and used nowhere else.
    on_batch: called with the number of new completions after each batch.

    `prompt_index` of the result counts from the first of the given prompts. Greedy choices and forced tokens have log-
    probability 0.

    Raises ConfigError for several greedy samples, ModelError for a model without an end-of-sequence token or
    with fewer tokens than the tokenizer, DataError for a prompt without tokens or too long for the model's positions,
    NumericsError for NaN or infinite logits.
    """
    if sampling.calculator and calculator is None:
        raise ValueError("sampling with the calculator needs the Calculator of the tokenizer")
    if sampling.greedy and sampling.samples > 1:
        raise ConfigError([f"--greedy gives the same completion {sampling.samples} times: set --samples 1"])
    if (known := model.get_input_embeddings().weight.shape[0]) < vocab_size:
        raise ModelError(f"the tokenizer has {vocab_size:,} tokens, but {_name(model)} only {known:,}: not a pair")
    if (empty := np.flatnonzero(prompts.lengths == 0)).size:
        raise DataError(f"prompt {first_prompt + empty[0]} has no tokens; drop it or use a template that adds some")
    if not model.config.is_encoder_decoder:
        check_positions(model, int(prompts.lengths.max(initial=0)) + sampling.max_new_tokens)
    eos = eos_ids(model)
    way = _decode if can_decode(model) else _generate
    completions: list[NDArray] = []
    logprobs: list[NDArray] = []
    forced: list[NDArray] = []
    finished: list[bool] = []
    made: list[NDArray[np.int64]] = []
    with _only_our_settings(model, eos):
        for places, part in _batches(prompts.lengths, sampling.samples, batch):
            forcing = ForcedResults(calculator) if calculator and sampling.calculator else None
            uniform = None
            if not sampling.greedy:
                numbers = [uniforms(sampling.seed, first_prompt + p, part, sampling.max_new_tokens) for p in places]
                uniform = torch.from_numpy(np.concatenate(numbers))
            count = part.stop - part.start
            tokens, logprob = way(model, vocab_size, prompts.take(places), count, sampling, uniform, eos, forcing)
            # only EOS ends a completion: the padding behind it may be an id that the policy also chooses
            is_eos = np.isin(tokens, eos)
            ended = np.asarray(is_eos.any(axis=1))
            lengths = np.where(ended, is_eos.argmax(axis=1) + 1, tokens.shape[1])
            completions += [row[:length] for row, length in zip(tokens, lengths, strict=True)]
            logprobs += [row[:length] for row, length in zip(logprob, lengths, strict=True)]
            if forcing is not None:
                chosen_for = forcing.forced(tokens.shape[1])
                forced += [row[:length] for row, length in zip(chosen_for, lengths, strict=True)]
            finished += ended.tolist()
            made.append((places[:, None] * sampling.samples + np.arange(part.start, part.stop)).ravel())
            if on_batch is not None:
                on_batch(len(tokens))
    order = np.argsort(np.concatenate([np.zeros(0, np.int64), *made]))
    ragged = Ragged.from_rows([completions[row] for row in order], TOKEN_DTYPE)
    return Rollouts(
        prompt_index=np.repeat(np.arange(len(prompts)), sampling.samples),
        completions=ragged,
        behavior_logprob=Ragged.from_rows([logprobs[row] for row in order], np.float32).values,
        forced=(
            Ragged.from_rows([forced[row] for row in order], np.bool_).values
            if forced
            else np.zeros(len(ragged.values), np.bool_)
        ),
        finished=np.array([finished[row] for row in order], np.bool_),
    )


def eos_ids(model: PreTrainedModel) -> list[int]:
    """Ids that end a completion; some models have several. Raises ModelError where there is none."""
    for config in (model.generation_config, model.config):
        eos = getattr(config, "eos_token_id", None)
        if eos is not None:
            return list(eos) if isinstance(eos, (list, tuple)) else [eos]
    raise ModelError(f"{_name(model)}: its config has no eos_token_id")


def _name(model: PreTrainedModel) -> str:
    return model.name_or_path or type(model).__name__


def _batches(lengths: NDArray[np.int64], samples: int, batch: int) -> Iterator[tuple[NDArray[np.int64], slice]]:
    """(places of prompts, which of the samples) of every batch, the longest prompts first: what does not fit into the
    memory shows at once. A batch holds whole prompts, with all their samples; where even those of one prompt are too
    many, a part of them."""
    at_once, order = max(1, batch // samples), np.argsort(-lengths, kind="stable")
    for start in range(0, len(order), at_once):
        for first in range(0, samples, batch):
            yield order[start : start + at_once], slice(first, min(first + batch, samples))


def _inputs(model: PreTrainedModel, prompts: Ragged) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Prompts and their mask, [P, longest]. A decoder-only model goes on at the right end, so they are padded on the
    left; `generate` counts positions from the mask."""
    mask = np.arange(prompts.lengths.max()) < prompts.lengths[:, None]
    if not model.config.is_encoder_decoder:
        mask = mask[:, ::-1]
    tokens = np.zeros(mask.shape, np.int64)
    tokens[mask] = prompts.values
    return tokens, mask.astype(np.int64)


def _decode(
    model: PreTrainedModel,
    vocab_size: int,
    prompts: Ragged,
    samples: int,
    sampling: Sampling,
    uniform: Tensor | None,
    eos: list[int],
    forcing: ForcedResults | None = None,
) -> tuple[NDArray, NDArray]:
    """Tokens [B, T] int64 and their log-probabilities [B, T] float32; after the first EOS of a row anything."""
    tokens, logprob = decode(
        model,
        prompts,
        samples,
        longest=sampling.max_new_tokens,
        uniform=None if uniform is None else uniform.to(input_device(model), number_type(input_device(model))),
        eos=eos,
        processors=_processors(vocab_size, 1, sampling, forcing),
        on_leave=forcing.keep if forcing else None,
    )
    return tokens.cpu().numpy(), logprob.cpu().numpy()


def _generate(
    model: PreTrainedModel,
    vocab_size: int,
    prompts: Ragged,
    samples: int,
    sampling: Sampling,
    uniform: Tensor | None,
    eos: list[int],
    forcing: ForcedResults | None = None,
) -> tuple[NDArray, NDArray]:
    """The same for any model, by transformers' `generate`: every row is computed until the last has ended."""
    device = input_device(model)
    input_ids, mask = _inputs(model, prompts)
    given = 1 if model.config.is_encoder_decoder else input_ids.shape[1]  # the decoder start, or the prompt
    processors = _processors(vocab_size, given, sampling, forcing)
    drawing = None if uniform is None else _Draw(uniform, given)
    settings = GenerationConfig(
        do_sample=uniform is not None,  # from what the last processor has left: a single token
        top_k=None if uniform is None else 0,  # transformers' default is 50
        num_return_sequences=samples,
        max_new_tokens=sampling.max_new_tokens,
    )
    with _global_random_state_kept():
        sequences = model.generate(
            input_ids=torch.from_numpy(input_ids).to(device),
            attention_mask=torch.from_numpy(mask).to(device),
            generation_config=settings,
            logits_processor=LogitsProcessorList(processors if drawing is None else [*processors, drawing]),
        )
    tokens = sequences[:, given:]
    logprob = torch.zeros(tokens.shape) if drawing is None else drawing.logprob(tokens.shape[1])
    return tokens.cpu().numpy(), logprob.cpu().numpy()


def _processors(
    vocab_size: int, given: int, sampling: Sampling, forcing: ForcedResults | None
) -> list[LogitsProcessor]:
    """What makes the distribution that a token is drawn from out of the model's logits."""
    processors: list[LogitsProcessor] = [_RealVocabulary(vocab_size, given)]
    if forcing is not None:
        processors.append(forcing)
    if not sampling.greedy:
        # in the order of transformers' own: top-p is a share of the tempered, top-k distribution
        if sampling.temperature != 1:
            processors.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            processors.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            processors.append(TopPLogitsWarper(sampling.top_p))
    return processors


class _RealVocabulary(LogitsProcessor):
    """Only the ids that the tokenizer has; refuses logits that are not numbers."""

    def __init__(self, vocab_size: int, given: int) -> None:
        """given: tokens before the first that is generated."""
        self._vocab_size, self._given = vocab_size, given

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores[:, : self._vocab_size]
        if not scores.sum().isfinite():  # a tenth of the time of looking at each
            token = input_ids.shape[1] - self._given + 1
            raise NumericsError(f"the policy's logits of token {token} hold a NaN or infinity: check its weights")
        return scores


class _Draw(LogitsProcessor):
    """Last in the list: draws the token as `decode` does, and leaves `generate` no other."""

    def __init__(self, uniform: Tensor, given: int) -> None:
        """uniform: [B, longest]. given: tokens before the first that is generated."""
        self._uniform, self._given = uniform, given
        self._steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self._given
        if step == self._uniform.shape[1]:  # on some devices `generate` takes one step too many and undoes it
            return scores
        uniform = self._uniform[:, step]
        chosen, logprob = draw(scores, uniform.to(scores.device, number_type(scores.device)))
        self._steps.append(logprob)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0)

    def logprob(self, length: int) -> Tensor:
        """[B, length] float32."""
        return torch.stack(self._steps[:length], dim=1)


@contextmanager
def _only_our_settings(model: PreTrainedModel, eos: list[int]) -> Iterator[None]:
    """No dropout, and only the special ids of the checkpoint's generation config: `generate` takes whatever is not
    set in the config that it is given from the model's own."""
    own, was_training = model.generation_config, model.training
    start = decoder_start(model) if model.config.is_encoder_decoder else None
    model.generation_config = GenerationConfig(decoder_start_token_id=start, eos_token_id=eos, pad_token_id=eos[0])
    model.eval()
    try:
        yield
    finally:
        model.generation_config = own
        model.train(was_training)


@contextmanager
def _global_random_state_kept() -> Iterator[None]:
    """`generate` draws a number for every row, if only of one token."""
    kind = "mps" if torch.backends.mps.is_available() else "cuda"
    with torch.random.fork_rng(range(torch.get_device_module(kind).device_count()), device_type=kind):
        yield
