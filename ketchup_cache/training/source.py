"""Where the batches come from: a cache as it is (offline), or rollouts refreshed from the student (on-policy)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from ketchup_cache.cache.cache import Cache
from ketchup_cache.cache.index import ScoredRef
from ketchup_cache.config.commands import LearnConfig
from ketchup_cache.console import progress
from ketchup_cache.errors import CacheError
from ketchup_cache.models.fingerprint import state_fingerprint, weights_fingerprint
from ketchup_cache.models.load import resolve_folder
from ketchup_cache.provenance import PolicyInfo, TokenizerInfo
from ketchup_cache.rollouts.calculator import Calculator
from ketchup_cache.rollouts.rollout import rollout_chunks, rollout_range, sampling_of
from ketchup_cache.training.batches import Stream, concatenate
from ketchup_cache.training.pick import ON_OUTPUTS, ON_SAMPLES, student_samples, teacher_outputs
from ketchup_cache.types import ScoredRollouts

ScoreRollouts = Callable[[Cache, Sequence[str]], str]
"""Scores the given rollouts segments, as far as they are not scored yet; returns the teacher's fingerprint.
Handed in by the command line, so that learning never imports the teacher."""


@dataclass(frozen=True)
class Drawn:
    """The rollouts of one optimizer step. refreshed: whether they were sampled for it. from_teacher: [B] bool, rows
    that count as teacher outputs."""

    rollouts: ScoredRollouts
    refreshed: bool
    from_teacher: NDArray[np.bool_]


class Source(Protocol):
    steps: int
    """Optimizer steps of the whole run."""

    def batch(self, step: int, model: PreTrainedModel) -> Drawn:
        """The rollouts of optimizer step `step`."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold so that `restore` goes on exactly here."""

    def restore(self, state: dict[str, Any]) -> None: ...

    def resolved(self) -> dict[str, Any]:
        """For the run's record: what the run reads."""

    def segments(self) -> list[str]:
        """Ids of the segments that the current batches come from, parents included."""


class Offline:
    """What the method needs of the cache, in epochs: rollouts of the student, teacher outputs, or half of each.

    An epoch is one over the student's rollouts; over the teacher outputs where the method has no others.
    """

    def __init__(self, cache: Cache, config: LearnConfig) -> None:
        self._cache, self._config = cache, config
        self._parts: dict[str, list[ScoredRef]] = {}
        # asked for first: where they are missing, they must be made before anything is scored again
        outputs = teacher_outputs(cache, config) if config.method in ON_OUTPUTS else None
        if config.method in ON_SAMPLES:
            self._parts["student"] = student_samples(cache, config)
        if outputs is not None:
            self._parts["teacher"] = outputs
        self._share = config.batch_size // len(self._parts)
        rows = sum(ref.rows for ref in next(iter(self._parts.values())))
        self.steps = config.steps or max(1, rows * config.epochs // self._share)
        self._streams: dict[str, Stream] = {}

    def batch(self, step: int, model: PreTrainedModel) -> Drawn:
        if not self._streams:
            self._streams = {
                name: Stream(self._cache, refs, self._share, self._config.seed, skip=step, batches=self.steps - step)
                for name, refs in self._parts.items()
            }
        drawn = [next(stream) for stream in self._streams.values()]
        from_teacher = [np.full(len(part), name == "teacher") for name, part in zip(self._streams, drawn, strict=True)]
        return Drawn(concatenate(drawn), False, np.concatenate(from_teacher))

    def state(self) -> dict[str, Any]:
        return {"segments": [ref.scores_id for refs in self._parts.values() for ref in refs]}

    def restore(self, state: dict[str, Any]) -> None:
        """The segments of the killed run, even if the cache has grown since."""
        if wanted := set(state.get("segments", ())):
            self._parts = {name: [ref for ref in refs if ref.scores_id in wanted] for name, refs in self._parts.items()}

    def resolved(self) -> dict[str, Any]:
        return self.state()

    def segments(self) -> list[str]:
        return _segments_of([ref for refs in self._parts.values() for ref in refs])


class OnPolicy:
    """Rolls out the current student on the next prompts every N steps and has the teacher score them.

    Prompts come from the cache, in the order of the data, and start again at the end. The first phase uses what the
    cache already holds for exactly this student, so that `rollout` and `score` before `learn` are not wasted.
    """

    def __init__(
        self,
        cache: Cache,
        config: LearnConfig,
        tokenizer: TokenizerInfo,
        score_rollouts: ScoreRollouts,
        calculator: Calculator | None = None,
    ) -> None:
        self._cache, self._config, self._tokenizer, self._score = cache, config, tokenizer, score_rollouts
        self._calculator = calculator
        self._prompt_segments = _distinct_prompts(cache)
        total = sum(rows for _, rows in self._prompt_segments)
        if total == 0:
            raise CacheError(f"{cache.address}: holds no prompts; put them there with `ketchup-cache rollout`")
        self._outputs = teacher_outputs(cache, config) if config.method in ON_OUTPUTS else None
        self._share = config.batch_size // (2 if self._outputs else 1)
        self._output_stream: Stream | None = None
        self.steps = config.steps or max(1, total * config.samples * config.epochs * config.reuse // self._share)
        # the stream of a phase goes over its rollouts again and again, each time in another order
        self._prompts_per_phase = config.refresh_every // config.reuse * self._share // config.samples
        self._phase: int | None = None
        self._refs: list[ScoredRef] = []
        self._stream: Stream | None = None

    def batch(self, step: int, model: PreTrainedModel) -> Drawn:
        phase, place = divmod(step, self._config.refresh_every)
        refreshed = phase != self._phase
        if refreshed:
            self._phase, self._refs, self._stream = phase, self._refresh(phase, step, model), None
        if self._stream is None:
            # each phase has a seed of its own; a resumed one skips the batches it has trained on
            seed = self._config.seed * 1_000_003 + phase
            left = min(self._config.refresh_every - place, self.steps - step)
            self._stream = Stream(self._cache, self._refs, self._share, seed, skip=place, batches=left)
        drawn = [next(self._stream)]
        if self._outputs:
            if self._output_stream is None:
                left = self.steps - step
                self._output_stream = Stream(
                    self._cache, self._outputs, self._share, self._config.seed, skip=step, batches=left
                )
            drawn.append(next(self._output_stream))
        from_teacher = np.repeat([False, True][: len(drawn)], self._share)
        return Drawn(concatenate(drawn), refreshed, from_teacher)

    def _refresh(self, phase: int, step: int, model: PreTrainedModel) -> list[ScoredRef]:
        if phase == 0:
            # of the files, as `rollout` takes it: a checkpoint of the Hub may hold tensors that the model does not
            fingerprint = weights_fingerprint(resolve_folder(self._config.student))
            if held := self._held_for(fingerprint):
                return held
        else:
            fingerprint = state_fingerprint(model)
        name = self._config.student if phase == 0 else str(self._config.out)
        policy = PolicyInfo(name=name, fingerprint=fingerprint, step=step)
        # a prompt that comes again in a later phase must not be met with the same random numbers
        seed = self._config.seed + 1_000_003 * phase
        sampling = sampling_of(self._config).model_copy(update={"seed": seed})
        ranges = self._next_prompts(phase)
        wanted = sum(stop - start for _, start, stop in ranges) * sampling.samples
        ids = []
        with progress("rollouts", wanted, "rollouts") as bar:
            for prompts_id, start, stop in ranges:
                for first, last in rollout_chunks(stop - start, sampling):
                    chunk = (prompts_id, start + first, start + last)
                    made = rollout_range(
                        self._cache,
                        model,
                        policy,
                        self._tokenizer,
                        *chunk,
                        sampling,
                        batch=self._config.rollout_batch,
                        calculator=self._calculator,
                        bar=bar,
                    )
                    ids.append(made)
        return self._refs_of(ids)

    def _held_for(self, fingerprint: str) -> list[ScoredRef]:
        """Rollouts of exactly this policy that the cache already holds, scored where they were not yet."""
        ids = [
            id_
            for id_, info in self._cache.rollouts()
            if info.policy.fingerprint == fingerprint
            and (info.sampling.greedy, info.sampling.calculator) == (self._config.greedy, self._config.calculator)
        ]
        return self._refs_of(ids) if ids else []

    def _refs_of(self, rollout_ids: Sequence[str]) -> list[ScoredRef]:
        teacher = self._score(self._cache, rollout_ids)
        place = {id_: i for i, id_ in enumerate(rollout_ids)}
        refs = [
            ref for ref in self._cache.scored(teacher, keep_top=self._config.top_needed) if ref.rollouts_id in place
        ]
        return sorted(refs, key=lambda ref: (place[ref.rollouts_id], ref.row_start))

    def _next_prompts(self, phase: int) -> list[tuple[str, int, int]]:
        """Ranges (prompts segment, start, stop) of this phase's prompts."""
        total = sum(rows for _, rows in self._prompt_segments)
        begin, wanted = (phase * self._prompts_per_phase) % total, min(self._prompts_per_phase, total)
        ranges: list[tuple[str, int, int]] = []
        while wanted:
            offset = 0
            for id_, rows in self._prompt_segments:
                start = begin - offset
                if 0 <= start < rows:
                    stop = min(rows, start + wanted)
                    ranges.append((id_, start, stop))
                    wanted -= stop - start
                    begin = (begin + stop - start) % total
                    break
                offset += rows
        return ranges

    def state(self) -> dict[str, Any]:
        state = {"phase": self._phase, "rollouts": list(dict.fromkeys(ref.rollouts_id for ref in self._refs))}
        return state | ({"outputs": [ref.scores_id for ref in self._outputs]} if self._outputs else {})

    def restore(self, state: dict[str, Any]) -> None:
        if state.get("phase") is not None:
            self._phase = state["phase"]
            self._refs = self._refs_of(state["rollouts"])
        if self._outputs and (wanted := set(state.get("outputs", ()))):
            self._outputs = [ref for ref in self._outputs if ref.scores_id in wanted]

    def resolved(self) -> dict[str, Any]:
        return {"prompts": [id_ for id_, _ in self._prompt_segments]}

    def segments(self) -> list[str]:
        return list(dict.fromkeys([*self.resolved()["prompts"], *_segments_of([*self._refs, *(self._outputs or ())])]))


def _segments_of(refs: Sequence[ScoredRef]) -> list[str]:
    return list(dict.fromkeys(id_ for ref in refs for id_ in (ref.prompts_id, ref.rollouts_id, ref.scores_id)))


def _distinct_prompts(cache: Cache) -> list[tuple[str, int]]:
    """(id, rows) of the prompts segments, one of each content: two processes may have stored the same at once."""
    segments: dict[tuple[str, ...], tuple[str, int]] = {}
    for id_, manifest in cache.manifests("prompts"):
        content = tuple(manifest.files[name].sha256 for name in sorted(manifest.files))
        segments.setdefault(content, (id_, manifest.rows))
    return list(segments.values())
