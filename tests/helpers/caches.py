"""Caches made with nothing of ours but the store: plain forward passes fill them, so they are oracles too."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForSeq2SeqLM

from ketchup_cache import open_cache
from ketchup_cache.cache.manifest import PromptsInfo, RolloutsInfo, ScoresInfo
from ketchup_cache.models.fingerprint import tokenizer_info, weights_fingerprint
from ketchup_cache.provenance import DataInfo, PolicyInfo, Sampling, TeacherInfo, in_precision
from ketchup_cache.types import Prompts, Ragged, Rollouts, Scores
from tests.helpers.tiny import WORDS, make_tokenizer

EOS = 1


def plain_logits(model, prompt, completion, *, after: bool = False) -> torch.Tensor:
    """[T (+ 1), V] logits of one row alone: no padding, no batch, the model's own forward and head."""
    start = model.config.decoder_start_token_id
    inputs = [start, *map(int, completion)] if after else [start, *map(int, completion[:-1])]
    with torch.no_grad():
        return model(
            input_ids=torch.tensor([list(map(int, prompt))]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            decoder_input_ids=torch.tensor([inputs]),
        ).logits[0]


def plain_scores(model, prompt, completion, finished: bool, vocab: int) -> dict[str, np.ndarray]:
    logits = plain_logits(model, prompt, completion, after=True)[:, :vocab].double()
    inside = logits[:-1]
    return {
        "q": inside[range(len(completion)), list(map(int, completion))].numpy(),
        "max_q": inside.max(1).values.numpy(),
        "logsumexp": inside.logsumexp(1).numpy(),
        "mean_q": inside.mean(1).numpy(),
        "final_max_q": np.array([0.0 if finished else float(logits[-1].max())]),
    }


def make_cache(
    path: Path,
    student: Path,
    teacher: Path,
    *,
    prompts: int = 6,
    samples: int = 2,
    longest: int = 7,
    seed: int = 0,
    forced: bool = False,
    stale: float = 0.0,
    segments: int = 1,
):
    """Rollouts of random tokens with exact behaviour log-probabilities (shifted by up to `stale`) and scores."""
    rng = np.random.default_rng(seed)
    vocab = len(WORDS) + 3
    info = tokenizer_info(make_tokenizer(), "tiny")
    models = [AutoModelForSeq2SeqLM.from_pretrained(folder).eval() for folder in (student, teacher)]
    texts = [rng.integers(3, vocab, rng.integers(1, longest)).astype(np.int32) for _ in range(prompts)]
    texts = [np.append(t, EOS).astype(np.int32) for t in texts]
    ids = np.stack([np.frombuffer(hashlib.sha256(bytes([i, seed])).digest()[:16], np.uint8) for i in range(prompts)])
    cache = open_cache(path, create=True)
    data = DataInfo(name="made up", fingerprint=hashlib.sha256(b"made up").hexdigest(), template="{prompt}")
    prompts_id = cache.commit_prompts(
        Prompts(ids, Ragged.from_rows(texts, np.int32)), PromptsInfo(tokenizer=info, data=data, start=0)
    )
    teacher_info = TeacherInfo(
        name="teacher", fingerprint=in_precision(weights_fingerprint(teacher), "float32"), dtype="float32"
    )
    policy = PolicyInfo(name=str(student), fingerprint=weights_fingerprint(student))
    for some in np.array_split(np.arange(prompts), segments):
        rows, finished, index, behavior, marks, scores = [], [], [], [], [], []
        for p in np.repeat(some, samples):
            done = bool(rng.random() < 0.8)
            tokens = rng.integers(3, vocab, rng.integers(1, longest)).astype(np.int32)
            tokens = np.append(tokens, EOS).astype(np.int32) if done else tokens
            logprob = plain_logits(models[0], texts[p], tokens)[:, :vocab].log_softmax(1)
            mark = (rng.random(len(tokens)) < 0.3) if forced else np.zeros(len(tokens), bool)
            chosen = logprob[range(len(tokens)), tokens.tolist()].numpy() - stale * rng.random(len(tokens))
            rows.append(tokens)
            finished.append(done)
            index.append(p)
            behavior.append(np.where(mark, 0, np.minimum(chosen, 0)))
            marks.append(mark)
            scores.append(plain_scores(models[1], texts[p], tokens, done, vocab))
        rollouts_id = cache.commit_rollouts(
            Rollouts(
                np.array(index, np.int64),
                Ragged.from_rows(rows, np.int32),
                np.concatenate(behavior).astype(np.float32),
                np.concatenate(marks),
                np.array(finished),
            ),
            RolloutsInfo(
                prompts=prompts_id,
                prompt_start=int(some[0]),
                prompt_stop=int(some[-1]) + 1,
                policy=policy,
                tokenizer=info,
                sampling=Sampling(samples=samples, max_new_tokens=longest, seed=seed),
            ),
        )
        joined = {k: np.concatenate([s[k] for s in scores]).astype(np.float32) for k in scores[0]}
        cache.commit_scores(
            Scores(**joined),
            ScoresInfo(rollouts=rollouts_id, row_start=0, row_stop=len(rows), teacher=teacher_info, tokenizer=info),
        )
    return cache
