"""Made-up segments for the tests of the cache."""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np

from ketchup_cache import open_cache
from ketchup_cache.cache.cache import Cache
from ketchup_cache.cache.manifest import PromptsInfo, RolloutsInfo, ScoresInfo
from ketchup_cache.provenance import DataInfo, PolicyInfo, Sampling, TeacherInfo, TokenizerInfo
from ketchup_cache.types import Prompts, Ragged, Rollouts, Scores, TopLogits

VOCAB = 60
SIZES = ((3, 1, 4), (5, 2, 7), ((0, 3),))
"""Of a family of segments: lengths of prompts, lengths of completions, rows that are scored together."""


def fingerprint(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def tokenizer(vocab_size: int = VOCAB, name: str = "words") -> TokenizerInfo:
    return TokenizerInfo(name=name, fingerprint=fingerprint(f"{name} {vocab_size}"), vocab_size=vocab_size)


def prompts_info(vocab_size: int = VOCAB) -> PromptsInfo:
    data = DataInfo(name="made-up", fingerprint=fingerprint("made-up"), template="{prompt}")
    return PromptsInfo(tokenizer=tokenizer(vocab_size), data=data, start=0)


def rollouts_info(prompts: str, stop: int, *, policy="student", samples=1, vocab_size=VOCAB) -> RolloutsInfo:
    by = PolicyInfo(name=policy, fingerprint=fingerprint(policy))
    made = {"policy": by, "tokenizer": tokenizer(vocab_size), "sampling": Sampling(samples=samples)}
    return RolloutsInfo(prompts=prompts, prompt_start=0, prompt_stop=stop, **made)


def teacher(name: str = "teacher") -> TeacherInfo:
    return TeacherInfo(name=name, fingerprint=fingerprint(name), dtype="float32")


def scores_info(rollouts: str, start: int, stop: int, *, by="teacher", vocab_size=VOCAB, **more) -> ScoresInfo:
    made = {"teacher": teacher(by), "tokenizer": tokenizer(vocab_size)}
    return ScoresInfo(rollouts=rollouts, row_start=start, row_stop=stop, **made, **more)


def ragged(rng: np.random.Generator, lengths: Sequence[int], vocab_size: int) -> Ragged:
    return Ragged.from_rows([rng.integers(0, vocab_size, n) for n in lengths], np.int32)


def make_prompts(lengths: Sequence[int] = (3, 1, 4), *, seed: int = 0, vocab_size: int = VOCAB) -> Prompts:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 256, (len(lengths), 16)).astype(np.uint8)
    return Prompts(ids, ragged(rng, lengths, vocab_size))


def make_rollouts(lengths=(5, 2, 7), *, prompts=3, seed=0, vocab_size=VOCAB, forced=False) -> Rollouts:
    rng, tokens = np.random.default_rng(seed), sum(lengths)
    index = np.sort(rng.integers(0, prompts, len(lengths))) if prompts else np.empty(0, np.int64)
    completions, behavior = ragged(rng, lengths, vocab_size), -rng.exponential(2, tokens).astype(np.float32)
    marks, ended = rng.random(tokens) < (0.3 if forced else 0), rng.random(len(lengths)) < 0.7
    return Rollouts(index, completions, behavior, marks, ended & (np.array(lengths, int) > 0))


def make_scores(rollouts: Rollouts, start: int, stop: int, *, seed=0, vocab_size=VOCAB, top=0) -> Scores:
    """Of random rows of logits, with the token's logit among them. top: how many of the largest are kept."""
    rng, tokens = np.random.default_rng(seed), rollouts.completions.slice(start, stop).values
    width = vocab_size if top else min(vocab_size, 50)
    logits = rng.normal(0, 8, (len(tokens), width)).astype(np.float32)
    final = np.where(rollouts.finished[start:stop], 0, rng.normal(0, 8, stop - start)).astype(np.float32)
    return scores_of(logits, tokens % width, final, top)


def scores_of(logits: np.ndarray, tokens: np.ndarray, final: np.ndarray, top: int) -> Scores:
    """From all logits, in float64, with the kept ones found by a plain sort."""
    order = np.argsort(-logits, axis=1, kind="stable")[:, :top].astype(np.int32)
    wide = logits.astype(np.float64)
    rest = wide.copy()
    np.put_along_axis(rest, order, -np.inf, axis=1)
    with np.errstate(divide="ignore"):
        lse, others = (np.log(np.exp(x - 50).sum(1)) + 50 for x in (wide, rest))
    kept = TopLogits(np.take_along_axis(logits, order, 1), order, others.astype(np.float32))
    q = logits[np.arange(len(tokens)), tokens]
    return Scores(q, logits.max(1), lse.astype(np.float32), logits.mean(1), final, kept if top else None)


def add_prompts(cache: Cache, lengths: Sequence[int] = (3, 1, 4), *, seed: int = 0, vocab_size: int = VOCAB) -> str:
    return cache.commit_prompts(make_prompts(lengths, seed=seed, vocab_size=vocab_size), prompts_info(vocab_size))


def fill(cache: Cache | Path, scores=None, *, sizes=SIZES, seed=0, forced=True, vocab_size=VOCAB, top=0, **info):
    """Ids of a family of segments: prompts and rollouts of these lengths, and scores of these spans of the rollouts.

    cache: or the folder of a new one. scores: in the place of made-up ones, of which `top` largest logits are kept.
    info: more that is said of the scores.
    """
    prompts, rollouts, spans = sizes
    cache = open_cache(cache, create=True) if isinstance(cache, Path) else cache
    ids = [add_prompts(cache, prompts, seed=seed, vocab_size=vocab_size)]
    drawn = make_rollouts(rollouts, prompts=len(prompts), seed=seed, forced=forced)
    ids.append(cache.commit_rollouts(drawn, rollouts_info(ids[0], len(prompts), vocab_size=vocab_size)))
    for start, stop in spans:
        part = scores or make_scores(drawn, start, stop, top=top)
        made_by = scores_info(ids[1], start, stop, vocab_size=vocab_size, keep_top=part.keep_top, **info)
        ids.append(cache.commit_scores(part, made_by))
    return ids


def contents(root: Path) -> dict[str, bytes]:
    """Of manifests/ and segments/."""
    found = (p for folder in ("manifests", "segments") for p in (root / folder).rglob("*") if p.is_file())
    return {str(p.relative_to(root)): p.read_bytes() for p in found}


def load_all(root: Path) -> None:
    cache = open_cache(root)
    for segment_id in cache.segment_ids():
        cache.load(segment_id)


def same(a: object, b: object) -> bool:
    """Equal bit for bit, dtypes and NaN payloads included."""
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if a is None or b is None:
        return a is b
    return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))  # type: ignore[arg-type]


def in_child(work: Callable[[], object]) -> int:
    """Fork, run, and return the process id; the child exits with 0, or with 70 where the work raised."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
