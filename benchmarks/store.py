"""How fast the cache commits and loads, and how small it is: `python benchmarks/store.py [FOLDER [RESULTS.json]]`.

FOLDER is on the disk to be measured (default: the system's temporary folder). Speeds are of the arrays as they are in
memory. Other work on the machine slows them down: the load is printed, and so is the processor time that was used.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from ketchup_cache.compact import compact
from ketchup_cache.config import CompactConfig
from ketchup_cache.store.cache import Cache, open_cache
from ketchup_cache.store.manifest import (
    DataInfo,
    PolicyInfo,
    PromptsInfo,
    RolloutsInfo,
    Sampling,
    ScoresInfo,
    TeacherInfo,
    TokenizerInfo,
)
from ketchup_cache.types import Prompts, Ragged, Rollouts, ScoredRollouts, Scores, offsets_of

TOKENS, LENGTH, VOCAB, REPEATS = 1_000_000, 100, 32_100, 9
RESULTS: dict[str, object] = {}
CPU: list[float] = []
"""Processor seconds of each measurement, in their order."""


def fingerprint(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def sample(seed: int) -> tuple[Prompts, Rollouts, Scores]:
    """Like a teacher's: the student mostly picks the best token; T5-sized logits; Zipf-distributed ids."""
    rng = np.random.default_rng(seed)
    rows = TOKENS // LENGTH
    offsets = offsets_of(np.full(rows, LENGTH))
    ids = np.minimum(rng.zipf(1.3, TOKENS), VOCAB - 1).astype(np.int32)
    max_q = rng.normal(-2, 6, TOKENS).astype(np.float32)
    gap = np.where(rng.random(TOKENS) < 0.6, 0, rng.exponential(3, TOKENS)).astype(np.float32)
    logsumexp = max_q + np.minimum(rng.exponential(1, TOKENS), 10).astype(np.float32)
    mean_q = max_q - 20 + rng.normal(0, 3, TOKENS).astype(np.float32)
    prompts = Prompts(rng.integers(0, 256, (rows, 16)).astype(np.uint8), Ragged(ids, offsets))
    logprob = -rng.exponential(1, TOKENS).astype(np.float32)
    none, all_rows = np.zeros(TOKENS, np.bool_), np.ones(rows, np.bool_)
    rollouts = Rollouts(np.arange(rows), Ragged(ids, offsets), logprob, none, all_rows)
    return prompts, rollouts, Scores(max_q - gap, max_q, logsumexp, mean_q, np.zeros(rows, np.float32))


def seconds(work: Callable[[], object]) -> float:
    began, busy = time.perf_counter(), time.process_time()
    work()
    CPU.append(time.process_time() - busy)
    return time.perf_counter() - began


def stored_arrays(scores: Scores) -> dict[str, np.ndarray]:
    return {**scores.per_token(), "final_max_q": scores.final_max_q}


def raw_write(folder: Path, scores: Scores) -> None:
    """The yardstick: the same numbers as .npy files, neither compressed nor hashed nor synced."""
    for name, array in stored_arrays(scores).items():
        np.save(folder / f"{name}.npy", array)


def raw_read(folder: Path, scores: Scores) -> None:
    for name in stored_arrays(scores):
        np.load(folder / f"{name}.npy")


def main(where: str | None) -> None:
    with tempfile.TemporaryDirectory(dir=where) as temporary:
        folder = Path(temporary)
        cache = open_cache(folder / "cache", create=True)
        prompts, rollouts, scores = sample(0)
        tokenizer = TokenizerInfo(name="t5", fingerprint=fingerprint("t5"), vocab_size=VOCAB)
        data = DataInfo(name="made-up", fingerprint=fingerprint("data"), template="{prompt}")
        p = cache.commit_prompts(prompts, PromptsInfo(tokenizer=tokenizer, data=data, start=0))
        policy = PolicyInfo(name="student", fingerprint=fingerprint("student"))
        rows = len(rollouts)
        r_info = RolloutsInfo(
            prompts=p, prompt_start=0, prompt_stop=rows, policy=policy, tokenizer=tokenizer, sampling=Sampling()
        )
        r = cache.commit_rollouts(rollouts, r_info)
        teacher = TeacherInfo(name="teacher", fingerprint=fingerprint("teacher"), dtype="float32")
        info = ScoresInfo(rollouts=r, row_start=0, row_stop=rows, teacher=teacher, tokenizer=tokenizer)
        cache.load_rollouts(r)
        commits = [seconds(lambda: cache.commit_scores(scores, info)) for _ in range(REPEATS)]
        s = cache.manifests("scores")[-1][0]
        cache.load_scores(s)
        loads = [seconds(lambda: cache.load_scores(s)) for _ in range(REPEATS)]
        yard_write = [seconds(lambda: raw_write(folder, scores)) for _ in range(REPEATS)]
        yard_read = [seconds(lambda: raw_read(folder, scores)) for _ in range(REPEATS)]
        report(cache, r, s, scores, (commits, yard_write), (loads, yard_read))
        gathering(ScoredRollouts(prompts, rollouts, scores))
        small = open_cache(folder / "small", create=True)
        compact(CompactConfig(cache=cache.path, into=small.path))
        print("\ncompact:")
        sizes(small, *(small.manifests(kind)[-1][0] for kind in ("rollouts", "scores")))


def gathering(loaded: ScoredRollouts) -> None:
    """256 random rows with all their arrays, from memory."""
    rng = np.random.default_rng(0)
    times = []
    for _ in range(200):
        rows = rng.choice(len(loaded), 256, replace=False)
        times.append(seconds(partial(loaded.take, rows)))
    RESULTS["gather 256 rows, ms, median and best"] = [
        round(t * 1e3, 2) for t in (statistics.median(times), min(times))
    ]
    print(f"\ngather 256 rows of {LENGTH} tokens: {statistics.median(times) * 1e3:.2f} ms ({min(times) * 1e3:.2f})")


def report(
    cache: Cache,
    r: str,
    s: str,
    scores: Scores,
    writes: tuple[list[float], list[float]],
    reads: tuple[list[float], list[float]],
) -> None:
    megabytes = sum(array.nbytes for array in stored_arrays(scores).values()) / 1e6
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    print(f"one scores segment: {TOKENS:,} tokens, {megabytes:.1f} MB, median (and best) of {REPEATS}")
    print(f"load of the machine while measuring: {load:.1f} tasks for each of {os.cpu_count()} processors")
    RESULTS["tasks per processor while measuring"] = round(load, 1)
    for at, label in enumerate(("commit", "load")):
        busy = megabytes / min(CPU[at * REPEATS : (at + 1) * REPEATS])
        RESULTS[f"{label}, MB for a second of processor time"] = round(busy)
        print(f"{label}: {busy:.0f} MB for a second of processor time")
    print("| | seconds | MB/s | share of plain .npy, unsynced |\n| --- | --- | --- | --- |")
    for label, (times, yard) in (("commit, durable", writes), ("load, verified", reads)):
        middle = statistics.median(times)
        RESULTS[f"{label}, MB/s, median and best"] = [round(megabytes / middle), round(megabytes / min(times))]
        speed = f"{megabytes / middle:.0f} ({megabytes / min(times):.0f})"
        print(f"| {label} | {middle:.3f} ({min(times):.3f}) | {speed} | {statistics.median(yard) / middle:.0%} |")
    print(
        f"\nfiles: {len(cache.manifest(s).files)} a scores segment, {len(cache.manifest(r).files)} a rollouts segment"
    )
    sizes(cache, r, s)


def sizes(cache: Cache, r: str, s: str) -> None:
    files = {name: e.length for i in (r, s) for name, e in cache.manifest(i).files.items() if "/c/" in name}
    print("| | bytes/token |\n| --- | --- |")
    parts = {
        "q + max_q + token ids": ("q", "max_q", "gap", "completion_tokens"),
        "all scores": ("q", "max_q", "gap", "logsumexp", "logsumexp_gap", "mean_q", "mean_gap", "final_max_q"),
        "all scores and rollouts": tuple({name.split("/")[0] for name in files}),
    }
    for label, names in parts.items():
        stored = sum(size for name, size in files.items() if name.split("/")[0] in names) / TOKENS
        storage = cache.manifest(s).info.storage
        RESULTS[f"{label}, {storage}, bytes/token"] = round(stored, 2)
        print(f"| {label} | {stored:.2f} |")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
    if len(sys.argv) > 2:
        machine = f"{os.cpu_count()} cores, {platform.system()}"
        Path(sys.argv[2]).write_text(json.dumps({"machine": machine, **RESULTS}, indent=1) + "\n")
