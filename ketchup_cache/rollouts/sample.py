"""Completions sampled from a policy, each token with its log-probability under the distribution it was drawn from.

Rows are decoded by `rollouts/decode.py`, which drops those that have ended. A model that needs more than it knows goes
through transformers' `generate`, to the same tokens. Prompts of similar length stand in one batch: what a row draws
depends on its prompt's place and on which of its samples it is (`rollouts/draw.py`), not on the batch.

A checkpoint's own generation defaults (temperature, repetition penalty, beams, minimum length) would silently make
another policy of it. They are set aside, and only the end-of-sequence and decoder start ids are taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ketchup_cache.console import one_line
from ketchup_cache.errors import ConfigError, DataError, ModelError, NumericsError
from ketchup_cache.models.folders import whole_folder
from ketchup_cache.models.forward import check_positions, decoder_start, forget, longest_mixed, of_one_length, padded
from ketchup_cache.models.head import own_pass
from ketchup_cache.models.load import evaluating, input_device, model_name
from ketchup_cache.parallel.group import group
from ketchup_cache.provenance import Sampling
from ketchup_cache.rollouts.calculator import Calculator, ForcedResults
from ketchup_cache.rollouts.decode import Decoding, can_decode, decode
from ketchup_cache.rollouts.draw import draw, number_type, uniforms
from ketchup_cache.rollouts.t5_decode import can_step
from ketchup_cache.types import TOKEN_DTYPE, Ragged, Rollouts, concatenated


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
    first_prompt: absolute place of the first of the prompts. With the seed it decides the random numbers of a row,
    whatever else is sampled beside it or was before. batch: completions generated at once. The same weights, prompts,
    `sampling`, `first_prompt` and `batch` give the same rollouts; another batch, or a part of the prompts, gives them
    too but for the last bits of products. torch's global random state is neither used nor changed.
    calculator: of the model's tokenizer; needed where `sampling.calculator` is set, and used nowhere else.
    on_batch: called with the number of new completions after each batch.
    Of several processes (`parallel/group.py`) each computes its part of these batches; all get all of it.

    `prompt_index` of the result counts from the first of the given prompts. Greedy choices and forced tokens have log-
    probability 0.

    Raises ConfigError for several greedy samples, ModelError for a model without an end-of-sequence token, with fewer
    tokens than the tokenizer, or one that other rows confuse, DataError for a prompt without tokens or too long for the
    model's positions, NumericsError for NaN or infinite logits.
    """
    if sampling.calculator and calculator is None:
        raise ValueError("sampling with the calculator needs the Calculator of the tokenizer")
    check_prompts(model, vocab_size, prompts, first_prompt, sampling)
    eos, longest = eos_ids(model), sampling.max_new_tokens
    way = decode if can_decode(model) else _generate
    made: list[Rollouts] = []
    with evaluating(model):
        mixed = longest_mixed(model)
        beside = min(mixed - longest, _longest_padded(model, way, vocab_size))
        for places, part in group().mine(_batches(prompts.lengths, sampling.samples, batch, beside)):
            if mixed < math.inf:
                forget(model)
            forcing = ForcedResults(calculator) if calculator and sampling.calculator else None
            uniform = None
            if not sampling.greedy:
                numbers = [uniforms(sampling.seed, first_prompt + place, part, longest) for place in places]
                uniform = torch.from_numpy(np.concatenate(numbers))
            processors, on_leave = _processors(vocab_size, sampling, forcing), forcing.keep if forcing else None
            how = Decoding(part.stop - part.start, longest, eos, uniform, processors, on_leave)
            chosen, logprob = way(model, prompts.take(places), how)
            tokens = chosen.cpu().numpy()
            # only EOS ends a completion: the padding behind it may be an id that the policy also chooses
            is_eos = np.isin(tokens, eos)
            finished = np.asarray(is_eos.any(axis=1))
            lengths = np.where(finished, is_eos.argmax(axis=1) + 1, tokens.shape[1])
            inside = np.arange(tokens.shape[1]) < lengths[:, None]
            completions = Ragged.from_lengths(tokens[inside].astype(TOKEN_DTYPE), lengths)
            forced = forcing.forced(tokens.shape[1]) if forcing else np.zeros(tokens.shape, np.bool_)
            index = np.repeat(places, how.samples)
            made.append(Rollouts(index, completions, logprob.cpu().numpy()[inside], forced[inside], finished))
            if on_batch is not None:
                on_batch(len(tokens))
    rollouts = concatenated(group().in_order(made))
    return rollouts.take(np.argsort(rollouts.prompt_index, kind="stable"))  # the samples of a prompt are in order


def check_prompts(
    model: PreTrainedModel, vocab_size: int, prompts: Ragged, first_prompt: int, sampling: Sampling
) -> None:
    """Raises, of the errors of `sample_completions`, those that show before anything is sampled."""
    if sampling.greedy and sampling.samples > 1:
        raise ConfigError([f"--greedy gives the same completion {sampling.samples} times: set --samples 1"])
    if (known := model.get_input_embeddings().weight.shape[0]) < vocab_size:
        raise ModelError(f"the tokenizer has {vocab_size:,} tokens, but {model_name(model)} only {known:,}: not a pair")
    if (empty := np.flatnonzero(prompts.lengths == 0)).size:
        raise DataError(f"prompt {first_prompt + empty[0]} has no tokens; drop it or use a template that adds some")
    longest_prompt, longest = int(prompts.lengths.max(initial=0)), sampling.max_new_tokens
    encodes = model.config.is_encoder_decoder
    check_positions(model, max(longest_prompt, longest) if encodes else longest_prompt + longest)


def eos_ids(model: Any) -> list[int]:
    """Ids that end a completion; some models have several. Raises ModelError where there is none."""
    for config in (model.generation_config, model.config):
        eos = getattr(config, "eos_token_id", None)
        if eos is not None:
            return list(eos) if isinstance(eos, (list, tuple)) else [eos]
    raise ModelError(f"{model_name(model)}: its config has no eos_token_id")


def stop_ids(model: str, *, trust_remote_code: bool = False) -> list[int]:
    """`eos_ids` of a model that is not loaded. Raises ModelError where there are none."""
    folder, known = whole_folder(model), SimpleNamespace(name_or_path=model, config=None, generation_config=None)
    with suppress(OSError, ValueError):
        known.config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
        known.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return eos_ids(known)


def _batches(lengths: NDArray, samples: int, batch: int, mixed: float) -> Iterator[tuple[NDArray[np.int64], slice]]:
    """(places of prompts, which of the samples) of every batch, the longest prompts first: what does not fit into the
    memory shows at once. A batch holds whole prompts, with all their samples; where even those of one prompt are too
    many, a part of them. mixed: as in `of_one_length`."""
    at_once = max(1, batch // samples)
    for alike in of_one_length(lengths, mixed):
        order = alike[np.argsort(-lengths[alike], kind="stable")]
        for start in range(0, len(order), at_once):
            for first in range(0, samples, batch):
                yield order[start : start + at_once], slice(first, min(first + batch, samples))


def _longest_padded(model: PreTrainedModel, way: Callable[..., Any], vocab_size: int) -> float:
    """0 for a model that a prompt's padding confuses, otherwise infinite. Found out once for a model, by what it draws
    for a short prompt and a longer one: each token must come with the log-probability of the model's own pass over the
    text. A cache that drops or mixes up something shows here, too; a T5 is compared where it is decoded.

    Raises ModelError where tokens of prompts of one length come with others.
    """
    if way is decode and can_step(model):
        return math.inf
    if model not in _PADDED:
        halves, real = torch.full((2, 6), 0.5, dtype=torch.float64), _RealVocabulary(vocab_size)
        near = 3e-4 if model.dtype == torch.float32 else 0.1

        def exact(*lengths: int) -> bool:
            ids = (vocab_size // 2 + np.arange(sum(lengths))) % vocab_size  # none that pads or ends
            prompts = Ragged.from_lengths(ids, lengths)
            try:
                tokens, logprob = way(model, prompts, Decoding(1, 6, [vocab_size], halves, [real], None))  # none ends
            except (TypeError, ValueError, AttributeError, IndexError) as error:
                raise ModelError(f"{model_name(model)}: can't be sampled from ({one_line(error)})") from error
            passes = [own_pass(model, *row)[1] for row in zip(prompts, tokens.cpu().numpy(), strict=True)]
            own = torch.stack(passes)[..., :vocab_size].float().log_softmax(2)
            own = own.gather(2, tokens[..., None].to(own.device))[..., 0]
            return torch.allclose(logprob.to(own.device), own, rtol=0, atol=near)

        with torch.no_grad():
            padded_too = exact(2, 10)
            if not padded_too and not exact(10, 10):
                what = "draws tokens with other probabilities than its own pass over the text gives"
                raise ModelError(f"{model_name(model)}: {what} (it looks ahead, or its cache errs): not supported")
        _PADDED[model] = math.inf if padded_too else 0
    return _PADDED[model]


_PADDED: WeakKeyDictionary[PreTrainedModel, float] = WeakKeyDictionary()


# ------------------------------------------------------------------------------------------------- the distribution


def _processors(vocab_size: int, sampling: Sampling, forcing: ForcedResults | None) -> list[LogitsProcessor]:
    """What makes the distribution that a token is drawn from out of the model's logits, for one batch."""
    return [_RealVocabulary(vocab_size), *([forcing] if forcing else []), *warpers(sampling)]


def warpers(sampling: Sampling) -> list[LogitsProcessor]:
    """Temperature, top-k and top-p, as far as they change something."""
    if sampling.greedy:
        return []
    # in the order of transformers' own: top-p is a share of the tempered, top-k distribution
    kinds: dict[type, tuple[float, float]] = {TemperatureLogitsWarper: (sampling.temperature, 1)}
    kinds |= {TopKLogitsWarper: (sampling.top_k, 0), TopPLogitsWarper: (sampling.top_p, 1)}
    return [warper(value) for warper, (value, off) in kinds.items() if value != off]


class _RealVocabulary(LogitsProcessor):
    """Only the ids that the tokenizer has; refuses logits that are not numbers."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size, self._token = vocab_size, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores, self._token = scores[:, : self._vocab_size], self._token + 1
        if not scores.sum().isfinite():  # a tenth of the time of looking at each
            raise NumericsError(f"the policy's logits of token {self._token} hold a NaN or infinity: check its weights")
        return scores


# --------------------------------------------------------------------------------------------------------- generate


def _generate(model: PreTrainedModel, prompts: Ragged, how: Decoding) -> tuple[Tensor, Tensor]:
    """`decode` for any model, by transformers' `generate`: every row is computed until the last has ended."""
    encodes, own = model.config.is_encoder_decoder, model.generation_config
    input_ids, mask = padded(prompts, input_device(model), left=not encodes)
    uniform, drawn = how.uniform, list[Tensor]()

    def draw_one(_: Tensor, scores: Tensor) -> Tensor:
        """Last in the list: draws the token as `decode` does, and leaves `generate` no other."""
        if uniform is None or len(drawn) == how.longest:  # on some devices it takes one step too many and undoes it
            return scores
        chosen, logprob = draw(scores, uniform[:, len(drawn)].to(scores.device, number_type(scores.device)))
        drawn.append(logprob)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0)

    processors = LogitsProcessorList([*how.processors, draw_one])
    # `generate` takes what is not set in the config that it is given from the model's own
    ids = {"eos_token_id": how.eos, "pad_token_id": how.eos[0]}
    ids |= {"decoder_start_token_id": decoder_start(model)} if encodes else {}
    # sampled from what the last processor has left: a single token; transformers' default of top_k is 50
    drawing = {"do_sample": uniform is not None, "top_k": None if uniform is None else 0}
    size = {"num_return_sequences": how.samples, "max_new_tokens": how.longest}
    model.generation_config = GenerationConfig(**ids, **drawing, **size)
    kind = "mps" if torch.backends.mps.is_available() else "cuda"
    try:
        # it draws a number for every row, if only of one token
        with torch.random.fork_rng(range(torch.get_device_module(kind).device_count()), device_type=kind):
            sequences = model.generate(input_ids=input_ids, attention_mask=mask, logits_processor=processors)
    finally:
        model.generation_config = own
    tokens = sequences[:, 1 if encodes else input_ids.shape[1] :]  # behind the decoder start, or the prompt
    return tokens, torch.stack(drawn[: tokens.shape[1]], dim=1) if drawn else torch.zeros(tokens.shape)
