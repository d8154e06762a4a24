"""The shipped reasoning task: what its script makes, consistent with the calculator, and with a gap to close."""

from __future__ import annotations

import json
import re

import pytest
from transformers import AutoTokenizer

from ketchup_cache.config.commands import EvaluateConfig
from ketchup_cache.report.evaluate import Evaluation, evaluate
from ketchup_cache.report.task_metrics import final_answer
from ketchup_cache.rollouts.calculator import calculate
from ketchup_cache.shipped import task

TASK = task("reason")
SPLITS = ("train", "prompts", "dev", "test")


def rows(split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (TASK / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_no_problem_is_twice():
    prompts = [row["prompt"] for split in SPLITS for row in rows(split)]
    assert len(prompts) == len(set(prompts)) == 4000 + 8000 + 500 + 500


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_solutions_are_arithmetic_that_uses_the_numbers_of_the_problem(split: str):
    for row in rows(split):
        steps = re.findall(r"<<(.*?)=(.*?)>>(\d+)", row["target"])
        known = {*re.findall(r"\d+", row["prompt"]), "2", "3"}  # doubles, thirds, …
        known |= {str(n) for n in (4, 5, 6, 7, 9, 12, 15, 20)}  # a brace, a hand, …
        for expression, result, said in steps:
            assert calculate(expression) == result == said
            assert set(re.findall(r"\d+", expression)) <= known
            known.add(result)
        assert final_answer(row["target"]) == steps[-1][1]


def test_every_text_is_short_and_round_trips():
    tokenizer = AutoTokenizer.from_pretrained(TASK / "tokenizer")
    for split in SPLITS:
        for row in rows(split):
            for text in row.values():
                ids = tokenizer(text)["input_ids"]
                assert len(ids) <= 40
                assert tokenizer.decode(ids, skip_special_tokens=True) == text


def on_test(model: str, *, calculator: bool = True) -> Evaluation:
    return evaluate(
        EvaluateConfig(
            model=str(TASK / model), data=str(TASK / "test.jsonl"), metrics="gsm8k", limit=200, rollout_batch=200,
            max_new_tokens=48, calculator=calculator, device="cpu",
        )
    )  # fmt: skip


def test_teacher_is_good_and_the_student_has_something_to_learn():
    teacher, student = on_test("teacher"), on_test("predistilled")
    assert teacher.metrics["gsm8k"] >= 97
    assert 25 <= student.metrics["gsm8k"] <= 60
    assert student.finished > 0.9
