"""The dev set: the model in training is evaluated as `evaluate` does it, from its start on, and the best one is kept.

OUT/dev.jsonl    one line per evaluation (`DevRecord`)
OUT/best/        the best model so far, by the first metric, as `from_pretrained` reads it
OUT/outputs-start.jsonl, outputs-best.jsonl    what the start and the best model wrote, as `evaluate --outputs` does
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ketchup_cache.config.options import DevOptions
from ketchup_cache.config.values import LOWER_IS_BETTER
from ketchup_cache.errors import DataError, ModelError, WriteError
from ketchup_cache.evaluation.outputs import EvalSet, Outputs, Returns, reference_loss
from ketchup_cache.files import write_file
from ketchup_cache.models.fingerprint import weights_fingerprint
from ketchup_cache.models.forward import Batch, completion_states, computes_prompts_once
from ketchup_cache.models.head import Head
from ketchup_cache.models.load import evaluating
from ketchup_cache.models.origin import read_origin
from ketchup_cache.parallel.group import by_first, group
from ketchup_cache.training.metrics import repetition
from ketchup_cache.types import Ragged, Rollouts

if TYPE_CHECKING:
    from ketchup_cache.models.sharded import Sharded

TOKENS = 16_384
"""Of prompts and outputs that go through the models at once."""
STATES = 1024
"""Whose logits are held at once."""
ReturnsOf = Callable[[Ragged, Rollouts], Returns]
"""Of greedy outputs under the teacher, from their prompts."""
Publish = Callable[[str, int, Mapping[str, float], Mapping[str, str]], None]
"""Writes the model as it is into a folder of the run, with the optimizer step, its metrics and their variants."""


class DevRecord(BaseModel):
    """One evaluation on the dev set: one line of dev.jsonl (schemas/dev.schema.json)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    step: int = Field(ge=0)
    """Optimizer steps that were taken before. 0: the start."""
    metrics: dict[str, float]
    """The first one chooses the best model."""
    best: bool
    """Whether it is the best so far. Of equal ones the first is."""
    fingerprint: str | None
    """Of the weights in best/, where it is the best so far."""
    variants: dict[str, str]
    """Which variant of a metric it is: sacrebleu's signatures and the like."""
    length_mean: float
    """Tokens per output, with EOS."""
    finished: float = Field(ge=0, le=1)
    """Share of outputs that ended before the length limit."""
    repetition: float = Field(ge=0, le=1)
    """Share of 4-grams that came before in the same output."""
    entropy: float
    """Of the policy in the states of its outputs: mean over tokens, nats."""
    kl_start: float
    """KL(policy‖start) in the same states: mean over tokens, nats. Exact, over the whole vocabulary."""
    seconds: float = Field(ge=0)
    alarms: tuple[str, ...] = ()
    """Names of the alarms that were raised (training/alarms.py)."""


class DevSet:
    """records: all evaluations up to the step that the run is at. every: optimizer steps between them."""

    def __init__(
        self,
        config: DevOptions,
        data: EvalSet,
        out: Path,
        publish: Publish,
        steps: int,
        recorded: Mapping[str, Any],
        returns: ReturnsOf | None = None,
    ) -> None:
        """out: folder of the run. steps: of the whole run. recorded: of a run that goes on, what it resolved to: its
        `eval_every` stays, however long it becomes. returns: needed for the metric `return`.

        Raises DataError for data without references, where a metric needs them.
        """
        if data.targets is None and set(config.metric) != {"return"}:
            raise DataError(f"{data.data}: has no references; set --target-field")
        self.every = config.eval_every or recorded.get("eval_every") or max(1, steps // 10)
        self.records: list[DevRecord] = []
        self._config, self._data, self._steps, self._returns = config, data, steps, returns
        self._publish, self._best, self._path = publish, out / "best", out / "dev.jsonl"

    def start(
        self, model: PreTrainedModel, head: Head, tokenizer: PreTrainedTokenizerBase, parts: Sharded | None = None
    ) -> None:
        """model: as the run starts with it, before a checkpoint is read. A copy of what is trained stays in memory: in
        parts, that of `parts`."""
        self._model, self._head, self._tokenizer, self._parts = model, head.on(model), tokenizer, parts
        if parts and parts.start:
            first, self._first = parts.start.model, partial(parts.start, precision="float32")
        else:
            frozen = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
            first = copy.deepcopy(model, frozen).eval().requires_grad_(False)
            self._first = partial(completion_states, first)
        self._first_head = head.on(first)

    def restore(self, step: int) -> None:
        """Keep the evaluations up to this optimizer step, which `Run.restore` has checked; later ones come again.

        Raises WriteError where best/ is not what was written.
        """
        found = [record for _, record in read_dev(self._path.parent) if step and record and record["step"] <= step]
        self.records = [DevRecord.model_validate(record) for record in found]
        if self.records:
            self.check_best(ahead=True)

    def due(self, step: int) -> bool:
        """Whether to evaluate after `step` optimizer steps: at the start, every so many, and at the end."""
        known = bool(self.records) and self.records[-1].step >= step
        return not known and (step % self.every == 0 or step == self._steps)

    @property
    def best(self) -> DevRecord:
        return next(record for record in reversed(self.records) if record.best)

    @property
    def patience_is_over(self) -> bool:
        since = sum(record.step > self.best.step for record in self.records) if self.records else 0
        return bool(self._config.patience) and since >= self._config.patience

    def evaluate(self, step: int) -> DevRecord:
        """Evaluate the model as it is, and keep it where it is the best so far. `record` writes the result down."""
        began = time.monotonic()
        if self._parts:
            self._parts.gather()
        outputs = Outputs.of(self._model, self._data, self._tokenizer, self._head.vocab_size, self._config)
        values = outputs.scores(self._data, self._config.metric) or {}
        if "loss" in self._config.metric:
            values["loss"] = reference_loss(self._model, self._head, self._data, self._tokenizer)
        returns = None
        if "return" in self._config.metric:
            assert self._returns is not None
            returns = self._returns(self._data.prompts, outputs.rollouts)
            values["return"] = float(returns.values.mean())
        metrics = {name: round(float(values[name]), 6) for name in self._config.metric}
        variants = {name: text for name, text in values.items() if isinstance(text, str)}
        lengths = outputs.rollouts.completions
        entropy, kl = self._entropy_and_kl(outputs.rollouts)
        first, fingerprint = self._config.metric[0], None
        sign = -1 if first in LOWER_IS_BETTER else 1
        best = not self.records or sign * metrics[first] > sign * self.best.metrics[first]
        for name in ["start"] * (not self.records) + ["best"] * best:
            outputs.write(self._path.with_name(f"outputs-{name}.jsonl"), self._data, returns)
        if best:
            self._publish("best", step, metrics, variants)
            fingerprint = group().from_first(lambda: weights_fingerprint(self._best))
        return DevRecord(
            step=step,
            metrics=metrics,
            best=best,
            fingerprint=fingerprint,
            variants=variants,
            length_mean=float(lengths.lengths.mean()),
            finished=float(outputs.rollouts.finished.mean()),
            repetition=repetition(lengths),
            entropy=entropy,
            kl_start=kl,
            seconds=round(time.monotonic() - began, 3),
        )

    def record(self, record: DevRecord) -> None:
        """After the best model is on the disk: what is written down is never without its model."""
        self.records.append(record)
        if group().first:
            write_file(self._path, "".join(r.model_dump_json() + "\n" for r in self.records).encode())

    def summary(self) -> dict[str, Any]:
        """For the report: the metric that chose, the evaluations at the start, the best and the last step, their number
        and seconds."""
        first, last, seconds = self.records[0], self.records[-1], sum(record.seconds for record in self.records)
        named = {"start": first, "best": self.best, "last": last}
        return {
            "data": self._data.data,
            "examples": len(self._data.examples),
            "metric": self._config.metric[0],
            **{name: record.model_dump(mode="json") for name, record in named.items()},
            "evaluations": len(self.records),
            "seconds": round(seconds, 3),
        }

    @by_first
    def check_best(self, *, ahead: bool = False) -> None:
        """Raise WriteError where best/ is not what dev.jsonl calls the best. ahead: it may be of a later step, after
        which the run was killed; that step comes again."""
        held, fingerprint = None, ""
        with suppress(ModelError):
            held = read_origin(str(self._best)).step
        if ahead and held is not None and held > self.best.step:
            return
        with suppress(ModelError):
            fingerprint = weights_fingerprint(self._best)
        if (held, fingerprint) != (self.best.step, self.best.fingerprint):
            what = f"{self._best}: is not the model of step {self.best.step}, the best on the dev set"
            raise WriteError(f"{what}; bring it back, or choose another --out")

    @torch.no_grad()
    def _entropy_and_kl(self, rollouts: Rollouts) -> tuple[float, float]:
        """Means over the tokens of the outputs, nats."""
        batch, sums = Batch(self._data.prompts, rollouts.prompt_index, rollouts.completions), torch.zeros(2).double()
        parts = batch.split(np.arange(len(rollouts)), TOKENS, once=computes_prompts_once(self._model))
        with evaluating(self._model):
            own = list(group().mine(parts))
            for number, part in enumerate(map(batch.take, group().level(own, parts[0]) if self._parts else own)):
                states = self._first(part), completion_states(self._model, part)
                for firsts, mine in zip(*(some.split(STATES) for some in states), strict=True):
                    logprob = self._head.logits(mine).log_softmax(1)
                    first = self._first_head.logits(firsts).log_softmax(1)
                    prob = logprob.exp()
                    if number < len(own):  # others are gone through for the start, in parts
                        sums -= torch.stack([(prob * logprob).sum(), (prob * (first - logprob)).sum()]).double().cpu()
        entropy, kl = (group().summed(sums.numpy()) / max(len(batch.completions.values), 1)).tolist()
        return entropy, kl


def best_text(dev: Mapping[str, Any] | None, folder: str) -> str:
    """The end of a run's last line: where its model is, and which step it is of. dev: `DevSet.summary`."""
    if dev is None:
        return f"model in {folder}"
    name, (start, best, last) = dev["metric"], (dev[which] for which in ("start", "best", "last"))
    start_value, value, last_value = (record["metrics"][name] for record in (start, best, last))
    if best["step"] == 0:
        return f"the best on the dev set is the start ({name} {value:.2f}, last {last_value:.2f}): it is in {folder}"
    of = "" if best["step"] == last["step"] else f", last {last_value:.2f}"
    return f"{name} on the dev set {start_value:.2f} → {value:.2f} at step {best['step']}{of}; model in {folder}"


def read_dev(out: Path) -> list[tuple[bytes, dict[str, Any] | None]]:
    """The lines of a run's dev.jsonl that are whole, each with what it holds; None where that is no evaluation."""
    path, found = out / "dev.jsonl", []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            record = DevRecord.model_validate_json(line).model_dump(mode="json")
        except ValueError:
            record = None
        if line.endswith(b"\n"):
            found.append((line, record))
    return found
