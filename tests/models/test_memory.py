"""Budgets against an allocator that fails above a size, a process that the system limits, and made-up GPUs."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from ketchup_cache import open_cache
from ketchup_cache.errors import ModelError
from ketchup_cache.models import memory
from ketchup_cache.models.memory import PROBE, TokenBudget, free_ram, out_of_memory
from ketchup_cache.scoring.score import score
from ketchup_cache.scoring.teacher import Teacher
from tests.helpers.errors import refuses
from tests.helpers.models import save_model
from tests.helpers.oracle import assert_same_scores, plain_scores, random_rollouts
from tests.helpers.scoring import MODELS, TEACHERS, add_rollouts, assert_scored, options

TEACHER, MODEL = TEACHERS["1.0"], MODELS["1.0"]
PROMPTS, ROLLOUTS = random_rollouts(7, 12)
PLAIN = plain_scores(MODEL, PROMPTS, ROLLOUTS)
ROWS = np.stack([PROMPTS.lengths[ROLLOUTS.prompt_index], ROLLOUTS.completions.lengths], 1)
LONGEST = int(ROWS.sum(1).max())
FAILURES = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:126] . DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
)


class Fails:
    """The teacher's pass over a batch, which fails above a number of tokens as `failure` does."""

    def __init__(self, limit: int, failure: Exception = FAILURES[0]) -> None:
        self.limit, self.failure, self.sizes, self.rows = limit, failure, [], []

    def __call__(self, batch, finished, names, *rest):
        self.sizes.append(batch.size(once=True))
        if self.sizes[-1] > self.limit:
            raise self.failure
        self.rows += names.tolist()
        return Teacher._score_batch(TEACHER, batch, finished, names, *rest)


def scored(monkeypatch, fails: Fails, budget):
    with monkeypatch.context() as patched:
        patched.setattr(TEACHER, "_score_batch", fails)
        return TEACHER.score(PROMPTS, ROLLOUTS, batch_tokens=budget)


@settings(max_examples=30)
@given(limit=st.integers(LONGEST, 400), asked=st.integers(1, 1000), failure=st.sampled_from(FAILURES))
def test_scores_do_not_depend_on_where_memory_ends(limit, asked, failure):
    fails, said = Fails(limit, failure), []
    budget = TokenBudget(asked, said.append)
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert_same_scores(scored(monkeypatch, fails, budget), PLAIN)
        failed = [size for size in fails.sizes if size > limit]
        assert sorted(fails.rows) == list(range(12))  # each row once
        assert len(said) == len(failed) <= np.log2(1000) + 1
        assert budget.tokens == (asked if not failed else max(min([*failed, asked]) // 2, 1))
        found, fails.sizes[:] = budget.tokens, []
        scored(monkeypatch, fails, budget)  # what was found is kept
    assert budget.tokens == found
    assert all(size <= max(found, LONGEST) for size in fails.sizes)
    assert max(fails.sizes) <= limit


def test_the_scores_of_a_row_that_never_fits_are_refused_with_what_to_do(monkeypatch):
    fails = Fails(LONGEST - 1, FAILURES[2])
    error = refuses(ModelError, ".", scored, monkeypatch, fails, 1000)
    what = (
        r"rollout row (\d+) \((\d+) prompt and (\d+) completion tokens\) does not fit into memory on its own: use --dt"
    )
    row, *lengths = map(int, re.match(what, error).groups())
    assert lengths == ROWS[row].tolist()
    assert fails.sizes[-1] == sum(lengths) == LONGEST


OTHERS = RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("out of memory"), KeyError("q")


@pytest.mark.parametrize("error", OTHERS)
def test_other_errors_are_not_taken_for_it(monkeypatch, error):
    assert not out_of_memory(error)
    fails = Fails(10, error)
    with pytest.raises(type(error)):
        scored(monkeypatch, fails, 1000)
    assert len(fails.sizes) == 1


# ----------------------------------------------------------------------------------------------------------- auto

GB = 2**30
CPU = torch.device("cpu")


def found(*devices: torch.device, size: int = PROBE, between=lambda: None) -> int:
    """What `auto` finds when the second batch of this size does `between`."""
    budget = TokenBudget("auto", lambda _: None)
    budget.watch(devices)
    assert not budget.fitted(size)
    assert (budget.tokens, budget.open) == (PROBE, True)
    budget.watch(devices)
    between()
    assert budget.fitted(size)
    assert not budget.open
    return budget.tokens


GPUS = [  # free on the device, and what the allocator holds without need; and the fullest of several devices decides
    ((8, 8), (400_000, 1), 0.8 * 9 * GB / 400_000), ((0, 8), (400_000, 1), 0.8 * GB / 400_000),
    ((79, 79), (1000, 1000), memory.MOST["cuda"]), ((8, 8), (100_000, 800_000), 0.8 * 9 * GB / 800_000),
    ((0.5, 70), (100_000, 800_000), 0.8 * 1.5 * GB / 100_000),
]  # fmt: skip


@pytest.mark.parametrize(("free", "each", "tokens"), GPUS)
def test_a_gpu_is_filled_to_a_share_of_what_is_free(monkeypatch, free, each, tokens):
    """Two GPUs, and 3 GB reserved by the allocator, of which 2 are in use."""
    for name, value in {
        "memory_allocated": lambda device: 2 * GB,
        "memory_reserved": lambda device: 3 * GB,
        "max_memory_allocated": lambda device: 2 * GB + PROBE * each[device.index],
        "mem_get_info": lambda device: (int(free[device.index] * GB), 80 * GB),
        "reset_peak_memory_stats": lambda device: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    assert found(torch.device("cuda", 0), torch.device("cuda", 1)) == max(int(tokens), PROBE)


@pytest.mark.parametrize(("free", "tokens"), [(64 * GB, 4096), (int(0.4 * GB), 3355), (1000, PROBE)])
def test_on_a_cpu_auto_is_the_default_where_memory_is_plenty_and_less_where_it_is_not(monkeypatch, free, tokens):
    """Never less than what has just gone through. A batch takes 128 MB here, in 2,000 tokens."""
    monkeypatch.setattr(memory, "free_ram", lambda: free)
    assert found(CPU, size=2000, between=lambda: np.ones(16_000_000).sum()) == pytest.approx(tokens, rel=0.1)
    assert found(torch.device("mps")) == memory.MOST["cpu"]  # what nobody can measure has a limit too


def test_small_batches_settle_nothing_and_a_failure_does():
    budget = TokenBudget("auto", lambda _: None)
    for _ in range(5):
        budget.watch([CPU])
        assert not budget.fitted(PROBE // 2 - 1)
    assert budget.open
    budget.halve(PROBE)
    budget.watch([CPU])
    assert (budget.tokens, budget.fitted(PROBE)) == (PROBE // 2, False)  # from here on it only shrinks


def test_free_memory_is_that_of_the_machine_or_of_the_container(tmp_path, monkeypatch):
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=5_000_000))
    (tmp_path / "memory").mkdir()

    def free(folder: str, limit: str, taken: str, stat: str) -> int:
        names = ("max", "current") if folder == "." else ("limit_in_bytes", "usage_in_bytes")
        for name, content in zip((*names, "stat"), (limit, taken, stat), strict=True):
            (tmp_path / folder / f"memory.{name}").write_text(content + "\n")
        return free_ram(tmp_path)

    assert free_ram(tmp_path) == 5_000_000
    assert free(".", "max", "1000000", "anon 5") == 5_000_000
    assert free(".", "3000000", "1000000", "anon 5") == 2_000_000
    assert free(".", "3000000", "1000000", "anon 5\ninactive_file 400000") == 2_400_000
    assert free(".", "3000000", "4000000", "anon 5\ninactive_file 400000") == 0
    assert free(".", "max", "1", "") == 5_000_000
    assert free("memory", "700000", "600000", "inactive_file 7\ntotal_inactive_file 1000") == 101_000


LIMITED = """
import json, resource, sys
sys.path[:0] = sys.argv[1:2]
import numpy as np, torch
torch.set_num_threads(1)
from tests.helpers.oracle import make_rollouts
from tests.helpers.scoring import TEACHERS
from ketchup_cache.models.memory import TokenBudget
from ketchup_cache.types import Ragged
rng = np.random.default_rng(0)
prompts = Ragged.from_rows([[*rng.integers(3, 60, size=300), 1] for _ in range(400)], np.int32)
rollouts = make_rollouts(range(400), [[5, 6, 1]] * 400, [True] * 400)
teacher = TEACHERS["1.0"]
small = teacher.score(prompts, rollouts, batch_tokens=1000)
taken = int(next(l for l in open("/proc/self/status") if l.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (taken + 24 * 2**20,) * 2)
budget = TokenBudget(200_000)
large = teacher.score(prompts, rollouts, batch_tokens=budget)
print(json.dumps([float(np.abs(small.q - large.q).max()), budget.tokens]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's limit of a process's memory")
def test_a_process_that_may_have_no_more_memory_goes_on():
    """The real thing: 400 rows of 304 tokens take more than the 24 MB that may be had."""
    command = [sys.executable, "-c", LIMITED, str(Path(__file__).parents[2])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    difference, found = json.loads(done.stdout)
    assert difference < 1e-4
    assert 300 <= found < 400 * 304
    assert done.stderr.splitlines()[0].startswith("ketchup-cache: out of memory at a batch of 121,600 tokens")


# ------------------------------------------------------------------------------------------------------- in `score`


def run_score(tmp_path, segments: int, batch_tokens, **given):
    """Score random rollouts, check the scores, and return the report."""
    folder, path = save_model(tmp_path / "teacher", "1.1"), tmp_path / "cache"
    cache = open_cache(path, create=True)
    ids = [add_rollouts(cache, *random_rollouts(n, 30, prompts=5), policy=n) for n in range(segments)]
    report = score(options(cache, folder, batch_tokens=batch_tokens, **given))
    assert_scored(open_cache(path), folder, ids)
    assert report.batch_tokens == report.to_dict()["batch_tokens"]
    return report


def test_score_keeps_the_budget_from_segment_to_segment_and_reports_it(tmp_path, monkeypatch, capsys):
    sizes, own = [], Teacher._score_batch

    def limited(self, batch, *rest):
        sizes.append(batch.size(once=False))
        if sizes[-1] > 40:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(self, batch, *rest)

    monkeypatch.setattr(Teacher, "_score_batch", limited)
    report = run_score(tmp_path, 3, 1000, commit_tokens=40)
    assert report.segments > 4
    lines = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    limits = [int(line.split()[-1]) for line in lines]
    said = r"ketchup-cache: out of memory at a batch of \d+ tokens: going on .*"
    assert all(re.fullmatch(said, line) for line in lines)
    assert limits == sorted(set(limits), reverse=True)
    assert report.batch_tokens == limits[-1] <= 40
    assert str(report).endswith(f" s, in batches of up to {limits[-1]} tokens")
    assert sum(size > 40 for size in sizes) == len(limits) <= 3  # not again in every segment


@pytest.mark.parametrize(("peak", "tokens"), [(1, 4096), (2 * 10**6, 40)])
def test_auto_in_score_is_found_in_the_second_full_batch(tmp_path, monkeypatch, capsys, peak, tokens):
    """The size is said where memory is what limits it."""
    for name, value in {"PROBE": 40, "used": lambda d: 0, "peak": lambda d: peak, "free": lambda d: 1000}.items():
        monkeypatch.setattr(memory, name, value)
    assert run_score(tmp_path, 1, "auto").batch_tokens == tokens
    said = f"ketchup-cache: batches of up to {tokens} tokens fit into memory (--batch-tokens auto)"
    assert capsys.readouterr().err.splitlines().count(said) == (tokens < 4096)
