"""`rollout`: prompts into the cache, completions of them sampled from a policy, one committed segment at a time."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from ketchup_cache.config.commands import RolloutConfig
from ketchup_cache.console import progress
from ketchup_cache.models.fingerprint import tokenizer_info, weights_fingerprint
from ketchup_cache.models.load import load_model, load_tokenizer, resolve_folder
from ketchup_cache.provenance import PolicyInfo
from ketchup_cache.rollouts.calculator import Calculator
from ketchup_cache.rollouts.segments import ensure_prompts, held_rollouts, rollout_chunks, rollout_range, sampling_of
from ketchup_cache.sharing.remote_cache import open_cache
from ketchup_cache.text.prompts import as_chat, kept_examples, tokenize_prompts, without_duplicates
from ketchup_cache.text.read import data_info, read_examples


@dataclass(frozen=True)
class RolloutReport:
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

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"mean_length": self.mean_length, "finished_share": self.finished_share}

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

    Raises DataError (`read_examples`, `tokenize_prompts`), ModelError (`lm.load`), CacheError, MismatchError for a
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
    chunks, left = [], config.first or len(prompts)
    for prompts_id in ensure_prompts(cache, prompts, data, info):
        rows = min(left, cache.manifest(prompts_id).rows)
        chunks += [(prompts_id, start, stop) for start, stop in rollout_chunks(rows, sampling)]
        left -= rows
    held = held_rollouts(cache, policy, sampling)
    missing = [chunk for chunk in chunks if chunk not in held]
    new = sum(stop - start for _, start, stop in missing) * sampling.samples
    if missing:
        model = load_model(config.student, device=config.device, trust_remote_code=config.trust_remote_code)
        with progress("rollouts", new, "rollouts") as bar:
            for chunk in missing:
                held[chunk] = rollout_range(
                    cache,
                    model,
                    policy,
                    info,
                    *chunk,
                    sampling,
                    batch=config.rollout_batch,
                    calculator=calculator,
                    bar=bar,
                )
    rows = tokens = finished = 0
    for chunk in chunks:
        rollouts = cache.load_rollouts(held[chunk])
        rows += len(rollouts)
        tokens += len(rollouts.completions.values)
        finished += int(rollouts.finished.sum())
    return RolloutReport(
        prompts=len(prompts),
        duplicates=len(given) - len(examples),
        too_long=len(examples) - len(prompts),
        rollouts=rows,
        tokens=tokens,
        finished=finished,
        already_there=rows - new,
        seconds=time.monotonic() - began,
    )
