"""How fast the cache commits, loads and gathers, and how small it is.

    python -m benchmarks.store [--folder DISK]

One scores segment of a million tokens, in rows of 100. Speeds are of the arrays as they are in memory, beside two
yardsticks in the same run: the same numbers as plain .npy files, neither compressed nor hashed nor synced; and what the
disk itself takes for the segment's files, written and synced one after the other with nothing else to do.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.common import commit_rollouts, options, publish, sample, table, timed
from ketchup_cache.cache.cache import Cache, open_cache
from ketchup_cache.types import ScoredRollouts, Scores

LENGTH = 100


def stored_arrays(scores: Scores) -> dict[str, np.ndarray]:
    return {**scores.per_token(), "final_max_q": scores.final_max_q}


def plain_write(folder: Path, scores: Scores) -> None:
    for name, array in stored_arrays(scores).items():
        np.save(folder / f"{name}.npy", array)


def plain_read(folder: Path, scores: Scores) -> None:
    for name in stored_arrays(scores):
        np.load(folder / f"{name}.npy")


def disk_alone(folder: Path, files: list[bytes]) -> None:
    """New files each time, as a commit makes them; the folder's name is not counted."""
    where = Path(tempfile.mkdtemp(dir=folder))
    for number, data in enumerate(files):
        with open(where / str(number), "wb", buffering=0) as file:
            file.write(data)
            os.fsync(file.fileno())


def speeds(cache: Cache, part: ScoredRollouts, repeats: int) -> tuple[dict[str, object], tuple[str, str]]:
    """Megabytes a second of everything, and the ids of the rollouts and the scores."""
    scores, folder = part.scores, cache.path.parent
    info = commit_rollouts(cache, part, samples=1)
    s = cache.commit_scores(scores, info)
    cache.load_scores(s)
    files = [(cache.path / "segments" / s / name).read_bytes() for name in cache.manifest(s).files]
    groups: list[dict[str, Callable[[], object]]] = [  # each in turn; what leaves work for the disk comes last
        {
            "commit, durable": lambda: cache.commit_scores(scores, info),
            "its files, written and synced by nobody else": lambda: disk_alone(folder, files),
        },
        {"load, verified": lambda: cache.load_scores(s)},
        {"plain .npy, written, not synced": lambda: plain_write(folder, scores)},
        {"plain .npy, read": lambda: plain_read(folder, scores)},
    ]
    taken: dict[str, list[tuple[float, float]]] = {name: [] for calls in groups for name in calls}
    for calls in groups:
        for _ in range(repeats):
            for name, call in calls.items():
                wall, cpu, _ = timed(call)
                taken[name].append((wall, cpu))
    megabytes = sum(array.nbytes for array in stored_arrays(scores).values()) / 1e6
    results: dict[str, object] = {}
    rows = []
    for name, times in taken.items():
        wall, cpu = (sorted(column) for column in zip(*times, strict=True))
        middle, best, busy = (round(megabytes / x) for x in (statistics.median(wall), wall[0], max(cpu[0], 1e-9)))
        results[f"{name}, MB/s, median and best"] = [middle, best]
        results[f"{name}, MB for a second of processor time"] = busy
        rows.append((name, f"{statistics.median(wall):.3f} ({wall[0]:.3f})", f"{middle} ({best})", busy))
    print(f"one scores segment: {len(scores.q):,} tokens, {megabytes:.1f} MB, median (and best) of {repeats}")
    print(table(("", "seconds", "MB/s", "MB for a CPU second"), rows))
    return results, (info.rollouts, s)


def gathering(part: ScoredRollouts, label: str) -> dict[str, object]:
    """256 random rows with all their arrays, from memory."""
    rng, times = np.random.default_rng(0), []
    for _ in range(200):
        rows = rng.choice(len(part), 256, replace=False)
        times.append(timed(lambda: part.take(rows))[0] * 1e3)  # noqa: B023
    print(f"gather 256 rows of {label}: {statistics.median(times):.2f} ms ({min(times):.2f})")
    return {
        f"gather 256 rows of {label}, ms, median and best": [round(statistics.median(times), 2), round(min(times), 2)]
    }


def sizes(cache: Cache, r: str, s: str) -> dict[str, object]:
    files = {name: e.length for i in (r, s) for name, e in cache.manifest(i).files.items() if "/c/" in name}
    parts = {
        "q + max_q + token ids": ("q", "max_q", "gap", "completion_tokens"),
        "all scores": ("q", "max_q", "gap", "logsumexp", "logsumexp_gap", "mean_q", "mean_gap", "final_max_q"),
        "all scores and rollouts": tuple({name.split("/")[0] for name in files}),
    }
    results: dict[str, object] = {}
    storage = cache.manifest(s).info.storage  # type: ignore[union-attr]
    for label, names in parts.items():
        stored = sum(size for name, size in files.items() if name.split("/")[0] in names) / cache.manifest(s).tokens
        results[f"{label}, {storage}, bytes/token"] = round(stored, 2)
    print("\n" + table((storage, "bytes/token"), list(results.items())))
    return results


def main() -> None:
    chosen = options(
        __doc__,
        folder=(tempfile.gettempdir(), "where the cache is made and deleted: the disk to be measured"),
        repeats=(15, "times each is measured"),
    )
    with tempfile.TemporaryDirectory(dir=chosen.folder) as temporary:
        folder = Path(temporary)
        cache = open_cache(folder / "cache", create=True)
        part = sample(0, (250_000 if chosen.short else 1_000_000) // LENGTH, samples=1, length=LENGTH)
        results, ids = speeds(cache, part, 5 if chosen.short else chosen.repeats)
        counts = [len(cache.manifest(i).files) for i in ids]
        print(f"\nfiles: {counts[1]} a scores segment, {counts[0]} a rollouts segment")
        results["files of a segment"] = max(counts)
        loaded = cache.load_scored(cache.scored()[0])
        results |= gathering(loaded, f"{LENGTH} tokens") | gathering(sample(0, 10_480), "25 ± 8 tokens")
        results |= sizes(cache, *ids)
        info = cache.manifest(ids[1]).info.model_copy(update={"storage": "compact"})
        results |= sizes(cache, ids[0], cache.commit_scores(loaded.scores, info))  # type: ignore[arg-type]
    publish("store", chosen, **results)


if __name__ == "__main__":
    main()
