"""Prompts and rollouts in the cache: found again if they are there, made and committed if not.

A rollouts segment depends only on the policy, its prompts, the sampling settings and the batch size. So a run that was
killed goes on where it stopped, to the same rollouts, and what a cache already holds is never sampled again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ketchup_cache.cache.cache import Cache
from ketchup_cache.cache.manifest import PromptsInfo, RolloutsInfo
from ketchup_cache.config.options import SamplingOptions
from ketchup_cache.console import Bar
from ketchup_cache.errors import MismatchError
from ketchup_cache.provenance import DataInfo, PolicyInfo, Sampling, TokenizerInfo
from ketchup_cache.rollouts.calculator import Calculator
from ketchup_cache.rollouts.sample import sample_completions
from ketchup_cache.types import Prompts, Ragged

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Chunk = tuple[str, int, int]
"""Prompts start..stop of the prompts segment with this id."""

PROMPTS_PER_SEGMENT = 2**16
PROMPT_TOKENS_PER_SEGMENT = 2**22
ROLLOUTS_PER_SEGMENT = 2**10
ROLLOUT_TOKENS_PER_SEGMENT = 2**16
"""What a killed run has to do again at most, in completions and in their longest possible tokens."""


def sampling_of(options: SamplingOptions) -> Sampling:
    """The part of the options that decides which completions are drawn."""
    return Sampling(**{name: getattr(options, name) for name in Sampling.model_fields})


# ------------------------------------------------------------------------------------------------------- prompts


def ensure_prompts(cache: Cache, prompts: Prompts, data: DataInfo, tokenizer: TokenizerInfo) -> list[str]:
    """Ids of the segments that hold these prompts, in their order; those that are not there yet are committed.

    Raises MismatchError for a cache of another tokenizer, and the errors of `Cache.commit_prompts`.
    """
    for _, manifest in cache.manifests("prompts"):
        other = manifest.info.tokenizer
        if other.fingerprint != tokenizer.fingerprint:
            raise MismatchError(
                f"{cache.path}: its prompts were made with tokenizer {other.name}, which encodes differently from "
                f"that of {tokenizer.name}: use another --cache"
            )
    ids = []
    for start, stop in _prompt_chunks(prompts.tokens):
        part = Prompts(prompts.ids[start:stop], prompts.tokens.slice(start, stop))
        info = PromptsInfo(tokenizer=tokenizer, data=data, start=start)
        ids.append(_find_prompts(cache, part, info) or cache.commit_prompts(part, info))
    return ids


def _find_prompts(cache: Cache, prompts: Prompts, wanted: PromptsInfo) -> str | None:
    for prompts_id, manifest in cache.manifests("prompts"):
        info = manifest.info
        if isinstance(info, PromptsInfo) and (info.data.fingerprint, info.start) == (
            wanted.data.fingerprint,
            wanted.start,
        ):
            # the same texts may have been cut at another length
            held = cache.load_prompts(prompts_id).tokens
            same = (held.offsets, prompts.tokens.offsets), (held.values, prompts.tokens.values)
            if all(np.array_equal(one, other) for one, other in same):
                return prompts_id
    return None


def _prompt_chunks(tokens: Ragged) -> Iterator[tuple[int, int]]:
    start = 0
    while start < len(tokens):
        full = tokens.offsets[start] + PROMPT_TOKENS_PER_SEGMENT
        stop = min(start + PROMPTS_PER_SEGMENT, int(np.searchsorted(tokens.offsets, full, side="right")) - 1)
        yield start, max(stop, start + 1)
        start = max(stop, start + 1)


# ------------------------------------------------------------------------------------------------------ rollouts


def rollout_chunks(prompts: int, sampling: Sampling) -> Iterator[tuple[int, int]]:
    """(start, stop) of the prompts whose rollouts make one segment. Independent of the batch size."""
    rollouts = min(ROLLOUTS_PER_SEGMENT, ROLLOUT_TOKENS_PER_SEGMENT // sampling.max_new_tokens)
    at_once = max(1, rollouts // sampling.samples)
    return ((start, min(start + at_once, prompts)) for start in range(0, prompts, at_once))


def held_rollouts(cache: Cache, policy: PolicyInfo, sampling: Sampling) -> dict[Chunk, str]:
    """Ids of the segments that hold rollouts of exactly this policy and sampling, by the prompts they are of."""
    held: dict[Chunk, str] = {}
    for rollouts_id, info in cache.rollouts():
        if info.policy.fingerprint == policy.fingerprint and info.sampling == sampling:
            held.setdefault((info.prompts, info.prompt_start, info.prompt_stop), rollouts_id)
    return held


def rollout_range(
    cache: Cache,
    model: PreTrainedModel,
    policy: PolicyInfo,
    tokenizer: TokenizerInfo,
    prompts_id: str,
    start: int,
    stop: int,
    sampling: Sampling,
    *,
    batch: int,
    calculator: Calculator | None = None,
    bar: Bar | None = None,
) -> str:
    """Id of the segment with the rollouts of prompts start..stop of a prompts segment, sampled if it is not there yet.

    policy: what `model` is. batch: completions generated at once. calculator: of the tokenizer, for sampling with it.
    bar: advances by the number of new ones.
    Raises the errors of `sample_completions` and `Cache.commit_rollouts`.
    """
    if found := held_rollouts(cache, policy, sampling).get((prompts_id, start, stop)):
        return found
    parent = cache.manifest(prompts_id).info
    assert isinstance(parent, PromptsInfo)
    sampled = sample_completions(
        model,
        tokenizer.vocab_size,
        cache.load_prompts(prompts_id).tokens.slice(start, stop),
        sampling,
        first_prompt=parent.start + start,
        batch=batch,
        calculator=calculator,
        on_batch=bar.advance if bar else None,
    )
    info = RolloutsInfo(
        prompts=prompts_id, prompt_start=start, prompt_stop=stop, policy=policy, tokenizer=tokenizer, sampling=sampling
    )
    return cache.commit_rollouts(replace(sampled, prompt_index=sampled.prompt_index + start), info)
