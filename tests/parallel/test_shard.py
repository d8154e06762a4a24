"""`--shard`: all parts together are what one command does, no row twice; and the page's Slurm scripts."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest

from ketchup_cache import open_cache
from ketchup_cache.cli.app import app
from ketchup_cache.config.commands import EvaluateConfig, RolloutConfig, ScoreConfig
from ketchup_cache.config.resolve import resolve
from ketchup_cache.errors import ConfigError, DataError
from ketchup_cache.evaluation.evaluate import evaluate
from ketchup_cache.rollouts import rollout as module
from ketchup_cache.rollouts.rollout import rollout
from ketchup_cache.scoring.score import score
from ketchup_cache.sharing.transfer import copy
from tests.helpers.caches import rows_of
from tests.helpers.errors import refuses
from tests.helpers.models import write_prompts

PAGE = Path(__file__).parents[2] / "docs" / "machines.md"
ORDER = (3, 1, 2)


@pytest.fixture
def options(tmp_path, folders, monkeypatch):
    """Of `rollout`, for prompts of four lots."""
    monkeypatch.setattr(module, "ROLLOUTS_AT_ONCE", 24)
    data = str(write_prompts(tmp_path / "prompts.jsonl", 40))
    given = {"student": str(folders[0]), "data": data, "samples": 2, "max_new_tokens": 9, "rollout_batch": 5}
    return RolloutConfig(cache=tmp_path / "whole", device="cpu", **given)


def in_parts(config, cache):
    return [config.model_copy(update={"cache": cache, "shard": f"{part}/3"}) for part in ORDER]


def test_the_parts_of_rollouts_are_those_of_one_command_to_the_bit(options, tmp_path):
    rollout(options)
    reports = [rollout(one) for one in in_parts(options, tmp_path / "parts")]
    whole, parts = (rows_of(open_cache(tmp_path / name)) for name in ("whole", "parts"))
    assert whole == parts
    assert sum(report.rollouts for report in reports) == len(whole) == 80
    again = rollout(options.model_copy(update={"cache": tmp_path / "parts"}))
    assert again.already_there == again.rollouts == 80
    too_many = options.model_copy(update={"shard": "1/5"})
    refuses(ConfigError, "at most 4 parts, one for each 12 prompts", rollout, too_many)


def test_prompts_that_two_tasks_stored_at_once_are_one(options, tmp_path):
    """Tasks of an array start together, and neither sees the other's prompts."""
    one, other, _ = in_parts(options, tmp_path / "one")
    rollout(one)
    rollout(other.model_copy(update={"cache": tmp_path / "other"}))
    copy(tmp_path / "other", tmp_path / "one")
    assert len(open_cache(tmp_path / "one").manifests("prompts")) == 2
    assert rollout(one).already_there == rollout(one).rollouts
    assert rollout(other).already_there == rollout(other).rollouts
    rollout(options.model_copy(update={"cache": tmp_path / "one"}))
    assert {len(rows) for rows in rows_of(open_cache(tmp_path / "one")).values()} == {1}


def test_the_parts_of_scores_are_those_of_one_command(options, folders, tmp_path):
    rollout(options)
    copy(tmp_path / "whole", tmp_path / "parts")
    config = ScoreConfig(teacher=str(folders[1]), cache=tmp_path / "whole", device="cpu")
    score(config)
    reports = [score(one) for one in in_parts(config, tmp_path / "parts")]
    assert [report.already for report in reports] == [0, 0, 0]
    assert sum(report.computed + report.copied for report in reports) == 80
    whole, parts = (open_cache(tmp_path / name) for name in ("whole", "parts"))
    refs = parts.scored()
    assert all(ref.row_start % ref.samples == ref.row_stop % ref.samples == 0 for ref in refs)
    held = [manifest.rows for _, manifest in parts.manifests("scores")]
    assert sum(held) == sum(ref.rows for ref in refs) == 80
    mine, theirs = ({(r.prompt_id, *r.completion_tokens): r for r in cache.rows()} for cache in (whole, parts))
    for key, row in mine.items():
        np.testing.assert_allclose(theirs[key].q, row.q, atol=1e-5)
    assert "nothing to do" in str(score(in_parts(config, tmp_path / "parts")[0]))


def test_the_outputs_of_the_parts_follow_each_other(options, folders, tmp_path):
    given = {"data": options.data, "metrics": "exact", "max_new_tokens": 9, "device": "cpu"}
    config = EvaluateConfig(model=str(folders[0]), outputs=tmp_path / "whole.jsonl", **given)
    evaluate(config)
    files = [tmp_path / f"{part}.jsonl" for part in (1, 2, 3)]
    for part, file in enumerate(files, 1):
        found = evaluate(config.model_copy(update={"shard": f"{part}/3", "outputs": file}))
        assert found.examples == len(file.read_text().splitlines())
    assert b"".join(file.read_bytes() for file in files) == (tmp_path / "whole.jsonl").read_bytes()
    refuses(DataError, "40 examples are too few", evaluate, config.model_copy(update={"shard": "1/99"}))


@pytest.mark.parametrize("text", ["0/4", "5/4", "3", "a/b", "slurm"])
def test_what_is_no_part_is_refused(text):
    with pytest.raises(ConfigError, match="--shard"):
        resolve("score", None, {"teacher": "t", "cache": "c", "shard": text})


def test_a_slurm_array_with_gaps_is_refused(monkeypatch):
    array(monkeypatch, task=7, first=3, last=7, count=2)
    with pytest.raises(ConfigError, match="follow each other"):
        resolve("score", None, {"teacher": "t", "cache": "c", "shard": "slurm"})


def array(monkeypatch, **numbers) -> None:
    for name, value in zip(("ID", "MIN", "MAX", "COUNT"), numbers.values(), strict=True):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))


STUBS = {
    "srun": 'exec "$@"',
    "scontrol": 'printf "%s\\n" node7 node8',
    "ketchup-cache": 'printf "%s\\n" "$*"',
    "torchrun": 'printf "%s\\n" "$*"',
}


def test_the_slurm_scripts_of_the_page_start_what_they_say(tmp_path, monkeypatch):
    """bash stands in for srun; the words that reach our command are read by it."""
    for name, line in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_NNODES", "4")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[7-8]")
    array(monkeypatch, task=2, first=0, last=15, count=16)
    scripts = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", PAGE.read_text(), re.DOTALL)
    started = []
    for script in scripts:
        done = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True)
        started.append(shlex.split(done.stdout))
    rolled, scored, learned = started
    for words in (rolled, scored):
        assert options_of(words).shard == "3/16"
    launcher = learned[: learned.index("-m")]
    assert launcher[-2:] == ["--rdzv-id", "12"]
    assert "node7:29500" in launcher
    assert options_of(learned[len(launcher) + 2 :]).teacher == "TEACHER"


def options_of(words: list[str]):
    """As the command line reads them."""
    assert words[0] in {command.name for command in app.registered_commands}
    return resolve(words[0], None, dict(zip([w[2:].replace("-", "_") for w in words[1::2]], words[2::2], strict=True)))
