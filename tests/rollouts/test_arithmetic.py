"""The calculator against GSM8K's own annotations, against Python's integers, and against whatever a model may write."""

from __future__ import annotations

import json
import re
import timeit
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ketchup_cache.report.task_metrics import compute
from ketchup_cache.rollouts.calculator import DEEPEST, LONGEST, LONGEST_RESULT, calculate

GSM8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k"

FLOOR_DIVISION = {"560//10=56", "180//3=60"}
"""`//` is Python's, not arithmetic: its two uses, both in the training split, are not reproduced."""


def solutions(split: str) -> list[str]:
    path = GSM8K / f"{split}.jsonl"
    if not path.is_file():
        pytest.skip(f"no GSM8K at {GSM8K}")
    return [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.mark.parametrize(
    ("split", "count", "as_text", "exceptions"), [("test", 4282, 4126, set()), ("train", 23716, 23047, FLOOR_DIVISION)]
)
def test_every_annotation_of_gsm8k(split: str, count: int, as_text: int, exceptions: set[str]):
    """All to the last digit. The spelling differs where it does not follow from the expression: 16.00, .5, 07, 3/4."""
    annotations = [a for solution in solutions(split) for a in re.findall(r"<<(.*?)>>", solution)]
    assert len(annotations) == count
    pairs = {a: (calculate(a.split("=")[0]), a.split("=")[1]) for a in annotations}
    wrong = {a for a, (result, written) in pairs.items() if result is None or Fraction(result) != Fraction(written)}
    other = [a for a in annotations if a not in wrong and pairs[a][0] != pairs[a][1]]
    assert all(re.search(r"\.\d*0$|=-?\.|=-?0\d|\.$|=.*/", annotation) for annotation in other)
    assert wrong == exceptions
    assert count - len(other) - sum(a in wrong for a in annotations) == as_text


@pytest.mark.parametrize("split", ["test", "train"])
def test_solutions_of_gsm8k_score_100(split: str):
    texts = solutions(split)
    assert compute(["gsm8k"], texts, texts) == {"gsm8k": 100}
    assert compute(["gsm8k"], texts[1:] + texts[:1], texts)["gsm8k"] < 10  # answers are compared, not found


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("48/2", "24"), ("7/2", "3.5"), ("16-3-4", "9"), ("2+3*4", "14"), ("(2+3)*4", "20"), ("12/2/3", "2"),
        ("10-2*3+1", "5"), ("1/3", "0.333333"), ("2/3", "0.666667"), ("-2/3", "-0.666667"), ("1/8", "0.125"),
        ("-48+21+(-3)", "-30"), ("1.75-(-1.25)", "3"), ("3*+6", "18"), ("--5", "5"), ("-(2+3)", "-5"), ("-2*-3", "6"),
        (".5*4", "2"), ("5.*2", "10"), ("$5*3", "15"), ("80,000+50,000", "130000"), ("1,234,567-0", "1234567"),
        ("20%", "0.2"), ("1,000*20%", "200"), ("$1,000.50*50%", "500.25"), (" 4 + 5 ", "9"), ("0/7", "0"), ("-0", "0"),
        ("007", "7"), ("0.1+0.2", "0.3"), ("1-0.9", "0.1"), ("99999999*99999999", "9999999800000001"),
        ("1/1000000", "0.000001"), ("9" * LONGEST_RESULT, "9" * LONGEST_RESULT), (" " * (LONGEST - 1) + "1", "1"),
        ("1" + "+1" * ((LONGEST - 1) // 2), str((LONGEST + 1) // 2)), ("(" * DEEPEST + "1" + ")" * DEEPEST, "1"),
        ("+".join(["(-1)"] * 20), "-20"),  # depth is limited, not number
    ],
)  # fmt: skip
def test_arithmetic(expression: str, result: str):
    assert calculate(expression) == result


HOSTILE = [
    "9**9**9**9", "9^9", "1/0", "5/(2-2)", "0/0", "9" * 10_000, "9" * LONGEST, "1" + "0" * LONGEST_RESULT,
    "*".join(["9999"] * 20), "/".join(["7"] * 50), "/".join(["0.0001"] * 14), "(" * 1000 + "1" + ")" * 1000,
    "(" * 40 + "1" + ")" * 40, "-" * 99 + "1", "-" * 10**6, "+" * 99, "٣*٣", "１+１", "²", "½", "3·4", "6×7", "8÷2",
    "−5", "NaN", "nan", "inf", "infinity", "1e999", "1e3", "1_000", "0x10", "1j", "True", "1 2", "1,00", "1,0000",
    "1,,000", ",100", "1.2.3", "..", ".", "$", "%", "$$5", "5%%", "5$", "", " ", "()", "(", ")", "1)", "(1", "1+", "*1",
    "2(3)", "(2)(3)", "3 4", "1\n+1", "1\t+1", "1\x00", "1;2", "[1]", "x", "1=1", "__import__('os')", "1//2", "5 % 2",
    "1/1" + "0" * 40, "1/10000000", "\ud800", "<<1",
    "(" * (DEEPEST + 1) + "1" + ")" * (DEEPEST + 1), " " * LONGEST + "1", "-" + "9" * LONGEST_RESULT,
]  # fmt: skip


@pytest.mark.parametrize("expression", HOSTILE, ids=lambda e: ascii(e[:20]))
def test_hostile_input_is_none_and_costs_nothing(expression: str):
    assert calculate(expression) is None
    assert min(timeit.repeat(lambda: calculate(expression), number=1, repeat=5)) < 1e-3  # the machine may be busy


@given(st.text(alphabet="0123456789+-*/()., $%=<>eN_", max_size=120) | st.text(max_size=60))
def test_never_raises(expression: str):
    result = calculate(expression)
    assert result is None or (re.fullmatch(r"-?\d+(\.\d*[1-9])?", result, re.ASCII) and len(result) <= LONGEST_RESULT)


numbers = st.integers(0, 9999).map(str)
trees = st.recursive(
    numbers,
    lambda inner: (
        st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda t: f"({t[0]}{t[1]}{t[2]})")
        | inner.map(lambda e: f"(-{e})")
    ),
    max_leaves=8,
)


@given(trees, st.sampled_from("+-*/"), trees)
def test_is_exact_arithmetic(left: str, sign: str, right: str):
    """Python parses the same text; only its numbers are made exact."""
    expression = f"{left}{sign}{right}"
    try:
        value = eval(re.sub(r"(\d+)", r"Fraction('\1')", expression), {"Fraction": Fraction})
    except ZeroDivisionError:
        value = None
    result = calculate(expression)
    if result is None:
        small = value is not None and value != 0 and abs(value) < Fraction(1, 1_000_000)
        assert value is None or len(expression) > LONGEST or small or abs(value) > 10 ** (LONGEST_RESULT - 9)
    else:
        assert abs(Fraction(result) - value) <= Fraction(1, 2_000_000)
        assert value.denominator > 1 or result == str(value)
