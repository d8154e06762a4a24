"""The shipped task is what its script makes, and the demo's commands work, with fewer steps."""

from __future__ import annotations

import filecmp
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence

import pytest

from ketchup_cache.cli import main
from ketchup_cache.config.commands import DemoConfig
from ketchup_cache.report.demo import demo
from ketchup_cache.shipped import task

TASK = task("translate")
SMALLER = {"--steps": "8", "--batch-size": "64", "--first": "16", "--warmup": "1"}


def prompts(name: str) -> list[str]:
    return [json.loads(line)["prompt"] for line in (TASK / f"{name}.jsonl").read_text().splitlines()]


def test_script_makes_the_shipped_data_and_tokenizer_again(tmp_path):
    shutil.copy(TASK / "make_task.py", tmp_path)
    for part in ("data", "tokenizer"):
        subprocess.run([sys.executable, tmp_path / "make_task.py", part], check=True, capture_output=True)
    for name in ("train.jsonl", "prompts.jsonl", "dev.jsonl", "test.jsonl", "tokenizer/tokenizer.json"):
        assert filecmp.cmp(tmp_path / name, TASK / name, shallow=False), name


def test_no_sentence_is_in_two_splits():
    names = ("train", "prompts", "dev", "test")
    splits = {name: set(prompts(name)) for name in names}
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert not splits[one] & splits[other], (one, other)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The demo with fewer steps on a fifth of the test sentences; every command line it ran."""
    folder = tmp_path_factory.mktemp("demo")
    commands: list[list[str]] = []

    def shell(words: Sequence[str]) -> int:
        words = [SMALLER.get(before, word) for before, word in zip(["", *words], words, strict=False)]
        commands.append(words)
        return main([*words, "--limit", "100"] if words[0] == "evaluate" else words)

    return demo(DemoConfig(out=folder), shell), commands


def test_demo_runs_every_phase_and_reports_what_its_commands_found(run):
    report, commands = run
    names = [words[0] for words in commands]
    assert names == ["rollout", "score", "score", "info", "analyze", "learn", "learn", *["evaluate"] * 4]
    assert list(report.rows) == ["student before", "K = 1", "K = 4", "teacher"]
    table = str(report).splitlines()
    for name, row in report.rows.items():
        (line,) = [line for line in table if line.startswith(name)]
        shown = [float(x) for x in line[22:].split()]
        metrics = row["metrics"]
        expected = [row["returns"]["mean"], row["returns"]["sd"], row["length_mean"]]
        expected += [metrics[key] for key in ("bleu", "chrf", "ter", "exact")]
        assert shown == pytest.approx(expected, abs=0.05)
    for picture in report.pictures:
        with open(picture, "rb") as file:
            assert file.read(8) == b"\x89PNG\r\n\x1a\n"


def test_shipped_teacher_masters_the_task_and_the_student_does_not(run):
    rows = run[0].rows
    assert rows["teacher"]["metrics"]["exact"] >= 99
    assert rows["student before"]["metrics"]["exact"] < 30
    assert rows["teacher"]["returns"]["mean"] > rows["student before"]["returns"]["mean"] + 10
