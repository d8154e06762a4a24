"""The calculator of GSM8K's solutions: what stands between `<<` and `=`, worked out exactly.

Expressions come out of a language model, so anything can stand there: nothing is ever evaluated by Python, all sizes
are bounded, and what is not an expression gives None, never an error. There are no powers and inputs are short, so no
intermediate result is long.
"""

from __future__ import annotations

import re
from fractions import Fraction

LONGEST = 100
"""Characters of an expression. The longest in GSM8K has 30."""
DEEPEST = 16
"""Parentheses and signs of numbers inside one another. GSM8K needs 2."""
LONGEST_RESULT = 24
"""Characters of a result; a longer one is refused."""
DECIMALS = 6
"""A result with more of them, or with no end, is rounded to so many, half to even. GSM8K needs 3."""

_LEXEME = re.compile(r" *(?:\$?((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)(%?)|([-+*/()]))")
"""A number, with $ before it or % after it, or a sign. `[0-9]`, because `\\d` matches digits of every script."""


class _NotAnExpression(Exception):
    pass


def calculate(expression: str) -> str | None:
    """`48/2` → `24`, `7/2` → `3.5`, `10/3` → `3.333333`, `1,000*20%` → `200`.

    Numbers are decimal, with or without commas between thousands, $ before or % (a hundredth) after them; + - * /,
    parentheses and a sign before a factor as in school. No zeros at the end of the result, and none of the spellings
    that GSM8K uses for money (`16.00`): those do not follow from the expression.

    None for everything else: not an expression, division by zero, too long, too deep, a result that is too long, or
    so near zero that nothing would be left of it.
    """
    if len(expression) > LONGEST:
        return None
    try:
        value = _Parser(_lexemes(expression)).parse()
    except (_NotAnExpression, ZeroDivisionError):
        return None
    if abs(value) >= 10**LONGEST_RESULT:
        return None
    text = _decimal(value)
    return None if len(text) > LONGEST_RESULT or (value and text == "0") else text


def _lexemes(expression: str) -> list[Fraction | str]:
    expression = expression.rstrip(" ")
    found: list[Fraction | str] = []
    at = 0
    while at < len(expression):
        match = _LEXEME.match(expression, at)
        if match is None:
            raise _NotAnExpression
        number, percent, sign = match.groups()
        found.append(sign or Fraction(number.replace(",", "")) / (100 if percent else 1))
        at = match.end()
    return found


class _Parser:
    """Recursive descent: sum → product {± product}, product → factor {×÷ factor}, factor → number, ±factor, (sum)."""

    def __init__(self, lexemes: list[Fraction | str]) -> None:
        self._lexemes = lexemes
        self._at = 0
        self._depth = 0

    def parse(self) -> Fraction:
        value = self._sum()
        if self._at < len(self._lexemes):
            raise _NotAnExpression
        return value

    def _next(self, signs: str) -> str | None:
        """The next lexeme, taken, if it is one of the signs."""
        if self._at < len(self._lexemes):
            lexeme = self._lexemes[self._at]
            if isinstance(lexeme, str) and lexeme in signs:
                self._at += 1
                return lexeme
        return None

    def _sum(self) -> Fraction:
        value = self._product()
        while sign := self._next("+-"):
            term = self._product()
            value = value + term if sign == "+" else value - term
        return value

    def _product(self) -> Fraction:
        value = self._factor()
        while sign := self._next("*/"):
            factor = self._factor()
            value = value * factor if sign == "*" else value / factor
        return value

    def _factor(self) -> Fraction:
        opened = self._next("+-(")
        if opened is None:
            lexeme = self._lexemes[self._at] if self._at < len(self._lexemes) else ""
            if isinstance(lexeme, str):
                raise _NotAnExpression
            self._at += 1
            return lexeme
        self._depth += 1
        if self._depth > DEEPEST:
            raise _NotAnExpression
        value = self._sum() if opened == "(" else self._factor()
        if opened == "(" and not self._next(")"):
            raise _NotAnExpression
        self._depth -= 1
        return -value if opened == "-" else value


def _decimal(value: Fraction) -> str:
    """The shortest decimal of at most `DECIMALS` decimals."""
    scaled = round(value * 10**DECIMALS)
    whole, part = divmod(abs(scaled), 10**DECIMALS)
    text = f"{whole}.{part:0{DECIMALS}d}".rstrip("0").rstrip(".")
    return f"-{text}" if scaled < 0 else text
