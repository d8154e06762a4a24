"""Does learning ever wait for data? Speed of the loader, memory while it streams, and its share of a step.

    python -m benchmarks.loading [--tokens 100000000] [--folder DISK | --keep FOLDER]

With --keep the caches are made in FOLDER where they are missing, and left there: `--only-make` does no more than that,
so that a busy machine can make them and a quiet one measure.

- Loader: completion tokens per second through `Stream` (load, verify, shuffle, gather), nothing else running; against
  np.load of the same numbers from plain .npy files, neither compressed nor hashed nor shuffled.
- Memory: resident memory while a whole cache of this many tokens streams by, above that of the first batch, in
  decoded segments.
- Share: time that `learn`'s loop waits for `Stream` against the time of its steps, T5-small-shaped student.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.common import forget_peak, made_up_cache, options, peak, publish, sample, t5, table
from ketchup_cache import open_cache
from ketchup_cache.training.batches import Stream, gather

BATCH = 256


def decoded_bytes(folder: Path) -> int:
    """Of one scored segment in memory, prompts included."""
    cache = open_cache(folder)
    part = cache.load_scored(cache.scored()[0])
    arrays = [part.prompts.ids, part.prompts.tokens.values, part.prompts.tokens.offsets]
    arrays += [part.rollouts.completions.values, part.rollouts.completions.offsets]
    arrays += [part.rollouts.prompt_index, part.rollouts.behavior_logprob, part.rollouts.forced]
    return sum(array.nbytes for array in [*arrays, *part.scores.per_token().values(), part.scores.final_max_q])


def stream_all(folder: Path) -> dict[str, float]:
    """One epoch of the cache."""
    cache = open_cache(folder)
    refs = cache.scored()
    batches = sum(ref.rows for ref in refs) // BATCH
    stream = Stream(cache, refs, BATCH, 0)
    next(stream)
    before = forget_peak()
    began, busy = time.perf_counter(), time.process_time()
    tokens = prompt_tokens = 0
    for _ in range(batches):
        batch = next(stream)
        tokens += len(batch.scores.q)
        prompt_tokens += len(batch.prompts.tokens.values)
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    return {
        "tokens": tokens,
        "prompt_tokens": prompt_tokens,
        "seconds": seconds,
        "cpu_seconds": busy,
        "tokens_per_second": tokens / seconds,
        "tokens_per_cpu_second": tokens / busy,
        "all_tokens_per_second": (tokens + prompt_tokens) / seconds,
        "growth_bytes": peak() - before,
    }


def plain_files(folder: Path, repeats: int = 5) -> float:
    """Completion tokens per second of np.load of one segment's arrays."""
    part = sample(0, 10_480)
    arrays = part.scores.per_token() | {"final_max_q": part.scores.final_max_q}
    arrays |= {"behavior": part.rollouts.behavior_logprob, "ids": part.rollouts.completions.values}
    arrays |= {"prompts": part.prompts.tokens.values}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        for name in arrays:
            np.load(folder / f"{name}.npy")
        times.append(time.perf_counter() - began)
    return len(part.scores.q) / statistics.median(times)


def gather_alone(folder: Path, repeats: int = 50) -> float:
    """Completion tokens per second of `gather` from segments in memory."""
    cache = open_cache(folder)
    part = cache.load_scored(cache.scored()[0])
    rows = np.random.default_rng(0).permutation(len(part))[:BATCH]
    times, tokens = [], int(part.rollouts.completions.lengths[rows].sum())
    for _ in range(repeats):
        began = time.perf_counter()
        gather([(part, rows)])
        times.append(time.perf_counter() - began)
    return tokens / statistics.median(times)


def waiting(folder: Path, steps: int, batch_size: int) -> dict[str, float]:
    """Seconds of waiting and of stepping in a loop like learn's, a segment boundary included."""
    from ketchup_cache.config.options import LossOptions
    from ketchup_cache.models.head import Head
    from ketchup_cache.training.optimizer import Learner, Optimizer
    from ketchup_cache.training.policy_gradient import policy_gradient_step

    model = t5({"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8})
    options = LossOptions(weight_decay=0)
    learner = Learner(model, Head.of(model, 32_100), Optimizer(model, options, steps), options)
    cache = open_cache(folder)
    refs = cache.scored()
    # so that the second batch needs a segment that was not read yet
    stream = Stream(cache, refs, batch_size, 0, skip=refs[0].rows // batch_size - 1)
    waits, works = [], []
    for step in range(steps):
        began = time.perf_counter()
        batch = next(stream)
        loaded = time.perf_counter()
        policy_gradient_step(learner, batch, step)
        waits.append(loaded - began)
        works.append(time.perf_counter() - loaded)
    return {
        "first_batch_seconds": waits[0],
        "waiting_seconds": sum(waits[1:]),
        "step_seconds": sum(works[1:]),
        "steps": steps - 1,
        "share": sum(waits[1:]) / (sum(waits[1:]) + sum(works[1:])),
    }


def main() -> None:
    chosen = options(
        __doc__,
        tokens=(100_000_000, "completion tokens of the large cache"),
        folder=(tempfile.gettempdir(), "where the caches are made and deleted"),
        steps=(4, "optimizer steps for the share of waiting"),
        batch_size=(16, "rollouts of such a step"),
        keep=("", "folder where the caches are, or are made and kept"),
        only_make=(False, "make the caches, measure nothing"),
    )
    large = 2_000_000 if chosen.short else chosen.tokens
    small = large // 10
    results: dict[str, object] = {}
    with tempfile.TemporaryDirectory(dir=chosen.folder) as temporary:
        folder = Path(chosen.keep or temporary)
        began = time.perf_counter()
        caches = {"small": folder / f"{small:,} tokens", "large": folder / f"{large:,} tokens"}
        for path, tokens in zip(caches.values(), (small, large), strict=True):
            if not path.exists():  # a half-made cache has another name
                made_up_cache(Path(tempfile.mkdtemp(dir=folder)) / "cache", tokens).path.rename(path)
        print(f"made in {time.perf_counter() - began:.0f} s", flush=True)
        if chosen.only_make:
            return
        segment = decoded_bytes(caches["small"])
        results["segment_bytes"] = segment
        results["disk_bytes"] = sum(f.stat().st_size for f in caches["large"].rglob("*") if f.is_file())
        rows = []
        for name, path in caches.items():
            found = stream_all(path)
            found["growth_segments"] = found["growth_bytes"] / segment
            results[name] = found
            rows.append(
                (
                    f"{found['tokens']:,}",
                    f"{found['tokens_per_second'] / 1e6:.2f}M",
                    f"{found['all_tokens_per_second'] / 1e6:.1f}M",
                    f"{found['tokens_per_cpu_second'] / 1e6:.2f}M",
                    f"{found['growth_bytes'] / 1e6:.0f} MB",
                    f"{found['growth_segments']:.1f}",
                )
            )
        head = (
            "tokens in cache",
            "tokens/s",
            "with prompts",
            "tokens/CPU-s",
            "peak above first batch",
            "in decoded segments",
        )
        print(table(head, rows), flush=True)
        results["plain_tokens_per_second"] = plain_files(Path(temporary))
        results["gather_tokens_per_second"] = gather_alone(caches["small"])
        ratio = results["large"]["tokens_per_second"] / results["plain_tokens_per_second"]  # type: ignore[index]
        results["ratio_to_plain"] = ratio
        print(
            f"\nnp.load of plain files: {results['plain_tokens_per_second'] / 1e6:.1f}M tokens/s (ours {ratio:.2f}); "  # type: ignore[operator]
            f"gather alone: {results['gather_tokens_per_second'] / 1e6:.1f}M",  # type: ignore[operator]
            flush=True,
        )
        share = waiting(caches["small"], 3 if chosen.short else chosen.steps, chosen.batch_size)
        results["waiting"] = share
        print(
            f"{share['steps']} steps of {chosen.batch_size} rollouts, T5-small: waiting "
            f"{share['waiting_seconds']:.4f} s, working {share['step_seconds']:.1f} s: {share['share']:.3%} "
            f"(the first batch took {share['first_batch_seconds']:.2f} s)"
        )
    publish("loading", chosen, **results)


if __name__ == "__main__":
    main()
