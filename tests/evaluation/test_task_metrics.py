"""Task metrics against values worked out by hand from their definitions."""

from __future__ import annotations

import math

import pytest

from ketchup_cache.errors import DataError
from ketchup_cache.evaluation.task_metrics import compute, final_answer, rouge_tokenizer
from tests.helpers.errors import refuses

MAT = "the cat sat on the mat"


def test_rouge_by_hand():
    # 3 of 3 and of 6 words; 1 of 2 and of 5 bigrams; longest common subsequence `the cat`, 2 of 3 and of 6
    values = compute(["rouge"], ["mat the cat"], [MAT])
    assert values["rouge1"] == pytest.approx(100 * 2 / 3)
    assert values["rouge2"] == pytest.approx(100 * 2 / 7)
    assert values["rougeL"] == pytest.approx(100 * 4 / 9)
    assert "stemmer" in values["rouge_variant"]


def test_rouge_is_a_mean_over_examples_of_stemmed_lower_case_words():
    # the first is perfect after stemming; in the second 1 of 1 and of 3 words agree: F1 = 2/4
    values = compute(["rouge"], ["Running dogs", "bird"], ["runs DOG", "a bird sees"])
    assert values["rouge1"] == pytest.approx(100 * (1 + 1 / 2) / 2)


@pytest.mark.parametrize(
    ("output", "target", "tokenizer", "rouge1"),
    [
        ("Москва город", "москва столица", "unicode", 50),
        ("日本", "日本国", "unicode", 0),
        ("日本", "日本国。", "characters", 80),  # 2 of 2 and of 3
        ("हिन्दी", "हिन्दी भाषा", "unicode", 100 * 2 / 3),  # its marks are no letters to Python
        ("dogs run_2", "dogs run 2", "unicode", 100),
        ("dogs", "dog", "unicode", 0),
    ],
)
def test_rouge_of_any_script_by_hand(output, target, tokenizer, rouge1):
    values = compute(["rouge1"], [output], [target], tokenizer)
    assert values["rouge1"] == pytest.approx(rouge1)
    assert "of any script" in values["rouge_variant"]


def test_a_rouge_that_loses_letters_is_refused_or_another_is_taken(capsys):
    """Of 40 letters 2 are lost, which is 5 %, or 3."""
    few, many = ["é" * n + "a" * (40 - n) + " -" for n in (2, 3)]
    assert rouge_tokenizer(None, ["rouge1"], [few]) == rouge_tokenizer("ascii", ["rouge1"], [few]) == "ascii"
    assert rouge_tokenizer("ascii", ["bleu"], [many]) == rouge_tokenizer(None, ["rouge"], []) == "ascii"
    assert not capsys.readouterr().err
    assert rouge_tokenizer(None, ["rouge"], [many]) == "unicode"
    assert "loses 8% of the letters of the references: --rouge-tokenizer unicode is taken" in capsys.readouterr().err
    assert rouge_tokenizer("characters", ["rouge"], [many]) == "characters"
    refuses(DataError, "--rouge-tokenizer ascii loses 8% .*: choose uni", rouge_tokenizer, "ascii", ["rougeL"], [many])


def test_bleu_by_hand():
    # precisions 5/6, 3/5, 2/4, 1/3, equal lengths
    values = compute(["bleu"], [MAT], ["the cat sat on a mat"])
    assert values["bleu"] == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    assert values["bleu_signature"].startswith("nrefs:1|case:mixed")


def test_bleu_counts_over_the_corpus_and_punishes_short_outputs():
    # 4 + 6 of 10 unigrams, 3 + 5 of 8 bigrams … all right, but 10 words stand for 12
    values = compute(["bleu"], ["the cat sat on", MAT], [MAT, MAT])
    assert values["bleu"] == pytest.approx(100 * math.exp(1 - 12 / 10))


def test_chrf_by_hand():
    # orders 1 and 2: precision 2/2 and 1/1, recall 2/3 and 1/2; averaged, then F with β = 2
    precision, recall = 1, (2 / 3 + 1 / 2) / 2
    values = compute(["chrf"], ["ab"], ["abc"])
    assert values["chrf"] == pytest.approx(100 * 5 * precision * recall / (4 * precision + recall))


@pytest.mark.parametrize("output", ["the cat sat the mat", "on the mat the cat sat"], ids=["insertion", "shift"])
def test_ter_counts_one_edit_for_an_insertion_and_for_a_shift(output: str):
    assert compute(["ter"], [output], [MAT])["ter"] == pytest.approx(100 / 6)


def test_exact_ignores_only_outer_white_space():
    outputs, targets = [" a b\n", "a  b", "A b", "a b"], ["a b"] * 4
    assert compute(["exact"], outputs, targets)["exact"] == 50


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("9 * 2 = <<9*2=18>>18\n#### 18", "18"),
        ("#### 1,234,567", "1234567"),
        ("#### -3.50", "-3.50"),
        ("#### 5 and then #### 6", "5"),
        ("the answer is 18", None),
        ("####18", None),
        ("#### $18", None),
        ("", None),
    ],
)
def test_final_answer(solution: str, answer: str | None):
    assert final_answer(solution) == answer


def test_gsm8k_compares_answers_as_text():
    targets = ["so #### 1,234"] * 4
    assert compute(["gsm8k"], ["#### 1234", "#### 1234.0", "1234", "#### 4321"], targets)["gsm8k"] == 25


def test_gsm8k_refuses_a_target_without_an_answer():
    with pytest.raises(DataError, match=r"example 2 has no final answer.*--target-field"):
        compute(["gsm8k"], ["#### 1", "#### 2"], ["#### 1", "2"])


def test_empty_outputs_are_wrong_not_errors():
    values = compute(["rouge", "bleu", "chrf", "ter", "exact", "gsm8k"], ["", ""], ["a b #### 1", "c #### 2"])
    scores = {name: value for name, value in values.items() if not isinstance(value, str)}
    assert scores == {
        "rouge1": 0, "rouge2": 0, "rougeL": 0, "bleu": 0, "chrf": 0, "ter": 100, "exact": 0, "gsm8k": 0
    }  # fmt: skip


def test_only_what_was_asked_for_in_that_order():
    assert list(compute(["exact", "chrf"], ["a"], ["a"])) == ["exact", "chrf", "chrf_signature"]


def test_refuses_unequal_numbers():
    with pytest.raises(ValueError, match="2 outputs for 1 targets"):
        compute(["exact"], ["a", "b"], ["a"])
