"""`learn`: the K-step REINFORCE loop over cached scores (Algorithm 1, with the teacher's part read from Zarr)."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ketchup_cache.cache.cache import Cache
from ketchup_cache.config.commands import LearnConfig
from ketchup_cache.console import progress, warn
from ketchup_cache.errors import MismatchError
from ketchup_cache.models.fingerprint import state_fingerprint, tokenizer_info
from ketchup_cache.models.head import Head
from ketchup_cache.models.load import load_model, load_tokenizer
from ketchup_cache.provenance import TokenizerInfo
from ketchup_cache.rollouts.calculator import Calculator
from ketchup_cache.sharing.remote_cache import open_cache
from ketchup_cache.training import pins
from ketchup_cache.training.divergence import divergence_step
from ketchup_cache.training.metrics import StepMetrics
from ketchup_cache.training.optimizer import Optimizer
from ketchup_cache.training.origin import Origin
from ketchup_cache.training.policy_gradient import train_step
from ketchup_cache.training.run import Run
from ketchup_cache.training.source import Offline, OnPolicy, ScoreRollouts, Source

OFTEN_CUT = 0.2
"""Share of rollouts that were cut at the length limit."""
MOSTLY_TAIL = 0.6
"""Share of tokens in the tails from which `learn` warns."""


@dataclass(frozen=True)
class LearnReport:
    """What a run did. `first` and `last`: metrics of the first and last optimizer step. `skipped`: steps whose
    rollouts were all dropped."""

    student: str
    steps: int
    skipped: int
    resumed_from: int
    seconds: float
    fingerprint: str
    first: dict[str, Any]
    last: dict[str, Any]
    already_done: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        if self.already_done:
            return f"nothing to do: the run is finished, its student is in {self.student}"
        resumed = f" (continued from step {self.resumed_from})" if self.resumed_from else ""
        change = " → ".join(f"{m['return_mean']:.2f}" for m in (self.first, self.last) if m["return_mean"] is not None)
        skipped = f"; {self.skipped} steps skipped, all their rollouts were dropped" if self.skipped else ""
        changes = f"mean return of the rollouts {change}" if change else ""
        if not change:
            changes = f"loss {self.first['loss']:.4f} → {self.last['loss']:.4f} nats per token"
        return f"{self.steps} steps in {self.seconds:.0f} s{resumed}; {changes}{skipped}; student in {self.student}"


def learn(config: LearnConfig, score_rollouts: ScoreRollouts | None = None) -> LearnReport:
    """Train `config.student` on the cache; with `score_rollouts` (and `config.teacher`) refresh its rollouts.

    Killed and run again with the same options, it goes on from its last checkpoint to the same weights.

    Raises ConfigError for an output folder in use or of another run, MismatchError for a cache of another tokenizer,
    NumericsError for NaN, and what loading models and caches raises.
    """
    cache = open_cache(config.cache)
    tokenizer = load_tokenizer(config.student, trust_remote_code=config.trust_remote_code)
    info = tokenizer_info(tokenizer, config.student)
    check_tokenizer(cache, info)
    pins.restrict(cache, config.pin)
    with Run(config.out, "learn", config).locked() as run:
        if run.report:
            return LearnReport(**{**run.report, "already_done": True})
        calculator = Calculator(tokenizer, config.student) if config.calculator else None
        source: Source = (
            OnPolicy(cache, config, info, score_rollouts, calculator) if score_rollouts else Offline(cache, config)
        )
        origin = Origin.of(config.student)
        # with --scorer the teacher is not known yet: training/waiting.py warns
        if origin and not config.scorer:
            teacher = config.teacher or cache.select_teacher(config.scored_by).name
            if warning := origin.differs_from(teacher):
                warn(f"{config.student}: {warning}")
        model = load_model(config.student, device=config.device, trust_remote_code=config.trust_remote_code)
        head = Head.of(model, info.vocab_size)
        run.write_config({"student": state_fingerprint(model), "steps": source.steps, **source.resolved()})
        optimizer = Optimizer(
            model,
            lr=config.lr,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            warmup=config.warmup,
            schedule=config.schedule,
            steps=source.steps,
        )
        state = run.restore(model, optimizer)
        source.restore(state)
        used = pins.Pins(config.out, cache, resumed=state["step"] > 0)
        began, resumed = time.monotonic(), state["step"]
        with progress("learning", source.steps - resumed, "steps") as bar:
            for step in range(resumed, source.steps):
                drawn = source.batch(step, model)
                if step == resumed:
                    rollouts = drawn.rollouts.rollouts
                    for warning in (
                        tail_warning(config, rollouts.completions.lengths),
                        cut_warning(config, rollouts.finished),
                    ):
                        if warning:
                            warn(warning)
                used.add(source.segments())
                step_began = time.monotonic()
                if config.method in ("ketchup", "llmr"):
                    metrics = train_step(model, head, optimizer, drawn.rollouts, config, step)
                else:
                    metrics = divergence_step(model, head, optimizer, drawn.rollouts, drawn.from_teacher, config, step)
                seconds = time.monotonic() - step_began
                metrics = metrics.model_copy(update={"refreshed": drawn.refreshed, "seconds": round(seconds, 4)})
                run.log(metrics.model_dump())
                bar.note(_note(metrics))
                bar.advance()
                done = step + 1
                if config.checkpoint_every and done % config.checkpoint_every == 0 and done < source.steps:
                    run.save_checkpoint(done, model, optimizer, source.state())
        lines = run.metrics()
        report = LearnReport(
            student=str(Path(config.out) / "student"),
            steps=source.steps,
            skipped=sum(line["action_tokens"] == 0 for line in lines),
            resumed_from=resumed,
            seconds=round(time.monotonic() - began, 1),
            fingerprint=state_fingerprint(model),
            first=lines[0],
            last=lines[-1],
        )
        run.finish("student", model, tokenizer, report.to_dict(), origin)
    return report


def tail_warning(config: LearnConfig, lengths: NDArray[np.int64]) -> str | None:
    """Where most tokens have the return of LLMR whatever K says: Algorithm 1 takes the last K of a completion one by
    one. On the shipped task `reason` that is how a large K loses (docs/log.md)."""
    if config.method != "ketchup" or config.k == 1 or config.tail != "one-step":
        return None
    share = np.minimum(lengths, config.k).sum() / max(1, lengths.sum())
    if share < MOSTLY_TAIL:
        return None
    return (
        f"{share:.0%} of the tokens are among the last {config.k} of their completion, where K = {config.k} steps one "
        f"by one as K = 1 does; choose a smaller --k, or --tail jump"
    )


def cut_warning(config: LearnConfig, finished: NDArray[np.bool_]) -> str | None:
    """Where many rollouts are dropped because they were cut: the others are the short ones, and to learn from them
    alone is to learn their length. On the shipped task `reason`, cut at 20 of its 26 tokens, accuracy fell from 42 %
    to 14 %, with bootstrap it did not (benchmarks/results/ablations.md)."""
    if config.method not in ("ketchup", "llmr") or config.unfinished != "drop":
        return None
    share = 1 - finished.mean()
    if share < OFTEN_CUT:
        return None
    return (
        f"{share:.0%} of the first rollouts were cut at --max-new-tokens and are dropped, so the student learns from "
        "short ones alone; raise --max-new-tokens, or keep them with --unfinished bootstrap"
    )


def check_tokenizer(cache: Cache, student: TokenizerInfo) -> None:
    """Raises MismatchError where the cache's token ids mean something else to the student."""
    for _, manifest in cache.manifests("prompts"):
        if manifest.info.tokenizer.fingerprint != student.fingerprint:
            raise MismatchError(
                f"{cache.address}: its prompts were encoded by the tokenizer of {manifest.info.tokenizer.name}, "
                f"which encodes differently from that of {student.name}; use a student with the cache's tokenizer"
            )


def _note(metrics: StepMetrics) -> str:
    if metrics.return_mean is None and metrics.action_tokens:
        return f"loss {metrics.loss:.4f} nats per token, length {metrics.length_mean:.1f}"
    if metrics.return_mean is None:
        return "every rollout of this step was dropped"
    returns = f"return {metrics.return_mean:.2f} ± {metrics.return_sd:.2f}"
    ess = "" if metrics.ess is None else f", ess {metrics.ess:.2f}"
    return f"{returns}, length {metrics.length_mean:.1f}{ess}"
