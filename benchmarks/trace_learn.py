"""How far one has to walk to read what `learn(config)` does: `python -m benchmarks.trace_learn [--files]`.

Four optimizer steps on the shipped task `translate`, on-policy, with a teacher. Every function of the package that the
main thread calls is visited once, where it is called first. Counted are the files that are entered, and the visits that
lead back into a file that had been left before.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import ketchup_cache
from ketchup_cache.cli import main as cli
from ketchup_cache.config.commands import LearnConfig
from ketchup_cache.shipped import task
from ketchup_cache.training.learn import learn

ROOT = Path(ketchup_cache.__file__).parent
TASK = task("translate")


class Walk:
    """A profile function (`sys.setprofile`) that keeps the files in the order in which functions are visited."""

    def __init__(self) -> None:
        self.seen: set[CodeType] = set()
        self.files: list[str] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        # a name in angle brackets is that of a module, a lambda or a comprehension
        if event != "call" or code in self.seen or code.co_name[0] == "<" or not code.co_filename.startswith(str(ROOT)):
            return
        self.seen.add(code)
        file = Path(code.co_filename).relative_to(ROOT).as_posix()
        if self.files[-1:] != [file]:
            self.files.append(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", action="store_true", help="also print the files, in the order of the walk")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        cache, walk = Path(temporary) / "cache", Walk()
        data = ["--data", TASK / "prompts.jsonl", "--limit", 16, "--first", 1, "--max-new-tokens", 8]
        assert cli(["rollout", "--student", str(TASK / "student"), "--cache", str(cache), *map(str, data)]) == 0
        config = LearnConfig(
            student=str(TASK / "predistilled"), teacher=str(TASK / "teacher"), cache=cache, out=Path(temporary) / "run",
            steps=4, refresh_every=2, batch_size=8, max_new_tokens=8, device="cpu",
        )  # fmt: skip
        sys.setprofile(walk)
        learn(config)
        sys.setprofile(None)
    entered = len(set(walk.files))
    print(f"{entered} files are entered, {len(walk.files) - entered} visits lead back into one that had been left")
    if chosen.files:
        print("\n".join(walk.files))


if __name__ == "__main__":
    main()
