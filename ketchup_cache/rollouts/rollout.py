"""`rollout`: prompts into the cache, and completions of them sampled from a policy, a segment at a time.

Rollouts depend only on the policy, their prompts, the sampling settings and the batch size. So a run that was killed
goes on where it stopped, to the same rollouts, and what a cache already holds is never sampled again.

A segment is committed when 262,144 completion tokens are sampled, so that a cache of millions of rollouts has few
segments; the last one of a prompts segment, of a run or of a refresh may be smaller. What is not committed is lost when
the run is killed: less than 262,144 tokens, and the up to 4,096 rollouts that are being sampled. `rollout` also commits
once five minutes have passed, so that a slow machine loses five minutes and those 4,096 rollouts at most. A refresh of
`learn` does not, since the order of training follows the segments and must not depend on the machine's speed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from ketchup_cache.cache.cache import Cache
from ketchup_cache.cache.index import Range, gaps
from ketchup_cache.cache.manifest import PromptsInfo, RolloutsInfo
from ketchup_cache.config.commands import RolloutConfig
from ketchup_cache.config.options import SamplingOptions
from ketchup_cache.console import Report, progress
from ketchup_cache.errors import ConfigError, ModelError, ServerError
from ketchup_cache.models.fingerprint import tokenizer_info, weights_fingerprint
from ketchup_cache.models.load import load_model, load_tokenizer
from ketchup_cache.models.origin import prompts_as_trained
from ketchup_cache.parallel.group import by_first, group
from ketchup_cache.parallel.pool import on_ray
from ketchup_cache.provenance import DataInfo, Mismatch, PolicyInfo, Sampling, TokenizerInfo, require_same_tokenizer
from ketchup_cache.rollouts.calculator import Calculator
from ketchup_cache.rollouts.engine import Drawn, Engine, require_decoder
from ketchup_cache.rollouts.sample import sample_completions
from ketchup_cache.sharing.remote_cache import open_cache
from ketchup_cache.text.prompts import tokenize_prompts
from ketchup_cache.text.read import data_info, read_examples
from ketchup_cache.types import Prompts, Ragged, concatenated

PROMPTS_PER_SEGMENT = 2**16
PROMPT_TOKENS_PER_SEGMENT = 2**22
ROLLOUTS_AT_ONCE = 2**12
TOKENS_AT_ONCE = 2**18
"""Completions that are sampled between two commits at least, and their longest possible tokens: the smaller of both."""
TOKENS_PER_SEGMENT = 2**18
"""Completion tokens of a rollouts segment, at least."""
SECONDS_PER_SEGMENT = 300.0
"""After which `rollout` commits fewer tokens."""


@dataclass(frozen=True)
class RolloutReport(Report):
    """What `rollout` leaves in the cache."""

    prompts: int
    duplicates: int
    """Prompts left out because an earlier one is the same."""
    too_long: int
    """Prompts left out by `--long-prompts drop`."""
    cut: int
    """Prompts that lost tokens by `--long-prompts truncate`."""
    rollouts: int
    tokens: int
    finished: int
    already_there: int
    """Rollouts that the cache held before."""
    seconds: float
    engine: dict[str, Any] | None = None
    """`Mismatch` of the segments that an engine drew."""

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
        cut = f" ({self.cut:,} of them cut at --max-prompt-tokens)" if self.cut else ""
        prompts = f"{self.prompts:,} prompts{cut}" + (f" (left out: {', '.join(left_out)})" if left_out else "")
        new = self.rollouts - self.already_there
        there = f", {self.already_there:,} of them already there" if self.already_there else ""
        return (
            f"{self.rollouts:,} rollouts of {prompts}{there}: mean length {self.mean_length:.1f} tokens, "
            f"{self.finished_share:.1%} finished; {self.seconds:.1f} s, {new / self.seconds:,.1f} new rollouts/s"
            + (f"; {Mismatch(**self.engine)}" if self.engine else "")
        )


def rollout(config: RolloutConfig) -> RolloutReport:
    """Sample completions of every prompt from `config.student` into the cache, as far as they are not there yet.

    Raises DataError (`read_examples`, `tokenize_prompts`), ModelError (`load_model`), CacheError, MismatchError for a
    cache of another tokenizer, NumericsError for a policy with NaN logits, ServerError (`Engine`), WriteError where the
    disk is full.
    """
    began, config = time.monotonic(), prompts_as_trained(config, config.student)
    require_decoder(config, config.student, trust_remote_code=config.trust_remote_code)
    given = read_examples(config)
    tokenizer = load_tokenizer(config.student, trust_remote_code=config.trust_remote_code)
    info = tokenizer_info(tokenizer, config.student)
    kept = tokenize_prompts(given, tokenizer, config, unique=True)
    prompts = kept.prompts
    policy = PolicyInfo(name=config.student, fingerprint=weights_fingerprint(config.student))

    cache = open_cache(config.cache, create=True)
    data = data_info(kept.examples, config, tokenizer)
    wanted: list[Range] = []
    left = config.first or len(prompts)
    prompt_ids = group().from_first(lambda: ensure_prompts(cache, prompts, data, info))
    cache.agree()
    for prompts_id in prompt_ids:
        wanted.append((prompts_id, 0, min(left, cache.entry(prompts_id).rows)))
        left -= wanted[-1][2]

    if config.shard:
        wanted = _of_shard(config, wanted)

    calculator = _calculator(config)

    def load() -> PreTrainedModel | Engine:
        model = _load(config)
        return Engine(config, model, info.vocab_size) if config.student_url else model

    held, new = ensure_rollouts(cache, wanted, load, policy, info, config, calculator, seconds=SECONDS_PER_SEGMENT)
    rows = tokens = finished = 0
    for rollouts_id, start, stop in held:
        rollouts = cache.load_rollouts(rollouts_id)
        inside = (start <= rollouts.prompt_index) & (rollouts.prompt_index < stop)
        rows += int(inside.sum())
        tokens += int(rollouts.completions.lengths[inside].sum())
        finished += int(rollouts.finished[inside].sum())
    too_long, seconds = len(given) - kept.duplicates - len(prompts), time.monotonic() - began
    left_out = kept.duplicates, too_long, kept.cut
    infos, ids = dict(cache.rollouts()), {id_ for id_, _, _ in held}
    engine = Mismatch.of_all([(cache.entry(id_).tokens, of) for id_ in ids if (of := infos[id_].engine)])
    how = engine.model_dump() if engine else None
    return RolloutReport(len(prompts), *left_out, rows, tokens, finished, rows - new, seconds, how)


def _load(config: RolloutConfig) -> PreTrainedModel:
    return load_model(config.student, device=config.device, trust_remote_code=config.trust_remote_code)


def _calculator(config: RolloutConfig) -> Calculator | None:
    tokenizer = load_tokenizer(config.student, trust_remote_code=config.trust_remote_code)
    return Calculator(tokenizer, config.student) if config.calculator else None


def _worker(config: RolloutConfig, policy: PolicyInfo, tokenizer: TokenizerInfo) -> Callable[[Range], list[Range]]:
    """On a cluster: holds the model, and says where the rollouts of a lot are."""
    cache, model, calculator = open_cache(config.cache), _load(config), _calculator(config)
    if weights_fingerprint(config.student) != policy.fingerprint:
        raise ModelError(f"{config.student}: is another model than where the command was started; copy it again")

    def work(lot: Range) -> list[Range]:
        cache.refresh()
        cache.await_shown(lot[:1])
        return ensure_rollouts(cache, [lot], lambda: model, policy, tokenizer, config, calculator)[0]

    return work


def _of_shard(config: RolloutConfig, wanted: list[Range]) -> list[Range]:
    """Of these prompts, those of `config.shard`: whole lots (`_prompts_at_once`), so that what is sampled beside a row
    is what is beside it without shards. Raises ConfigError for more shards than lots."""
    lots, size = _lots(wanted, config), _prompts_at_once(config)
    if not (part := config.part_of(len(lots))):
        most = f"at most {len(lots)} parts, one for each {size:,} prompts, which are sampled together"
        raise ConfigError([f"--shard {config.shard}: these prompts make {most}"])
    mine = lots[part.start : part.stop]
    spans = {id_: [place for other, *span in mine if other == id_ for place in span] for id_, _, _ in mine}
    return [(id_, min(places), max(places)) for id_, places in spans.items()]


# ----------------------------------------------------------------------------------------------------------- prompts


def ensure_prompts(cache: Cache, prompts: Prompts, data: DataInfo, tokenizer: TokenizerInfo) -> list[str]:
    """Ids of the segments that hold these prompts, in their order; those that are not there yet are committed.

    Raises MismatchError for a cache of another tokenizer, and the errors of `Cache.commit_prompts`.
    """
    held = [(id_, m.info) for id_, m in cache.manifests("prompts") if isinstance(m.info, PromptsInfo)]
    for _, info in held:
        what = f"{cache.address} was made with another tokenizer; use another --cache"
        require_same_tokenizer(tokenizer, info.tokenizer, what)
    ids = []
    for rows in prompts.tokens.ranges(0, len(prompts), PROMPT_TOKENS_PER_SEGMENT, PROMPTS_PER_SEGMENT):
        part = Prompts(prompts.ids[rows.start : rows.stop], prompts.tokens.slice(rows.start, rows.stop))
        same = [id_ for id_, info in held if (info.data.fingerprint, info.start) == (data.fingerprint, rows.start)]
        # the same texts may have been cut at another length
        there = (id_ for id_ in same if _equal(cache.load_prompts(id_).tokens, part.tokens))
        new = PromptsInfo(tokenizer=tokenizer, data=data, start=rows.start)
        ids.append(next(there, None) or cache.commit_prompts(part, new))
    return ids


def _equal(one: Ragged, other: Ragged) -> bool:
    return np.array_equal(one.offsets, other.offsets) and np.array_equal(one.values, other.values)


# ---------------------------------------------------------------------------------------------------------- rollouts


def ensure_rollouts(
    cache: Cache,
    wanted: Iterable[Range],
    load: Callable[[], PreTrainedModel | Engine],
    policy: PolicyInfo,
    tokenizer: TokenizerInfo,
    options: SamplingOptions,
    calculator: Calculator | None,
    seconds: float = math.inf,
) -> tuple[list[Range], int]:
    """Sample rollouts of these prompts, as far as they are not there yet. Returns where they are (rollouts segment, and
    the prompts of it that are wanted, each prompt once, in the order of `wanted`), and how many are new.

    load: gives the policy's model, or an engine that has it; called if rollouts are missing. policy: what it is.
    calculator: of the tokenizer, for sampling with it. seconds: after which a segment with fewer tokens is committed.
    Raises the errors of `sample_completions` or `Engine.sample`, and of `Cache.commit_rollouts`.
    """
    # the part of the options that decides which completions are drawn
    sampling = Sampling(**{name: getattr(options, name) for name in Sampling.model_fields})
    held, missing = _held(cache, wanted, policy, sampling)
    if not missing:
        return held, 0
    new = sum(stop - start for _, start, stop in missing) * sampling.samples
    at_once = _prompts_at_once(options)
    made_by = {"policy": policy, "tokenizer": tokenizer, "sampling": sampling}
    late = by_first(lambda began: time.monotonic() - began >= seconds)
    if isinstance(options, RolloutConfig) and options.engine == "ray":
        make = partial(_worker, options.model_copy(update={"engine": "local"}), policy, tokenizer)
        with progress("rollouts", new, "rollouts") as bar:
            for (_, start, stop), parts in on_ray(options, make, _lots(missing, options)):
                cache.await_shown({id_ for id_, _, _ in parts})
                bar.advance((stop - start) * sampling.samples)
        return _held(cache, wanted, policy, sampling)[0], new
    with progress("rollouts", new, "rollouts", workers=group().size) as bar:
        model = load()

        @by_first
        def commit(drawn: Drawn, start: int, stop: int) -> None:
            mismatch = model.mismatch(drawn) if isinstance(model, Engine) else None
            info = RolloutsInfo(prompts=prompts_id, prompt_start=start, prompt_stop=stop, engine=mismatch, **made_by)
            cache.commit_rollouts(drawn.rollouts, info)

        for prompts_id, begin, end in missing:
            parent, prompts = cache.entry(prompts_id).info, cache.load_prompts(prompts_id).tokens
            assert isinstance(parent, PromptsInfo)
            waiting: list[Drawn] = []
            began = time.monotonic()
            for start in range(begin, end, at_once):
                stop, first = min(start + at_once, end), parent.start + start
                some, failed, lacking = prompts.slice(start, stop), None, list[tuple[int, int]]()
                if isinstance(model, Engine):
                    try:
                        part = model.sample(some, sampling, first, bar.advance)
                    except ServerError as error:
                        failed, part = error, error.done
                        lacking = gaps(start, stop, [(start + place, start + place + 1) for place in error.places])
                else:
                    part = Drawn(
                        sample_completions(
                            model, tokenizer.vocab_size, some, sampling, first_prompt=first,
                            batch=options.rollout_batch, calculator=calculator, on_batch=bar.advance,
                        )
                    )  # fmt: skip
                rollouts = replace(part.rollouts, prompt_index=part.rollouts.prompt_index + start)
                waiting.append(replace(part, rollouts=rollouts))
                tokens = sum(len(drawn.rollouts.completions.values) for drawn in waiting)
                if stop == end or tokens >= TOKENS_PER_SEGMENT or failed or late(began):
                    whole = concatenated(waiting)
                    index = whole.rollouts.prompt_index
                    for low, high in gaps(begin, stop, lacking):
                        commit(whole.take(np.flatnonzero((low <= index) & (index < high))), low, high)
                    waiting, begin, began = [], stop, time.monotonic()
                if failed:
                    raise failed
    cache.agree()
    return _held(cache, wanted, policy, sampling)[0], new


def _lots(ranges: Iterable[Range], options: SamplingOptions) -> list[Range]:
    """What is sampled together."""
    size = _prompts_at_once(options)
    return [(id_, at, min(at + size, stop)) for id_, start, stop in ranges for at in range(start, stop, size)]


def _prompts_at_once(options: SamplingOptions) -> int:
    """Independent of the batch size, so that after running out of memory a smaller batch goes on."""
    return max(1, min(ROLLOUTS_AT_ONCE, TOKENS_AT_ONCE // options.max_new_tokens) // options.samples)


def _held(
    cache: Cache, wanted: Iterable[Range], policy: PolicyInfo, sampling: Sampling
) -> tuple[list[Range], list[Range]]:
    """Which rollouts segments hold these prompts for exactly this policy and sampling, and the prompts none holds."""
    held, missing = [], []
    # several processes may have stored the same prompts at once
    content = {id_: entry.content for id_, entry in cache.manifests("prompts")}
    for prompts_id, start, stop in wanted:
        covered: list[tuple[int, int, str]] = []
        for id_, info in cache.rollouts():
            made_by = content.get(info.prompts), info.policy.fingerprint, info.sampling
            if made_by == (content[prompts_id], policy.fingerprint, sampling):
                inside = max(start, info.prompt_start), min(stop, info.prompt_stop)
                covered += [(*part, id_) for part in gaps(*inside, [part[:2] for part in covered])]
        held += [(id_, first, last) for first, last, id_ in sorted(covered)]
        missing += [(prompts_id, *part) for part in gaps(start, stop, [part[:2] for part in covered])]
    return held, missing
