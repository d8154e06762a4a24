"""The trust figures, in their long form: `make soak MINUTES=40`, or `python -m benchmarks.soak --minutes 40`.

Each round draws a seed, makes one kind of trouble, and adds what came of it to the tally in
benchmarks/results/soak.json and docs/trust.md. Ends with code 1 where something is not as it must be.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import pytest

from benchmarks import soak_damage as damage, soak_processes as processes
from ketchup_cache import open_cache
from ketchup_cache.cache.inspect import clean, verify
from ketchup_cache.files import write_file
from ketchup_cache.sharing import transfer
from tests.helpers.caches import make_cache
from tests.helpers.models import save_model, write_prompts
from tests.helpers.segments import contents, fill
from tests.helpers.stores import KEYS, emulated_s3, families, kill_copies, make_bucket, same_keys
from tests.helpers.trust import (
    ERRORS,
    Count,
    fail_every_step,
    flips,
    kill_at_random,
    kill_clean,
    kill_writers,
    kills,
    run,
    run_and_kill,
    write_at_once,
)

ROOT = Path(__file__).parents[1]
RESULTS, DOCS = ROOT / "benchmarks/results/soak.json", ROOT / "docs/trust.md"
BEGIN, END = "<!-- written by benchmarks/soak.py -->", "<!-- end -->"
NONE = "lost partial torn silent false_acknowledgements unclear two_creators early different accepted slow twice"
GOOD = dict.fromkeys(NONE.split(), 0)
"""What every count of these names must be."""


def kill_command(
    words: list[str],
    root: Path,
    reset: Callable[[], object],
    times: int,
    seed: int = 0,
    grow: Callable[[int], object] = lambda number: None,
    result: Callable[[], object] = lambda: None,
) -> Count:
    """Kill a command of ours at random moments; each run goes on where the last one was. Any command that commits to
    the cache in `root` will do.

    reset: sets the scene, before the first run and whenever the command has finished. grow: what somebody else adds to
    the cache after the n-th kill. result: what the command leaves; it must be that of a run that nobody killed, in a
    cache that did not grow.
    """
    count, rng = kills(), random.Random(seed)
    count.different = 0
    reset()
    began = time.monotonic()
    _, killed = run_and_kill(lambda: run(words), 600)
    assert not killed
    whole, wanted = time.monotonic() - began, result()

    def attempt(work: Callable[[], object], after_s: float) -> tuple[set[str], bool]:
        said = run_and_kill(work, after_s)
        grow(count.kills)
        return said

    while count.kills < times:
        reset()
        some = min(times - count.kills, rng.randint(1, 6))  # kills in a row, each run going on from the one before
        kill_at_random(lambda: run(words), root, count, some, 0.9 * whole, rng.randrange(10**9), attempt)
        _, killed = run_and_kill(lambda: run(words), 600)  # and at last it finishes
        assert not killed
        count.different += result() != wanted
        assert verify(open_cache(root)).ok
    return count


def kill_score(folder: Path, times: int, seed: int) -> Count:
    student, teacher = models(folder)
    base, root = folder / "unscored", folder / "scored"
    make_cache(base, student, teacher, prompts=12, segments=3)
    unscore(base)
    words = ["score", "--teacher", str(teacher), "--cache", str(root), "--commit-tokens", "12", "--device", "cpu"]
    return kill_command(words, root, lambda: copy(base, root), times, seed, others(folder, root))


def unscore(root: Path) -> None:
    for segment_id, _ in open_cache(root).manifests("scores"):
        (root / "manifests" / f"{segment_id}.json").unlink()
        shutil.rmtree(root / "segments" / segment_id)


def others(folder: Path, root: Path) -> Callable[[int], object]:
    """Rollouts of the same student and of another, scored, that come into a cache after the n-th kill."""
    student, teacher = models(folder)
    for number in range(4):
        policy = teacher if number % 2 else student
        make_cache(folder / f"other {number}", policy, teacher, prompts=3, seed=10 + number)
    return lambda number: transfer.copy(folder / f"other {number % 4}", root)


def fingerprint(out: Path) -> str:
    """Of the weights that a run ended with."""
    return json.loads((out / "report.json").read_text())["fingerprint"]


TRAINING = "--batch-size 8 --max-new-tokens 6 --checkpoint-every 1 --device cpu".split()
ON_POLICY = "--steps 6 --refresh-every 2 --samples 2 --unfinished bootstrap".split()


def kill_training(folder: Path, times: int, seed: int, command: str, *more: str) -> Count:
    """`learn` with and without a teacher, or `pretrain`, in a cache that grows: the weights stay the same."""
    student, teacher = models(folder)
    base, root, out = folder / "base", folder / "cache", folder / "run"
    make_cache(base, student, teacher, prompts=12)
    model = ["--model" if command == "pretrain" else "--student", str(student), "--cache", str(root)]
    words = [command, *model, "--out", str(out), *TRAINING, *(word.format(teacher=teacher) for word in more)]

    def reset() -> None:
        shutil.rmtree(out, ignore_errors=True)
        copy(base, root)

    add = others(folder, root)

    def grow(number: int) -> None:
        if (out / "config.json").exists():  # else the run has not begun, and may read all that is there
            add(number)

    return kill_command(words, root, reset, times, seed, grow, lambda: fingerprint(out))


def kill_ranks(folder: Path, times: int, seed: int, command: str) -> Count:
    """`score`, or `learn` that samples and scores, in two processes."""
    student, teacher = models(folder)
    base, root, out = folder / "base", folder / "cache", folder / "run"
    make_cache(base, student, teacher, prompts=12, segments=3)
    words = [command, "--teacher", str(teacher), "--cache", str(root), "--device", "cpu"]
    if command == "score":
        unscore(base)
        words += ["--commit-tokens", "12"]
    else:
        words += ["--student", str(student), "--out", str(out), *TRAINING, *ON_POLICY]

    def reset() -> None:
        shutil.rmtree(out, ignore_errors=True)
        copy(base, root)

    def result() -> Any:
        return processes.values(root) if command == "score" else fingerprint(out)

    def watched() -> set[str]:
        return {path.name for place in (root / "manifests", out / "checkpoints") for path in place.glob("*")}

    return processes.kill_ranks(words, watched, root, reset, result, times, seed)


def kill_workers(folder: Path, times: int, seed: int) -> Count:
    """In a process of its own: the others here are forked, and Ray has threads."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(processes.kill_workers, folder, models(folder), times, seed).result()


def kill_rollout(folder: Path, times: int, seed: int) -> Count:
    student, _ = models(folder)
    root, data = folder / "rollouts", write_prompts(folder / "prompts.jsonl", 40, seed=seed)
    words = ["rollout", "--student", str(student), "--data", str(data), "--cache", str(root), "--samples", "4"]
    words += "--max-new-tokens 6 --rollout-batch 8 --device cpu".split()
    return kill_command(words, root, lambda: shutil.rmtree(root, ignore_errors=True), times, seed, others(folder, root))


def kill_copy(folder: Path, times: int, command: str, seed: int = 0) -> Count:
    """push, pull or merge from folder to folder, as on a shared file system, into a cache that holds something."""
    source, own, into = (folder / f"{command} {name}" for name in ("from", "own", "to"))
    families(source)
    fill(own, seed=100)
    given, words = [source, own], [command, str(source), str(into)]
    if command == "merge":
        fill(folder / "other", seed=101)
        given, words = [*given, folder / "other"], [command, str(source), str(folder / "other"), "--into", str(into)]
    count = kill_command(words, into, lambda: copy(own, into), times, seed)
    clean(open_cache(into), hours=0)
    assert verify(open_cache(into)).leftovers == ()
    assert contents(into) == {name: data for root in given for name, data in contents(root).items()}
    return count


def writers_on_s3(folder: Path, segments: int) -> Count:
    with emulated_s3() as endpoint:
        os.environ |= {"AWS_ENDPOINT_URL": endpoint, **KEYS}
        return same_keys(folder, f"s3://{make_bucket(endpoint)}/cache", 8, segments)


def models(folder: Path) -> tuple[Path, Path]:
    if not (folder / "teacher").exists():
        save_model(folder / "student", "1.0", seed=1)
        save_model(folder / "teacher", "1.1", seed=2)
    return folder / "student", folder / "teacher"


def copy(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


def troubles(folder: Path, seed: int, share: float) -> dict[str, tuple[str, int, Callable[[], Any]]]:
    """Name → which of its counts is how many were made, how many there should be at least, and one round of it."""

    def some(number: int) -> int:
        return max(1, round(number * share))

    on_policy = ["--teacher", "{teacher}", *ON_POLICY]
    offline = "--epochs 2 --unfinished bootstrap".split()
    s3 = some(6)
    return {
        "kill score": ("kills", 60, lambda: kill_score(folder, some(10), seed)),
        "kill learn": ("kills", 60, lambda: kill_training(folder, some(8), seed, "learn", *on_policy)),
        "kill learn, offline": ("kills", 60, lambda: kill_training(folder, some(8), seed, "learn", *offline)),
        "kill pretrain": ("kills", 60, lambda: kill_training(folder, some(8), seed, "pretrain", "--epochs", "2")),
        "kill rollout": ("kills", 60, lambda: kill_rollout(folder, some(8), seed)),
        "kill a rank of learn": ("kills", 20, lambda: kill_ranks(folder, some(5), seed, "learn")),
        "kill a rank of score": ("kills", 20, lambda: kill_ranks(folder, some(5), seed, "score")),
        "kill a Ray worker": ("kills", 20, lambda: kill_workers(folder, some(10), seed)),
        "corrupt the folder of a run": ("cases", 1_000, lambda: damage.run_folders(folder, some(100), seed)),
        "forge a segment": ("cases", 100, lambda: damage.forged(folder, some(100), seed)),
        "hostile configs, models and servers": ("cases", 50, lambda: damage.hostile(folder)),
        "flip a bit or byte": ("cases", 10_000, lambda: flips(folder, some(2_000), seed)),
        "fail a write": (
            "failures",
            100,
            lambda: fail_every_step(folder, pytest.MonkeyPatch, ERRORS, round(1 / share)),
        ),
        "kill a writer": ("kills", 60, lambda: kill_writers(folder, some(40), seed)),
        "kill push": ("kills", 60, lambda: kill_copy(folder, some(20), "push", seed)),
        "kill pull": ("kills", 60, lambda: kill_copy(folder, some(20), "pull", seed)),
        "kill merge": ("kills", 60, lambda: kill_copy(folder, some(20), "merge", seed)),
        "kill verify --clean": ("kills", 60, lambda: kill_clean(folder / "cleaned", some(20), seed=seed)),
        "kill a push to S3": ("kills", 20, lambda: kill_copies(folder, s3, pull=False, seed=seed)),
        "kill a pull from S3": ("kills", 20, lambda: kill_copies(folder, s3, pull=True, seed=seed)),
        "8 writers of the same keys on S3": ("objects", 100, lambda: writers_on_s3(folder, some(50))),
        "16 writers and a reader": ("segments", 100, lambda: write_at_once(folder, 16, some(20))),
    }


def table(tally: dict[str, Any]) -> str:
    """The rows of docs/trust.md."""
    rows = []
    for name, counts in tally.items():
        if isinstance(counts, dict):
            shown = ", ".join(f"{key.replace('_', ' ')} {n:,}" for key, n in counts.items() if key != "seconds")
            rows.append(f"| {name} | {shown} |")
    return "\n".join(["| fault | made, and what came of it |", "| --- | --- |", *rows])


def write_docs(tally: dict[str, Any], page: Path = DOCS) -> None:
    before, _, rest = page.read_text().partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{table(tally)}\n\n{END}{rest.partition(END)[2]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=15.0, help="begin no further round after these")
    parser.add_argument("--share", type=float, default=1.0, help="of the cases of a round")
    parser.add_argument(
        "--only", action="append", default=[], help="what has this in its name; may be given repeatedly"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="the tally, to which the counts are added")
    arguments = parser.parse_args()
    tally: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    ends, bad, rounds = time.monotonic() + 60 * arguments.minutes, 0, dict.fromkeys(troubles(Path(), 0, 1.0), 0)
    wanted = [name for name in rounds if not arguments.only or any(part in name for part in arguments.only)]
    while time.monotonic() < ends:
        seed = random.SystemRandom().randrange(2**32)
        with tempfile.TemporaryDirectory() as folder:
            known = troubles(Path(folder), seed, arguments.share)
            # first what is furthest from its number, then all in turn
            name = min(wanted, key=lambda n: (min(1, tally.get(n, {}).get(known[n][0], 0) / known[n][1]), rounds[n]))
            began, rounds[name] = time.monotonic(), rounds[name] + 1
            counts = vars(known[name][2]()) | {"seconds": 0}
            counts["seconds"] = round(time.monotonic() - began)
        wrong = {key: n for key, n in counts.items() if n != GOOD.get(key, n)}
        bad += bool(wrong)
        held = tally.setdefault(name, {})
        tally[name] = held | {key: held.get(key, 0) + n for key, n in counts.items()}
        print(f"{'WRONG' if wrong else 'ok'}  {name}, seed {seed}: {counts}", flush=True)
        tally["machine"] = f"{os.cpu_count()} cores, {platform.system()}"
        write_file(arguments.out, (json.dumps(tally, indent=1) + "\n").encode())
        if arguments.out == RESULTS:
            write_docs(tally)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
