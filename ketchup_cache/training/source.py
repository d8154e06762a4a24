"""Where the batches come from: a cache as it is (offline), or rollouts refreshed from the student (on-policy)."""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from ketchup_cache.cache.cache import Cache
from ketchup_cache.cache.index import ScoredRef
from ketchup_cache.cache.manifest import PromptsInfo
from ketchup_cache.config.commands import LearnConfig
from ketchup_cache.config.goal import several
from ketchup_cache.config.methods import METHODS
from ketchup_cache.console import say
from ketchup_cache.errors import CacheError
from ketchup_cache.models import lora
from ketchup_cache.models.fingerprint import state_fingerprint, weights_fingerprint
from ketchup_cache.models.load import quiet
from ketchup_cache.parallel.group import by_first, group
from ketchup_cache.provenance import PolicyInfo, PromptForm, TeacherInfo, TokenizerInfo, in_precision
from ketchup_cache.rollouts.calculator import Calculator
from ketchup_cache.rollouts.engine import Engine
from ketchup_cache.rollouts.rollout import ensure_rollouts
from ketchup_cache.training.batches import Stream, concatenate, seed_of
from ketchup_cache.training.checkpoints import saving
from ketchup_cache.types import ScoredRollouts

STUDENT, TEACHER = "student", "teacher"
"""Whose rollouts: samples of the student, outputs of the teacher. The order of a batch."""

ScoreRollouts = Callable[[Cache, Sequence[str], str | None], tuple[str, float]]
"""Scores these rollouts segments, as far as they are not scored yet. The last argument is the fingerprint of the
teacher that has scored for the run so far. Returns that of the teacher, and the seconds that reading its weights took.
Of several teachers, the fingerprints are separated by commas.
"""


@dataclass(frozen=True)
class Drawn:
    """The rollouts of one optimizer step. from_teacher: [B] bool, rows that count as teacher outputs. times: how long
    it took to sample and score new rollouts for it, as in `StepMetrics`; empty where that was not done."""

    rollouts: ScoredRollouts
    from_teacher: NDArray[np.bool_]
    times: dict[str, float] = field(default_factory=dict)


class Offline:
    """What the method needs of the cache, in epochs: rollouts of the student, teacher outputs, or half of each.

    An epoch is one over the student's rollouts; over the teacher outputs where the method has no others.
    load: as `Stream` takes it. gather: called before the student is sampled from (`Learner.gather`).
    """

    load: Callable[[Cache, ScoredRef], ScoredRollouts] = staticmethod(lambda cache, ref: cache.load_scored(ref))
    gather: Callable[[], None] = staticmethod(lambda: None)

    def __init__(
        self, cache: Cache, config: LearnConfig, recorded: Mapping[str, Any] | None = None, rollouts: int = 0
    ) -> None:
        """recorded: what the run recorded when it began (`resolved`); it reads that and no more, whatever has come into
        the cache since. Empty for a new run. rollouts: how many it is to learn from; 0: those of the cache, in
        `config.epochs` passes.

        Raises CacheError where the cache lacks what the method learns from, or what the run has read before.
        """
        self._cache, self._config, method = cache, config, METHODS[config.method]
        # asked for first: where they are missing, they must be made before anything is scored again
        outputs = {TEACHER: scored_rollouts(cache, config, TEACHER)} if config.needs_outputs else {}
        samples = scored_rollouts(cache, config, STUDENT) if method.samples and config.offline else []
        self._refs = ({STUDENT: samples} if method.samples else {}) | outputs
        if (wanted := (recorded or {}).get("segments")) is not None:
            self._refs = {kind: [r for r in refs if {*scores_of(r)} <= {*wanted}] for kind, refs in self._refs.items()}
            self._require(wanted, self._scores())
        self._share = config.batch_size // len(self._refs)
        self._streams: dict[str, Stream] = {}
        rollouts = rollouts or sum(ref.rows for ref in next(iter(self._refs.values()))) * config.epochs
        self.steps = config.steps or max(1, rollouts // self._share)

    def batch(self, step: int, model: PreTrainedModel) -> Drawn:
        """The rollouts of optimizer step `step`. model: the student as it is."""
        for kind in self._refs.keys() - self._streams.keys():
            self._open(kind, self._config.seed, skip=step, batches=self.steps - step)
        drawn = concatenate([next(self._streams[kind]) for kind in self._refs])
        from_teacher = np.repeat([kind == TEACHER for kind in self._refs], self._share)
        return Drawn(drawn, from_teacher)

    def observe(self, ess: float | None) -> None:
        """The effective sample size of the last step."""

    def some(self, rollouts: int) -> ScoredRollouts:
        """At most so many of the student's rollouts, the same ones at any time of the run."""
        refs = self._refs[STUDENT]
        size = min(rollouts, sum(ref.rows for ref in refs))
        stream = Stream(self._cache, refs, size, self._config.seed, batches=1)
        stream.load = self.load
        return next(stream)

    def _open(self, kind: str, seed: int, skip: int, batches: int) -> None:
        stream = Stream(self._cache, self._refs[kind], self._share, seed, skip=skip, batches=batches)
        stream.load, self._streams[kind] = self.load, stream

    def _scores(self) -> list[str]:
        return [id_ for refs in self._refs.values() for ref in refs for id_ in scores_of(ref)]

    def _require(self, wanted: Sequence[str], found: Iterable[str]) -> None:
        if lost := set(wanted) - set(found):
            what = f"{len(lost)} segments that the run reads are not there any more (first: {min(lost)[:12]})"
            raise CacheError(f"{self._cache.address}: {what}; bring them back, or choose another --out")

    def resolved(self) -> dict[str, Any]:
        """For the run's record, from its start: what it reads."""
        return {"segments": self._scores()}

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold so that `restore` goes on exactly here."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint was taken."""

    def segments(self) -> list[str]:
        """Ids of the segments that the current batches come from, parents included."""
        refs = [ref for refs in self._refs.values() for ref in refs]
        return list(dict.fromkeys(id_ for ref in refs for id_ in (ref.prompts_id, ref.rollouts_id, *scores_of(ref))))


class OnPolicy(Offline):
    """Rolls out the current student on the next prompts every N steps and has the teacher score them.

    Prompts come from the cache, in the order of the data, and start again at the end. The first phase uses what the
    cache already holds for exactly this student, so that `rollout` and `score` before `learn` are not wasted.
    """

    def __init__(
        self,
        cache: Cache,
        config: LearnConfig,
        recorded: Mapping[str, Any],
        tokenizer: TokenizerInfo,
        score: ScoreRollouts,
        by: Calculator | None,
    ) -> None:
        """recorded: as `Offline` wants it. tokenizer: of the student. by: what computes between << and =.

        Raises CacheError.
        """
        self._tokenizer, self._score, self._calculator = tokenizer, score, by
        segments: dict[str, tuple[str, int]] = {}
        for id_, manifest in cache.manifests("prompts"):  # two processes may have stored the same at once
            segments.setdefault(manifest.content, (id_, manifest.rows))
        wanted = recorded.get("prompts", [id_ for id_, _ in segments.values()])
        self._prompt_segments = [(id_, rows) for id_, rows in segments.values() if id_ in wanted]
        self._prompts = sum(rows for _, rows in self._prompt_segments)
        if self._prompts == 0:
            raise CacheError(f"{cache.address}: holds no prompts; put them there with `ketchup-cache rollout`")
        super().__init__(cache, config, recorded, self._prompts * config.samples * config.epochs * config.reuse)
        self._require(wanted, [id_ for id_, _ in self._prompt_segments])
        # of the files, as `rollout` takes it: a checkpoint of the Hub may hold tensors that the model does not
        self._start = weights_fingerprint(config.student)
        held = [(id_, info) for id_, info in cache.rollouts() if info.policy.fingerprint == self._start]
        drawn = config.greedy, config.calculator
        same = [id_ for id_, info in held if (info.sampling.greedy, info.sampling.calculator) == drawn]
        self._held: list[str] = recorded.get("held", same)
        self._require(self._held, same)
        # the stream of a phase goes over its rollouts again and again, each time in another order
        self._prompts_per_phase = config.refresh_every // config.reuse * self._share // config.samples
        self._phase, self._since = -1, 0
        """The phase, and the step that it began with."""
        self._ess: float | None = None
        self.teacher: str | None = None
        self._engine: Engine | None = None

    def batch(self, step: int, model: PreTrainedModel) -> Drawn:
        every = self._config.refresh_every
        stale = self._ess is not None and self._ess < self._config.refresh_below_ess
        times = {}
        if self._phase < 0 or step - self._since >= every or (stale and step > self._since):
            self._since = step
            times = self._refresh(self._phase + 1, step, model)
        if times or STUDENT not in self._streams:
            # each phase has a seed of its own; a resumed one skips the batches it has trained on
            place = step - self._since
            left = min(every - place, self.steps - step)
            self._open(STUDENT, seed_of(self._config.seed, self._phase), skip=place, batches=left)
        return replace(super().batch(step, model), times=times)

    def observe(self, ess: float | None) -> None:
        self._ess = ess

    def _refresh(self, phase: int, step: int, model: PreTrainedModel) -> dict[str, float]:
        """Sample and score the rollouts of a phase; returns the seconds that took."""
        self._phase, began = phase, time.perf_counter()
        if phase == 0:
            name, fingerprint, ids = self._config.student, self._start, self._held
        else:
            self.gather()
            name, fingerprint, ids = str(self._config.out), state_fingerprint(model), []
        sampler = self._updated(model) if self._config.student_url else model
        updated = time.perf_counter()
        ids = ids or self._sample(phase, PolicyInfo(name=name, fingerprint=fingerprint, step=step), sampler)
        sampled = time.perf_counter()
        load_s = self._take(ids)
        scored = max(0.0, time.perf_counter() - sampled - load_s)
        times = {"sample_s": sampled - began, "score_s": scored, "load_s": load_s}
        return times | ({"engine_s": updated - began} if self._engine else {})

    def _updated(self, model: PreTrainedModel) -> Engine:
        """The engine with the student's weights as they are."""
        self._engine = engine = self._engine or Engine(self._config, model, self._tokenizer.vocab_size)
        folder = self._config.out / "engine"

        @by_first
        def write() -> None:
            whole = lora.merge(copy.deepcopy(model)) if lora.adapter_weights(model) else model
            with saving(folder) as partial, quiet():
                whole.save_pretrained(partial)

        write()
        try:
            engine.update(folder)
        finally:
            if group().first:
                shutil.rmtree(folder, ignore_errors=True)
        return engine

    def _whole(self, model: PreTrainedModel | Engine) -> PreTrainedModel | Engine:
        self.gather()
        return model

    def _sample(self, phase: int, policy: PolicyInfo, model: PreTrainedModel | Engine) -> list[str]:
        # a prompt that comes again in a later phase must not be met with the same random numbers
        options = self._config.model_copy(update={"seed": seed_of(phase, self._config.seed)})
        given = self._cache, self._next_prompts(phase), partial(self._whole, model), policy, self._tokenizer, options
        return list(dict.fromkeys(id_ for id_, _, _ in ensure_rollouts(*given, self._calculator)[0]))

    def _take(self, rollout_ids: Sequence[str]) -> float:
        """Have these rollouts scored, and learn from them; returns the seconds that reading the teacher took."""
        found, load_s = self._score(self._cache, rollout_ids, self.teacher)
        self.teacher = group().gathered(found)[0]  # where several score elsewhere, each process may have met another
        self._cache.agree()
        teachers = several(self.teacher)
        require_known(self._cache, self._config, teachers)
        place = {id_: i for i, id_ in enumerate(rollout_ids)}
        refs = [r for r in self._cache.scored(teachers, keep_top=self._config.top_needed) if r.rollouts_id in place]
        self._refs[STUDENT] = sorted(refs, key=lambda ref: (place[ref.rollouts_id], ref.row_start))
        return load_s

    def _next_prompts(self, phase: int) -> list[tuple[str, int, int]]:
        """Ranges (prompts segment, start, stop) of this phase's prompts."""
        begin = (phase * self._prompts_per_phase) % self._prompts
        end = begin + min(self._prompts_per_phase, self._prompts)
        ranges = []
        for id_, rows in self._prompt_segments * 2:  # at the end, from the start
            if (start := max(begin, 0)) < (stop := min(end, rows)):
                ranges.append((id_, start, stop))
            begin, end = begin - rows, end - rows
        return ranges

    def resolved(self) -> dict[str, Any]:
        outputs = [id_ for ref in self._refs.get(TEACHER, []) for id_ in scores_of(ref)]
        return {"prompts": [id_ for id_, _ in self._prompt_segments], "held": self._held, "segments": outputs}

    def state(self) -> dict[str, Any]:
        rollouts = list(dict.fromkeys(ref.rollouts_id for ref in self._refs[STUDENT]))
        given = {"phase": self._phase, "since": self._since, "ess": self._ess}
        return {**given, "rollouts": rollouts, "teacher": self.teacher}

    def restore(self, state: dict[str, Any]) -> None:
        if state.get("phase") is not None:
            self._phase, self.teacher, self._ess = state["phase"], state.get("teacher"), state.get("ess")
            self._since = state.get("since", self._phase * self._config.refresh_every)
            self._take(state["rollouts"])

    def segments(self) -> list[str]:
        return list(dict.fromkeys([*(id_ for id_, _ in self._prompt_segments), *super().segments()]))


def scored_rollouts(cache: Cache, config: LearnConfig, kind: str) -> list[ScoredRef]:
    """What a method learns from: all scored rollouts of some policies, with as many logits as it needs.

    TEACHER: of `config.teacher_outputs`; without it, of the policy that has the teacher's weights, whatever its name
    and the precision that the teacher scored in. STUDENT: of `config.policy`; without it, of the policy that has the
    weights of `config.student`; where there is none, of all policies that are not the teacher's. Which, is said.

    Raises CacheError where there are none, or some with fewer logits.
    """
    names = several(config.scored_by) if config.scored_by or len(config.teachers) == 1 else config.teachers
    teachers = require_known(cache, config, names)
    policies, outputs = {policy.fingerprint for policy in cache.policies()}, set[str]()
    if config.needs_outputs and config.teacher_outputs is not None:
        outputs = {cache.select_policy(config.teacher_outputs, "--teacher-outputs").fingerprint}
    elif config.needs_outputs:
        outputs = {p for p in policies for t in teachers if in_precision(p, t.dtype) == t.fingerprint}
    if kind == TEACHER:
        wanted = outputs
        none = (
            f"{config.method_text} learns from teacher outputs, but no scored rollouts are of policy "
            f"{config.teacher_outputs or teachers[0].name}; make them with `ketchup-cache rollout --student "
            f"{teachers[0].name} --greedy` and `ketchup-cache score`, or name a policy with --teacher-outputs"
        )
    else:
        mine = {weights_fingerprint(config.student)} if not config.policy else set[str]()
        wanted = {cache.select_policy(config.policy).fingerprint} if config.policy else policies - outputs
        own = {ref.policy.fingerprint for ref in cache.scored(names)} & mine & wanted
        wanted = own or wanted
        what = f"of policy {config.policy!r}" if config.policy else "of a student"
        none = f"no scored rollouts {what}; make some with `rollout` and `score`"
    top = config.top_needed
    selected, enough = (
        [ref for ref in cache.scored(by, keep_top=n) if ref.policy.fingerprint in wanted]
        for by, n in ((names[:1], 0), (names, top))
    )
    if not selected:
        raise CacheError(f"{cache.address}: {none}")
    if kind == STUDENT and not config.policy:
        whose = "this student" if own else f"{len(wanted)} policies, none of them this student"
        others = {policy.name for policy in cache.policies() if policy.fingerprint not in wanted | outputs}
        rest = f"; those of {', '.join(sorted(others))} are left out (--policy)" if others else ""
        say(f"learning from {sum(ref.rows for ref in selected):,} scored rollouts of {whose}{rest}")
    missing = sum(ref.rows for ref in selected) - sum(ref.rows for ref in enough)
    if missing and len(names) > 1:
        wants = f" with --keep-top {top}" if top else ""
        what = f"{missing:,} rollouts that {teachers[0].name} has scored lack scores{wants} of another of --scored-by"
        raise CacheError(f"{cache.address}: {what}; run `ketchup-cache score` by each of them, then this again")
    if missing:
        raise CacheError(
            f"{cache.address}: {missing:,} of the rollouts for --method {config.method} are scored without "
            f"the teacher's {top} largest logits (or with fewer); run `ketchup-cache score "
            f"--teacher {teachers[0].name} --cache {cache.address} --keep-top {top}`"
        )
    return enough


def require_known(cache: Cache, config: LearnConfig, names: Iterable[str | None]) -> list[TeacherInfo]:
    """The teachers of these names, whose scores give what the options need. Raises CacheError, MismatchError."""
    teachers = [cache.select_teacher(name) for name in names]
    for teacher in teachers:
        teacher.require_known(config.normalization, config.unfinished)
    return teachers


def scores_of(ref: ScoredRef) -> tuple[str, ...]:
    """Its segments of scores, one of each teacher."""
    return ref.scores_id, *ref.beside


def prompt_form(cache: Cache) -> PromptForm | None:
    """The form of a cache's prompts; None where it is not recorded, or there are several."""
    infos = [manifest.info for _, manifest in cache.manifests("prompts")]
    forms = {info.data.form for info in infos if isinstance(info, PromptsInfo)}
    return forms.pop() if len(forms) == 1 else None
