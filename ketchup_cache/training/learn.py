"""`learn`: the K-step REINFORCE loop over cached scores (Algorithm 1, with the teacher's part read from the cache)."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ketchup_cache.cache.cache import Cache
from ketchup_cache.config.commands import LearnConfig, ScoreConfig
from ketchup_cache.config.goal import several
from ketchup_cache.config.methods import METHODS
from ketchup_cache.config.resolve import flag
from ketchup_cache.config.servers import ScoringOptions
from ketchup_cache.console import Report, warn
from ketchup_cache.errors import MismatchError, ModelError
from ketchup_cache.evaluation.outputs import EvalSet, Returns
from ketchup_cache.method.returns import rollout_returns
from ketchup_cache.models.fingerprint import state_fingerprint, tokenizer_info, weights_fingerprint
from ketchup_cache.models.head import Head
from ketchup_cache.models.load import load_model, load_tokenizer
from ketchup_cache.models.origin import Origin, prompts_as_trained, read_origin
from ketchup_cache.provenance import OTHER_TOKENIZER, PromptForm, require_same_tokenizer
from ketchup_cache.rollouts.calculator import Calculator
from ketchup_cache.rollouts.engine import require_decoder
from ketchup_cache.sharing.remote_cache import open_cache
from ketchup_cache.training.alarms import Alarms
from ketchup_cache.training.dev import DevSet, ReturnsOf, best_text
from ketchup_cache.training.divergence import divergence_step
from ketchup_cache.training.goal import Goal
from ketchup_cache.training.metrics import StepMetrics
from ketchup_cache.training.optimizer import Learner
from ketchup_cache.training.policy_gradient import policy_gradient_step, reweighted_return
from ketchup_cache.training.records import read_pins
from ketchup_cache.training.run import Callback, Run, steps_text
from ketchup_cache.training.source import Offline, OnPolicy, ScoreRollouts, prompt_form
from ketchup_cache.types import ScoredRollouts

TIMES = ("sample_s", "engine_s", "score_s", "load_s", "train_s")
FIXED_ROLLOUTS = 1024
"""At most: those from which an offline run estimates the return of its student before and after."""
ENOUGH_ESS = 0.3
"""Effective sample size of whole rollouts, as a share, below which that estimate is not given."""
SMOOTH = 10
"""Optimizer steps that the live line is a mean of."""
SAMPLES = 4
"""Rollouts that are written down as text at every refresh."""
NEARLY_ONE = 0.95
"""Effective sample size from which on it is not worth a word."""


@dataclass(frozen=True)
class LearnReport(Report):
    """What a run did. student: folder of the best one on the dev set; without a dev set, that of the last step.

    `first` and `last`: metrics of the first and last optimizer step. `returns`: mean return of the rollouts over the
    first and last `SMOOTH` steps, where they are the student's own. `skipped`: steps whose rollouts were all
    dropped. `stopped`: why it ended early: patience or callback. `dev`: see `DevSet.summary`. `alarms`: all that were
    raised. `fixed_return`: offline, [mean return, effective sample size] of the same rollouts re-weighted to the
    student before and after (`reweighted_return`). `seconds`: since it was started or went on; the other times: of all
    steps, as in `StepMetrics`, `load_s` with reading the student; `engine_s` is a part of `sample_s`; `eval_s` of all
    evaluations."""

    student: str
    steps: int
    skipped: int
    resumed_from: int
    seconds: float
    fingerprint: str
    first: dict[str, Any]
    last: dict[str, Any]
    returns: list[float] | None = None
    stopped: str = ""
    dev: dict[str, Any] | None = None
    alarms: list[dict[str, Any]] = field(default_factory=list)
    fixed_return: list[list[float]] | None = None
    already_done: bool = False
    sample_s: float = 0.0
    engine_s: float = 0.0
    score_s: float = 0.0
    load_s: float = 0.0
    train_s: float = 0.0
    eval_s: float = 0.0

    def __str__(self) -> str:
        if self.already_done:
            return f"nothing to do: the run is finished, its student is in {self.student}"
        skipped = f"; {self.skipped} steps skipped, all their rollouts were dropped" if self.skipped else ""
        head = steps_text(self.steps, self.seconds, self.resumed_from, self.stopped)
        alarms = f"; alarms: {', '.join(alarm['name'] for alarm in self.alarms)}" if self.alarms else ""
        return f"{head}; {self._change()}{skipped}{alarms}; {best_text(self.dev, self.student)}"

    def _change(self) -> str:
        """What the student gained, as far as the run can know it."""
        if not self.first:
            return "nothing was learned"
        if self.fixed_return is not None:
            (before, _), (after, ess) = self.fixed_return
            if ess >= ENOUGH_ESS:
                seen = f"on the rollouts it learnt from, re-weighted (ess {ess:.2f})"
                return f"return {before:.2f} → {after:.2f} {seen}; measure new ones: `ketchup-cache evaluate --teacher`"
            return f"its return can't be told from these rollouts (ess {ess:.2f}): `ketchup-cache evaluate --teacher`"
        if self.returns is not None:
            return "mean return of its rollouts " + " → ".join(f"{value:.2f}" for value in self.returns)
        return f"loss {self.first['loss']:.4f} → {self.last['loss']:.4f} nats per token"


def learn(config: LearnConfig, callbacks: Sequence[Callback] = ()) -> LearnReport:
    """Train `config.student` on the cache; with `config.teacher` or `config.scores_from`, refresh its rollouts.

    Killed and run again with the same options, it goes on from its last checkpoint to the same weights; with more
    `steps` or `epochs`, a run is lengthened.

    Raises ConfigError for an output folder in use or of another run, MismatchError for a cache of another tokenizer,
    DataError for an unusable dev set, NumericsError for NaN, KeyboardInterrupt for Ctrl-C once the run is saved, and
    what loading models and caches and scoring raise.
    """
    require_decoder(config, config.student, trust_remote_code=config.trust_remote_code)
    cache = open_cache(config.cache)
    cache.agree()
    tokenizer = load_tokenizer(config.student, trust_remote_code=config.trust_remote_code)
    info = tokenizer_info(tokenizer, config.student)
    form = prompt_form(cache)
    for _, manifest in cache.manifests("prompts"):
        what = f"{cache.address}: holds prompts of another tokenizer; {OTHER_TOKENIZER}"
        require_same_tokenizer(info, manifest.info.tokenizer, what)
    if config.pin is not None:
        cache.pin(read_pins(config.pin))
    if METHODS[config.method].step == "divergence":
        for name in sorted({"k", "tail", "clip_return", "normalization"} & config.model_fields_set):
            warn(f"--method {config.method} has no returns: {flag(name)} does nothing")
    with Run("learn", config, callbacks).locked() as run:
        if report := run.finished(LearnReport):
            return report
        if "form" in run.recorded:  # of the prompts that were there when the run began
            form = PromptForm.model_validate(run.recorded["form"]) if run.recorded["form"] else None
        prompts = prompts_as_trained(config, config.student, form)
        how = config.metric, config.rouge_tokenizer
        data = EvalSet.read(prompts.dev_data, tokenizer, config.student, *how) if prompts.dev_data else None
        calculator = Calculator(tokenizer, config.student) if config.calculator else None
        score, returns = (None, None) if config.offline else _scoring(config)
        known, goal = run.recorded, Goal(config, prompts, tokenizer)
        if known.get("reward_data", goal.fingerprint) != goal.fingerprint:
            todo = "bring it back as it was, or choose another --out"
            raise MismatchError(f"{config.reward_data}: is not what it was when the run began; {todo}")
        source = OnPolicy(cache, config, known, info, score, calculator) if score else Offline(cache, config, known)
        source.load = goal.load
        origin = read_origin(config.student)
        if config.scores_from is None:
            live = [config.teacher_name] if config.teacher_name else config.teachers if config.teacher else ()
            _warn_of_origin(config, origin, live or [cache.select_teacher(one).name for one in config.teachers])
        began = time.perf_counter()
        model = load_model(config.student, device=config.device, trust_remote_code=config.trust_remote_code, fit=config)
        load_s = time.perf_counter() - began
        head = Head.of(model, info.vocab_size)
        dev = DevSet(config, data, run.out, run.publish, source.steps, known, returns) if data else None
        begun = model.base_fingerprint if config.lora_rank else state_fingerprint(model)
        learner = Learner.of(model, head, config, source.steps, keep_start=dev is not None)
        source.gather = run.gather = learner.gather
        came = origin.model_copy(update={"prompts": form or origin.prompts, "tokenizer": info})
        run.describe(model, tokenizer, came, cache)
        if dev is not None:
            dev.start(model, head, tokenizer, learner.parts)
        resolved = {
            "steps": source.steps,
            **source.resolved(),
            "reward_data": goal.fingerprint,
            "form": form.model_dump() if form else None,
        }
        resolved["student"] = begun
        state = run.restore(learner)
        if dev is not None:
            dev.restore(run.resumed)
            resolved["eval_every"] = dev.every
        run.write_config(resolved)
        source.restore(state)
        fixed = _fixed_rollouts(config, cache, source)
        before = state.get("fixed_return") or (reweighted_return(learner, fixed) if fixed else None)
        recent: deque[StepMetrics] = deque(maxlen=SMOOTH)

        def step(number: int) -> tuple[dict[str, Any], str]:
            drawn = source.batch(number, model)
            if number == run.resumed and isinstance(source, OnPolicy) and config.scores_from is not None:
                _warn_of_origin(config, origin, [cache.select_teacher(one).name for one in several(source.teacher)])
            if number == run.resumed or drawn.times:
                run.pin(cache.address, source.segments())
            if number == 0 or drawn.times:
                run.log_samples(number, _samples(drawn.rollouts, tokenizer, config.of_returns))
            began = time.perf_counter()
            if METHODS[config.method].step == "policy_gradient":
                reward = goal.rewards(drawn.rollouts)
                metrics = policy_gradient_step(learner, drawn.rollouts, number, drawn.from_teacher, reward)
            else:
                metrics = divergence_step(learner, drawn.rollouts, drawn.from_teacher, number)
            times = drawn.times | {"train_s": time.perf_counter() - began}
            rounded = {name: round(seconds, 4) for name, seconds in times.items()}
            metrics = metrics.model_copy(update={"refreshed": bool(drawn.times), **rounded})
            source.observe(metrics.ess)
            recent.append(metrics)
            return metrics.model_dump(), _note(recent)

        def saved() -> dict[str, Any]:
            return source.state() | ({"fixed_return": before} if before else {})

        alarms = Alarms(config)
        lines = run.train(learner, source.steps, step, saved, dev, alarms)
        times: dict[str, Any] = {name: sum(line.get(name, 0) for line in lines) for name in TIMES}
        times["load_s"] += round(load_s, 4)
        skipped = sum(line["action_tokens"] == 0 for line in lines)
        after = reweighted_return(learner, fixed) if fixed and before else None
        done = run.done, skipped, run.resumed, run.seconds, run.fingerprint()
        report = LearnReport(
            str(run.out / "best"),
            *done,
            lines[0] if lines else {},
            lines[-1] if lines else {},
            returns=None if config.offline else _mean_returns(lines),
            stopped=run.stopped,
            dev=dev.summary() if dev else None,
            alarms=[asdict(alarm) for alarm in alarms.raised.values()],
            fixed_return=[list(before), list(after)] if before and after else None,
            eval_s=round(sum(record.seconds for record in dev.records), 3) if dev else 0.0,
            **times,
        )
        run.finish(report, dev)
    return report


def _mean_returns(lines: Sequence[dict[str, Any]]) -> list[float] | None:
    """Over the first and the last `SMOOTH` steps, of a short run over its halves; None where one of them has none."""
    n = max(1, min(SMOOTH, len(lines) // 2))
    parts = [[line["return_mean"] for line in part] for part in (lines[:n], lines[-n:])]
    known = [[value for value in part if value is not None] for part in parts]
    return [sum(part) / len(part) for part in known] if all(known) else None


def _samples(batch: ScoredRollouts, tokenizer: PreTrainedTokenizerBase, how: Any) -> list[dict[str, Any]]:
    """A few rollouts as text, special tokens too, with G_1. how: `ReturnOptions.of_returns`."""
    some = batch.take(np.unique(np.linspace(0, len(batch) - 1, SAMPLES).astype(int)))
    prompts, completions = some.prompts.tokens.take(some.rollouts.prompt_index), some.rollouts.completions
    texts = [[tokenizer.decode(row) for row in ids] for ids in (prompts, completions)]
    (returns,) = rollout_returns(some.rollouts, some.scores, [1], **how | {"unfinished": "bootstrap"})
    rows = zip(*texts, some.rollouts.finished.tolist(), returns[:, 0].round(4).tolist(), strict=True)
    return [dict(zip(("prompt", "completion", "finished", "return"), row, strict=True)) for row in rows]


def _fixed_rollouts(config: LearnConfig, cache: Cache, source: Offline) -> ScoredRollouts | None:
    """Some of the student's rollouts that an offline run learns from; None where it learns from no such."""
    return source.some(FIXED_ROLLOUTS) if config.offline and METHODS[config.method].samples else None


def _scoring(config: LearnConfig) -> tuple[ScoreRollouts, ReturnsOf | None]:
    """What scores new rollouts, and what gives the returns of outputs, where the teacher is in this process.

    The teacher enters here and nowhere else, so that offline learning never imports it.
    """
    if config.scores_from is not None:
        from ketchup_cache.training.scores_from import ScoresFrom

        return _together([ScoresFrom(config.model_copy(update={"scored_by": name})) for name in config.teachers]), None
    if len(config.teachers) > 1:
        return _together([_scoring(config.model_copy(update={"teacher": one}))[0] for one in config.teachers]), None
    from ketchup_cache.scoring.score import Scorer

    options = config.model_dump(include={"cache", *ScoringOptions.model_fields})
    scorer = Scorer(ScoreConfig(teacher=config.teacher or config.student, keep_top=config.top_needed, **options))
    scorer.info.require_known(config.normalization, config.unfinished)

    def score_rollouts(cache: Cache, rollout_ids: Sequence[str], teacher: str | None) -> tuple[str, float]:
        scorer.unscored(cache)  # one behind a server finds the fingerprint that it has here
        if teacher not in (None, scorer.info.fingerprint):
            what = f"{config.out}: has learned from teacher {teacher:.12}, and {scorer} is another"
            raise MismatchError(f"{what}; bring it back, or choose another --out")
        load_s = scorer.ensure(cache, rollout_ids).load_s
        return scorer.info.fingerprint, load_s

    return score_rollouts, lambda prompts, rollouts: Returns.under(scorer, prompts, rollouts, config.normalization)


def _together(scorers: Sequence[ScoreRollouts]) -> ScoreRollouts:
    """One of several teachers: each scores the rollouts, and all the others' scores stay beside."""

    def score(cache: Cache, rollout_ids: Sequence[str], teacher: str | None) -> tuple[str, float]:
        known = several(teacher) if teacher else (None,) * len(scorers)
        done = [one(cache, rollout_ids, name) for one, name in zip(scorers, known, strict=True)]
        return ",".join(name for name, _ in done), sum(seconds for _, seconds in done)

    return score


def _warn_of_origin(config: LearnConfig, origin: Origin, teachers: Sequence[str | None]) -> None:
    """Where the student learned another model's text than a teacher's (teacher consistency): the scores are least
    telling then. The precision that the teacher scores in does not matter."""
    policies, teacher = origin.pretrained_on, str(teachers[0])
    if not policies or any(policy.name in teachers for policy in policies):
        return
    with suppress(ModelError):
        if Path(teacher).is_dir() and weights_fingerprint(Path(teacher)) in {policy.fingerprint for policy in policies}:
            return
    names = ", ".join(f"{policy.name} ({policy.fingerprint[:12]})" for policy in policies)
    todo = f"pre-distil it on outputs of {teacher}, unless these are one model under two names"
    warn(f"{config.student}: was pre-distilled on the outputs of {names}, but {teacher} scored: {todo}")


def _note(recent: Sequence[StepMetrics]) -> str:
    """What stands beside the progress: means of the last steps. The effective sample size where it is not nearly 1."""

    def mean(name: str) -> float | None:
        values = [value for metrics in recent if (value := getattr(metrics, name)) is not None]
        return sum(values) / len(values) if values else None

    returns, ess = mean("return_mean"), mean("ess")
    parts = [] if returns is None else [f"return {returns:.2f}"]
    parts += [f"loss {mean('loss'):.4g}"]
    parts += [f"ess {ess:.2f}"] if ess is not None and ess < NEARLY_ONE else []
    return " ".join(parts) if recent[-1].action_tokens else "every rollout of this step was dropped"
