"""How rows are dealt out, and what is said to commands and models that several processes are not for, or are."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from ketchup_cache.cli import main
from ketchup_cache.config.options import StudentOptions
from ketchup_cache.errors import ConfigError, ModelError, WriteError
from ketchup_cache.models.load import load_model
from ketchup_cache.models.sharded import Sharded
from ketchup_cache.parallel.group import Group
from ketchup_cache.training import checkpoints
from tests.helpers.errors import refuses
from tests.helpers.models import make_model


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_every_row_is_one_processes_and_the_tokens_are_shared_evenly(size):
    rng = np.random.default_rng(size)
    for rows in (0, 1, 5, 200):
        names, sizes = rng.permutation(rows), rng.integers(0, 40, rows)
        parts = [Group(rank, size).cut(names, sizes) for rank in range(size)]
        assert np.concatenate(parts).tolist() == names.tolist()
        place = np.argsort(names)
        loads = [sizes[place[part]].sum() for part in parts]
        assert max(loads, default=0) <= sizes.sum() / size + 40
        assert sorted(i for rank in range(size) for i in Group(rank, size).mine(range(rows))) == list(range(rows))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_command_that_works_in_one_process_says_so_once(rank, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["info", str(tmp_path)]) == 2
    line = "ketchup-cache: `info` works in one process: start it without torchrun\n"
    assert capsys.readouterr().err == ("" if rank else line)


def test_parts_need_several_processes_and_a_model_of_the_same_passes_for_all_rows(folders):
    options = StudentOptions(fsdp=True)
    refuses(ConfigError, "--fsdp needs several .*torchrun", load_model, str(folders[0]), device="cpu", fit=options)
    for family in ("nllb-moe", "llama-dynamic"):
        refuses(ModelError, "leave --fsdp out", Sharded, make_model(family), torch.device("cpu"))


def test_a_disk_that_is_full_for_a_part_is_one_line(tmp_path, monkeypatch):
    def full(*_, **__):
        raise CheckpointException("", {1: (OSError(28, "No space left on device"), None)})

    monkeypatch.setattr(checkpoints.state_dict_saver, "save", full)
    optimizer = SimpleNamespace(named={}, tensors=dict)
    learner = SimpleNamespace(parts=True, model=make_model("qwen2"), optimizer=optimizer)
    refuses(WriteError, "can't be written .*No space left", checkpoints.save, tmp_path, 1, learner, {}, {}, keep=1)
    assert not list((tmp_path / "checkpoints").glob("step-????????"))
