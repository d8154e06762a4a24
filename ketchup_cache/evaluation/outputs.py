"""What a model writes for a set of examples, and what that is worth: the core of `evaluate` and of the dev set."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ketchup_cache.config.options import DataOptions, GreedyOptions
from ketchup_cache.config.values import Normalization, RougeTokenizer
from ketchup_cache.console import progress
from ketchup_cache.errors import DataError
from ketchup_cache.evaluation.task_metrics import Values, check_metrics, compute, rouge_tokenizer
from ketchup_cache.files import write_file
from ketchup_cache.method.returns import rollout_returns
from ketchup_cache.models.forward import Batch, completion_states, computes_prompts_once
from ketchup_cache.models.head import Head
from ketchup_cache.models.load import evaluating, model_name
from ketchup_cache.parallel.group import by_first, group
from ketchup_cache.provenance import Sampling
from ketchup_cache.rollouts.calculator import Calculator
from ketchup_cache.rollouts.sample import sample_completions, stop_ids
from ketchup_cache.text.prompts import Example, reply_ids, tokenize_prompts
from ketchup_cache.text.read import read_examples
from ketchup_cache.types import TOKEN_DTYPE, Ragged, Rollouts

if TYPE_CHECKING:
    from ketchup_cache.scoring.score import Scorer

LOSS_TOKENS = 16_384
"""Of prompts and references that go through the model at once."""


@dataclass(frozen=True)
class EvalSet:
    """Examples as a model is given them. prompts: their token ids. targets: the references of each, None where no
    example has one. left_out, cut: examples over the prompt limit that are not here, and that lost tokens."""

    data: str
    examples: list[Example]
    prompts: Ragged
    targets: list[tuple[str, ...]] | None
    left_out: int
    cut: int
    rouge: RougeTokenizer = "ascii"

    @classmethod
    def read(
        cls,
        options: DataOptions,
        tokenizer: PreTrainedTokenizerBase,
        model: str,
        metrics: Sequence[str],
        by: RougeTokenizer | None,
    ) -> EvalSet:
        """model: whose stop tokens end the replies of conversations. by: what ROUGE counts.

        Raises DataError for unusable data, or targets that a metric can't use; ConfigError for an unusable template,
        chat template or function of the user's."""
        examples = read_examples(options)
        # a reply without a text of its own, which calls tools, is compared as the template writes it
        written = "loss" in metrics or any(e.talk and e.talk.reply and e.target is None for e in examples)
        trust = getattr(options, "trust_remote_code", False)
        stops = stop_ids(model, trust_remote_code=trust) if examples[0].talk and written else []
        kept = tokenize_prompts(examples, tokenizer, options, stops=stops)
        targets = _targets(kept.examples, options)
        check_metrics(metrics, targets or [])
        by = rouge_tokenizer(by, metrics, targets or [])
        left_out = len(examples) - len(kept.examples)
        return cls(options.data, kept.examples, kept.prompts.tokens, targets, left_out, kept.cut, by)

    def part(self, rows: range) -> EvalSet:
        """Some of the examples, next to each other. Raises DataError for none."""
        if not rows:
            raise DataError(f"{self.data}: {len(self.examples)} examples are too few for so many parts (--shard)")
        place = slice(rows.start, rows.stop)
        targets = None if self.targets is None else self.targets[place]
        return replace(self, examples=self.examples[place], prompts=self.prompts.take(place), targets=targets)


@dataclass(frozen=True)
class Outputs:
    """What a model writes for an `EvalSet`: greedy completions, and their texts."""

    rollouts: Rollouts
    texts: list[str]

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        data: EvalSet,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        options: GreedyOptions,
    ) -> Outputs:
        """vocab_size: the tokenizer's. Raises what `sample_completions` raises."""
        greedy = Sampling(greedy=True, max_new_tokens=options.max_new_tokens, calculator=options.calculator)
        calculator = Calculator(tokenizer, model_name(model)) if options.calculator else None
        with progress("decode", len(data.prompts), "outputs", workers=group().size) as bar:
            how: Any = {"batch": options.rollout_batch, "calculator": calculator, "on_batch": bar.advance}
            rollouts = sample_completions(model, vocab_size, data.prompts, greedy, first_prompt=0, **how)
        return cls(rollouts, [tokenizer.decode(row, skip_special_tokens=True) for row in rollouts.completions])

    def scores(self, data: EvalSet, metrics: Sequence[str]) -> Values | None:
        """Those of the metrics that are of texts; None where the data has no targets."""
        targets = data.targets
        if targets is None:
            return None
        return group().from_first(lambda: compute(metrics, self.texts, targets, data.rouge))

    @by_first
    def write(self, path: Path, data: EvalSet, returns: Returns | None = None) -> None:
        """As JSONL: what `compare` and `show` read. Raises WriteError."""
        known: list[dict[str, Any]] = [{}] * len(self.texts)
        if returns:
            known = [{"return": value, "return_of": returns.of} for value in returns.values.tolist()]
        rows = zip(data.examples, self.texts, self.rollouts.finished.tolist(), known, strict=True)
        records = (
            {"id": e.id.hex(), "prompt": e.prompt, "output": output, "target": e.target, "finished": finished}
            | ({"targets": e.references} if e.more else {})
            | more
            for e, output, finished, more in rows
        )
        write_file(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())


def reference_loss(model: PreTrainedModel, head: Head, data: EvalSet, tokenizer: PreTrainedTokenizerBase) -> float:
    """Cross-entropy of the (first) references with their EOS, by teacher forcing: nats per token, over all tokens.

    Raises DataError where the data has no references.
    """
    if data.targets is None:
        raise DataError(f"{data.data}: metric loss needs references: set --target-field, or choose another metric")
    bare = not model.config.is_encoder_decoder
    targets = Ragged.from_rows([reply_ids(tokenizer, example, bare=bare) for example in data.examples], TOKEN_DTYPE)
    return -float(token_logprob(model, head, Batch(data.prompts, np.arange(len(targets)), targets)).mean(dtype=float))


@torch.no_grad()
def token_logprob(model: PreTrainedModel, head: Head, batch: Batch) -> NDArray[np.float32]:
    """log π(a_t) of every completion token of a batch, [N], nats."""
    values = np.zeros(len(batch.completions.values), np.float32)
    with evaluating(model):
        rows = np.flatnonzero(batch.completions.lengths > 0)
        for chosen in group().mine(batch.split(rows, LOSS_TOKENS, once=computes_prompts_once(model))):
            part = batch.take(chosen)
            wanted = torch.from_numpy(part.completions.values).long().to(head.device)
            logprob = head.log_prob(completion_states(model, part), wanted)
            values[batch.completions.places(chosen)[0]] = logprob.float().cpu().numpy()
    return group().summed(values)


def _targets(examples: Sequence[Example], options: DataOptions) -> list[tuple[str, ...]] | None:
    """The references; None where no example has one. A mean over a part of the data would pass for one over all."""
    targets = [example.references for example in examples if example.references]
    if targets and len(targets) < len(examples):
        row = next(example.row for example in examples if example.target is None)
        raise DataError(
            f"{options.data}: row {row}: no text in {options.target_field!r}, but other rows have some: "
            "fill it in, leave the row out, or set --target-field"
        )
    return targets or None


@dataclass(frozen=True)
class Returns:
    """Of greedy outputs under a teacher. values: [B] G_1 (Eq. 10, K = 1), nats; an output that was cut counts with the
    gaps so far. of: what they are, which those of two models must have in common to be compared."""

    values: NDArray[np.float64]
    of: str

    @classmethod
    def under(cls, scorer: Scorer, prompts: Ragged, rollouts: Rollouts, normalization: Normalization) -> Returns:
        scores = scorer.scores(prompts, rollouts)
        (one_step,) = rollout_returns(rollouts, scores, [1], normalization=normalization, unfinished="bootstrap")
        return cls(one_step[:, 0], f"G_1, {normalization}, teacher {scorer.info.fingerprint:.12}")
