"""How time, memory and disk grow with the number of completion tokens, and what the paper's data sets would cost.

    python benchmarks/growth.py [--largest 10000000]

Measured at 10³, 10⁴, … tokens in the realistic mix of lengths: commit of prompts, rollouts and scores; one epoch
through the loader; bytes on the disk. Scoring (T5-small-shaped, random weights) is measured on `--score-rollouts`
rollouts and extrapolated to each size, since it is linear in rollouts of the same mix.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from common import (
    T5_SMALL,
    VOCAB,
    fingerprint,
    forget_peak,
    made_up_cache,
    options,
    peak,
    publish,
    sample,
    t5,
    table,
    timed,
)

from ketchup_cache.learn.stream import Stream
from ketchup_cache.store.cache import open_cache


def epoch(path: Path) -> int:
    cache = open_cache(path)
    refs = cache.scored()
    size = min(256, refs[0].rows)
    batches = sum(ref.rows for ref in refs) // size
    stream = Stream(cache, refs, size, 0, batches=batches)
    return sum(len(next(stream).scores.q) for _ in range(batches))


def scoring_rate(rollouts: int) -> tuple[float, float]:
    """Completion tokens per wall second and per CPU second."""
    from ketchup_cache.store.manifest import TeacherInfo, TokenizerInfo
    from ketchup_cache.teacher import Teacher

    info = TeacherInfo(name="random", fingerprint=fingerprint("t"), dtype="float32")
    teacher = Teacher(t5(T5_SMALL), info, TokenizerInfo(name="t5", fingerprint=fingerprint("w"), vocab_size=VOCAB))
    batch = sample(0, rollouts)
    wall, cpu, scores = timed(lambda: teacher.score(batch.prompts.tokens, batch.rollouts, batch_tokens="auto"))
    return len(scores.q) / wall, len(scores.q) / cpu


def main() -> None:
    chosen = options(
        __doc__,
        largest=(10_000_000, "completion tokens of the largest cache"),
        score_rollouts=(64, "rollouts to measure scoring on, 4 of each prompt"),
        folder=(tempfile.gettempdir(), "where the caches are made and deleted"),
    )
    largest = 100_000 if chosen.short else chosen.largest
    sizes, rows = [], []
    tokens = 1_000
    while tokens <= largest:
        with tempfile.TemporaryDirectory(dir=chosen.folder) as temporary:
            path = Path(temporary) / "cache"
            segment = min(tokens, 262_144)
            made = timed(lambda: made_up_cache(path, tokens, segment_tokens=segment))  # noqa: B023
            refs = open_cache(path).scored()
            loaded = timed(lambda: [open_cache(path).load_scored(ref) for ref in refs[:1]] and None)  # noqa: B023
            before = forget_peak()
            read = timed(lambda: epoch(path))  # noqa: B023
            found = {
                "tokens": tokens,
                "commit_seconds": made[0],
                "commit_cpu_seconds": made[1],
                "first_segment_load_seconds": loaded[0],
                "epoch_seconds": read[0],
                "epoch_cpu_seconds": read[1],
                "epoch_peak_bytes": peak() - before,
                "disk_bytes": sum(f.stat().st_size for f in path.rglob("*") if f.is_file()),
                "segments": len(refs),
            }
        sizes.append(found)
        tokens *= 10
    rate, cpu_rate = scoring_rate(8 if chosen.short else chosen.score_rollouts)
    for found in sizes:
        found["scoring_cpu_seconds_extrapolated"] = found["tokens"] / cpu_rate
        rows.append(
            (
                f"{found['tokens']:,}",
                found["segments"],
                f"{found['commit_seconds']:.2f}",
                f"{found['epoch_seconds']:.2f}",
                f"{found['epoch_peak_bytes'] / 1e6:.0f} MB",
                f"{found['disk_bytes'] / 1e6:.2f} MB",
                f"{found['disk_bytes'] / found['tokens']:.1f}",
                f"{found['scoring_cpu_seconds_extrapolated']:,.0f}",
            )
        )
    head = (
        "tokens",
        "segments",
        "make and commit s",
        "epoch s",
        "epoch memory",
        "disk",
        "bytes/token",
        "scoring CPU s*",
    )
    print(table(head, rows))
    print(f"\n* from {rate:.0f} completion tokens/s ({cpu_rate:.0f} per CPU second), T5-small-shaped teacher")
    publish("growth", chosen, sizes=sizes, scoring_tokens_per_second=rate, scoring_tokens_per_cpu_second=cpu_rate)


if __name__ == "__main__":
    main()
