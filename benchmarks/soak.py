"""The trust figures, in their long form: `make soak`, or `python -m benchmarks.soak [--share 0.1] [--out FILE]`.

Prints a line of counts for each kind of trouble, and fails where one is not as it must be (docs/trust.md).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import pytest

from ketchup_cache import open_cache
from ketchup_cache.cache.inspect import clean, verify
from tests.helpers.caches import make_cache
from tests.helpers.models import save_model
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

NONE = "lost partial torn silent false_acknowledgements unclear two_creators early"
GOOD = dict.fromkeys(NONE.split(), 0)
"""What every count of these names must be."""


def kill_command(words: list[str], root: Path, reset: Callable[[], object], times: int, seed: int = 0) -> Count:
    """Kill a command of ours at random moments; each run goes on where the last one was. Any command that commits to
    the cache in `root` will do.

    reset: sets the scene, before the first run and whenever the command has finished.
    """
    count = kills()
    reset()
    began = time.monotonic()
    _, killed = run_and_kill(lambda: run(words), 600)
    assert not killed
    whole = time.monotonic() - began
    rng = random.Random(seed)
    while count.kills < times:
        reset()
        some = min(times - count.kills, rng.randint(1, 6))  # kills in a row, each run going on from the one before
        kill_at_random(lambda: run(words), root, count, some, 0.9 * whole, rng.randrange(10**9))
        assert verify(open_cache(root)).ok
    _, killed = run_and_kill(lambda: run(words), 600)  # and at last it finishes
    assert not killed
    assert verify(open_cache(root)).ok
    return count


def kill_score(folder: Path, times: int) -> Count:
    student, teacher = models(folder)
    base, root = folder / "unscored", folder / "scored"
    make_cache(base, student, teacher, prompts=12, segments=3)
    for segment_id, _ in open_cache(base).manifests("scores"):
        (base / "manifests" / f"{segment_id}.json").unlink()
        shutil.rmtree(base / "segments" / segment_id)
    words = ["score", "--teacher", str(teacher), "--cache", str(root), "--commit-tokens", "12", "--device", "cpu"]
    return kill_command(words, root, lambda: copy(base, root), times)


def kill_learn(folder: Path, times: int) -> Count:
    student, teacher = models(folder)
    base, root, out = folder / "learn", folder / "learning", folder / "run"
    make_cache(base, student, teacher, prompts=12)
    words = ["learn", "--student", str(student), "--teacher", str(teacher), "--cache", str(root), "--out", str(out)]
    words += "--steps 6 --refresh-every 2 --batch-size 8 --samples 2 --max-new-tokens 6 --checkpoint-every 2".split()
    words += "--unfinished bootstrap --device cpu".split()

    def reset() -> None:
        shutil.rmtree(out, ignore_errors=True)
        copy(base, root)

    return kill_command(words, root, reset, times)


def kill_copy(folder: Path, times: int, command: str) -> Count:
    """push, pull or merge from folder to folder, as on a shared file system, into a cache that holds something."""
    source, own, into = (folder / f"{command} {name}" for name in ("from", "own", "to"))
    families(source)
    fill(own, seed=100)
    given, words = [source, own], [command, str(source), str(into)]
    if command == "merge":
        fill(folder / "other", seed=101)
        given, words = [*given, folder / "other"], [command, str(source), str(folder / "other"), "--into", str(into)]
    count = kill_command(words, into, lambda: copy(own, into), times)
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of all cases")
    parser.add_argument("--only", action="append", help="only what has this in its name; may be given several times")
    parser.add_argument("--out", type=Path, help="write the counts as JSON")
    arguments = parser.parse_args()

    def cases(number: int) -> int:
        return max(1, round(number * arguments.share))

    troubles: dict[str, Callable[[Path], Any]] = {
        "kill a writer": lambda folder: kill_writers(folder, cases(680)),
        "kill push": lambda folder: kill_copy(folder, cases(60), "push"),
        "kill pull": lambda folder: kill_copy(folder, cases(60), "pull"),
        "kill merge": lambda folder: kill_copy(folder, cases(60), "merge"),
        "kill verify --clean": lambda folder: kill_clean(folder / "cleaned", cases(40)),
        "kill a push to S3": lambda folder: kill_copies(folder, cases(20), pull=False),
        "kill a pull from S3": lambda folder: kill_copies(folder, cases(20), pull=True),
        "kill score": lambda folder: kill_score(folder, cases(40)),
        "kill learn": lambda folder: kill_learn(folder, cases(20)),
        "fail a write": lambda folder: fail_every_step(folder, pytest.MonkeyPatch, ERRORS, round(1 / arguments.share)),
        "flip a bit or byte": lambda folder: flips(folder, cases(10_000)),
        "8 writers of the same keys on S3": lambda folder: writers_on_s3(folder, cases(100)),
        "16 writers and a reader": lambda folder: write_at_once(folder, 16, cases(100)),
    }
    held = json.loads(arguments.out.read_text()) if arguments.only and arguments.out and arguments.out.exists() else {}
    results, bad = {key: counts for key, counts in held.items() if key != "machine"}, 0
    for name, trouble in troubles.items():
        if arguments.only and not any(part in name for part in arguments.only):
            continue
        with tempfile.TemporaryDirectory() as folder:
            began = time.monotonic()
            counts = vars(trouble(Path(folder)))
            seconds = round(time.monotonic() - began, 1)
        wrong = {key: n for key, n in counts.items() if n != GOOD.get(key, n)}
        bad += bool(wrong)
        results[name] = counts | {"seconds": seconds}
        shown = ", ".join(f"{key.replace('_', ' ')} {n:,}" for key, n in counts.items())
        print(f"{'WRONG' if wrong else 'ok'}  {name}: {shown} ({seconds} s)", flush=True)
        if arguments.out:
            arguments.out.write_text(
                json.dumps({"machine": f"{os.cpu_count()} cores, {platform.system()}", **results}, indent=1) + "\n"
            )
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
