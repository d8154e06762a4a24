"""Invented word problems with solutions in the notation of GSM8K: `<<12*8=96>>96 <<96-15=81>>81 #### 81`.

A problem is a start, one to three events and a question. What has to be learnt word by word: a dozen verbs that add and
a dozen that take away, words that stand for a number (a brace, a dozen), containers, and sentences that change nothing.
"""

from __future__ import annotations

import random
import re
from fractions import Fraction

NAMES = "ann ben cara dan eve finn gina hugo ida jon kim leo mia ned ola pam rex sue tom una".split()
THINGS = (
    "nuts pens cards coins eggs shells beads plums figs pears "
    "stamps nails tiles cups balls rings seeds cakes leaves keys"
).split()
CONTAINERS = "bags boxes jars crates packs trays baskets sacks".split()
GAINS = "finds buys gets wins earns picks makes collects borrows receives gathers bakes".split()
LOSSES = "loses eats sells drops breaks lends donates wastes burns returns mails trades".split()
NUMBERS = {
    "pair": 2,
    "trio": 3,
    "brace": 4,
    "hand": 5,
    "nest": 6,
    "week": 7,
    "ring": 9,
    "dozen": 12,
    "stack": 15,
    "score": 20,
}
TIMES = {"doubles": "*2", "triples": "*3", "halves": "/2", "thirds": "/3"}
ASIDES = ("{other} has {n} {thing}.", "it is {n} degrees.", "{name} is {n} years old.", "the bus takes {n} minutes.")
SIGNS = "+-*/"
PIECES = r" ?[a-z]+| ?\d| ?<<|>>| ?####|."
"""What the tokenizer takes as one token."""

Step = tuple[str, str, str]
"""Left operand, sign, right operand; `_` stands for the result of the step before, `__` for the one before that."""


class Problem:
    """Text of a problem, the steps that solve it, and the numbers in it (for plausible mistakes)."""

    def __init__(self, rng: random.Random) -> None:
        self.sentences: list[str] = []
        self.steps: list[Step] = []
        self.numbers: list[str] = []
        self._rng = rng
        self._name, self._other = rng.sample(NAMES, 2)
        self._thing, self._other_thing = rng.sample(THINGS, 2)
        self._start()
        for _ in range(rng.choice((1, 1, 2, 2, 2))):
            self._event()
        self.sentences.append(f"how many {self._thing}?")

    def _number(self, low: int, high: int) -> str:
        self.numbers.append(str(self._rng.randint(low, high)))
        return self.numbers[-1]

    def _start(self) -> None:
        if self._rng.random() < 0.5:
            self._now = self._number(10, 99)
            self.sentences.append(f"{self._name} has {self._now} {self._thing}.")
        else:
            many, each = self._number(2, 12), self._number(2, 9)
            container = self._rng.choice(CONTAINERS)
            self.sentences.append(f"{self._name} has {many} {container} of {each} {self._thing}.")
            self._step(many, "*", each)

    def _step(self, left: str, sign: str, right: str) -> None:
        self.steps.append((left, sign, right))
        self._now = "_"

    def _event(self) -> None:
        rng, gain = self._rng, self._rng.random() < 0.5
        verb, sign = (rng.choice(GAINS), "+") if gain else (rng.choice(LOSSES), "-")
        kind = rng.choices(("plain", "word", "times", "group", "aside"), (5, 4, 2, 2, 2))[0]
        if kind == "plain":
            n = self._number(2, 30)
            self.sentences.append(f"{self._pronoun()} {verb} {n}.")
            self._step(self._now, sign, n)
        elif kind == "word":
            word = rng.choice(list(NUMBERS))
            self.sentences.append(f"{self._pronoun()} {verb} a {word}.")
            self._step(self._now, sign, str(NUMBERS[word]))
        elif kind == "times":
            word = rng.choice(list(TIMES))
            self.sentences.append(f"{self._pronoun()} {word} them.")
            self._step(self._now, TIMES[word][0], TIMES[word][1])
        elif kind == "group":
            many, each = self._number(2, 9), self._number(2, 9)
            self.sentences.append(f"{self._pronoun()} {verb} {many} {rng.choice(CONTAINERS)} of {each}.")
            before = "__" if self._now == "_" else self._now
            self._step(many, "*", each)
            self._step(before, sign, "_")
        else:
            text = rng.choice(ASIDES).format(
                n=self._number(2, 30), name=self._name, other=self._other, thing=self._other_thing
            )
            self.sentences.append(text)

    def _pronoun(self) -> str:
        return self._rng.choice((self._name, "then", "later"))

    @property
    def prompt(self) -> str:
        return " ".join(self.sentences)

    def mistaken(self, rng: random.Random) -> list[Step]:
        """The steps with one of them wrong: another sign, another number of the text, or left out."""
        steps, at, kind = list(self.steps), rng.randrange(len(self.steps)), rng.random()
        left, sign, right = steps[at]
        if kind < 0.4:
            steps[at] = left, rng.choice(SIGNS.replace(sign, "")), right
        elif kind < 0.9 or len(steps) == 1:
            other = rng.choice([*self.numbers, *map(str, NUMBERS.values())])
            steps[at] = (left, sign, other) if right[0] != "_" else (other, sign, right)
        else:
            del steps[at]
        return steps


def solution(steps: list[Step]) -> str | None:
    """The steps written out, the last result as the answer; None where a result is not a whole number from 1 to 999."""
    results: list[str] = []
    text = []
    for left, sign, right in steps:
        if max(left.count("_"), right.count("_")) > len(results):
            return None
        left, right = (results[-len(part)] if part[0] == "_" else part for part in (left, right))
        a, b = Fraction(left), Fraction(right)
        value = a + b if sign == "+" else a - b if sign == "-" else a * b if sign == "*" else a / b
        if value.denominator != 1 or not 1 <= value <= 999:
            return None
        results.append(str(value))
        text.append(f"<<{left}{sign}{right}={value}>>{value}")
    return " ".join(text) + f" #### {results[-1]}" if results else None


def problem(rng: random.Random, longest: int = 3) -> tuple[Problem, str]:
    """A solvable problem of at most so many steps, and its solution of at most 40 tokens with EOS."""
    while True:
        drawn = Problem(rng)
        text = solution(drawn.steps) if 1 <= len(drawn.steps) <= longest else None
        if text is not None and len(re.findall(PIECES, text)) < 40:
            return drawn, text


def words() -> list[str]:
    """Every piece of text that the tokenizer knows, in a fixed order."""
    aside = "has is it degrees years old the bus takes minutes".split()
    lists = [NAMES, THINGS, CONTAINERS, GAINS, LOSSES, list(NUMBERS), list(TIMES), aside]
    plain = [w for group in lists for w in group] + "of a how many them then later".split()
    starts = [*NAMES, "it", "the", "then", "later", "how"]
    digits = list("0123456789")
    signs = [*SIGNS, "=", ">>", "<<", " <<", " ####", ".", "?"]
    return list(dict.fromkeys([*digits, *(f" {d}" for d in digits), *signs, *(f" {word}" for word in plain), *starts]))
