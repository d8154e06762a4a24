"""Rollouts that another program has sampled, into a cache, checked like our own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import chain

import numpy as np
from numpy.typing import ArrayLike

from ketchup_cache.cache.cache import Cache
from ketchup_cache.cache.manifest import RolloutsInfo
from ketchup_cache.errors import DataError
from ketchup_cache.models.fingerprint import tokenizer_info
from ketchup_cache.models.load import load_tokenizer
from ketchup_cache.provenance import DataInfo, PolicyInfo, Sampling, canonical_json
from ketchup_cache.rollouts.rollout import ensure_prompts
from ketchup_cache.types import TOKEN_DTYPE, Prompts, Ragged, Rollouts


def add_rollouts(
    cache: Cache,
    prompts: Sequence[str],
    completions: Sequence[Sequence[ArrayLike]],
    behavior_logprob: Sequence[Sequence[ArrayLike]],
    *,
    tokenizer: str,
    policy: str | PolicyInfo,
    finished: Sequence[Sequence[bool]] | None = None,
    sampling: Sampling | None = None,
) -> list[str]:
    """Commit completions of these prompts, as far as just these are not there yet; returns the ids of their segments.

    prompts: P texts as the policy was given them, each once; the tokenizer adds its special tokens. completions: of
    each prompt, the token ids of its S completions, the same number for all. behavior_logprob: in the same places, the
    log-probability (nats) under the distribution that each token was drawn from; `learn` weighs stale rollouts by it.
    tokenizer: a folder or a Hub id; that of the teacher too. policy: who sampled. Of a name alone the fingerprint is
    that of the name, so other weights must have another name. finished: whether each completion ended by itself; None:
    those that end in the tokenizer's EOS. sampling: how they were drawn; None: from the policy itself.

    Raises DataError for prompts and completions that don't go together, MismatchError for a cache of another tokenizer,
    and the errors of `Cache.commit_rollouts`.
    """
    samples = len(completions[0]) if completions else 0
    if not samples or len(completions) != len(prompts) or any(len(some) != samples for some in completions):
        raise DataError(f"{len(prompts)} prompts and {len(completions)} completions: each prompt must have as many")
    if len(set(prompts)) < len(prompts):
        raise DataError("a prompt is there twice: give each once, with all its completions")
    if isinstance(policy, str):
        policy = PolicyInfo(name=policy, fingerprint=hashlib.sha256(f"elsewhere: {policy}".encode()).hexdigest())
    encoder = load_tokenizer(tokenizer)
    info = tokenizer_info(encoder, tokenizer)
    digests = [hashlib.sha256(text.encode()).digest() for text in prompts]
    ids = np.frombuffer(b"".join(digest[:16] for digest in digests), np.uint8).reshape(-1, 16)
    tokens = Ragged.from_rows(encoder(list(prompts))["input_ids"], TOKEN_DTYPE)
    fingerprint = hashlib.sha256(canonical_json(list(prompts))).hexdigest()
    data = DataInfo(name=f"rollouts of {policy.name}", fingerprint=fingerprint, template="{prompt}")
    rows = Ragged.from_rows(chain.from_iterable(completions), TOKEN_DTYPE)
    logprob = Ragged.from_rows(chain.from_iterable(behavior_logprob), np.float32)
    if not np.array_equal(rows.offsets, logprob.offsets):
        raise DataError("behavior_logprob must have one number for every token of completions")
    ended = np.array([len(row) > 0 and row[-1] == encoder.eos_token_id for row in rows])
    if finished is not None:
        ended = np.array([bool(one) for one in chain.from_iterable(finished)])
    longest = int(rows.lengths.max(initial=1))
    sampling = (sampling or Sampling()).model_copy(update={"samples": samples, "max_new_tokens": longest})
    index, nothing, made = (
        np.repeat(np.arange(len(prompts)), samples),
        np.zeros(len(rows.values), np.bool_),
        list[str](),
    )
    whole, first = Rollouts(index, rows, logprob.values, nothing, ended), 0
    for prompts_id in ensure_prompts(cache, Prompts(ids, tokens), data, info):
        count = cache.entry(prompts_id).rows
        part = whole.rows(first * samples, (first + count) * samples)
        part = Rollouts(part.prompt_index - first, part.completions, part.behavior_logprob, part.forced, part.finished)
        about = RolloutsInfo(
            prompts=prompts_id, prompt_start=0, prompt_stop=count, policy=policy, tokenizer=info, sampling=sampling
        )
        same = (id_ for id_, info in cache.rollouts() if _is(cache, id_, info, about, part))
        made.append(next(same, None) or cache.commit_rollouts(part, about))
        first += count
    return made


def _is(cache: Cache, id_: str, info: RolloutsInfo, wanted: RolloutsInfo, rollouts: Rollouts) -> bool:
    """Whether a segment holds these rollouts, so that a program that runs again adds none twice."""
    who = (info.prompts, info.policy.fingerprint, info.sampling)
    if who != (wanted.prompts, wanted.policy.fingerprint, wanted.sampling):
        return False
    there = cache.load_rollouts(id_)
    pairs = zip(vars(there.completions).values(), vars(rollouts.completions).values(), strict=True)
    return all(np.array_equal(one, other) for one, other in pairs)
