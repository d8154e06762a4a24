"""Caches whose rollouts and scores come from plain forward passes (`tests/helpers/oracle.py`): oracles too."""

import hashlib
from dataclasses import replace

import numpy as np
from transformers import AutoModelForSeq2SeqLM

from ketchup_cache import open_cache
from ketchup_cache.cache.cache import Cache
from ketchup_cache.cache.manifest import PromptsInfo, RolloutsInfo, ScoresInfo
from ketchup_cache.models.fingerprint import tokenizer_info, weights_fingerprint
from ketchup_cache.provenance import DataInfo, PolicyInfo, Sampling, TeacherInfo, in_precision
from ketchup_cache.types import Prompts, Ragged, Scores
from tests.helpers.models import VOCAB, make_tokenizer
from tests.helpers.oracle import make_rollouts, plain_logits, plain_row_scores

EOS = 1


def make_cache(
    path, student, teacher, *, prompts=6, samples=2, longest=7, seed=0, forced=False, stale=0.0, segments=1
) -> Cache:
    """Rollouts of random tokens with exact behaviour log-probabilities (shifted by up to `stale`) and scores."""
    rng = np.random.default_rng(seed)
    info = tokenizer_info(make_tokenizer(), "tiny")
    models = [AutoModelForSeq2SeqLM.from_pretrained(folder).eval() for folder in (student, teacher)]
    texts = [rng.integers(3, VOCAB, rng.integers(1, longest)).astype(np.int32) for _ in range(prompts)]
    texts = [np.append(t, EOS).astype(np.int32) for t in texts]
    ids = np.stack([np.frombuffer(hashlib.sha256(bytes([i, seed])).digest()[:16], np.uint8) for i in range(prompts)])
    cache = open_cache(path, create=True)
    data = DataInfo(name="made up", fingerprint=hashlib.sha256(b"made up").hexdigest(), template="{prompt}")
    given = Prompts(ids, Ragged.from_rows(texts, np.int32))
    prompts_id = cache.commit_prompts(given, PromptsInfo(tokenizer=info, data=data, start=0))
    fingerprint = in_precision(weights_fingerprint(teacher), "float32")
    teacher_info = TeacherInfo(name="teacher", fingerprint=fingerprint, dtype="float32")
    policy = PolicyInfo(name=str(student), fingerprint=weights_fingerprint(student))
    sampling = Sampling(samples=samples, max_new_tokens=longest, seed=seed)
    for some in np.array_split(np.arange(prompts), segments):
        drawn = []
        for p in np.repeat(some, samples):
            done = bool(rng.random() < 0.8)
            tokens = rng.integers(3, VOCAB, rng.integers(1, longest)).astype(np.int32)
            tokens = np.append(tokens, EOS).astype(np.int32) if done else tokens
            logprob = plain_logits(models[0], texts[p], tokens)[:, :VOCAB].log_softmax(1)
            mark = (rng.random(len(tokens)) < 0.3) if forced else np.zeros(len(tokens), bool)
            chosen = logprob[range(len(tokens)), tokens.tolist()].numpy() - stale * rng.random(len(tokens))
            scores = plain_row_scores(models[1], texts[p], tokens, done, VOCAB)
            drawn.append((p, tokens, done, np.where(mark, 0, np.minimum(chosen, 0)), mark, scores))
        index, rows, finished, behavior, marks, scores = zip(*drawn, strict=True)
        of_tokens = {"behavior_logprob": np.concatenate(behavior).astype(np.float32), "forced": np.concatenate(marks)}
        rollouts = replace(make_rollouts(index, rows, finished), **of_tokens)
        span = {"prompt_start": int(some[0]), "prompt_stop": int(some[-1]) + 1}
        made_by = RolloutsInfo(prompts=prompts_id, policy=policy, tokenizer=info, sampling=sampling, **span)
        rollouts_id = cache.commit_rollouts(rollouts, made_by)
        scored = ScoresInfo(rollouts=rollouts_id, row_start=0, row_stop=len(rows), teacher=teacher_info, tokenizer=info)
        joined = {k: np.concatenate([s[k] for s in scores]).astype(np.float32) for k in scores[0]}
        cache.commit_scores(Scores(**joined), scored)
    return cache


def rows_of(cache):
    """Each rollout by its prompt and the number of its sample, and how often it is there."""
    found: dict[tuple, list] = {}
    for id_, info in cache.rollouts():
        rollouts = cache.load_rollouts(id_)
        for row, prompt in enumerate(rollouts.prompt_index):
            one = rollouts.rows(row, row + 1)
            key = int(prompt), row % info.sampling.samples
            found.setdefault(key, []).append((one.completions.values.tolist(), one.behavior_logprob.tolist()))
    return found
