"""The paper's third task as it is published, where a copy lies beside the repository."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

from ketchup_cache.config.options import DataOptions
from ketchup_cache.text.prompts import without_duplicates
from ketchup_cache.text.read import read_examples

GSM8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k"

pytestmark = pytest.mark.skipif(not (GSM8K / "test.jsonl").is_file(), reason=f"no GSM8K at {GSM8K}")


PINNED_IDS = "900990d9a7f18f3381733fee5221d92e0d2019ec5cd428f7d2d2017f3378bf21"


def gsm8k(split: str, **changes: object) -> DataOptions:
    return DataOptions(data=str(GSM8K / f"{split}.jsonl"), prompt_field="question", target_field="answer", **changes)


@pytest.mark.parametrize(("split", "rows"), [("test", 1319), ("train", 7473)])
def test_question_by_question(split, rows):
    examples = read_examples(gsm8k(split), need_target=True)
    lines = [json.loads(line) for line in (GSM8K / f"{split}.jsonl").read_bytes().decode().split("\n") if line]
    assert len(examples) == rows
    assert [(e.prompt, e.target) for e in examples] == [(line["question"], line["answer"]) for line in lines]
    assert [e.id for e in examples] == [hashlib.sha256(line["question"].encode()).digest()[:16] for line in lines]
    assert all(re.search(r"#### -?[\d,.]+$", e.target) for e in examples)


def test_ids_are_stable():
    """Pinned: rollouts in existing caches are found again by these."""
    plain, rendered = read_examples(gsm8k("test")), read_examples(gsm8k("test", template="Q: {prompt}\nA:"))
    assert len(without_duplicates(plain)) == len(without_duplicates(rendered)) == 1319
    assert rendered[0].id == hashlib.sha256(f"Q: {plain[0].prompt}\nA:".encode()).digest()[:16]
    assert hashlib.sha256(b"".join(e.id for e in plain)).hexdigest() == PINNED_IDS
