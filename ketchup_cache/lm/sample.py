"""Completions sampled from a policy, each token with its log-probability under the distribution it was drawn from.

Rows are decoded by `lm/decode.py`, which drops those that have ended; a model that needs more than it knows goes
through transformers' `generate`, to the same tokens. The distribution is ours alone: a checkpoint's own generation
defaults (temperature, repetition penalty, beams, minimum length) would silently make another policy of it, so they are
set aside, and only the end-of-sequence and decoder start ids are taken.
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
from ketchup_cache.lm.calculator import Calculator, ForcedResults
from ketchup_cache.lm.decode import can_decode, decode
from ketchup_cache.lm.forward import check_positions, decoder_start
from ketchup_cache.lm.load import input_device
from ketchup_cache.store.manifest import Sampling
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
    first_prompt: absolute place of the first of the prompts, so that the seed of a batch does not depend on which call
    it is part of. batch: completions generated at once. The same weights, prompts, `sampling`, `first_prompt` and
    `batch` give the same rollouts, whatever was sampled before; torch's global random state is left as it was.
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
    with _only_our_settings(model, eos):
        for start, stop, first_sample, samples in _batches(len(prompts), sampling.samples, batch):
            with _seeded([sampling.seed, first_prompt + start, first_sample]):
                forcing = ForcedResults(calculator) if calculator and sampling.calculator else None
                part = prompts.slice(start, stop)
                tokens, logprob = way(model, vocab_size, part, samples, sampling, eos, forcing)
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
            if on_batch is not None:
                on_batch(len(tokens))
    ragged = Ragged.from_rows(completions, TOKEN_DTYPE)
    return Rollouts(
        prompt_index=np.repeat(np.arange(len(prompts)), sampling.samples),
        completions=ragged,
        behavior_logprob=Ragged.from_rows(logprobs, np.float32).values,
        forced=Ragged.from_rows(forced, np.bool_).values if forced else np.zeros(len(ragged.values), np.bool_),
        finished=np.array(finished, np.bool_),
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


def _batches(prompts: int, samples: int, batch: int) -> Iterator[tuple[int, int, int, int]]:
    """(first prompt, stop, first sample, samples of each) of every batch. A batch holds whole prompts, with all their
    samples; where even those of one prompt are too many, a part of them."""
    at_once = max(1, batch // samples)
    for start in range(0, prompts, at_once):
        for first_sample in range(0, samples, batch):
            yield start, min(start + at_once, prompts), first_sample, min(batch, samples - first_sample)


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
    eos: list[int],
    forcing: ForcedResults | None = None,
) -> tuple[NDArray, NDArray]:
    """Tokens [B, T] int64 and their log-probabilities [B, T] float32; after the first EOS of a row anything."""
    tokens, logprob = decode(
        model,
        prompts,
        samples,
        longest=sampling.max_new_tokens,
        greedy=sampling.greedy,
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
    eos: list[int],
    forcing: ForcedResults | None = None,
) -> tuple[NDArray, NDArray]:
    """The same for any model, by transformers' `generate`: every row is computed until the last has ended."""
    device = input_device(model)
    input_ids, mask = _inputs(model, prompts)
    given = 1 if model.config.is_encoder_decoder else input_ids.shape[1]  # the decoder start, or the prompt
    recorder = _Recorder()
    settings = GenerationConfig(
        do_sample=not sampling.greedy,
        top_k=None if sampling.greedy else 0,  # transformers' default is 50
        num_return_sequences=samples,
        max_new_tokens=sampling.max_new_tokens,
    )
    sequences = model.generate(
        input_ids=torch.from_numpy(input_ids).to(device),
        attention_mask=torch.from_numpy(mask).to(device),
        generation_config=settings,
        logits_processor=LogitsProcessorList([*_processors(vocab_size, given, sampling, forcing), recorder]),
    )
    tokens = sequences[:, given:]
    logprob = torch.zeros(tokens.shape) if sampling.greedy else recorder.logprob(tokens)
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
    """Takes away the ids that the tokenizer does not have, and refuses logits that are not numbers."""

    def __init__(self, vocab_size: int, given: int) -> None:
        """given: tokens before the first that is generated."""
        self._vocab_size, self._given = vocab_size, given

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, self._vocab_size :] = -torch.inf
        if not scores[:, : self._vocab_size].sum().isfinite():  # a tenth of the time of looking at each
            token = input_ids.shape[1] - self._given + 1
            raise NumericsError(f"the policy's logits of token {token} hold a NaN or infinity: check its weights")
        return scores


class _Recorder(LogitsProcessor):
    """Last in the list: sees the distribution that the next token is drawn from, and in the next call that token.

    Holds the scores of one step at a time, [B, V].
    """

    def __init__(self) -> None:
        self._scores: Tensor | None = None
        self._steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._record(input_ids[:, -1:])
        self._scores = scores
        return scores

    def _record(self, chosen: Tensor) -> None:
        if self._scores is not None:
            self._steps.append(self._scores.log_softmax(dim=-1).gather(1, chosen))

    def logprob(self, tokens: Tensor) -> Tensor:
        """[B, T] float32, of all T tokens that were generated."""
        if len(self._steps) < tokens.shape[1]:  # on some devices `generate` takes one step too many and undoes it
            self._record(tokens[:, -1:])
        return torch.cat(self._steps, dim=1)


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
def _seeded(place: list[int]) -> Iterator[None]:
    """torch's global generators, which `generate` draws from, seeded from a list of numbers; then as they were."""
    kind = "mps" if torch.backends.mps.is_available() else "cuda"
    with torch.random.fork_rng(range(torch.get_device_module(kind).device_count()), device_type=kind):
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0]))
        yield
