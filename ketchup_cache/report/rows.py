"""Rollouts of a cache one by one, as text and numbers: what `export`, `show` and `report` read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from ketchup_cache.cache.cache import Cache
from ketchup_cache.cache.index import ScoredRef
from ketchup_cache.config.options import SelectOptions
from ketchup_cache.errors import CacheError, ModelError
from ketchup_cache.models.fingerprint import tokenizer_info
from ketchup_cache.models.load import load_tokenizer
from ketchup_cache.provenance import PolicyInfo, require_same_tokenizer
from ketchup_cache.sharing.remote_cache import open_cache
from ketchup_cache.text.tokens import pieces
from ketchup_cache.training.records import read_pins
from ketchup_cache.types import PER_TOKEN, Row, ScoredRollouts, Scores, TopLogits

Part = tuple[str, int, int, str, PolicyInfo, ScoredRef | None]
"""Rows start to stop of a rollouts segment, its prompts segment, who sampled them, and where their scores are."""


def parts(cache: Cache, select: SelectOptions, *, keep_top: int = 0, unscored: bool = True) -> Iterator[Part]:
    """The scored rows in the order of commits, then those without scores. Selects and raises as `Cache.scored`."""
    teacher = cache.select_teacher(select.scored_by).fingerprint if cache.teachers() else ""
    for ref in cache.scored(teacher, select.policy, keep_top=keep_top) if teacher else ():
        yield ref.rollouts_id, ref.row_start, ref.row_stop, ref.prompts_id, ref.policy, ref
    if unscored:
        wanted = cache.select_policy(select.policy).fingerprint if select.policy is not None else None
        infos = {id_: info for id_, info in cache.rollouts() if wanted in (None, info.policy.fingerprint)}
        for id_, start, stop in cache.unscored(teacher, keep_top=keep_top):
            if info := infos.get(id_):
                yield id_, start, stop, info.prompts, info.policy, None


def load_part(cache: Cache, part: Part, keep_top: int | None = None) -> ScoredRollouts:
    """Its rows; scores are zeros where there are none. keep_top: at most so many of the largest logits; None: all."""
    id_, start, stop, prompts, _, ref = part
    rollouts = cache.load_rollouts(id_).rows(start, stop)
    scores = cache.load_scored(ref).scores if ref else Scores.empty(len(rollouts.completions.values), len(rollouts))
    if keep_top is not None:
        scores = scores.with_top(min(keep_top, scores.keep_top))
    return ScoredRollouts(cache.load_prompts(prompts), rollouts, scores)


def record(joined: ScoredRollouts, i: int, part: Part, tokenizer: PreTrainedTokenizerBase, top: int = 0) -> dict:
    """Row i of a part in plain values: the fields of `Row`, those of scores where there are any, with `tokens` and
    `prompt` as text. top: so many of the largest logits, as [token, q] of each state, where they were kept."""
    policy, ref = part[4:]
    row = dict(vars(Row.of(joined, i, policy.name, ref.teacher.name if ref else "")))
    kept: TopLogits | None = row.pop("top")
    prompt, ids = (row.pop(name).tolist() for name in ("prompt_tokens", "completion_tokens"))
    known = {key: value for key, value in row.items() if ref or key not in (*PER_TOKEN, "final_max_q")}
    values = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in known.items()}
    for key in {"behavior_logprob", *PER_TOKEN} & known.keys():  # the shortest digits that are the same float32
        values[key] = [float(str(value)) for value in known[key]]
    if kept and ref and top:
        pairs = zip(kept.ids[:, :top].tolist(), kept.q[:, :top].tolist(), strict=True)
        values["top"] = [[[tokenizer.decode([id_]), round(q, 3)] for id_, q in zip(*p, strict=True)] for p in pairs]
    values |= {"prompt": "".join(pieces(tokenizer, prompt)), "prompt_tokens": len(prompt), "ids": ids}
    return values | {"tokens": pieces(tokenizer, ids), "scored": ref is not None, "policy_step": policy.step}


def cache_of_run(run: Path) -> Cache:
    """The segments that a run has read. Raises CacheError where it has read none, or its cache is not on this
    machine: a file of a run never makes this program call an address."""
    if not (pins := run / "pins.json").is_file():
        raise CacheError(f"{run}: has read no cache; show the file that it learned from")
    ids = read_pins(pins)
    address = str(json.loads(pins.read_text(encoding="utf-8")).get("cache", ""))
    if "://" in address or not Path(address).is_dir():
        raise CacheError(f"{run}: its cache is not in this folder ({address}): give the cache, or go where it is")
    cache = open_cache(address)
    cache.pin(ids)
    return cache


def tokenizer_of(cache: Cache, name: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer that made the ids of a cache. name: a folder or Hub id; None: the folder that the cache names.

    Raises ModelError where there is none here, MismatchError for another one.
    """
    known = {m.info.tokenizer.fingerprint: m.info.tokenizer for _, m in cache.manifests()}
    for theirs in known.values():
        if name is None and not Path(theirs.name).is_dir():
            what = f"{cache.address}: its tokenizer is not here ({theirs.name})"
            raise ModelError(f"{what}: give a model that has it with --tokenizer")
        tokenizer = load_tokenizer(name or theirs.name)
        todo = f"{cache.address}: holds ids of another tokenizer; choose another --tokenizer"
        require_same_tokenizer(tokenizer_info(tokenizer, name or theirs.name), theirs, todo)
        return tokenizer
    raise CacheError(f"{cache.address}: holds nothing yet; `ketchup-cache rollout` puts prompts there")
