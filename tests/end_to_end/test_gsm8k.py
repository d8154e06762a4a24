"""The whole tool on real text: GSM8K's questions, a tokenizer trained on them, small models made on the spot."""

import json
import re

import numpy as np
import pytest
from transformers import AutoModelForSeq2SeqLM

from ketchup_cache import open_cache
from ketchup_cache.types import PER_TOKEN
from tests.helpers import gsm8k
from tests.helpers.learning import json_lines, metrics, run
from tests.helpers.models import make_t5, train_byte_level
from tests.helpers.oracle import plain_row_scores

pytestmark = gsm8k.NEEDED


def test_rollout_score_learn_evaluate(tmp_path, capsys):
    texts = [text for row in gsm8k.rows("train")[:200] for text in row.values()]
    tokenizer = train_byte_level(texts, 600)
    assert all(tokenizer.decode(tokenizer(t)["input_ids"], skip_special_tokens=True) == t for t in texts)
    for name, seed, width in (("t0", 0, 48), ("s0", 1, 32)):
        make_t5("1.1", seed=seed, vocab_size=len(tokenizer) + 8, d_model=width).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    fields = ["--prompt-field", "question", "--target-field", "answer", "--max-prompt-tokens", 200]
    fields += ["--long-prompts", "truncate", "--data"]
    train = [*fields, gsm8k.FOLDER / "train.jsonl", "--limit", 96]
    test = [*fields, gsm8k.FOLDER / "test.jsonl", "--limit", 16]

    # fine-tune the teacher on references, then learn from its scores
    run("pretrain", "--model", tmp_path / "t0", *train, "--out", tmp_path / "teacher", "--epochs", 2, "--lr", 3e-3,
        "--batch-size", 16, "--max-new-tokens", 120)  # fmt: skip
    student, teacher, cache = tmp_path / "s0", tmp_path / "teacher" / "best", tmp_path / "cache"
    sampled = ["--samples", 2, "--max-new-tokens", 12]
    run("rollout", "--student", student, *train, "--cache", cache, *sampled)
    run("score", "--teacher", teacher, "--cache", cache)
    run("learn", "--student", student, "--cache", cache, "--out", tmp_path / "run", "--k", 4, "--teacher", teacher,
        "--refresh-every", 2, "--steps", 6, "--batch-size", 16, *sampled, "--unfinished", "bootstrap",
        "--lr", 1e-3)  # fmt: skip
    run("verify", cache)
    capsys.readouterr()
    run("evaluate", "--model", tmp_path / "run" / "student", *test, "--teacher", teacher,
        "--metrics", "gsm8k,exact", "--max-new-tokens", 60, "--outputs", tmp_path / "o.jsonl", "--json")  # fmt: skip
    result = json.loads(capsys.readouterr().out)

    # scores of real text against plain forward passes; the head is 8 rows wider than the vocabulary
    plain = AutoModelForSeq2SeqLM.from_pretrained(teacher).eval()
    rows = list(open_cache(cache).rows())
    assert len(rows) == 96 * 2 + 2 * 32  # the first phase used what was there, two more of 2 × 16 were sampled
    longest = max(rows, key=lambda row: len(row.prompt_tokens))
    for row in (rows[0], rows[-1], longest):
        expected = plain_row_scores(plain, row.prompt_tokens, row.completion_tokens, row.finished, len(tokenizer))
        for name in PER_TOKEN:
            np.testing.assert_allclose(getattr(row, name), expected[name], rtol=0, atol=1e-4)
    questions = [tokenizer(row["question"])["input_ids"] for row in gsm8k.rows("train")[:96]]
    cut = {tuple(q if len(q) <= 200 else [*q[:199], 1]) for q in questions}
    assert {tuple(row.prompt_tokens.tolist()) for row in rows} <= cut

    # accuracy, counted again from the written outputs
    written = json_lines(tmp_path / "o.jsonl")
    assert len(written) == result["examples"] == 16
    answers = [[re.search(r"#### (-?[0-9.,]+)", line[key]) for key in ("output", "target")] for line in written]
    hits = sum(bool(got) and got[1].replace(",", "") == want[1].replace(",", "") for got, want in answers)
    assert result["metrics"]["gsm8k"] == pytest.approx(100 * hits / 16)
    assert np.isfinite(result["returns"]["mean"])
    assert [step["refreshed"] for step in metrics(tmp_path / "run")] == [True, False] * 3
