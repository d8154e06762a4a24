"""The demo's commands work, with fewer steps, on models that differ as they should."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from ketchup_cache.cli import main
from ketchup_cache.config.commands import DemoConfig
from ketchup_cache.report.demo import demo

SMALLER = {"--steps": "8", "--batch-size": "64", "--first": "16", "--warmup": "1"}


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
    scored = ["rollout", "score", "score", "info", "analyze"]
    assert names == ["evaluate", "evaluate", *scored, *["learn", "evaluate"] * 3, "report"]
    assert list(report.rows) == ["teacher", "student before", "K = 1", "K = 4", "exact first step"]
    table = str(report).splitlines()
    for name, row in report.rows.items():
        (line,) = [line for line in table if line.startswith(name)]
        shown = [float(x) for x in line[22:].split()]
        metrics = row["metrics"]
        expected = [row["returns"]["mean"], row["returns"]["sd"], row["length_mean"]]
        expected += [metrics[key] for key in ("bleu", "chrf", "ter", "exact")]
        assert shown == pytest.approx(expected, abs=0.05)
    best = max(("K = 1", "K = 4", "exact first step"), key=lambda name: report.rows[name]["returns"]["mean"])
    (learnt,) = [line for line in table if line.startswith("Of the three")]
    assert learnt.startswith(
        f"Of the three, `{best}` has the highest return: {report.rows['student before']['returns']['mean']:.2f}"
    )
    assert [line.split()[1] for line in table[-3:]] == ["rollout", "learn", "report"]
    for picture, start in zip(report.pictures, (b"<!doctype html>", b"\x89PNG\r\n\x1a\n"), strict=True):
        with open(picture, "rb") as file:
            assert file.read(len(start)) == start


def test_shipped_teacher_masters_the_task_and_the_student_does_not(run):
    rows = run[0].rows
    assert rows["teacher"]["metrics"]["exact"] >= 99
    assert rows["student before"]["metrics"]["exact"] < 15
    assert rows["teacher"]["returns"]["mean"] > rows["student before"]["returns"]["mean"] + 10


def test_in_a_terminal_it_offers_to_open_the_page(run, monkeypatch, tmp_path):
    opened: list[str] = []
    monkeypatch.setattr("ketchup_cache.report.demo.demo", lambda config, shell: run[0])
    monkeypatch.setattr("webbrowser.open", opened.append)
    for terminal, answer, more in ((False, True, []), (True, False, []), (True, True, ["--json"]), (True, True, [])):
        assert not opened
        monkeypatch.setattr("typer.confirm", lambda text, answer=answer: answer)
        for stream in (sys.stdin, sys.stdout):
            monkeypatch.setattr(stream, "isatty", lambda terminal=terminal: terminal, raising=False)
        assert main(["demo", "--out", str(tmp_path), *more]) == 0
    assert opened == [Path(run[0].page).resolve().as_uri()]
