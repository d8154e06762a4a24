"""How good is a model: greedy outputs against references, and their return under a teacher."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ketchup_cache.config.commands import EvaluateConfig, ScoreConfig
from ketchup_cache.config.servers import ScoringOptions
from ketchup_cache.config.values import Normalization
from ketchup_cache.console import Report
from ketchup_cache.evaluation.outputs import EvalSet, Outputs, Returns, reference_loss
from ketchup_cache.evaluation.task_metrics import Values, spread
from ketchup_cache.models.fingerprint import tokenizer_info
from ketchup_cache.models.head import Head
from ketchup_cache.models.load import load_model, load_tokenizer, require_same_encoding
from ketchup_cache.models.origin import prompts_as_trained
from ketchup_cache.scoring.score import Scorer
from ketchup_cache.types import Rollouts


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

    left_out, cut: examples over the prompt limit (`long_prompts` drop, truncate). metrics: None where the data has no
    targets.
    """

    model: str
    data: str
    examples: int
    left_out: int
    cut: int
    metrics: Values | None
    length_mean: float
    length_sd: float | None
    finished: float
    returns: MeanReturn | None

    def __str__(self) -> str:
        lost = [f"{n:,} {what}" for n, what in ((self.left_out, "left out"), (self.cut, "with cut prompts")) if n]
        left_out = f" ({', '.join(lost)})" if lost else ""
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

    Prompts have the form that the model was trained with (`prompts_as_trained`), unless an option says otherwise.

    With `shard`, all is of that part of the examples.

    Raises MismatchError where the teacher's tokenizer encodes differently, DataError for unusable data or targets,
    ModelError for an unusable model, WriteError for `outputs`. All but the last before anything is decoded.
    """
    config = prompts_as_trained(config, config.model)
    trust: Any = {"trust_remote_code": config.trust_remote_code}
    tokenizer = load_tokenizer(config.model, **trust)
    scorer = None
    if config.teacher is not None or config.teacher_url:
        scoring = config.model_dump(include=set(ScoringOptions.model_fields))
        scorer = Scorer(ScoreConfig(teacher=config.teacher or config.model, cache="", **scoring))
        scorer.info.require_known(config.normalization)
        what = f"teacher {scorer.info.name}: its tokenizer encodes differently from that of model {config.model}"
        todo = "choose a teacher that shares it, or leave --teacher out"
        ours = tokenizer_info(tokenizer, config.model)
        require_same_encoding(ours, scorer.tokenizer, what, todo, download=True, **trust)
    data = EvalSet.read(config, tokenizer, config.model, config.metrics, config.rouge_tokenizer)
    if config.shard:
        data = data.part(config.part_of(len(data.examples)))
    outputs, loss = _of_model(config, data, tokenizer)
    gc.collect()
    torch.cuda.empty_cache()
    if config.outputs is not None:  # before the teacher comes, which may fail
        outputs.write(config.outputs, data)
    mean = None
    if scorer is not None:
        returns = Returns.under(scorer, data.prompts, outputs.rollouts, config.normalization)
        mean = _mean_return(returns.values, outputs.rollouts, scorer, config.normalization)
        if config.outputs is not None:
            outputs.write(config.outputs, data, returns)
    lengths, scores = outputs.rollouts.completions.lengths, outputs.scores(data, config.metrics)
    return Evaluation(
        model=config.model,
        data=config.data,
        examples=len(data.examples),
        left_out=data.left_out,
        cut=data.cut,
        metrics=scores if scores is None else scores | loss,
        length_mean=float(lengths.mean()),
        length_sd=spread(lengths)[1],
        finished=float(outputs.rollouts.finished.mean()),
        returns=mean,
    )


def _of_model(config: EvaluateConfig, data: EvalSet, tokenizer: PreTrainedTokenizerBase) -> tuple[Outputs, Values]:
    """The model is not held longer than this call, so that student and teacher need not fit into memory together."""
    model = load_model(config.model, device=config.device, trust_remote_code=config.trust_remote_code)
    vocab_size = tokenizer_info(tokenizer, config.model).vocab_size
    loss: Values = {}
    if "loss" in config.metrics:
        loss = {"loss": reference_loss(model, Head.of(model, vocab_size), data, tokenizer)}
    return Outputs.of(model, data, tokenizer, vocab_size, config), loss


def _mean_return(returns: NDArray, rollouts: Rollouts, scorer: Scorer, normalization: Normalization) -> MeanReturn:
    who = (scorer.info.name, scorer.info.fingerprint, normalization)
    return MeanReturn(*who, float(returns.mean()), *spread(returns)[1:], spread(returns[rollouts.finished])[0])


def _spread(what: str, value: float | None) -> str:
    return "" if value is None else f", {what} {value:.3f}"
