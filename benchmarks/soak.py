"""The trust figures, in their long form: `make soak`, or `python benchmarks/soak.py [--share 0.1] [--out FILE]`.

Prints a line of counts for each kind of trouble, and fails where one is not as it must be (docs/trust.md).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import pytest
from caches import make_cache
from test_compact import small_segments
from tiny import save_model
from trust import ERRORS, Kills, fail_every_step, flips, kill_command, kill_writers, write_at_once

import ketchup_cache.learn.loop
import ketchup_cache.score  # noqa: F401  (loaded here once, not in every child)
from ketchup_cache.store.cache import open_cache

GOOD = {"lost": 0, "partial": 0, "torn": 0, "silent": 0, "false_acknowledgements": 0, "unclear": 0}
"""What every count of these names must be."""


def kill_compact(folder: Path, times: int) -> Kills:
    cache, into = small_segments(folder / "compact"), folder / "into"
    words = ["compact", str(cache.path), "--into", str(into), "--segment-tokens", "5"]

    def reset() -> None:
        shutil.rmtree(into, ignore_errors=True)
        open_cache(into, create=True)

    return kill_command(words, into, reset, times)


def kill_score(folder: Path, times: int) -> Kills:
    student, teacher = models(folder)
    base, root = folder / "unscored", folder / "scored"
    make_cache(base, student, teacher, prompts=12, segments=3)
    for segment_id, _ in open_cache(base).manifests("scores"):
        (base / "manifests" / f"{segment_id}.json").unlink()
        shutil.rmtree(base / "segments" / segment_id)
    words = ["score", "--teacher", str(teacher), "--cache", str(root), "--commit-tokens", "12", "--device", "cpu"]
    return kill_command(words, root, lambda: copy(base, root), times)


def kill_learn(folder: Path, times: int) -> Kills:
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
    parser.add_argument("--only", default="", help="only what has this in its name")
    parser.add_argument("--out", type=Path, help="write the counts as JSON")
    arguments = parser.parse_args()

    def cases(number: int) -> int:
        return max(1, round(number * arguments.share))

    troubles: dict[str, Callable[[Path], Any]] = {
        "kill a writer": lambda folder: kill_writers(folder, cases(840)),
        "kill compact": lambda folder: kill_compact(folder, cases(100)),
        "kill score": lambda folder: kill_score(folder, cases(40)),
        "kill learn": lambda folder: kill_learn(folder, cases(20)),
        "fail a write": lambda folder: fail_every_step(folder, pytest.MonkeyPatch, ERRORS, round(1 / arguments.share)),
        "flip a bit or byte": lambda folder: flips(folder, cases(10_000)),
        "16 writers and a reader": lambda folder: write_at_once(folder, 16, cases(100)),
    }
    results, bad = {}, 0
    for name, trouble in troubles.items():
        if arguments.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            began = time.monotonic()
            counts = asdict(trouble(Path(folder)))
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
