"""How time, memory and disk grow with the number of completion tokens, and what the paper's data sets would cost.

    python -m benchmarks.growth [--largest 10000000]
    python -m benchmarks.growth --full-size        # the second half alone, from results/gpu.json

Measured at 10³, 10⁴, … tokens in the realistic mix of lengths: commit of prompts, rollouts and scores; one epoch
through the loader; bytes on the disk. Scoring (T5-small-shaped, random weights) is measured on `--score-rollouts`
rollouts and extrapolated to each size, since it is linear in rollouts of the same mix.

Worked out: the GPU-hours that a FLAN-T5-XL-shaped teacher takes for one completion of each prompt of XSum and Europarl,
at the rate of operations that benchmarks/gpu.py measured, and the bytes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import (
    FLAN_T5_XL,
    RESULTS,
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
from ketchup_cache import open_cache
from ketchup_cache.training.batches import Stream


def epoch(path: Path) -> int:
    cache = open_cache(path)
    refs = cache.scored()
    size = min(256, refs[0].rows)
    batches = sum(ref.rows for ref in refs) // size
    stream = Stream(cache, refs, size, 0, batches=batches)
    return sum(len(next(stream).scores.q) for _ in range(batches))


def scoring_rate(rollouts: int) -> tuple[float, float]:
    """Completion tokens per wall second and per CPU second."""
    from ketchup_cache.provenance import TeacherInfo, TokenizerInfo
    from ketchup_cache.scoring.teacher import Teacher

    info = TeacherInfo(name="random", fingerprint=fingerprint("t"), dtype="float32")
    teacher = Teacher(t5(T5_SMALL), info, TokenizerInfo(name="t5", fingerprint=fingerprint("w"), vocab_size=VOCAB))
    batch = sample(0, rollouts)
    wall, cpu, scores = timed(lambda: teacher.score(batch.prompts.tokens, batch.rollouts, batch_tokens="auto"))
    return len(scores.q) / wall, len(scores.q) / cpu


FULL_SIZE = {"XSum": (202_926, 480, 28), "Europarl EN-NL": (1_167_808, 40, 40)}
"""Rows of the training split (the paper), and assumed tokens of a prompt and of a completion."""
SCORES_BYTES, PROMPT_BYTES = 14.5, 2.0
"""Of a completion token (benchmarks/store.py) and of a prompt token, before compression."""


def full_size() -> None:
    measured = json.loads((RESULTS / "gpu.json").read_text())
    rate = next(entry["flops"] for entry in measured["scoring"] if entry["samples"] == 1)
    width, inner, layers = FLAN_T5_XL["d_model"], FLAN_T5_XL["d_ff"], FLAN_T5_XL["num_layers"]
    square, feed_forward = width * width, 3 * width * inner
    of_prompt = layers * (4 * square + feed_forward + 2 * square)  # encoder; keys and values of cross-attention
    of_completion = layers * (6 * square + feed_forward) + VOCAB * width
    rows = []
    for name, (prompts, prompt_tokens, tokens) in FULL_SIZE.items():
        read, written = prompts * prompt_tokens, prompts * tokens
        hours = 2 * (read * of_prompt + written * of_completion) / rate / 3600
        size = SCORES_BYTES * written + PROMPT_BYTES * read
        rows.append((name, f"{prompts:,}", f"{prompt_tokens}, {tokens}", f"{hours:.2f}", f"{size / 1e9:.2f} GB"))
    print(f"{measured['device']}, {rate / 1e12:.0f} TFLOP/s; weights of a prompt token {of_prompt / 1e9:.2f}e9, "
          f"of a completion token {of_completion / 1e9:.2f}e9\n")  # fmt: skip
    print(table(("", "rows", "tokens of prompt, completion (assumed)", "GPU-hours to score", "disk"), rows))
    print("\n" + on_paper(10**10, measured["scoring"]))


def on_paper(tokens: int, scoring: Sequence[Mapping[str, Any]]) -> str:
    """What so many completion tokens cost, 4 completions of 25 to each prompt of 180, from what other scripts measured
    on fewer. A request is one object or one page of 1,000 names."""
    from ketchup_cache.rollouts.rollout import PROMPT_TOKENS_PER_SEGMENT, TOKENS_PER_SEGMENT

    store, loading = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("store", "loading"))
    prompt_tokens = tokens * 180 // 100
    parts = {"prompts": prompt_tokens * store["prompts, bytes/token"]}
    parts |= {kind: tokens * store[f"{kind}, bytes/token"] for kind in ("rollouts", "scores")}
    segments = 2 * -(-tokens // TOKENS_PER_SEGMENT) + -(-prompt_tokens // PROMPT_TOKENS_PER_SEGMENT)
    size = sum(parts.values())
    hours = {f"scoring, {e['samples']} of each prompt": tokens / e["tokens_per_second"] / 3600 for e in scoring}
    hours["an epoch of the loader, two cores"] = tokens / loading["large"]["tokens_per_second"] / 3600
    hours["to copy it at 1 Gbit/s"] = size / 125e6 / 3600
    rows = [
        ("disk", ", ".join(f"{kind} {held / 1e9:,.0f} GB" for kind, held in parts.items()) + f"; {size / 1e9:,.0f} GB"),
        ("segments", f"{segments:,} of {TOKENS_PER_SEGMENT:,} tokens"),
        ("requests to write it, or to read all of it", f"{2 * segments:,}"),
        ("requests to list it", f"{-(-segments // 1000):,}"),
        *((what, f"{time:,.1f} h") for what, time in hours.items()),
    ]
    return table((f"{tokens:,} completion tokens", ""), rows)


def main() -> None:
    chosen = options(
        __doc__,
        largest=(10_000_000, "completion tokens of the largest cache"),
        score_rollouts=(64, "rollouts to measure scoring on, 4 of each prompt"),
        full_size=(False, "what is worked out, and nothing else"),
        folder=(tempfile.gettempdir(), "where the caches are made and deleted"),
    )
    if chosen.full_size:
        full_size()
        return
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
