"""The calculator of GSM8K's solutions: after `<<48/2=` the next tokens are those of `24>>`, not the model's choice.

It looks at generated tokens only, one row at a time and one token at a time, so it serves encoder-decoder and
decoder-only models alike, and what it costs does not grow with the length of the text.

Expressions come out of a language model, so anything can stand there: Python parses them and evaluates nothing, all
sizes are bounded, and what is not an expression gives None, never an error. There are no powers and inputs are short,
so no intermediate result is long.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from ketchup_cache.errors import ModelError

OPEN, CLOSE = "<<", ">>"
LONGEST = 100
"""Characters of an expression. The longest in GSM8K has 30."""
DEEPEST = 16
"""Parentheses and signs of numbers inside one another. GSM8K needs 2."""
LONGEST_RESULT = 24
"""Characters of a result; a longer one is refused."""
DECIMALS = 6
"""A result with more of them, or with no end, is rounded to so many, half to even. GSM8K needs 3."""

NUMBER = re.compile(r"\$?((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)(%?)")
"""With $ before it or % after it. `[0-9]`, because `\\d` matches digits of every script."""
OPERATIONS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.UAdd: operator.pos, ast.USub: operator.neg, ast.Invert: operator.pos,
}  # fmt: skip
"""`~`, which no expression holds, stands before each parenthesis, so that parentheses are nodes of the tree too."""


def calculate(expression: str) -> str | None:
    """`48/2` → `24`, `7/2` → `3.5`, `10/3` → `3.333333`, `1,000*20%` → `200`.

    Numbers are decimal, with or without commas between thousands, $ before or % (a hundredth) after them; + - * /,
    parentheses and a sign before a factor as in school. No zeros at the end of the result, and none of the spellings
    that GSM8K uses for money (`16.00`): those do not follow from the expression.

    None for everything else: not an expression, division by zero, too long, too deep, a result that is too long, or
    so near zero that nothing would be left of it.
    """
    if len(expression) > LONGEST or not re.fullmatch(r"[-+*/().,$%0-9 ]*", expression):
        return None
    numbers: list[Fraction] = []

    def name(number: re.Match[str]) -> str:
        numbers.append(Fraction(number[1].replace(",", "")) / (100 if number[2] else 1))
        return f" n{len(numbers) - 1} "

    text = NUMBER.sub(name, expression).replace("(", "~(").strip()
    try:
        value = _value(ast.parse(text, mode="eval").body, numbers)
    except (SyntaxError, KeyError, ZeroDivisionError):
        return None
    scaled = round(value * 10**DECIMALS)
    whole, part = divmod(abs(scaled), 10**DECIMALS)
    result = "-" * (scaled < 0) + f"{whole}.{part:0{DECIMALS}d}".rstrip("0").rstrip(".")
    return None if len(result) > LONGEST_RESULT or (value and result == "0") else result


def _value(node: ast.expr, numbers: list[Fraction], depth: int = 0) -> Fraction:
    """Raises KeyError for whatever is no number, operation, sign or parenthesis, and for one that is too deep."""
    match node:
        case ast.Name(id=name):
            return numbers[int(name[1:])]
        case ast.UnaryOp(op, operand) if depth < DEEPEST:
            return OPERATIONS[type(op)](_value(operand, numbers, depth + 1))
        case ast.BinOp(left, op, right):
            return OPERATIONS[type(op)](_value(left, numbers, depth), _value(right, numbers, depth))
    raise KeyError(node)


class Calculator:
    """How one tokenizer writes annotations. Holds what it has worked out, so keep it for a whole run.

    T5 and FLAN-T5 have no `<`: in a fine-tuning text `<<` becomes their unknown token, so that is what a model of
    theirs has learnt to open an annotation with. Here it counts as `<<` where the tokenizer turns `<<` into nothing
    but that token. It stands for other characters too, but only before an expression and `=` does it start anything.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        """name: of the model, for messages. Raises ModelError where the tokenizer can't write annotations."""
        self._tokenizer = tokenizer
        # not all_special_ids: somebody may have given T5 a `<<` as an additional special token
        ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
        self._silent = {token for token in ids if token is not None}
        self._pieces: dict[int, str] = {}
        self._results: dict[str, list[int]] = {}
        # SentencePiece may put a piece that is only a space before it
        opening = [token for token in self._encode(OPEN) if self.piece(token).strip() or token in self._silent]
        if set(opening) == {tokenizer.unk_token_id} and len(opening) <= len(OPEN):
            self._pieces[opening[0]] = OPEN[len(opening) - 1 :]
        missing = [sign for sign in (OPEN, "=", *"0123456789.-+*/") if self._text(self._encode(sign)).strip() != sign]
        if missing or not self.result_tokens("-12345.67890"):
            what = f"its tokenizer can't write {' '.join(missing) or f'a number and {CLOSE}'}, which --calculator needs"
            raise ModelError(f"{name}: {what}: leave --calculator out, or choose a model whose tokenizer knows them")

    def piece(self, token: int) -> str:
        """The text that a token adds in the middle of a text; empty for special tokens."""
        if token not in self._pieces:
            once, twice = (self._tokenizer.decode([token] * n, clean_up_tokenization_spaces=False) for n in (1, 2))
            self._pieces[token] = "" if token in self._silent else twice[len(once) :]
        return self._pieces[token]

    def result_tokens(self, result: str) -> list[int]:
        """Tokens of `24>>` as the tokenizer writes it behind a `=`; empty where it can't."""
        if result not in self._results:
            # in context first: on its own, SentencePiece starts a text with a space
            text, before, whole = result + CLOSE, self._encode("1="), self._encode(f"1={result}{CLOSE}")
            # a token of `=2` and the like: then sign by sign
            signs = [token for token in self._tokenizer.convert_tokens_to_ids(list(text)) if token is not None]
            ways = [whole[len(before) :] if whole[: len(before)] == before else [], signs]
            self._results[result] = next((tokens for tokens in ways if self._text(tokens) == text), [])
        return self._results[result]

    def _text(self, tokens: list[int]) -> str:
        return "".join(map(self.piece, tokens))

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


class ForcedResults(LogitsProcessor):
    """Takes every choice but one away where a row has a result to write: that token's log-probability is then 0.

    For one batch. State per row: the text since its last `<<`, and the tokens that it has yet to write. Rows go by
    their place in the first call; later ones may have fewer of them (`keep`).
    """

    def __init__(self, calculator: Calculator) -> None:
        self._calculator = calculator
        self._open: list[str] = []
        self._queues: dict[int, list[int]] = {}
        self._steps: list[NDArray[np.bool_]] = []
        self._rows: list[int] = []

    def keep(self, places: list[int]) -> None:
        """From the next call on there are these rows of the last one only, in this order."""
        self._rows = [self._rows[place] for place in places]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._steps:  # the first call sees only what was there before: a prompt, or the decoder's start
            self._read(input_ids[:, -1].tolist())
        else:
            self._open, self._rows = [""] * len(input_ids), list(range(len(input_ids)))
        forced = np.zeros(len(self._open), np.bool_)
        if places := [place for place, row in enumerate(self._rows) if self._queues.get(row)]:
            rows = [self._rows[place] for place in places]
            forced[rows] = True
            where = torch.tensor(places, device=scores.device)
            scores[where] = -torch.inf
            scores[where, torch.tensor([self._queues[row].pop(0) for row in rows], device=scores.device)] = 0
        self._steps.append(forced)
        return scores

    def forced(self, length: int) -> NDArray[np.bool_]:
        """[B, length]: which of the generated tokens were not the policy's choice. Behind a row's end anything."""
        return np.stack(self._steps[:length], axis=1)

    def _read(self, tokens: list[int]) -> None:
        """The row's newest tokens; forced ones belong to no expression."""
        pieces, forced = self._calculator.piece, self._steps[-1]
        for row, token in zip(self._rows, tokens, strict=True):
            text = pieces(token)
            was = self._open[row]
            if forced[row] or not (was or "<" in text):
                continue
            now = was + text
            start = now.rfind(OPEN)
            if start < 0:
                self._open[row] = "<" if now.endswith("<") else ""
            elif ">" in now[start:] or len(now) - start > LONGEST + len(OPEN) + 1:
                self._open[row] = ""
            else:
                self._open[row] = now[start:]
                result = calculate(now[start + len(OPEN) : -1]) if now.endswith("=") else None
                if result is not None and (tokens := self._calculator.result_tokens(result)):
                    self._queues[row], self._open[row] = list(tokens), ""
