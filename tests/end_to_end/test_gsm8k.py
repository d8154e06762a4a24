"""The whole tool on real text: GSM8K's questions, a tokenizer trained on them, small models made on the spot."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

from ketchup_cache import open_cache
from ketchup_cache.cli import main
from tests.helpers.models import wrap_tokenizer
from tests.helpers.oracle import plain_row_scores as plain_scores

DATA = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"
pytestmark = pytest.mark.skipif(not (DATA / "test.jsonl").exists(), reason="GSM8K is not beside the repository")
FIELDS = ["--prompt-field", "question", "--target-field", "answer"]


def make_tokenizer(texts: list[str]):
    """Byte-level BPE, so that every text is encoded without unknown tokens and decoded to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = {"vocab_size": 600, "special_tokens": ["<pad>", "</s>"], "show_progress": False}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(**trainer, initial_alphabet=letters))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return wrap_tokenizer(tokenizer, pad_token="<pad>", unk_token=None)


def save_t5(folder: Path, tokenizer, *, seed: int, d_model: int) -> str:
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=len(tokenizer) + 8, d_model=d_model, d_kv=16, d_ff=2 * d_model, num_layers=2, num_heads=2,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def run(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


def test_rollout_score_learn_evaluate(tmp_path, capsys):
    lines = (DATA / "train.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    texts = [text for line in lines for text in json.loads(line).values()]
    tokenizer = make_tokenizer(texts)
    assert all(tokenizer.decode(tokenizer(t)["input_ids"], skip_special_tokens=True) == t for t in texts)
    teacher = save_t5(tmp_path / "t0", tokenizer, seed=0, d_model=48)
    student = save_t5(tmp_path / "s0", tokenizer, seed=1, d_model=32)
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_text("\n".join(lines[:96]) + "\n", encoding="utf-8")
    test.write_text("\n".join((DATA / "test.jsonl").read_text(encoding="utf-8").splitlines()[:16]), encoding="utf-8")
    long = ["--max-prompt-tokens", 200, "--long-prompts", "truncate"]

    # fine-tune the teacher on references, pre-distil the student on the teacher's outputs
    run("pretrain", "--model", teacher, "--data", train, *FIELDS, *long, "--out", tmp_path / "teacher",
        "--epochs", 2, "--lr", 3e-3, "--batch-size", 16, "--max-new-tokens", 120)  # fmt: skip
    teacher = tmp_path / "teacher" / "model"
    cache = tmp_path / "cache"
    run("rollout", "--student", student, "--data", train, *FIELDS, *long, "--cache", cache,
        "--samples", 2, "--max-new-tokens", 12)  # fmt: skip
    run("score", "--teacher", teacher, "--cache", cache)
    run("learn", "--student", student, "--cache", cache, "--out", tmp_path / "run", "--k", 4, "--teacher", teacher,
        "--refresh-every", 2, "--steps", 6, "--batch-size", 16, "--samples", 2, "--max-new-tokens", 12,
        "--unfinished", "bootstrap", "--lr", 1e-3)  # fmt: skip
    run("verify", cache)
    capsys.readouterr()
    run("evaluate", "--model", tmp_path / "run" / "student", "--data", test, *FIELDS, *long, "--teacher", teacher,
        "--metrics", "gsm8k,exact", "--max-new-tokens", 60, "--outputs", tmp_path / "outputs.jsonl",
        "--json")  # fmt: skip
    result = json.loads(capsys.readouterr().out)

    # scores of real text against plain forward passes; the head is 8 rows wider than the vocabulary
    plain = AutoModelForSeq2SeqLM.from_pretrained(teacher).eval()
    rows = list(open_cache(cache).rows())
    assert len(rows) == 96 * 2 + 2 * 32  # the first phase used what was there, two more of 2 × 16 were sampled
    longest = max(rows, key=lambda row: len(row.prompt_tokens))
    for row in (rows[0], rows[-1], longest):
        expected = plain_scores(plain, row.prompt_tokens, row.completion_tokens, row.finished, len(tokenizer))
        for name in ("q", "max_q", "logsumexp", "mean_q"):
            np.testing.assert_allclose(getattr(row, name), expected[name], rtol=0, atol=1e-4)
    questions = {tuple(tokenizer(json.loads(line)["question"])["input_ids"]) for line in lines[:96]}
    assert {tuple(row.prompt_tokens.tolist()) for row in rows} <= {
        q if len(q) <= 200 else (*q[:199], 1) for q in questions
    }

    # accuracy, counted again from the written outputs
    written = [json.loads(line) for line in (tmp_path / "outputs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(written) == result["examples"] == 16
    answer = re.compile(r"#### (-?[0-9.,]+)")
    hits = 0
    for line in written:
        got, want = answer.search(line["output"]), answer.search(line["target"])
        hits += bool(got) and got[1].replace(",", "") == want[1].replace(",", "")
    assert result["metrics"]["gsm8k"] == pytest.approx(100 * hits / 16)
    assert np.isfinite(result["returns"]["mean"])
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [s["refreshed"] for s in steps] == [True, False] * 3
