"""The shipped tasks are what their scripts make, with splits that share nothing, and small."""

from __future__ import annotations

import filecmp
import itertools
import json
import shutil
import subprocess
import sys

import pytest

from ketchup_cache.shipped import task

SPLITS = ("train", "prompts", "dev", "test")


@pytest.mark.parametrize("name", ["translate", "summarise", "reason"])
def test_script_makes_the_shipped_data_and_tokenizer_again(name, tmp_path):
    for file in task(name).glob("*.py"):
        shutil.copy(file, tmp_path)
    for part in ("data", "tokenizer"):
        subprocess.run([sys.executable, tmp_path / "make_task.py", part], check=True, capture_output=True)
    for file in (*(f"{split}.jsonl" for split in SPLITS), "tokenizer/tokenizer.json"):
        assert filecmp.cmp(tmp_path / file, task(name) / file, shallow=False), file


@pytest.mark.parametrize("name", ["translate", "summarise"])
def test_no_prompt_is_in_two_splits(name):
    lines = {split: (task(name) / f"{split}.jsonl").read_text(encoding="utf-8").splitlines() for split in SPLITS}
    prompts = {split: {json.loads(line)["prompt"] for line in of_split} for split, of_split in lines.items()}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not prompts[one] & prompts[other], (one, other)
    if name != "translate":
        assert all(len(prompts[split]) == len(lines[split]) for split in SPLITS)


@pytest.mark.parametrize("name", ["summarise", "reason"])
def test_size(name):
    files = [path for path in task(name).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 6_000_000
