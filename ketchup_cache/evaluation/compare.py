"""`compare`: is one model better than another on the same examples? Paired bootstrap (Koehn, 2004) of every metric."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sacrebleu.significance import PairedTest

from ketchup_cache.config.commands import CompareConfig
from ketchup_cache.config.values import RougeTokenizer
from ketchup_cache.console import Report, one_line, printable, warn
from ketchup_cache.errors import ConfigError, DataError
from ketchup_cache.evaluation.task_metrics import (
    NOT_OF_TEXTS,
    SACREBLEU,
    Targets,
    check_metrics,
    compute,
    of_each,
    of_texts,
    references,
    rouge_tokenizer,
    sacrebleu_metric,
    streams,
)

ALPHA = 0.05
FEWEST = 10
"""Examples: with fewer, resamples are too much alike for a p-value to mean anything."""
SEED = "12345"
"""As sacrebleu's. SACREBLEU_SEED sets both."""
WIDEST = 160
"""Characters of a text in an example."""


@dataclass(frozen=True)
class Difference:
    """One metric. p: two-sided, of the hypothesis that the models are equally good. variant: which metric it is.

    low, high: 95 % interval of b − a, for metrics that are means over examples; None for those of a corpus.
    """

    metric: str
    a: float
    b: float
    p: float
    variant: str
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        interval = "" if self.low is None else f"[{self.low:+.2f}, {self.high:+.2f}]"
        return f"  {self.metric:<12} {self.a:>8.2f} {self.b:>8.2f} {self.b - self.a:>+8.2f} {self.p:>8.4f}  {interval}"


@dataclass(frozen=True)
class Comparison(Report):
    """wins, losses: the examples where b is better and worse than a by most, by `by`, with both values."""

    a: str
    b: str
    examples: int
    resamples: int
    differences: tuple[Difference, ...]
    words_a: float
    words_b: float
    by: str
    wins: tuple[dict[str, Any], ...]
    losses: tuple[dict[str, Any], ...]

    @property
    def quote(self) -> str:
        """One line for a paper, of the first metric."""
        d = self.differences[0]
        gap = f"{abs(d.b - d.a):.2f} {'above' if d.b > d.a else 'below'} {d.a:.2f}"
        gap = gap if d.p < ALPHA else f"not significantly different from {d.a:.2f}"
        test = f"p = {d.p:.3g}, paired bootstrap, {self.resamples:,} resamples of {self.examples:,} examples"
        return f"{d.metric} {d.b:.2f}, {gap} ({test}; {d.variant or d.metric})"

    def __str__(self) -> str:
        lines = [f"A = {self.a}", f"B = {self.b}", f"{self.examples:,} examples, {self.resamples:,} resamples", ""]
        lines += [f"  {'':<12} {'A':>8} {'B':>8} {'B - A':>8} {'p':>8}  95 % interval", *map(str, self.differences)]
        lines += [f"  {'words':<12} {self.words_a:>8.1f} {self.words_b:>8.1f} {self.words_b - self.words_a:>+8.1f}"]
        for title, shown in (("B is better by most", self.wins), ("B is worse by most", self.losses)):
            lines += ["", f"{title} ({self.by}):"] if shown else []
            for example in shown:
                lines.append(f"  {_cut(example['prompt'])}")
                for name in ("target", "a", "b"):
                    value = "" if name == "target" else f" ({example[f'{name}_value']:.1f})"
                    lines.append(f"    {name:<6}{value:<8} {_cut(example[name])}")
        return "\n".join([*lines, "", self.quote])


def compare(config: CompareConfig) -> Comparison:
    """Compare the outputs of two models.

    bleu, chrf and ter are tested by sacrebleu's own paired bootstrap. For the others, examples are drawn with
    replacement, both models on the same ones; p is the share of resamples whose difference is as far from the mean of
    all as the one found is from 0. The return is among these where both files were made with the same --teacher.

    Raises DataError for files that are no outputs of `evaluate`, or not of the same data with references.
    """
    ours, theirs = (read_outputs(path) for path in (config.a, config.b))
    if [(row["id"], targets_of(row)) for row in ours] != [(row["id"], targets_of(row)) for row in theirs]:
        what = "are not outputs for the same prompts and targets in the same order"
        raise DataError(f"{config.a} and {config.b}: {what}; make them with the same --data")
    targets = [targets_of(row) for row in ours]
    if [] in targets:
        raise DataError(f"{config.a}: example {targets.index([]) + 1} has no target to compare with")
    a, b = ([row["output"] for row in rows] for rows in (ours, theirs))
    metrics = of_texts(config.metrics)
    if NOT_OF_TEXTS.intersection(config.metrics):
        raise ConfigError(["leave loss and return out of --metrics: a return that both files hold comes by itself"])
    check_metrics(metrics, targets)
    rouge = rouge_tokenizer(config.rouge_tokenizer, metrics, targets)
    if len(targets) < FEWEST:
        raise DataError(f"{config.a}: {len(targets)} examples tell nothing; compare at least {FEWEST}")
    if not (seed := os.environ.get("SACREBLEU_SEED", SEED)).isdecimal():
        raise ConfigError([f"SACREBLEU_SEED must be a whole number, not {seed!r}"])
    rng = np.random.default_rng(int(seed))
    draws = rng.integers(0, len(targets), (config.resamples, len(targets)))
    differences = [_difference(name, a, b, targets, draws, rouge) for name in metrics]
    differences += _of_returns(config, ours, theirs, draws)
    by, values = values_of_each(metrics, (a, b), targets, rouge)
    gain = np.subtract(*values[::-1])
    order = np.argsort(gain, kind="stable")

    def shown(places: NDArray) -> tuple[dict[str, Any], ...]:
        texts = [{"prompt": ours[i]["prompt"], "target": targets[i][0], "a": a[i], "b": b[i]} for i in places]
        numbers = [{"a_value": float(values[0][i]), "b_value": float(values[1][i])} for i in places]
        return tuple(text | of_both for text, of_both in zip(texts, numbers, strict=True))

    n, words = config.examples, [float(np.mean([len(text.split()) for text in texts])) for texts in (a, b)]
    return Comparison(
        a=str(config.a),
        b=str(config.b),
        examples=len(targets),
        resamples=config.resamples,
        differences=tuple(differences),
        words_a=words[0],
        words_b=words[1],
        by=by,
        wins=shown(order[::-1][:n][gain[order[::-1][:n]] > 0]),
        losses=shown(order[:n][gain[order[:n]] < 0]),
    )


def _difference(
    name: str, a: list[str], b: list[str], targets: Targets, draws: NDArray, rouge: RougeTokenizer
) -> Difference:
    """draws: [resamples, examples] int."""
    values = [compute([name], outputs, targets, rouge) for outputs in (a, b)]
    before, after = (float(of_one[name]) for of_one in values)
    if name in SACREBLEU:
        # the first system is the baseline, which has no p of its own
        signatures, scores = PairedTest(
            [("a", a), ("b", b)], {name: sacrebleu_metric(name)}, streams(targets), "bs", len(draws)
        )()
        ((key, signature),) = signatures.items()
        # of equal outputs it says p = 1/(resamples + 1)
        return Difference(name, before, after, 1.0 if a == b else float(scores[key][1].p_value), str(signature))
    ours, theirs = (of_each(name, outputs, targets, rouge) for outputs in (a, b))
    if ours is not None and theirs is not None:
        resampled = np.subtract(theirs, ours)[draws].mean(axis=1)
    else:  # a function of the user's, of the whole
        resampled = np.array([_own_difference(name, a, b, targets, draw) for draw in draws])
    variant = next((text for text in values[0].values() if isinstance(text, str)), "")
    return _tested(name, before, after, resampled, variant)


def _tested(name: str, before: float, after: float, resampled: NDArray, variant: str) -> Difference:
    """resampled: [resamples] float, the difference in each."""
    far = np.abs(resampled - resampled.mean()) >= abs(after - before)
    low, high = np.quantile(resampled, [ALPHA / 2, 1 - ALPHA / 2])
    p = float((far.sum() + 1) / (len(resampled) + 1))
    return Difference(name, before, after, p, variant, float(low), float(high))


def _of_returns(
    config: CompareConfig, ours: list[dict[str, Any]], theirs: list[dict[str, Any]], draws: NDArray
) -> list[Difference]:
    """The return, in nats, where `evaluate --teacher` has put it into both files."""
    of = [str(row["return_of"]) for row in (*ours, *theirs) if isinstance(row.get("return"), float)]
    if len(of) < len(ours) + len(theirs):
        return []
    if len(set(of)) > 1:
        warn(f"{config.a} and {config.b} hold returns of different teachers, which can't be compared")
        return []
    a, b = (np.array([row["return"] for row in rows]) for rows in (ours, theirs))
    return [_tested("return", a.mean(), b.mean(), (b - a)[draws].mean(axis=1), of[0])]


def _own_difference(name: str, a: list[str], b: list[str], targets: Targets, draw: NDArray) -> float:
    picked = [targets[i] for i in draw]
    before, after = (compute([name], [texts[i] for i in draw], picked)[name] for texts in (a, b))
    return float(after) - float(before)


def values_of_each(
    metrics: Sequence[str], systems: Sequence[list[str]], targets: Targets, rouge: RougeTokenizer
) -> tuple[str, list[NDArray]]:
    """For choosing examples: the first metric that is a mean over examples, else chrF of each sentence; its name, and
    the value of each example of each system."""
    by = next((name for name in metrics if of_each(name, systems[0][:1], targets[:1])), "chrf")
    if by != "chrf":
        return by, [np.array(of_each(by, outputs, targets, rouge)) for outputs in systems]
    chrf = sacrebleu_metric("chrf")
    pairs = [zip(outputs, map(references, targets), strict=True) for outputs in systems]
    return by, [np.array([chrf.sentence_score(o, several).score for o, several in pair]) for pair in pairs]


def _cut(text: str) -> str:
    text = printable(" ".join(text.split()))
    return text if len(text) <= WIDEST else text[: WIDEST - 1] + "…"


KEYS: dict[str, Any] = {"id": str, "prompt": str, "output": str, "target": str | None}


def read_outputs(path: Path) -> list[dict[str, Any]]:
    """The rows that `evaluate --outputs` wrote. Raises DataError."""
    if path.is_dir():
        raise DataError(f"{path}: is a folder; of a run, compare its outputs-best.jsonl, or what `evaluate` writes")
    try:
        rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: can't be read ({one_line(error)})") from None
    if not rows or not all(map(_is_output, rows)):
        raise DataError(f"{path}: holds no outputs; make them with `ketchup-cache evaluate --outputs {path}`")
    return rows


def targets_of(row: dict[str, Any]) -> list[str]:
    """All references of such a row."""
    return list(row.get("targets", [] if row["target"] is None else [row["target"]]))


def is_outputs(path: Path) -> bool:
    """Whether the first line of a file is one that `read_outputs` takes."""
    try:
        with path.open("rb") as file:
            return _is_output(json.loads(file.readline()))
    except (OSError, ValueError, RecursionError):
        return False


def _is_output(row: Any) -> bool:
    if not isinstance(row, dict) or not all(key in row and isinstance(row[key], kind) for key, kind in KEYS.items()):
        return False
    return isinstance(several := row.get("targets", []), list) and all(isinstance(text, str) for text in several)
