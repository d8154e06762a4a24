"""Every write of every command that writes outside a cache fails once: one line, and the same command goes on."""

import json
from pathlib import Path

import pytest

from ketchup_cache.cli import main
from tests.helpers.caches import make_cache
from tests.helpers.faults import DISK, stand_in
from tests.helpers.models import write_prompts

DEV = ("--eval-every", 2, "--metric", "exact", "--max-new-tokens", 4, "--eval-data")
AT_LEAST = {"learn": 25, "pretrain": 30, "evaluate": 2, "analyze": 4, "parquet": 4, "hf-dataset": 8}
"""Writes at least; some are the libraries' own. What a dev set adds, `pretrain` has."""


@pytest.fixture(scope="module")
def words(folders, tmp_path_factory) -> dict[str, list[object]]:
    """Of each command, all but where it writes to."""
    base = tmp_path_factory.mktemp("full")
    data, (student, teacher) = write_prompts(base / "d.jsonl", 4, longest=3), folders
    make_cache(base / "c", student, teacher)
    train = ("--device", "cpu", "--batch-size", 2, "--checkpoint-every", 1)
    return {
        "learn": ["learn", "--student", student, "--cache", base / "c", "--steps", 2, *train, "--out"],
        "pretrain": ["pretrain", "--model", student, "--data", data, "--epochs", 1, *train, "--out"],
        "evaluate": ["evaluate", "--model", student, "--data", data, "--max-new-tokens", 4, "--outputs"],
        "analyze": ["analyze", "--cache", base / "c", "--out"],
        "parquet": ["export", "--to", "parquet", base / "c"],
        "hf-dataset": ["export", "--to", "hf-dataset", base / "c"],
    }  # fmt: skip


def left(out: Path) -> dict[str, object]:
    """What a command left, without times and places; of a run, what can be compared."""
    files = [out] if out.is_file() else [p for p in sorted(out.rglob("*")) if p.is_file() and p.name != ".lock"]
    found = {str(p.relative_to(out)): p.read_bytes() for p in files if p.suffix not in (".json", ".jsonl")}
    if (out / "report.json").exists():
        lines = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
        found["metrics"] = [{k: v for k, v in line.items() if not k.endswith("_s")} for line in lines]
        found["fingerprint"] = json.loads((out / "report.json").read_text())["fingerprint"]
    return found


@pytest.mark.parametrize("command", AT_LEAST)
def test_every_write_fails_once(command, words, tmp_path, monkeypatch, capsys):
    stand_in(monkeypatch)

    def run(out: Path, at: int = -1) -> tuple[int, str]:
        DISK.watch(tmp_path, at)
        try:
            code = main([str(word) for word in (*words[command], out)])
        finally:
            DISK.root = ""
        return code, capsys.readouterr().err

    assert run(tmp_path / "whole" / "out")[0] == 0
    writes, whole = DISK.done, left(tmp_path / "whole" / "out")
    assert writes >= AT_LEAST[command]
    for at in range(writes):
        out = tmp_path / str(at) / "out"
        code, said = run(out, at)
        assert DISK.done > at
        if command == "hf-dataset" and code == 0:  # a lock that its library can do without
            assert left(out) == whole
            continue
        assert code == 2, said
        errors = [line for line in said.splitlines() if "No space left" in line]
        assert len(errors) == 1, said
        assert str(tmp_path / str(at)) in errors[0]
        assert "Traceback" not in said
        assert run(out)[0] == 0
        assert left(out) == whole
