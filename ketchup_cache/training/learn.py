"""`learn`: the K-step REINFORCE loop over cached scores (Algorithm 1, with the teacher's part read from the cache)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ketchup_cache.cache.cache import Cache
from ketchup_cache.config.commands import LearnConfig, ScoreConfig
from ketchup_cache.config.methods import METHODS
from ketchup_cache.config.options import ScoringOptions
from ketchup_cache.console import Report, warn
from ketchup_cache.errors import ModelError
from ketchup_cache.models.fingerprint import state_fingerprint, tokenizer_info, weights_fingerprint
from ketchup_cache.models.head import Head
from ketchup_cache.models.load import load_model, load_tokenizer
from ketchup_cache.provenance import require_same_tokenizer
from ketchup_cache.rollouts.calculator import Calculator
from ketchup_cache.sharing.remote_cache import open_cache
from ketchup_cache.training.divergence import divergence_step
from ketchup_cache.training.metrics import StepMetrics
from ketchup_cache.training.optimizer import Learner, Optimizer
from ketchup_cache.training.policy_gradient import policy_gradient_step
from ketchup_cache.training.run import Origin, Run, read_origin, read_pins
from ketchup_cache.training.source import Offline, OnPolicy, ScoreRollouts
from ketchup_cache.types import Rollouts

TIMES = ("sample_s", "score_s", "load_s", "train_s")
OFTEN_CUT = 0.2
"""Share of rollouts that were cut at the length limit."""
MOSTLY_TAIL = 0.6
"""Share of tokens in the tails from which `learn` warns."""


@dataclass(frozen=True)
class LearnReport(Report):
    """What a run did. `first` and `last`: metrics of the first and last optimizer step. `skipped`: steps whose
    rollouts were all dropped. `seconds`: since it was started or went on; the other times: of all steps, as in
    `StepMetrics`, `load_s` with reading the student."""

    student: str
    steps: int
    skipped: int
    resumed_from: int
    seconds: float
    fingerprint: str
    first: dict[str, Any]
    last: dict[str, Any]
    already_done: bool = False
    sample_s: float = 0.0
    score_s: float = 0.0
    load_s: float = 0.0
    train_s: float = 0.0

    def __str__(self) -> str:
        if self.already_done:
            return f"nothing to do: the run is finished, its student is in {self.student}"
        resumed = f" (continued from step {self.resumed_from})" if self.resumed_from else ""
        change = " → ".join(f"{m['return_mean']:.2f}" for m in (self.first, self.last) if m["return_mean"] is not None)
        skipped = f"; {self.skipped} steps skipped, all their rollouts were dropped" if self.skipped else ""
        loss = f"loss {self.first['loss']:.4f} → {self.last['loss']:.4f} nats per token"
        changes = f"mean return of the rollouts {change}" if change else loss
        return f"{self.steps} steps in {self.seconds:.0f} s{resumed}; {changes}{skipped}; student in {self.student}"


def learn(config: LearnConfig) -> LearnReport:
    """Train `config.student` on the cache; with `config.teacher` or `config.scores_from`, refresh its rollouts.

    Killed and run again with the same options, it goes on from its last checkpoint to the same weights.

    Raises ConfigError for an output folder in use or of another run, MismatchError for a cache of another tokenizer,
    NumericsError for NaN, and what loading models and caches and scoring raise.
    """
    cache = open_cache(config.cache)
    tokenizer = load_tokenizer(config.student, trust_remote_code=config.trust_remote_code)
    info = tokenizer_info(tokenizer, config.student)
    for _, manifest in cache.manifests("prompts"):
        what = "holds prompts of another tokenizer; use a student with the cache's tokenizer"
        require_same_tokenizer(info, manifest.info.tokenizer, f"{cache.address}: {what}")
    if config.pin is not None:
        cache.pin(read_pins(config.pin))
    with Run("learn", config).locked() as run:
        if report := run.finished(LearnReport):
            return report
        calculator = Calculator(tokenizer, config.student) if config.calculator else None
        refreshed = None if config.offline else (info, _scoring(config), calculator)
        source = OnPolicy(cache, config, *refreshed) if refreshed else Offline(cache, config)
        origin = read_origin(config.student)
        if config.scores_from is None:
            _warn_of_origin(config, origin, config.teacher or cache.select_teacher(config.scored_by).name)
        began = time.perf_counter()
        model = load_model(config.student, device=config.device, trust_remote_code=config.trust_remote_code)
        load_s = time.perf_counter() - began
        learner = Learner(model, Head.of(model, info.vocab_size), Optimizer(model, config, source.steps), config)
        run.write_config({"student": state_fingerprint(model), "steps": source.steps, **source.resolved()})
        source.restore(run.restore(learner))

        def step(number: int) -> tuple[dict[str, Any], str]:
            drawn = source.batch(number, model)
            if number == run.resumed:
                for warning in rollout_warnings(config, drawn.rollouts.rollouts):
                    warn(warning)
                if isinstance(source, OnPolicy) and config.scores_from is not None:
                    _warn_of_origin(config, origin, cache.select_teacher(source.teacher).name)
            if number == run.resumed or drawn.times:
                run.pin(cache.address, source.segments())
            began = time.perf_counter()
            if METHODS[config.method].step == "policy_gradient":
                metrics = policy_gradient_step(learner, drawn.rollouts, number)
            else:
                metrics = divergence_step(learner, drawn.rollouts, drawn.from_teacher, number)
            times = drawn.times | {"train_s": time.perf_counter() - began}
            rounded = {name: round(seconds, 4) for name, seconds in times.items()}
            metrics = metrics.model_copy(update={"refreshed": bool(drawn.times), **rounded})
            return metrics.model_dump(), _note(metrics)

        lines = run.train(learner, source.steps, step, source.state)
        times: dict[str, Any] = {name: sum(line.get(name, 0) for line in lines) for name in TIMES}
        times["load_s"] += round(load_s, 4)
        skipped = sum(line["action_tokens"] == 0 for line in lines)
        done = run.resumed, run.seconds, state_fingerprint(model)
        report = LearnReport(str(run.out / "student"), source.steps, skipped, *done, lines[0], lines[-1], **times)
        run.finish("student", (model, tokenizer), report, origin)
    return report


def _scoring(config: LearnConfig) -> ScoreRollouts:
    """The teacher enters here and nowhere else, so that offline learning never imports it."""
    if config.scores_from is not None:
        from ketchup_cache.training.scores_from import ScoresFrom

        return ScoresFrom(config)
    from ketchup_cache.scoring.score import Scorer

    options = config.model_dump(include={"teacher", "cache", *ScoringOptions.model_fields})
    scorer = Scorer(ScoreConfig(keep_top=config.top_needed, **options))

    def score_rollouts(cache: Cache, rollout_ids: Sequence[str], teacher: str | None) -> tuple[str, float]:
        return scorer.info.fingerprint, scorer.ensure(cache, rollout_ids).load_s

    return score_rollouts


def _warn_of_origin(config: LearnConfig, origin: Origin, teacher: str) -> None:
    """Where the student learned another model's text than the teacher's (teacher consistency): the scores are least
    telling then. The precision that the teacher scores in does not matter."""
    if not origin or any(policy.name == teacher for policy in origin):
        return
    with suppress(ModelError):
        if Path(teacher).is_dir() and weights_fingerprint(Path(teacher)) in {policy.fingerprint for policy in origin}:
            return
    names = ", ".join(f"{policy.name} ({policy.fingerprint[:12]})" for policy in origin)
    todo = f"pre-distil it on outputs of {teacher}, unless these are one model under two names"
    warn(f"{config.student}: was pre-distilled on the outputs of {names}, but {teacher} scored: {todo}")


def rollout_warnings(config: LearnConfig, rollouts: Rollouts) -> Iterator[str]:
    """What is likely to go wrong with returns of such rollouts.

    Most tokens have the return of LLMR whatever K says, since Algorithm 1 takes the last K of a completion one by one:
    on the shipped task `reason` that is how a large K loses (docs/log.md). Or many rollouts are dropped because they
    were cut; the others are the short ones, and to learn from them alone is to learn their length. On `reason`, cut at
    20 of its 26 tokens, accuracy fell from 42 % to 14 %, with bootstrap it did not (benchmarks/results/ablations.md).
    """
    if METHODS[config.method].step != "policy_gradient":
        return
    lengths = rollouts.completions.lengths
    tail, cut = np.minimum(lengths, config.k).sum() / max(1, lengths.sum()), 1 - rollouts.finished.mean()
    if config.k > 1 and config.tail == "one-step" and tail >= MOSTLY_TAIL:
        todo = "choose a smaller --k, or --tail jump"
        among = f"{tail:.0%} of the tokens are among the last {config.k} of their completion"
        yield f"{among}, where K = {config.k} steps one by one as K = 1 does; {todo}"
    if config.unfinished == "drop" and cut >= OFTEN_CUT:
        todo = "raise --max-new-tokens, or keep them with --unfinished bootstrap"
        dropped = f"{cut:.0%} of the first rollouts were cut at --max-new-tokens and are dropped"
        yield f"{dropped}, so the student learns from short ones alone; {todo}"


def _note(metrics: StepMetrics) -> str:
    if metrics.return_mean is None:
        loss = f"loss {metrics.loss:.4f} nats per token, length {metrics.length_mean:.1f}"
        return loss if metrics.action_tokens else "every rollout of this step was dropped"
    returns = f"return {metrics.return_mean:.2f} ± {metrics.return_sd:.2f}"
    ess = "" if metrics.ess is None else f", ess {metrics.ess:.2f}"
    return f"{returns}, length {metrics.length_mean:.1f}{ess}"
