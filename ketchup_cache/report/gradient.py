"""`analyze --gradient`: which estimator of the policy gradient is right, which is steady, and where each pushes the
length. Nothing is trained.

The student's own rollouts are cut into batches as `learn` takes them. Each estimator gives a gradient of every batch,
with the mean baseline. The batches form two halves, A and B, of different prompts, so that g_A and g_B are independent:
    norm        ‖g‖, by g_A·g_B, which noise does not raise
    cosine      of g with the reference r: (g_A·r_B + g_B·r_A) / 2 over the norms. 1 − cosine is the bias of direction
    agreement   of the halves: g_A·g_B / (‖g_A‖ ‖g_B‖). What is missing to 1 is noise
    snr         ‖g‖² over the trace of the variance of one batch's gradient
    length      derivative of the expected length along g / ‖g‖, over that of K = 1 in size; −1 shortens as K = 1 does
The reference is unbiased: all later gaps (K = 1), and the first step in expectation where top logits are kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ketchup_cache.config.commands import AnalyzeConfig
from ketchup_cache.config.options import LossOptions
from ketchup_cache.console import Report, progress
from ketchup_cache.errors import CacheError, ConfigError
from ketchup_cache.files import write_file
from ketchup_cache.models.fingerprint import tokenizer_info, weights_fingerprint
from ketchup_cache.models.head import Head
from ketchup_cache.models.load import load_model, load_tokenizer
from ketchup_cache.sharing.remote_cache import open_cache
from ketchup_cache.training.batches import Stream
from ketchup_cache.training.optimizer import Learner, Optimizer
from ketchup_cache.training.policy_gradient import policy_gradient
from ketchup_cache.types import ScoredRollouts, Scores

REFERENCE, LENGTH = "reference", "length"
FLAT, GAE = {"weights": "flat"}, {"weights": "gae"}
NO_FUTURE = {"weights": "flat", "lam": 0.0}
SAMPLED: dict[str, Mapping[str, Any]] = {
    "K = 1 (LLMR)": {"k": 1},
    "comb K = 2": {"k": 2},
    "comb K = 4": {"k": 4},
    "comb K = 8": {"k": 8},
    "flat 1/2": FLAT | {"lam": 0.5},
    "flat 1/4": FLAT | {"lam": 0.25},
    "flat 1/8": FLAT | {"lam": 0.125},
    "gae 0.9": GAE | {"lam": 0.9},
    "gae 0.7": GAE | {"lam": 0.7},
    "gae 0.5": GAE | {"lam": 0.5},
    "no future": NO_FUTURE,
    "flat 1/4, end 1": FLAT | {"lam": 0.25, "end_weight": 1.0},
    "flat 1/4, centred": FLAT | {"lam": 0.25, "cost": "centred"},
    "gae 0.7, centred": GAE | {"lam": 0.7, "cost": "centred"},
    "K = 1, centred": {"k": 1, "cost": "centred"},
}
"""Estimators of two numbers a token, and their options of `learn`."""
EXACT: dict[str, Mapping[str, Any]] = {
    "exact, no future": NO_FUTURE,
    "exact, flat 1/4": FLAT | {"lam": 0.25},
    "exact, gae 0.7": GAE | {"lam": 0.7},
    "exact, K = 1": {"k": 1},
    "exact, flat 1/4, centred": FLAT | {"lam": 0.25, "cost": "centred"},
    "exact, gae 0.7, centred": GAE | {"lam": 0.7, "cost": "centred"},
    "exact, K = 1, centred": {"k": 1, "cost": "centred"},
    "reverse KL": NO_FUTURE | {"cost": "kl"},
    "MiniLLM": {"weights": "mean", "cost": "kl"},
}
"""Those of the teacher's top logits."""
ROW = "  {:<26} {:>7} {:>9} {:>7} {:>8} {:>7}"


@dataclass(frozen=True)
class GradientReport(Report):
    """settings: what was asked. estimators: a record each, in the order of `SAMPLED` and `EXACT`, the reference first:
    its `name`, its `options`, and the figures above; None where noise hides one."""

    cache: str
    student: str
    settings: dict[str, Any]
    estimators: tuple[dict[str, Any], ...]

    def __str__(self) -> str:
        rows = [[r["name"], *(_number(r[name]) for name in FIGURES)] for r in self.estimators]
        head = "{batches} batches of {batch_size} rollouts of {student}, {keep_top} top logits, tail {tail}"
        length = self.estimators[0]["length"]
        last = "noise hides the reference: the halves do not agree; make more rollouts, several for each prompt"
        if length is not None:
            last = f"the return itself, not an estimator, asks for {'shorter' if length < 0 else 'longer'} outputs"
        lines = [head.format(student=self.student, **self.settings), ROW.format("", *FIGURES)]
        return "\n".join([*lines, *(ROW.format(*row) for row in rows), f"  {last}"])


FIGURES = ("cosine", "agreement", "norm", "snr", "length")


def gradient_report(config: AnalyzeConfig) -> GradientReport:
    """Compare the estimators on the rollouts of `config.student` in the cache; write gradient.json to `config.out`.

    Raises ConfigError without a student, CacheError where the cache has fewer than four batches of its rollouts, and
    what loading models raises.
    """
    if not config.student:
        raise ConfigError(["--gradient differentiates a student: give --student, whose rollouts are in the cache"])
    cache, own = open_cache(config.cache), weights_fingerprint(config.student)
    with_top, refs = (
        [ref for ref in cache.scored(config.scored_by, keep_top=n) if ref.policy.fingerprint == own] for n in (1, 0)
    )
    cache.select_teacher(config.scored_by).require_known(config.normalization, config.unfinished)
    rows, size = sum(ref.rows for ref in refs), config.batch_size
    refs = with_top if sum(ref.rows for ref in with_top) == rows else refs
    if (batches := rows // size // 2 * 2) < 4:
        what = f"{config.cache}: {rows:,} scored rollouts are of {config.student}, and 4 batches of {size} are needed"
        raise CacheError(f"{what}; make more with `rollout` and `score`, or lower --batch-size")
    info = tokenizer_info(load_tokenizer(config.student), config.student)
    model = load_model(config.student, device=config.device)
    head = Head.of(model, info.vocab_size)
    stream = Stream(cache, refs, size, seed=0, batches=batches)
    halves: dict[str, list[Tensor]] = {}
    squares: dict[str, float] = {}
    members: dict[str, LossOptions] = {}
    with progress("gradient", batches, "batches") as bar:
        for number in range(batches):
            batch = next(stream)
            if not members:
                members = _members(config, min(batch.scores.keep_top, info.vocab_size))
            for name, options in members.items():
                learner = Learner(model, head, Optimizer(model, options, 1), options)
                policy_gradient(learner, _lengths(batch) if name == LENGTH else batch, 0)
                gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
                model.zero_grad()
                sums = halves.setdefault(name, [torch.zeros_like(gradient), torch.zeros_like(gradient)])
                sums[number % 2] += gradient * (2 / batches)
                squares[name] = squares.get(name, 0.0) + float(gradient @ gradient) / batches
            bar.advance()
    settings = {"batches": batches, "batch_size": size, "keep_top": members[REFERENCE].top_needed, "tail": config.tail}
    report = GradientReport(str(config.cache), config.student, settings, _compare(members, halves, squares, batches))
    if config.out:
        write_file(config.out / "gradient.json", (json.dumps(report.to_dict(), indent=2) + "\n").encode())
    return report


def _members(config: AnalyzeConfig, keep_top: int) -> dict[str, LossOptions]:
    exact: dict[str, Any] = {"exact": True, "keep_top": keep_top} if keep_top else {}
    length = {"k": 1, "normalization": "raw", "clip_return": 1e9}
    given: dict[str, Mapping[str, Any]] = {REFERENCE: {"k": 1, **exact}, **SAMPLED, LENGTH: length}
    given |= {name: {**options, **exact} for name, options in EXACT.items()} if keep_top else {}
    shared: dict[str, Any] = {"normalization": config.normalization, "unfinished": config.unfinished}
    shared |= {"baseline": "mean", "importance": False}
    tail = {"tail": config.tail}
    return {
        name: LossOptions(**(shared | (tail if options.get("weights", "comb") == "comb" else {}) | dict(options)))
        for name, options in given.items()
    }


def _lengths(batch: ScoredRollouts) -> ScoredRollouts:
    """The same rollouts by a teacher whose every gap is −1: the return of a token is the number of tokens after it."""
    zero = np.zeros_like(batch.scores.q)
    scores = Scores(zero, zero - 1, zero, zero, np.zeros_like(batch.scores.final_max_q))
    return replace(batch, scores=scores)


def _compare(
    members: Mapping[str, LossOptions], halves: Mapping[str, list[Tensor]], squares: Mapping[str, float], batches: int
) -> tuple[dict[str, Any], ...]:
    def cross(a: str, b: str) -> float:
        """Of the expected gradients: the product of independent halves."""
        (a_1, a_2), (b_1, b_2) = halves[a], halves[b]
        return float(a_1 @ b_2 + a_2 @ b_1) / 2

    norms = {name: max(cross(name, name), 0.0) ** 0.5 for name in members}
    base = cross("K = 1 (LLMR)", LENGTH) / norms["K = 1 (LLMR)"] if norms["K = 1 (LLMR)"] else 0.0
    records = []
    for name, options in members.items():
        if name == LENGTH:
            continue
        first, second = halves[name]
        norm = norms[name]
        mean = (first + second) / 2
        variance = max(squares[name] - float(mean @ mean), 0.0) * batches / (batches - 1)
        known = norm and norms[REFERENCE]
        figures = {
            "cosine": cross(name, REFERENCE) / norm / norms[REFERENCE] if known else None,
            "agreement": float(first @ second / (first.norm() * second.norm())),
            "norm": norm / norms[REFERENCE] if known else None,
            "snr": norm**2 / variance if variance else None,
            "length": cross(name, LENGTH) / norm / abs(base) if norm and base else None,
        }
        records.append({"name": name, "options": options.model_dump(mode="json", exclude_unset=True), **figures})
    return tuple(records)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
