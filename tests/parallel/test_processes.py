"""One, two and three processes do the same (gloo, a thread each), and all end where one dies."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ketchup_cache import open_cache
from ketchup_cache.models.fingerprint import weights_fingerprint
from ketchup_cache.models.folders import ADAPTER_WEIGHTS
from ketchup_cache.training.learn import learn
from tests.helpers.learning import json_lines, killed_before, metrics
from tests.helpers.models import save_decoder, save_model, write_prompts
from tests.helpers.processes import CHECKPOINT, KILLED, KINDS, LEARNED, PARTS, STEPS, chained, everything

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(900)
def test_one_two_and_three_processes_do_the_same_and_end_together(tmp_path):
    """One test, so that each launcher is started once: starting takes most of the time."""
    for kind, save in (("t5", save_model), ("decoder", save_decoder)):
        save(tmp_path / kind / "student", seed=1)
        save(tmp_path / kind / "teacher", seed=2)
    write_prompts(tmp_path / "prompts.jsonl", 40)
    everything(tmp_path)
    check_that_all_end_with_one_line(tmp_path, *started(2, "begin", tmp_path))
    with killed_before(KILLED + CHECKPOINT):
        learn(chained(tmp_path))
    check_that_a_signal_stops_all_after_the_same_step(tmp_path, *started(3, "end", tmp_path))
    check_that_other_numbers_have_gone_on(tmp_path)
    check_that_parts_have_gone_on(tmp_path)
    for kind in KINDS:
        check_parts(tmp_path, kind)
    for count in (2, 3):
        check_reports(tmp_path, count)
        for kind in KINDS:
            check_rollouts_and_scores(tmp_path, count, kind)
            check_training(tmp_path, count, kind)


def started(count: int, *words: object) -> tuple[int, list[str]]:
    """Exit code of a torchrun, and what we say at its end."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [sys.executable, *launcher, "-m", "tests.helpers.processes", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert "Error" not in done.stderr.replace("ChildFailedError", ""), done.stderr
    said = r"^ketchup-cache: (?!warning|learning from|step )(.*)"
    return done.returncode, re.findall(said, done.stderr, re.MULTILINE)


def check_that_all_end_with_one_line(folder: Path, code: int, lines: list[str]) -> None:
    assert time.time() - (folder / "killed").stat().st_mtime < 60
    assert code != 0
    (line,) = lines
    assert line.startswith("another process of this command has ended")


def check_that_a_signal_stops_all_after_the_same_step(folder: Path, code: int, lines: list[str]) -> None:
    assert code != 0
    saved, stopped = lines
    assert saved.startswith(f"saved after step {KILLED + 1} of {STEPS}")
    assert stopped == "stopped; run the same command again to continue"
    assert len(metrics(folder / "stopped")) == KILLED + 1


def check_that_other_numbers_have_gone_on(folder: Path) -> None:
    """Two processes by FSDP, killed at step 7; one, from the checkpoint after step 5 and killed at step 12; then three
    by FSDP."""
    assert [line["step"] for line in metrics(folder / "chain")] == list(range(STEPS))
    assert json.loads((folder / "chain" / "report.json").read_text())["resumed_from"] == 2 * CHECKPOINT
    assert_near(folder, folder / "1" / "t5" / "ketchup", folder / "chain", "t5")


def check_that_parts_have_gone_on(folder: Path) -> None:
    """By FSDP, two processes that died at step 7, then three."""
    run = folder / "2" / "t5" / "seqkd-fsdp"
    assert json.loads((run / "report.json").read_text())["resumed_from"] == CHECKPOINT
    assert_near(folder, folder / "1" / "t5" / "seqkd", run, "t5")


def check_parts(folder: Path, kind: str) -> None:
    """Two processes by FSDP against one without: what they learn, and the bytes that each has."""
    one, several = (folder / str(count) / kind for count in (1, 2))
    for name in [*PARTS[kind], "adapter", *["pretrain"] * (kind == "decoder")]:
        mine, theirs = one / name, several / f"{name}-fsdp"
        check_run(folder, mine, theirs, kind)
        held, of_part = (bytes_of(place.with_suffix(".safetensors")) for place in (mine, theirs))
        assert of_part <= 0.51 * held, (name, of_part, held)
        of_trained = held // 2
        parts = [load_file(file).values() for file in (theirs / "checkpoints").glob("step-*/shard-*")]
        sizes = [sum(tensor.nbytes for tensor in part if tensor.dim()) for part in parts]
        assert set(sizes) == {3 * of_trained // 2}  # weights and moments
        report = json.loads((theirs / "report.json").read_text())
        assert report["fingerprint"] == weights_fingerprint(theirs / "last")
    starts = [json_lines(place / "dev.jsonl")[0] for place in (one / "ketchup", several / "ketchup-fsdp")]
    assert starts[0]["fingerprint"] == starts[1]["fingerprint"]  # put together, the weights are the same to the bit


def bytes_of(file: Path) -> int:
    """Of weights and gradient in a process (`first_gradient`)."""
    with safe_open(file, "pt") as tensors:
        return int(tensors.metadata()["bytes"])


def check_reports(folder: Path, count: int) -> None:
    one, several = (json.loads((folder / str(n) / "done.json").read_text()) for n in (1, count))
    for kind in KINDS:
        for name, value in one[kind].items():
            assert same(several[kind][name], value, 1e-5), name
        outputs = [json_lines(folder / str(n) / kind / "out.jsonl") for n in (1, count)]
        returns = [[row.pop("return") for row in rows] for rows in outputs]
        assert outputs[0] == outputs[1]
        assert returns[1] == pytest.approx(returns[0], abs=1e-4)  # scores are equal but for rounding


def check_rollouts_and_scores(folder: Path, count: int, kind: str) -> None:
    """Rollouts to the bit, scores but for rounding, both in the same segments."""
    one, several = (open_cache(folder / str(n) / kind / "cache") for n in (1, count))
    for mine, theirs in zip(one.rollouts(), several.rollouts(), strict=True):
        assert one.manifest(mine[0]).files == several.manifest(theirs[0]).files
    parts = [sorted(cache.scored(), key=lambda ref: (ref.samples, ref.row_start)) for cache in (one, several)]
    assert len(parts[0]) > count  # most are dealt out; what is left is shared
    for mine, theirs in zip(*parts, strict=True):
        assert (mine.row_start, mine.row_stop) == (theirs.row_start, theirs.row_stop)
        scores, others = (cache.load_scored(ref).scores for cache, ref in ((one, mine), (several, theirs)))
        for name, values in (scores.per_token() | {"top": scores.top.q}).items():
            np.testing.assert_allclose((others.per_token() | {"top": others.top.q})[name], values, atol=1e-5)


def check_training(folder: Path, count: int, kind: str) -> None:
    """The gradient of the first step, the weights after the last, and all that was written down in between."""
    for name in [*LEARNED, *["pretrain"] * (kind == "decoder")]:
        check_run(folder, *(folder / str(n) / kind / name for n in (1, count)), kind)


def check_run(folder: Path, one: Path, several: Path, kind: str) -> None:
    gradients = [flat(place.with_suffix(".safetensors")) for place in (one, several)]
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-6 * gradients[0].norm(), several
    assert_near(folder, one, several, kind)
    for mine, theirs in zip(metrics(one), metrics(several), strict=True):
        for key in (key for key in mine if not key.endswith("_s")):
            assert same(theirs[key], mine[key], 1e-3), (several, mine["step"], key)
    if not (one / "dev.jsonl").exists():
        return
    for mine, theirs in zip(*(json_lines(place / "dev.jsonl") for place in (one, several)), strict=True):
        assert theirs["metrics"] == pytest.approx(mine["metrics"], abs=1e-3)
        assert theirs["kl_start"] == pytest.approx(mine["kl_start"], abs=1e-4)


def same(value: object, expected: object, tolerance: float) -> bool:
    return value == (pytest.approx(expected, abs=tolerance, rel=tolerance) if isinstance(expected, float) else expected)


def flat(file: Path, part: str = "") -> torch.Tensor:
    return torch.cat([tensor.flatten() for name, tensor in sorted(load_file(file).items()) if part in name])


def assert_near(folder: Path, one: Path, other: Path, kind: str) -> None:
    """The weights of two runs, as far as they have moved."""
    if (one / "last" / ADAPTER_WEIGHTS).exists():  # whose B begins as 0
        mine, theirs = (flat(place / "last" / ADAPTER_WEIGHTS, "lora_B") for place in (one, other))
        start = torch.zeros_like(mine)
    else:
        places = (folder / kind / "student", one / "last", other / "last")
        start, mine, theirs = (flat(place / "model.safetensors") for place in places)
    assert (mine - theirs).norm() <= 1e-3 * (mine - start).norm()
    assert (mine - start).norm() > 0.01
