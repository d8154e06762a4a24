"""How good is a model: greedy outputs against references, and their return under a teacher."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ketchup_cache.config.commands import EvaluateConfig
from ketchup_cache.console import Report, progress
from ketchup_cache.errors import DataError
from ketchup_cache.files import write_file
from ketchup_cache.method.returns import rollout_returns
from ketchup_cache.models.fingerprint import tokenizer_info
from ketchup_cache.models.load import load_model, load_tokenizer, require_same_encoding
from ketchup_cache.provenance import Sampling
from ketchup_cache.report.analyze import spread
from ketchup_cache.report.task_metrics import Values, check_targets, compute
from ketchup_cache.rollouts.calculator import Calculator
from ketchup_cache.rollouts.sample import sample_completions
from ketchup_cache.scoring.teacher import Teacher
from ketchup_cache.text.prompts import Example, tokenize_prompts
from ketchup_cache.text.read import read_examples
from ketchup_cache.types import Ragged, Rollouts


@dataclass(frozen=True)
class MeanReturn:
    """G_1 (Eq. 10, K = 1) of the outputs under a teacher.

    mean, sd, se: over all outputs; se is the mean's standard error. An output cut at the length limit counts with the
    gaps it has run up so far (`unfinished="bootstrap"`). Going on could only lower that, so `mean` is an upper bound
    where there are such outputs; leaving them out would let a model that rambles without an end look good.
    mean_finished: over the finished ones alone. None where there are too few outputs for a figure.
    """

    teacher: str
    fingerprint: str
    normalization: str
    mean: float
    sd: float | None
    se: float | None
    mean_finished: float | None


@dataclass(frozen=True)
class Evaluation(Report):
    """Metrics are in percent (`metrics.compute`), lengths in tokens with EOS, `finished` is a share.

    left_out: examples over the prompt limit (`long_prompts="drop"`). metrics: None where the data has no targets.
    """

    model: str
    data: str
    examples: int
    left_out: int
    metrics: Values | None
    length_mean: float
    length_sd: float | None
    finished: float
    returns: MeanReturn | None

    def __str__(self) -> str:
        left_out = f" ({self.left_out:,} left out)" if self.left_out else ""
        metrics = {name.replace("_", " "): value for name, value in (self.metrics or {}).items()}
        rows = {name: f"{value:.2f}" for name, value in metrics.items() if not isinstance(value, str)}
        if self.metrics is None:
            rows["task metrics"] = "none: the data has no targets (see --target-field)"
        rows["length"] = f"{self.length_mean:.1f} tokens{_spread('s.d.', self.length_sd)}"
        rows["finished"] = f"{100 * self.finished:.1f} %"
        if r := self.returns:
            rows["return"] = f"{r.mean:.3f}{_spread('s.e.', r.se)}{_spread('s.d.', r.sd)}"
            if self.finished < 1:
                rows["return"] += " (at most: unfinished outputs count up to the cut)"
                rows["… of finished"] = "–" if r.mean_finished is None else f"{r.mean_finished:.3f}"
            rows["… under"] = f"{r.teacher}, {r.normalization}"
        rows |= {name: value for name, value in metrics.items() if isinstance(value, str)}
        head = f"{self.model}, greedy, on {self.examples:,} examples of {self.data}{left_out}"
        return "\n".join([head, *(f"  {name:<16} {value}" for name, value in rows.items())])


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Decode `config.data` greedily, compute the task metrics, and the mean return where there is a teacher. Only one
    model is in memory at a time.

    Raises MismatchError where the teacher's tokenizer encodes differently, DataError for unusable data or targets,
    ModelError for an unusable model, WriteError for `outputs`. All but the last before anything is decoded.
    """
    trust: Any = {"trust_remote_code": config.trust_remote_code}
    tokenizer = load_tokenizer(config.model, **trust)
    info = tokenizer_info(tokenizer, config.model)
    if config.teacher is not None:
        _, theirs = Teacher.identify(config.teacher, config)
        what = f"teacher {config.teacher}: its tokenizer encodes differently from that of model {config.model}"
        todo = "choose a teacher that shares it, or leave --teacher out"
        require_same_encoding(info, theirs, what, todo, download=True, **trust)
    examples = read_examples(config)
    kept, prompts = tokenize_prompts(examples, tokenizer, config)
    targets = _targets(kept, config)
    check_targets(config.metrics, targets or [])
    calculator = Calculator(tokenizer, config.model) if config.calculator else None
    greedy = Sampling(greedy=True, max_new_tokens=config.max_new_tokens, calculator=config.calculator)
    with progress("decode", len(kept), "outputs") as bar:
        how: Any = {"batch": config.rollout_batch, "calculator": calculator, "on_batch": bar.advance}
        model = partial(load_model, config.model, device=config.device, **trust)
        # not held longer than this call, so that student and teacher need not fit into memory together
        rollouts = sample_completions(model(), info.vocab_size, prompts.tokens, greedy, first_prompt=0, **how)
    gc.collect()
    torch.cuda.empty_cache()
    outputs = [tokenizer.decode(row, skip_special_tokens=True) for row in rollouts.completions]
    if config.outputs is not None:
        rows = zip(kept, outputs, rollouts.finished.tolist(), strict=True)
        write_file(config.outputs, "".join(_json_line(*row) for row in rows).encode())
    lengths = rollouts.completions.lengths
    return Evaluation(
        model=config.model,
        data=config.data,
        examples=len(kept),
        left_out=len(examples) - len(kept),
        metrics=compute(config.metrics, outputs, targets) if targets is not None else None,
        length_mean=float(lengths.mean()),
        length_sd=spread(lengths)[1],
        finished=float(rollouts.finished.mean()),
        returns=_mean_return(prompts.tokens, rollouts, config) if config.teacher is not None else None,
    )


def _targets(examples: Sequence[Example], config: EvaluateConfig) -> list[str] | None:
    """The references; None where no example has one. A mean over a part of the data would pass for one over all."""
    targets = [example.target for example in examples if example.target is not None]
    if targets and len(targets) < len(examples):
        row = next(example.row for example in examples if example.target is None)
        raise DataError(
            f"{config.data}: row {row}: no text in {config.target_field!r}, but other rows have some: "
            "fill it in, leave the row out, or set --target-field"
        )
    return targets or None


def _mean_return(prompts: Ragged, rollouts: Rollouts, config: EvaluateConfig) -> MeanReturn:
    assert config.teacher is not None
    teacher = Teacher.load(config.teacher, config)
    with progress("score", len(rollouts.completions.values)) as bar:
        scores = teacher.score(prompts, rollouts, batch_tokens=config.batch_tokens, on_batch=bar.advance)
    (one_step,) = rollout_returns(rollouts, scores, [1], normalization=config.normalization, unfinished="bootstrap")
    returns, finished = one_step[:, 0], one_step[rollouts.finished, 0]
    who = (teacher.info.name, teacher.info.fingerprint, config.normalization)
    return MeanReturn(*who, float(returns.mean()), *spread(returns)[1:], spread(finished)[0])


def _json_line(e: Example, output: str, finished: bool) -> str:
    record = {"id": e.id.hex(), "prompt": e.prompt, "output": output, "target": e.target, "finished": finished}
    return json.dumps(record, ensure_ascii=False) + "\n"


def _spread(what: str, value: float | None) -> str:
    return "" if value is None else f", {what} {value:.3f}"
