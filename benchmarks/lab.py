"""What a lab's cache costs as it grows: to open, to give the first batch, to extend, to verify.

    python -m benchmarks.lab [--refreshes 2000,10000] [--keep FOLDER]

50 runs by each of 5 people, each refreshing its rollouts 8 times, are 2,000 refreshes in a year, each a segment of
rollouts and one of their scores; 10,000 are 20,000 segments and 10⁸ completion tokens. All are written through
`open_cache` and `commit_…`, and held against a cache of 500 segments. Opening, the first batch and verifying are
processes of their own, and their memory is that above the imported package. With --keep the caches stay in FOLDER, and
one that is there is not made again. A commit waits for the disk.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.common import (
    T5_TOKENIZER,
    fingerprint,
    forget_peak,
    made_up_cache,
    options,
    peak,
    publish,
    run,
    sample,
    table,
    timed,
)
from benchmarks.growth import epoch
from ketchup_cache import open_cache
from ketchup_cache.cache.inspect import verify
from ketchup_cache.cache.manifest import PromptsInfo, RolloutsInfo, ScoresInfo
from ketchup_cache.cache.segment_bytes import KeyedStore
from ketchup_cache.provenance import DataInfo, PolicyInfo, Sampling, TeacherInfo
from ketchup_cache.training.batches import Stream

SMALL, EVERY, ROWS = 248, 8, 400
"""Refreshes of the cache that others are held against; of a run; rollouts of each, of 25 tokens on average."""
TEACHER = TeacherInfo(name="teacher", fingerprint=fingerprint("teacher"), dtype="float32")


def made(path: Path, refreshes: int) -> dict[str, list[float]]:
    """Seconds of each run: to open the cache and to look what is scored; to commit a refresh."""
    cache, given = open_cache(path, create=True), {"tokenizer": T5_TOKENIZER}
    data = DataInfo(name="made up", fingerprint=fingerprint("made up"), template="{prompt}")
    parts = [sample(0, ROWS, first=i * ROWS) for i in range(EVERY)]
    starts = [PromptsInfo(data=data, start=i * len(part.prompts), **given) for i, part in enumerate(parts)]
    prompts = [cache.commit_prompts(part.prompts, info) for part, info in zip(parts, starts, strict=True)]
    seconds: dict[str, list[float]] = {"look": [], "commit": []}
    for number in range(refreshes // EVERY):
        began = time.perf_counter()
        cache = open_cache(path)
        cache.index.scored(TEACHER.fingerprint)
        cache.unscored(TEACHER.fingerprint)
        looked = time.perf_counter()
        for phase, part in enumerate(parts):
            step, name = EVERY * phase, f"runs/{number}"
            made_by: dict[str, Any] = {
                "policy": PolicyInfo(name=name, fingerprint=fingerprint(f"{name} {step}"), step=step)
            }
            made_by |= {"sampling": Sampling(samples=4, seed=phase), **given}
            info = RolloutsInfo(prompts=prompts[phase], prompt_start=0, prompt_stop=len(part.prompts), **made_by)
            rollouts = cache.commit_rollouts(part.rollouts, info)
            of_all = {"row_start": 0, "row_stop": len(part)}
            cache.commit_scores(part.scores, ScoresInfo(rollouts=rollouts, teacher=TEACHER, **of_all, **given))
        seconds["look"].append(looked - began)
        seconds["commit"].append((time.perf_counter() - looked) / EVERY)
    return seconds


def look(what: str, path: str) -> None:
    """In a process of its own: prints seconds and bytes."""
    before, cache = forget_peak(), open_cache(path)
    if what in ("verify", "epoch"):
        cache.load(cache.segment_ids()[0])  # imports what decodes
    work: dict[str, Callable[[], Any]] = {
        "open": cache.segment_ids,
        "batch": lambda: next(Stream(cache, cache.scored(), 256, 0, batches=1)),
        "verify": lambda: verify(cache).ok or sys.exit("damaged"),
        "epoch": lambda: epoch(Path(path)),
    }
    seconds, cpu_seconds, _ = timed(work[what])
    used = {"seconds": seconds, "cpu_seconds": cpu_seconds, "bytes": peak() - before}
    print(json.dumps({**used, "segments": len(cache.segment_ids())}))


def once(what: str, path: Path) -> dict[str, float]:
    done = run(sys.executable, "-m", "benchmarks.lab", "--look", f"{what}:{path}")
    found: dict[str, float] = json.loads(done["output"])
    return found


def measured(path: Path) -> dict[str, Any]:
    cache = open_cache(path)
    tokens = sum(entry.tokens for _, entry in cache.manifests("scores"))
    size = sum(entry.data_bytes + entry.manifest_bytes for _, entry in cache.manifests())
    (path / KeyedStore.INDEX).unlink(missing_ok=True)
    found = {"first": once("open", path)} | {what: once(what, path) for what in ("open", "batch", "verify")}
    return {"tokens": tokens, "disk_bytes": size, **found}


def drawn(caches: Sequence[Mapping[str, Any]]) -> str:
    """The table, which docs/growth.md has too."""
    rows = []
    for found in caches:
        each = [c["verify"]["cpu_seconds"] / c["verify"]["segments"] for c in (found, caches[0])]
        changes = [f"{1000 * a:.1f} → {1000 * b:.1f}" for a, b in (found.get(w, (0, 0)) for w in ("look", "commit"))]
        rows.append(
            (
                f"{found['refreshes']:,}",
                f"{found['open']['segments']:,}",
                f"{found['tokens']:,}",
                f"{found['disk_bytes'] / 1e6:,.0f} MB",
                f"{found['first']['seconds']:.2f}",
                f"{found['open']['seconds']:.2f}",
                f"{found['open']['bytes'] / 1e6:.0f} MB",
                f"{found['batch']['seconds']:.2f}",
                f"{1000 * each[0]:.2f} ({each[0] / each[1]:.2f})",
                *changes,
            )
        )
    head = (
        *("refreshes", "segments", "tokens", "disk", "open without index s", "open s", "memory", "first batch s"),
        *("verify, processor ms a segment (ratio)", "look ms, first → last tenth", "commit of a refresh ms"),
    )
    return table(head, rows)


def main() -> None:
    chosen = options(
        __doc__,
        refreshes=("2000,10000", "of each cache, beside the small one"),
        keep=("", "folder for the caches"),
        look=("", "what a process of its own looks at"),
    )
    if chosen.look:
        look(*chosen.look.split(":", 1))
        return
    sizes = [64, 128] if chosen.short else [SMALL, *map(int, chosen.refreshes.split(","))]
    caches: list[dict[str, Any]] = []
    epochs: list[tuple[int, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for refreshes in sizes:
            path = Path(chosen.keep or temporary) / f"lab-{refreshes}"
            seconds = {}
            if not path.exists():
                shutil.rmtree(half := path.with_suffix(".half"), ignore_errors=True)
                seconds = made(half, refreshes)
                half.rename(path)
            tenth = max(1, refreshes // EVERY // 10)
            grown = {what: [mean(times[:tenth]), mean(times[-tenth:])] for what, times in seconds.items()}
            caches.append({"refreshes": refreshes, **measured(path), **grown})
            if not epochs:
                made_up_cache(full := Path(temporary) / "full", int(caches[0]["tokens"]))
                tokens = [sum(e.tokens for _, e in open_cache(p).manifests("scores")) for p in (path, full)]
                epochs = [(n, once("epoch", p)) for n, p in zip(tokens, (path, full), strict=True)]
    print(drawn(caches))
    small, full = (tokens / found["cpu_seconds"] for tokens, found in epochs)
    print(f"\nloader: {small:,.0f} tokens for a second of processor time; of segments of 262,144 tokens {full:,.0f} "
          f"({full / small:.1f} times)")  # fmt: skip
    publish("lab", chosen, caches=caches, loader_tokens_per_cpu_second={"small segments": small, "full segments": full})


if __name__ == "__main__":
    main()
