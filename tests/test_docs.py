"""The site builds without a warning, and every command that a page shows can be given as it stands."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cli.app import panels_of
from ketchup_cache.cli import main
from ketchup_cache.config.commands import COMMANDS
from ketchup_cache.config.resolve import flag

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EVERYWHERE = {"--config", "--recipe", "--json", "--help", "--debug"}
"""Options of all commands."""


def test_the_site_builds_without_a_warning_and_has_every_option(tmp_path):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install 'ketchup-cache[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    pages = {path.relative_to(tmp_path / "site").as_posix() for path in (tmp_path / "site").rglob("index.html")}
    assert {"index.html", *(f"{page.stem}/index.html" for page in PAGES[1:])} <= pages
    reference = (tmp_path / "site/reference/commands/index.html").read_text()
    for command_name, config in COMMANDS.items():
        assert f'id="{command_name}"' in reference
        assert not [key for key in config.model_fields if f"<code>{flag(key)}</code>" not in reference]
        assert set(panels_of(command_name)) == config.model_fields.keys()
    assert "k_step_returns" in (tmp_path / "site/reference/python/index.html").read_text()


def shown(page: Path) -> list[list[str]]:
    """The words of every `ketchup-cache COMMAND …` of the blocks of a page, lines that go on joined."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"^(?:    |)(?:\w+\$ )?((?:ketchup-cache|torchrun .*ketchup-cache) .*)$", text, re.MULTILINE)
    return [shlex.split(line.partition("ketchup-cache ")[2], comments=True) for line in lines]


def test_the_reader_of_this_test_finds_commands():
    assert ["report", "k4", "--out", "k4.html"] in shown(ROOT / "README.md")
    assert len(shown(ROOT / "docs/tutorial.md")) > 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_on_a_page_has_the_options_that_it_is_given(page):
    if page.name == "log.md":
        pytest.skip("the log has commands of earlier versions")
    for command, *words in shown(page):
        assert command in COMMANDS, f"{page.name}: {command}"
        fields = COMMANDS[command].model_fields
        known = EVERYWHERE | {flag(key) for key in fields} | {f"--no-{key.replace('_', '-')}" for key in fields}
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert given <= known, f"{page.name}: {command} {' '.join(words)}"


def test_the_tutorial_runs_as_it_stands_with_fewer_rows_and_steps(tmp_path, monkeypatch, capsys):
    """In this process, for a command takes seconds to start; what is none of ours, by a shell."""
    text = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8").replace("\\\n", " ")
    small = {
        "--steps 40": "--steps 2", "--steps 8": "--steps 1", "--batch-size 256": "--batch-size 16", "-n 4000": "-n 300",
        "--first 1024": "--first 64", "-n 200": "-n 8", "--eval-every 10": "--eval-every 1",
        "--refresh-every 8": "--refresh-every 4", "--outputs": "--limit 20 --outputs",
    }  # fmt: skip
    for large, few in small.items():
        text = text.replace(large, few)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    ran = 0
    for kind, block in re.findall(r"^```(sh|python)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        if kind == "python":
            exec(block, {})
            continue
        for line in block.splitlines():
            words = shlex.split(os.path.expandvars(line), comments=True)
            if words[0] == "ketchup-cache":
                assert main(words[1:]) == 0, line
                ran += 1
            elif "pip install" not in line and words[0] != "python":
                variable = words[1].partition("=")[0] if words[0] == "export" else "HOME"
                shell = ["bash", "-ec", f"{line}\nprintenv {variable} >&2"]
                done = subprocess.run(shell, check=True, capture_output=True, text=True)
                monkeypatch.setenv(variable, done.stderr.strip().splitlines()[-1])
    assert ran == len(shown(ROOT / "docs/tutorial.md"))
    assert (tmp_path / "runs.html").stat().st_size > 10_000
    said = capsys.readouterr().out.rstrip()
    assert "bleu" in said
    assert said.splitlines()[-1].endswith("]")
