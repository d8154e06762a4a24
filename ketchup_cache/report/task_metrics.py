"""Task metrics: outputs against references, all in percent, so that numbers stand beside the paper's tables.

Every library score comes with a text that says which variant it is, to be reported next to the number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from ketchup_cache.config.commands import Metric
from ketchup_cache.errors import DataError

Values = dict[str, float | str]

GSM8K_ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")
"""The final answer in a GSM8K solution, as the data set's authors define it (Cobbe et al., 2021)."""


def compute(metrics: Sequence[Metric], outputs: Sequence[str], targets: Sequence[str]) -> Values:
    """Scores of all outputs, one reference each. Empty outputs are wrong answers, not errors.

    Returns, for the metrics asked for and in their order:
        rouge → rouge1, rouge2, rougeL: F1, mean over examples, and rouge_variant. Letters and digits of ASCII only.
        bleu, chrf, ter: of the whole corpus by sacrebleu (Post, 2018), each with NAME_signature. Lower TER is better.
        exact: share of the outputs that equal their target, outer white space aside.
        gsm8k: share whose final answer (`GSM8K_ANSWER`, commas removed) is the target's, compared as text.

    Raises:
        DataError: see `check_targets`.
        ValueError: no outputs, or not as many as targets.
    """
    if not outputs or len(outputs) != len(targets):
        raise ValueError(f"{len(outputs)} outputs for {len(targets)} targets")
    check_targets(metrics, targets)
    values: Values = {}
    for metric in metrics:
        values |= _METRICS[metric](outputs, targets)
    return values


def check_targets(metrics: Sequence[Metric], targets: Sequence[str]) -> None:
    """Raise DataError where a metric can't use a target: worth knowing before anything is decoded."""
    for row, target in enumerate(targets if "gsm8k" in metrics else (), start=1):
        if final_answer(target) is None:
            raise DataError(
                f"target of example {row} has no final answer `#### NUMBER`, which metric gsm8k needs: "
                "check --target-field, or leave gsm8k out of --metrics"
            )


def final_answer(solution: str) -> str | None:
    """`… #### 1,234` → `1234`; None where there is no such answer."""
    match = GSM8K_ANSWER.search(solution)
    return match.group(1).replace(",", "") if match else None


def _rouge(outputs: Sequence[str], targets: Sequence[str]) -> Values:
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(kinds, use_stemmer=True)
    scores = [scorer.score(target, output) for output, target in zip(outputs, targets, strict=True)]
    values: Values = {kind: 100 * sum(s[kind].fmeasure for s in scores) / len(scores) for kind in kinds}
    return values | {"rouge_variant": "rouge-score, F1, Porter stemmer, rougeL over the whole text"}


def _sacrebleu(name: str) -> Callable[[Sequence[str], Sequence[str]], Values]:
    def score(outputs: Sequence[str], targets: Sequence[str]) -> Values:
        from sacrebleu.metrics import BLEU, CHRF, TER

        metric = {"bleu": BLEU, "chrf": CHRF, "ter": TER}[name]()
        value = metric.corpus_score(list(outputs), [list(targets)]).score
        return {name: value, f"{name}_signature": str(metric.get_signature())}

    return score


def _share(name: str, answer: Callable[[str], str | None]) -> Callable[[Sequence[str], Sequence[str]], Values]:
    def score(outputs: Sequence[str], targets: Sequence[str]) -> Values:
        hits = [answer(output) == answer(target) for output, target in zip(outputs, targets, strict=True)]
        return {name: 100 * sum(hits) / len(hits)}

    return score


_METRICS: dict[Metric, Callable[[Sequence[str], Sequence[str]], Values]] = {
    "rouge": _rouge,
    **{name: _sacrebleu(name) for name in ("bleu", "chrf", "ter")},
    "exact": _share("exact", str.strip),
    "gsm8k": _share("gsm8k", final_answer),
}
