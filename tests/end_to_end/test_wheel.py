"""The wheel holds all that the program needs, and works outside of any checkout."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOMES = {"ketchup_cache": "ketchup_cache", "cli": "ketchup_cache/cli", "data": "ketchup_cache/data"}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pytest.importorskip("setuptools", "77", reason="setuptools is not installed, which builds the wheel")
    how = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *how, str(ROOT)], check=True, timeout=300)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def test_every_file_that_git_knows_is_in_it(unpacked):
    listed = subprocess.run(["git", "ls-files", *HOMES], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split():
        top, _, rest = name.partition("/")
        if top != "data" or not name.endswith(".py"):  # what made the tasks stays here
            assert (unpacked / HOMES[top] / rest).is_file(), name
    assert (unpacked / "ketchup_cache/py.typed").is_file()
    assert {path.name for path in unpacked.iterdir() if not path.name.endswith(".dist-info")} == {"ketchup_cache"}


def test_it_runs_from_there(unpacked, tmp_path):
    def run(*words: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(unpacked), "PYTHONSAFEPATH": "1"}
        command = [sys.executable, "-m", "ketchup_cache", *words]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout

    where = "import ketchup_cache.cli as c, ketchup_cache.shipped as s; print(c.__file__, s.task('translate'))"
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    shown = subprocess.run([sys.executable, "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert all(path.startswith(str(unpacked)) for path in shown.stdout.split())
    assert "gsm8k" in run("recipes")
    task = shown.stdout.split()[1]
    run(
        "rollout",
        "--student",
        f"{task}/predistilled",
        "--data",
        f"{task}/dev.jsonl",
        "--limit",
        "4",
        "--cache",
        "cache",
    )
    assert "4 rollouts" in run("info", "cache")


def test_the_oldest_versions_that_are_tested_are_those_that_are_allowed():
    allowed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    least = dict(re.fullmatch(r"([\w-]+)>=([\d.]+)(?:,<\d+)?", line).groups() for line in allowed)
    tested = (line.split("==") for line in (ROOT / ".ci/test-oldest.txt").read_text().splitlines() if "==" in line)
    for name, version in tested:
        if name != "torch":  # of which an older version brings gigabytes
            assert f"{version}.".startswith(f"{least[name]}."), name
