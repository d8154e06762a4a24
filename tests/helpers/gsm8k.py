"""GSM8K where a copy lies beside the repository; elsewhere its tests are skipped."""

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k"
NEEDED = pytest.mark.skipif(not (FOLDER / "test.jsonl").is_file(), reason=f"no GSM8K at {FOLDER}")


def rows(split: str) -> list[dict[str, str]]:
    """Questions and answers. (A text may hold line separators other than a line feed.)"""
    return [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_bytes().split(b"\n") if line]
