"""Scores of a model that this program does not run: the caller gives its logits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ketchup_cache.cache.cache import Cache
from ketchup_cache.cache.manifest import ScoresInfo
from ketchup_cache.errors import NumericsError
from ketchup_cache.provenance import TeacherInfo
from ketchup_cache.types import TOKEN_DTYPE, Scores, TopLogits, concatenated

Logits = Callable[[NDArray[np.int32], NDArray[np.int32]], NDArray]
"""(prompt tokens [P], completion tokens [T]) → [T + 1, V]: the logits before each token, and after the last one."""


def score_with(cache: Cache, logits: Logits, *, teacher: str | TeacherInfo, keep_top: int = 0) -> list[str]:
    """Score all rollouts that have no scores by this teacher, and commit them; returns the ids of the new segments.

    logits: of the teacher, float, over at least the tokenizer's vocabulary; columns behind it are padding and are left
    out. teacher: who it is. Of a name alone the fingerprint is that of the name, so a model of other weights must have
    another name. keep_top: how many of the largest logits of each state to keep.

    Raises NumericsError for a NaN or infinity, ValueError for a shape that does not fit, and the errors of
    `Cache.commit_scores`.
    """
    if isinstance(teacher, str):
        fingerprint = hashlib.sha256(f"elsewhere: {teacher}".encode()).hexdigest()
        teacher = TeacherInfo(name=teacher, fingerprint=fingerprint, dtype="elsewhere")
    infos, made = dict(cache.rollouts()), []
    for id_, start, stop in cache.unscored(teacher.fingerprint, keep_top=keep_top):
        info, rollouts = infos[id_], cache.load_rollouts(id_)
        prompts, vocab = cache.load_prompts(info.prompts).tokens, info.tokenizer.vocab_size
        top = min(keep_top, vocab)
        found = []
        for row in range(start, stop):
            tokens, finished = rollouts.completions[row], bool(rollouts.finished[row])
            given_logits = np.asarray(logits(prompts[rollouts.prompt_index[row]], tokens))
            found.append(_reduced(given_logits, tokens, vocab, finished, top, f"rollouts {id_[:12]}, row {row}"))
        given = {"teacher": teacher, "tokenizer": info.tokenizer, "keep_top": top}
        made.append(
            cache.commit_scores(concatenated(found), ScoresInfo(rollouts=id_, row_start=start, row_stop=stop, **given))
        )
    return made


def _reduced(
    logits: NDArray, tokens: NDArray[np.int32], vocab: int, finished: bool, keep_top: int, where: str
) -> Scores:
    """Scores of one row, computed in float64. where: what an error names."""
    if logits.ndim != 2 or len(logits) != len(tokens) + 1 or logits.shape[1] < vocab:
        raise ValueError(f"{where}: logits of shape {logits.shape}, must be ({len(tokens) + 1}, {vocab} or more)")
    logits = logits[:, :vocab].astype(np.float64)
    if not np.isfinite(logits).all():
        raise NumericsError(f"{where}: a NaN or infinite logit; look at the model that gave it")
    before = logits[:-1]
    largest = before.max(1, keepdims=True)
    logsumexp = largest[:, 0] + np.log(np.exp(before - largest).sum(1))
    q, final = before[np.arange(len(tokens)), tokens], 0.0 if finished else logits[-1].max()
    top = None
    if keep_top:
        order = np.argsort(-before, axis=1, kind="stable")
        ids, others = order[:, :keep_top], np.take_along_axis(before, order[:, keep_top:], 1)
        with np.errstate(divide="ignore"):
            rest = largest[:, 0] + np.log(np.exp(others - largest).sum(1))
        top_q = np.take_along_axis(before, ids, 1)
        top = TopLogits(top_q.astype(np.float32), ids.astype(TOKEN_DTYPE), rest.astype(np.float32))
    q, max_q, logsumexp, mean_q = (v.astype(np.float32) for v in (q, largest[:, 0], logsumexp, before.mean(1)))
    return Scores(q, max_q, logsumexp, mean_q, np.array([final], np.float32), top)
