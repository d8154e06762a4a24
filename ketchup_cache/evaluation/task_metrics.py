"""Task metrics: outputs against references, all in percent, so that numbers stand beside the paper's tables.

Every library score comes with a text that says which variant it is, to be reported next to the number.
"""

from __future__ import annotations

import importlib
import math
import re
import sys
import unicodedata
from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from types import SimpleNamespace
from typing import Any

from numpy.typing import NDArray

from ketchup_cache.config.values import RougeTokenizer
from ketchup_cache.console import one_line, say
from ketchup_cache.errors import ConfigError, DataError

Texts = Sequence[str]
Targets = Sequence[str | Texts]
"""Of each output one reference, or several."""
Values = dict[str, float | str]
ROUGE = ("rouge1", "rouge2", "rougeL")
COUNTED: dict[RougeTokenizer, str] = {
    "ascii": "Porter stemmer, letters and digits of ASCII only",
    "unicode": "runs of letters and digits of any script, no stemmer",
    "characters": "single letters and digits of any script, no stemmer",
}
"""What each tokenizer of ROUGE counts, in the words of its variant."""
MOST_LOST = 0.05
"""Share of the references' letters that a tokenizer of ROUGE may lose."""
SACREBLEU = ("bleu", "chrf", "ter")
NOT_OF_TEXTS = {"loss", "return"}
"""Metrics that need a model: the references' cross-entropy, and the outputs' return under a teacher."""

GSM8K_ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")
"""The final answer in a GSM8K solution, as the data set's authors define it (Cobbe et al., 2021)."""


def compute(metrics: Texts, outputs: Texts, targets: Targets, rouge: RougeTokenizer = "ascii") -> Values:
    """Scores of all outputs. Empty outputs are wrong answers, not errors.

    Returns, for the metrics asked for and in their order (`loss` and `return` are not of texts, and are passed over):
        rouge1, rouge2, rougeL, or rouge for all three: F1, mean over examples, by the tokenizer `rouge`, and
            rouge_variant, which names it. Of several references that with the highest F1 counts (Lin, 2004).
        bleu, chrf, ter: of the whole corpus by sacrebleu (Post, 2018), each with NAME_signature. Lower TER is better.
            Of several references, whose number may vary: as sacrebleu takes them.
        exact: share of the outputs that equal a target, outer white space aside.
        accuracy, gsm8k: share whose final answer (`GSM8K_ANSWER`, commas removed) is a target's, compared as text.
        package.module:function: what it returns for the lists of outputs and targets; where an example has several,
            the targets are lists of texts.

    Raises:
        ConfigError, DataError: see `check_metrics`; DataError also where a function of the user's fails.
        ValueError: no outputs, or not as many as targets.
    """
    if not outputs or len(outputs) != len(targets):
        raise ValueError(f"{len(outputs)} outputs for {len(targets)} targets")
    check_metrics(metrics, targets)
    values: Values = {}
    for metric in of_texts(metrics):
        values |= _values(metric, outputs, targets, rouge)
    return values


def of_texts(metrics: Sequence[str]) -> list[str]:
    """The metrics that are of texts, with rouge as the three that it stands for."""
    return [one for name in metrics for one in (ROUGE if name == "rouge" else [name]) if one not in NOT_OF_TEXTS]


def check_metrics(metrics: Sequence[str], targets: Targets) -> None:
    """Raise DataError where a metric can't use a target, ConfigError where a function of the user's can't be imported:
    worth knowing before anything is decoded."""
    for name in of_texts(metrics):
        if ":" in name:
            _own(name)
    for row, target in enumerate(targets if {"gsm8k", "accuracy"} & set(metrics) else (), start=1):
        if None in map(final_answer, references(target)):
            raise DataError(
                f"target of example {row} has no final answer `#### NUMBER`, which metric accuracy (gsm8k) needs: "
                "check --target-field, or choose another metric"
            )


def final_answer(solution: str) -> str | None:
    """`… #### 1,234` → `1234`; None where there is no such answer."""
    match = GSM8K_ANSWER.search(solution)
    return match.group(1).replace(",", "") if match else None


def references(target: str | Texts) -> list[str]:
    """All of one output."""
    return [target] if isinstance(target, str) else list(target)


def rouge_tokenizer(asked: RougeTokenizer | None, metrics: Sequence[str], targets: Targets) -> RougeTokenizer:
    """The one that was asked for; without any, `ascii` where it fits the references, else `unicode`, which is said.

    Raises DataError where the one asked for loses more than `MOST_LOST` of their letters.
    """
    texts = (text.lower() for target in targets for text in references(target))
    letters = "".join(letter for text in texts for letter in text if letter.isalnum())
    lost = sum(not letter.isascii() for letter in letters) / max(len(letters), 1)
    if not {"rouge", *ROUGE}.intersection(metrics) or lost <= MOST_LOST or asked not in (None, "ascii"):
        return asked or "ascii"
    what = f"loses {lost:.0%} of the letters of the references"
    if asked:
        raise DataError(f"--rouge-tokenizer ascii {what}: choose unicode or characters")
    say(f"the English tokenizer of ROUGE {what}: --rouge-tokenizer unicode is taken")
    return "unicode"


def _of_any_script(rouge: RougeTokenizer, text: str) -> list[str]:
    """Marks (of Hindi, Thai) belong to their letters."""
    kept = "".join(letter if unicodedata.category(letter)[0] in "LMN" else " " for letter in text.lower())
    return kept.split() if rouge == "unicode" else list(kept.replace(" ", ""))


ANSWERS: dict[str, Callable[[str], str | None]] = {
    "exact": str.strip,
    "accuracy": final_answer,
    "gsm8k": final_answer,
}
"""Metrics that are a share of right answers → the answer in a text."""


def of_each(metric: str, outputs: Texts, targets: Targets, rouge: RougeTokenizer = "ascii") -> list[float] | None:
    """The metric of every single output, in percent, where the whole is their mean; None for other metrics."""
    pairs = list(zip(outputs, map(references, targets), strict=True))
    if metric in ROUGE:
        from rouge_score.rouge_scorer import RougeScorer

        own: Any = None if rouge == "ascii" else SimpleNamespace(tokenize=partial(_of_any_script, rouge))
        best = RougeScorer([metric], use_stemmer=True, tokenizer=own).score_multi
        return [100 * best(several, output)[metric].fmeasure for output, several in pairs]
    if metric in ANSWERS:
        answer = ANSWERS[metric]
        return [100.0 * (answer(output) in map(answer, several)) for output, several in pairs]
    return None


def sacrebleu_metric(name: str) -> Any:
    """bleu, chrf or ter with sacrebleu's defaults."""
    from sacrebleu.metrics import BLEU, CHRF, TER

    return {"bleu": BLEU, "chrf": CHRF, "ter": TER}[name]()


def streams(targets: Targets) -> list[list[str | None]]:
    """As sacrebleu takes them: the first references of all, the second ones, …; None where an output has fewer."""
    return [list(stream) for stream in zip_longest(*map(references, targets))]


def _values(name: str, outputs: Sequence[str], targets: Targets, rouge: RougeTokenizer) -> Values:
    if name in SACREBLEU:
        metric = sacrebleu_metric(name)
        score = metric.corpus_score(list(outputs), streams(targets)).score
        return {name: score, f"{name}_signature": str(metric.get_signature())}
    if (each := of_each(name, outputs, targets, rouge)) is not None:
        variant = f"rouge-score, F1, {COUNTED[rouge]}, rougeL over the whole text"
        return {name: sum(each) / len(each)} | ({"rouge_variant": variant} if name in ROUGE else {})
    several = [references(target) for target in targets]
    return {name: _own(name)(outputs, [one for one, *more in several] if max(map(len, several)) == 1 else several)}


def import_function(name: str, what: str) -> Callable[..., Any]:
    """A function of the user's, `package.module:function`. The folder that the program runs in is searched too."""
    module, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever its module does when it is imported
        raise ConfigError([f"{what} {name}: can't be imported ({one_line(error)})"]) from error


def _own(name: str) -> Callable[[Texts, Targets], float]:
    function = import_function(name, "metric")

    def score(outputs: Texts, targets: Targets) -> float:
        try:
            value = float(function(list(outputs), list(targets)))
        except Exception as error:
            raise DataError(f"metric {name}: {one_line(error)}") from error
        if not math.isfinite(value):
            raise DataError(f"metric {name}: gives {value}")
        return value

    return score


def spread(values: NDArray) -> tuple[float | None, float | None, float | None]:
    """[n] → mean, standard deviation (unbiased, n − 1), standard error of the mean. None for too few values."""
    sd = float(values.std(ddof=1)) if len(values) > 1 else None
    return float(values.mean()) if len(values) else None, sd, None if sd is None else sd / math.sqrt(len(values))
