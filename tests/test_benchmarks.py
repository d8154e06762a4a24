"""The GPU script runs on any machine at toy size, and says what it measured; a measured peak is a peak."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
from common import forget_peak, peak, run, sample  # noqa: E402


def test_gpu_script_runs_without_a_gpu(tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, "benchmarks/gpu.py", "--tiny", "--device", "cpu", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["tiny"] is True
    assert 0 < found["scoring"]["share_of_matrix_rate"] < 1
    # at least the embedding of the toy shape, float32
    assert found["scoring"]["weights_bytes"] > 4 * 64 * 32_100
    assert set(found["learning"]) == {"with teacher", "without teacher"}
    assert str(found["matrix_flops"] / 1e12)[:3] in done.stdout


def test_it_refuses_three_billion_parameters_on_a_cpu():
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert "use --tiny" in done.stderr


def test_peak_sees_memory_that_is_gone_again():
    before = forget_peak()
    np.ones(40_000_000)  # 320 MB, freed at once
    assert 300e6 < peak() - before < 400e6


def test_a_process_is_charged_its_memory_and_time():
    mine = b"1" * 400_000_000  # of the process that asks: not of the one that is measured
    found = run(
        sys.executable,
        "-c",
        "x = b'1' * 200_000_000\nimport time; b = time.process_time()\nwhile time.process_time() < b + .3: pass",
    )
    assert 200e6 < found["peak_bytes"] < 260e6 < len(mine)
    assert 0.3 <= found["cpu_seconds"] <= found["seconds"] + 0.1


def test_mix_of_lengths():
    batch = sample(0, 8_000)
    prompts, completions = batch.prompts.tokens.lengths, batch.rollouts.completions.lengths
    assert 165 < np.median(prompts) < 195
    assert prompts.max() <= 1024
    assert 24.5 < completions.mean() < 25.5
    assert 7.5 < completions.std() < 8.5
    assert (np.bincount(batch.rollouts.prompt_index) == 4).all()
