"""`rollout`: prompts into the cache, and completions of them sampled from a policy, a segment at a time.

A rollouts segment depends only on the policy, its prompts, the sampling settings and the batch size. So a run that was
killed goes on where it stopped, to the same rollouts, and what a cache already holds is never sampled again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from transformers import PreTrainedModel

from ketchup_cache.cache.cache import Cache
from ketchup_cache.cache.manifest import PromptsInfo, RolloutsInfo
from ketchup_cache.config.commands import RolloutConfig
from ketchup_cache.config.options import SamplingOptions
from ketchup_cache.console import Bar, Report, progress
from ketchup_cache.models.fingerprint import tokenizer_info, weights_fingerprint
from ketchup_cache.models.load import load_model, load_tokenizer, resolve_folder
from ketchup_cache.provenance import DataInfo, PolicyInfo, Sampling, TokenizerInfo, require_same_tokenizer
from ketchup_cache.rollouts.calculator import Calculator
from ketchup_cache.rollouts.sample import sample_completions
from ketchup_cache.sharing.remote_cache import open_cache
from ketchup_cache.text.prompts import as_chat, kept_examples, tokenize_prompts, without_duplicates
from ketchup_cache.text.read import data_info, read_examples
from ketchup_cache.types import Prompts, Ragged

Chunk = tuple[str, int, int]
"""Prompts start..stop of the prompts segment with this id."""

PROMPTS_PER_SEGMENT = 2**16
PROMPT_TOKENS_PER_SEGMENT = 2**22
ROLLOUTS_PER_SEGMENT = 2**12
ROLLOUT_TOKENS_PER_SEGMENT = 2**18
"""Completions of a segment at most, and their longest possible tokens: what a killed run has to do again at most."""


@dataclass(frozen=True)
class RolloutReport(Report):
    """What `rollout` leaves in the cache."""

    prompts: int
    duplicates: int
    """Prompts left out because an earlier one is the same."""
    too_long: int
    """Prompts left out by `--long-prompts drop`."""
    rollouts: int
    tokens: int
    finished: int
    already_there: int
    """Rollouts that the cache held before."""
    seconds: float

    @property
    def mean_length(self) -> float:
        """Tokens per rollout."""
        return self.tokens / self.rollouts

    @property
    def finished_share(self) -> float:
        """Share of the rollouts that ended with EOS."""
        return self.finished / self.rollouts

    def __str__(self) -> str:
        left_out = [f"{n:,} {what}" for n, what in ((self.duplicates, "duplicates"), (self.too_long, "too long")) if n]
        prompts = f"{self.prompts:,} prompts" + (f" (left out: {', '.join(left_out)})" if left_out else "")
        new = self.rollouts - self.already_there
        there = f", {self.already_there:,} of them already there" if self.already_there else ""
        return (
            f"{self.rollouts:,} rollouts of {prompts}{there}: mean length {self.mean_length:.1f} tokens, "
            f"{self.finished_share:.1%} finished; {self.seconds:.1f} s, {new / self.seconds:,.1f} new rollouts/s"
        )


def rollout(config: RolloutConfig) -> RolloutReport:
    """Sample completions of every prompt from `config.student` into the cache, as far as they are not there yet.

    Raises DataError (`read_examples`, `tokenize_prompts`), ModelError (`load_model`), CacheError, MismatchError for a
    cache of another tokenizer, NumericsError for a policy with NaN logits, WriteError where the disk is full.
    """
    began = time.monotonic()
    given = read_examples(config)
    tokenizer = load_tokenizer(config.student, trust_remote_code=config.trust_remote_code)
    examples = as_chat(without_duplicates(given), tokenizer, config)
    info = tokenizer_info(tokenizer, config.student)
    prompts = tokenize_prompts(examples, tokenizer, config)
    policy = PolicyInfo(name=config.student, fingerprint=weights_fingerprint(resolve_folder(config.student)))
    sampling = sampling_of(config)
    calculator = Calculator(tokenizer, config.student) if config.calculator else None

    cache = open_cache(config.cache, create=True)
    data = data_info(kept_examples(examples, prompts), config, tokenizer)
    chunks: list[Chunk] = []
    left = config.first or len(prompts)
    for prompts_id in ensure_prompts(cache, prompts, data, info):
        rows = min(left, cache.manifest(prompts_id).rows)
        chunks += [(prompts_id, start, stop) for start, stop in rollout_chunks(rows, sampling)]
        left -= rows
    held = held_rollouts(cache, policy, sampling)
    missing = [chunk for chunk in chunks if chunk not in held]
    new = sum(stop - start for _, start, stop in missing) * sampling.samples
    if missing:
        model = load_model(config.student, device=config.device, trust_remote_code=config.trust_remote_code)
        sampled = partial(rollout_range, cache, model, policy, info, batch=config.rollout_batch, calculator=calculator)
        with progress("rollouts", new, "rollouts") as bar:
            held |= {chunk: sampled(chunk, sampling, bar=bar) for chunk in missing}
    rows = tokens = finished = 0
    for chunk in chunks:
        rollouts = cache.load_rollouts(held[chunk])
        rows += len(rollouts)
        tokens += len(rollouts.completions.values)
        finished += int(rollouts.finished.sum())
    duplicates, too_long, seconds = len(given) - len(examples), len(examples) - len(prompts), time.monotonic() - began
    return RolloutReport(len(prompts), duplicates, too_long, rows, tokens, finished, rows - new, seconds)


def sampling_of(options: SamplingOptions) -> Sampling:
    """The part of the options that decides which completions are drawn."""
    return Sampling(**{name: getattr(options, name) for name in Sampling.model_fields})


# ----------------------------------------------------------------------------------------------------------- prompts


def ensure_prompts(cache: Cache, prompts: Prompts, data: DataInfo, tokenizer: TokenizerInfo) -> list[str]:
    """Ids of the segments that hold these prompts, in their order; those that are not there yet are committed.

    Raises MismatchError for a cache of another tokenizer, and the errors of `Cache.commit_prompts`.
    """
    for _, manifest in cache.manifests("prompts"):
        what = f"{cache.path} was made with another tokenizer; use another --cache"
        require_same_tokenizer(tokenizer, manifest.info.tokenizer, what)
    ids = []
    for start, stop in _prompt_chunks(prompts.tokens):
        part = Prompts(prompts.ids[start:stop], prompts.tokens.slice(start, stop))
        info = PromptsInfo(tokenizer=tokenizer, data=data, start=start)
        ids.append(_find_prompts(cache, part, info) or cache.commit_prompts(part, info))
    return ids


def _find_prompts(cache: Cache, prompts: Prompts, wanted: PromptsInfo) -> str | None:
    for prompts_id, manifest in cache.manifests("prompts"):
        info = manifest.info
        assert isinstance(info, PromptsInfo)
        if (info.data.fingerprint, info.start) == (wanted.data.fingerprint, wanted.start):
            # the same texts may have been cut at another length
            held, own = cache.load_prompts(prompts_id).tokens, prompts.tokens
            if np.array_equal(held.offsets, own.offsets) and np.array_equal(held.values, own.values):
                return prompts_id
    return None


def _prompt_chunks(tokens: Ragged) -> Iterator[tuple[int, int]]:
    start = 0
    while start < len(tokens):
        full = tokens.offsets[start] + PROMPT_TOKENS_PER_SEGMENT
        fitting = int(np.searchsorted(tokens.offsets, full, side="right")) - 1
        stop = max(min(start + PROMPTS_PER_SEGMENT, fitting), start + 1)
        yield start, stop
        start = stop


# ---------------------------------------------------------------------------------------------------------- rollouts


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
    chunk: Chunk,
    sampling: Sampling,
    *,
    batch: int,
    calculator: Calculator | None = None,
    bar: Bar | None = None,
) -> str:
    """Id of the segment with the rollouts of these prompts, sampled if it is not there yet.

    policy: what `model` is. batch: completions generated at once. calculator: of the tokenizer, for sampling with it.
    bar: advances by the number of new ones.
    Raises the errors of `sample_completions` and `Cache.commit_rollouts`.
    """
    if found := held_rollouts(cache, policy, sampling).get(chunk):
        return found
    prompts_id, start, stop = chunk
    parent = cache.manifest(prompts_id).info
    assert isinstance(parent, PromptsInfo)
    prompts, first = cache.load_prompts(prompts_id).tokens.slice(start, stop), parent.start + start
    place = {"prompts": prompts_id, "prompt_start": start, "prompt_stop": stop}
    info = RolloutsInfo(**place, policy=policy, tokenizer=tokenizer, sampling=sampling)
    told, size = bar.advance if bar else None, tokenizer.vocab_size
    sampled = sample_completions(
        model, size, prompts, sampling, first_prompt=first, batch=batch, calculator=calculator, on_batch=told
    )
    return cache.commit_rollouts(replace(sampled, prompt_index=sampled.prompt_index + start), info)
