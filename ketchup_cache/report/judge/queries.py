"""What the judge is asked, four times for each pair and aspect, and what its answer means. Pure functions."""

from __future__ import annotations

import re
from dataclasses import dataclass

WHAT = {
    "summary": "summary of the document",
    "translation": "translation of the source",
    "answer": "answer to the task",
}
"""Kind of output → what it is called in the question."""

CRITERIA = {
    "summary": {
        "quality": "whether it is short and exact, and states what matters most in the document and nothing else",
        "informativeness": "whether it holds the important details of the document and leaves out the unimportant",
        "coherence": "whether it is well ordered and easy to follow",
    },
    "translation": {
        "quality": "whether it says what the source says, completely and in natural language",
        "informativeness": "whether it keeps all that the source says and adds nothing",
        "coherence": "whether it is fluent, well ordered and easy to understand",
    },
    "answer": {
        "quality": "whether it does what the task asks for, correctly and to the point",
        "informativeness": "whether it holds everything the task needs and nothing else",
        "coherence": "whether it is well ordered and easy to follow",
    },
}
"""Kind of output → aspect → what to look at."""


@dataclass(frozen=True)
class Query:
    """One question. The four of a pair and aspect have all combinations of the two switches.

    system_first: the system's output stands before the baseline's. system_is_a: it is called A.
    """

    pair: int
    aspect: str
    system_first: bool
    system_is_a: bool
    text: str


def queries(pair: int, aspect: str, kind: str, prompt: str, system: str, baseline: str) -> list[Query]:
    """Both orders × both names, so that a taste for a place or a letter cancels out."""
    made = []
    for system_first in (True, False):
        for system_is_a in (True, False):
            named = [("A" if system_is_a else "B", system), ("B" if system_is_a else "A", baseline)]
            shown = named if system_first else named[::-1]
            outputs = "\n\n".join(f"[{name}]\n{text}" for name, text in shown)
            text = (
                f"Compare two candidates, each a {WHAT[kind]}, by their {aspect} alone: {CRITERIA[kind][aspect]}.\n\n"
                f"[Given]\n{prompt}\n\n{outputs}\n\n"
                "Write one sentence that compares the two and says which is better and why. "
                "Then write a last line of this form, with A or B for the better one:\nPreferred: <A or B>"
            )
            made.append(Query(pair, aspect, system_first, system_is_a, text))
    return made


_PREFERRED = re.compile(r"preferred\W*(.*)", re.IGNORECASE)
_TIE = re.compile(r"\b(tie|neither|both|equal|equally)\b", re.IGNORECASE)


def verdict(query: Query, answer: str) -> float | None:
    """1: the system is better, 0: the baseline is, 0.5: a tie, None: can't be told."""
    found = _PREFERRED.findall(answer)
    choice = found[-1] if found else answer.strip()
    if not found and len(choice.strip(" .*[]()\"'")) != 1:
        return None
    letters = set(re.findall(r"\b[AB]\b", choice))
    if _TIE.search(choice) or len(letters) != 1:
        return 0.5 if _TIE.search(choice) else None
    return float(("A" in letters) == query.system_is_a)
