"""Scoring, sampling and learning at the size of the paper's models, on a GPU. Makes its own random weights.

    python -m benchmarks.gpu            # FLAN-T5-XL-shaped teacher (3B, bfloat16), T5-base-shaped student (float32)
    python -m benchmarks.gpu --tiny     # the same on toy sizes, on any machine

Nothing is downloaded. Prompts log-normal around 180 tokens, completions 25 ± 8, 4 of each prompt. In one process:

- the rate of a plain bfloat16 matrix product;
- scoring: completion tokens/s through `Teacher.score` and the plain way (each rollout a row of its own, random batches
  padded to their longest, logits [B, T, V], batches of 8 or 32, whichever is faster), at 1 and 4 completions a
  prompt; the share of the matrix rate, counting the operations that the job needs (`needed_operations`); peak memory;
- values: `Teacher.score` of a T5-small-shaped teacher in float32 against the plain way in float64;
- `--batch-tokens auto`, and running out of memory for real;
- a step of learning from 256 rollouts: sample them from the student, score them, take an optimizer step, in float32
  and with `--precision bfloat16`; live (all three at every step, teacher in memory), refreshed every 4 and 16 steps,
  and offline from scores that are there.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.common import (
    FLAN_T5_XL,
    T5_BASE,
    T5_SMALL,
    VOCAB,
    fingerprint,
    held,
    machine,
    needed_operations,
    options,
    publish,
    rss,
    sample,
    t5,
    table,
)
from benchmarks.scoring import plain_way
from ketchup_cache.config.options import LossOptions
from ketchup_cache.models.head import Head
from ketchup_cache.models.load import fuse_gelu
from ketchup_cache.models.memory import TokenBudget
from ketchup_cache.provenance import Sampling, TeacherInfo, TokenizerInfo
from ketchup_cache.rollouts.sample import sample_completions
from ketchup_cache.scoring.teacher import Teacher
from ketchup_cache.training.optimizer import Learner, Optimizer
from ketchup_cache.training.policy_gradient import policy_gradient_step
from ketchup_cache.types import Ragged, ScoredRollouts

TINY = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
PRECISIONS = ("float32", "bfloat16")
REUSED = ((4, 4), (16, 4), (4, 16))
"""Steps whose rollouts are sampled at once, and how often each is used (`learn --reuse`)."""
LIMIT = 64
"""Longest completion."""


class Gpu:
    """The device, its clock and its memory. On a CPU the process's resident memory, which never falls."""

    def __init__(self, name: str) -> None:
        self.device = torch.device(name)
        self.is_gpu = self.device.type == "cuda"

    def seconds(self, call: Callable[[], Any], repeats: int = 3, warm: int = 1) -> float:
        """Median over the repeats."""
        times = []
        for _ in range(warm + repeats):
            self.wait()
            began = time.perf_counter()
            call()
            self.wait()
            times.append(time.perf_counter() - began)
        return statistics.median(times[warm:])

    def wait(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def forget(self) -> int:
        """Start the peak anew; returns what is in use."""
        if not self.is_gpu:
            return rss()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) if self.is_gpu else rss()


def teacher_of(model: Any) -> Teacher:
    name = str(next(model.parameters()).dtype).removeprefix("torch.")
    info = TeacherInfo(name="random", fingerprint=fingerprint("t"), dtype=name)
    return Teacher(model, info, TokenizerInfo(name="t5", fingerprint=fingerprint("w"), vocab_size=VOCAB))


def matrix_rate(gpu: Gpu, size: int, dtype: torch.dtype) -> float:
    """Operations per second of a square matrix product: two for each multiply and add."""
    a, b = (torch.randn(size, size, device=gpu.device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / gpu.seconds(lambda: a @ b, repeats=10, warm=3)


def scoring(gpu: Gpu, model: Any, rollouts: int, samples: int, budget: int, rate: float) -> dict[str, Any]:
    batch, teacher = sample(0, rollouts, samples=samples), teacher_of(model)
    prompts, tokens = batch.prompts.tokens, len(batch.scores.q)
    before = gpu.forget()
    seconds = gpu.seconds(lambda: teacher.score(prompts, batch.rollouts, batch_tokens=budget))
    found: dict[str, Any] = {
        "samples": samples,
        "rollouts": rollouts,
        "tokens_per_second": tokens / seconds,
        "flops": needed_operations(model, prompts.lengths.sum(), tokens) / seconds,
        "peak_above_weights": gpu.peak() - before,
    }
    return found | {"share_of_matrix_rate": found["flops"] / rate}


def scoring_plainly(gpu: Gpu, model: Any, rollouts: int, samples: int) -> dict[str, dict[str, float]]:
    """The plain way on a part of the same rollouts, by rows of a batch."""
    batch = sample(0, rollouts, samples=samples)
    few = batch.take(np.random.default_rng(0).permutation(len(batch))[: max(rollouts // 16, 8)])
    plain: dict[str, dict[str, float]] = {}
    for at_once in (8, 32):
        before = gpu.forget()
        seconds = gpu.seconds(lambda: plain_way(model, few.prompts.tokens, few.rollouts, at_once), repeats=1)  # noqa: B023
        plain[str(at_once)] = {
            "tokens_per_second": len(few.scores.q) / seconds,
            "peak_above_weights": gpu.peak() - before,
        }
    return plain


def compared(found: dict[str, Any], plain: dict[str, dict[str, float]]) -> dict[str, Any]:
    rates = {rows: measured["tokens_per_second"] for rows, measured in plain.items()}
    best, ours = max(rates, key=rates.__getitem__), found["tokens_per_second"]
    return found | {
        "plain": plain, "plain_rows": best, "times_plain": ours / rates[best], "times_plain_of_8": ours / rates["8"],
    }  # fmt: skip


def exactness(gpu: Gpu, shape: dict[str, int]) -> dict[str, float]:
    """Largest difference of q and max_q in float32 from the plain way in float64."""
    with torch.device(gpu.device):
        model = t5(shape)
    batch = sample(2, 64)
    scores = teacher_of(model).score(batch.prompts.tokens, batch.rollouts, batch_tokens=8192)
    exact = plain_way(model.double(), batch.prompts.tokens, batch.rollouts)
    difference = max(float(np.abs(getattr(scores, name) - values).max()) for name, values in exact.items())
    return {"largest_difference": difference, "largest_logit": float(np.abs(exact["max_q"]).max())}


def budgets(gpu: Gpu, model: Any, rollouts: int) -> dict[str, Any]:
    """What `auto` finds, and what a number that is far too large ends at where memory is cut to 2 GiB more."""
    batch, teacher, said = sample(3, rollouts), teacher_of(model), []
    auto = TokenBudget("auto", said.append)
    teacher.score(batch.prompts.tokens, batch.rollouts, batch_tokens=auto)
    found: dict[str, Any] = {"auto": auto.tokens}
    if gpu.is_gpu:
        gpu.forget()
        total = torch.cuda.get_device_properties(gpu.device).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 2 * 2**30) / total)
        fixed = TokenBudget(2**20, said.append)
        teacher.score(batch.prompts.tokens, batch.rollouts, batch_tokens=fixed)
        torch.cuda.set_per_process_memory_fraction(1.0)
        found |= {"asked": 2**20, "with_2_gib": fixed.tokens}
    return found | {"said": said}


def learning(
    gpu: Gpu, student: Any, teacher: Teacher | None, size: int, everies: tuple[int, ...] = ()
) -> dict[str, Any]:
    """Seconds of the parts of a step of `size` rollouts, and the peak memory of learning. Those of several steps are
    sampled and scored together. One token in 25 ends a completion, so that they are as long as the made-up ones."""
    few = sample(1, size)
    head = Head.of(student, VOCAB)
    found: dict[str, Any] = {"learn": {}, "learn_peak_bytes": {}}
    for precision in PRECISIONS:
        options = LossOptions(weight_decay=0, precision=precision)
        learner = Learner(student, head, Optimizer(student, options, 99), options)
        gpu.forget()
        found["learn"][precision] = gpu.seconds(lambda: policy_gradient_step(learner, few, 1))  # noqa: B023
        found["learn_peak_bytes"][precision] = gpu.peak()
    if teacher is None:
        return found
    ends = np.random.default_rng(0).choice(np.arange(3, VOCAB), VOCAB // 25, replace=False)
    student.generation_config.eos_token_id = student.config.eos_token_id = [1, *map(int, ends)]
    for steps in everies:
        many = sample(4, size * steps)
        rollouts = many.rollouts

        def draw(prompts: Ragged = many.prompts.tokens) -> None:
            sampling = Sampling(samples=4, max_new_tokens=LIMIT)
            sample_completions(student, VOCAB, prompts, sampling, first_prompt=0, batch=1024)

        def judge(part: ScoredRollouts = many) -> None:
            teacher.score(part.prompts.tokens, part.rollouts, batch_tokens=65_536)

        parts = {"sample": gpu.seconds(draw, 1) / steps, "score": gpu.seconds(judge, 1) / steps}
        parts["tokens"] = len(rollouts.completions.values) / steps
        found[f"every {steps}"] = parts
    return found


def keep(chosen: Any, results: dict[str, Any]) -> None:
    """What is measured so far: a machine that is lent may be taken back."""
    if not results["tiny"] or chosen.out:
        publish("gpu", chosen, **results)


def show_scoring(results: dict[str, Any]) -> None:
    head = ("scoring, completions a prompt", "tokens/s", "of matrix rate", "plain, rows of 8", "plain, best rows",
            "times plain", "peak MB above weights", "plain of 8")  # fmt: skip
    rows = [
        (
            f["samples"],
            f"{f['tokens_per_second']:,.0f}",
            f"{f['share_of_matrix_rate']:.0%}",
            f"{f['plain']['8']['tokens_per_second']:,.0f}",
            f"{f['plain'][f['plain_rows']]['tokens_per_second']:,.0f} ({f['plain_rows']})",
            f"{f['times_plain']:.1f} ({f['times_plain_of_8']:.1f} of 8)",
            f"{f['peak_above_weights'] / 1e6:,.0f}",
            f"{f['plain']['8']['peak_above_weights'] / 1e6:,.0f}",
        )
        for f in results["scoring"]
    ]
    print(table(head, rows) + "\n", flush=True)


def show_learning(results: dict[str, Any]) -> None:
    """Milliseconds of a step by parts that were measured. Where rollouts are used several times, so much less of
    sampling and scoring is in a step: `16x4` samples at once what four steps take, and so do the four of `every 4`."""
    size = results["size"]
    both, alone = results["learning"]["with teacher"], results["learning"]["without teacher"]
    measured = {int(key.split()[1]): parts for key, parts in both.items() if key.startswith("every")}
    ways = [("live" if n == 1 else f"every {n} steps", parts, 1) for n, parts in measured.items()]
    ways += [
        (f"every {n * uses} steps, each used {uses} times", measured[n], uses) for n, uses in REUSED if n in measured
    ]
    rows, live = [], {}
    for name, parts, uses in [*ways, ("offline", {}, 1)]:
        sampled = {part: parts[part] / uses for part in ("sample", "score") if parts}
        cells = [name, *(f"{sampled[part] * 1e3:,.0f}" if sampled else "–" for part in ("sample", "score"))]
        for precision in PRECISIONS:
            learn = (both if parts else alone)["learn"][precision]
            rate = size / (learn + sum(sampled.values()))
            live.setdefault(precision, rate)
            cells += [f"{learn * 1e3:,.0f}", f"{rate:,.0f} ({rate / live[precision]:.1f})"]
        rows.append(tuple(cells))
    what = (f"{precision}: {cell}" for precision in PRECISIONS for cell in ("learn", "rollouts/s (times live)"))
    print(table(("ms a step", "sample", "score", *what), rows) + "\n")
    for precision in PRECISIONS:
        peaks = [found["learn_peak_bytes"][precision] / 2**30 for found in (both, alone)]
        print(
            f"peak memory of learning, {precision}: {peaks[0]:.2f} GiB with the teacher in memory, {peaks[1]:.2f} not"
        )


def main() -> None:
    chosen = options(
        __doc__,
        tiny=(False, "toy sizes"),
        device=("cuda" if torch.cuda.is_available() else "cpu", "where to run"),
        rollouts=(2048, "rollouts to score"),
        batch_tokens=(65_536, "largest batch of the teacher"),
        show=(False, "print the tables of benchmarks/results/gpu.json, and measure nothing"),
    )
    if chosen.show:
        results = held("gpu", chosen)
        print(results["device"], f"{results['matrix_flops'] / 1e12:.2f} TFLOP/s\n")
        show_scoring(results)
        show_learning(results)
        return
    gpu, tiny = Gpu(chosen.device), chosen.tiny or chosen.short
    if not gpu.is_gpu and not tiny:
        raise SystemExit("no GPU here: 3B parameters on a CPU take hours; use --tiny to see that the script works")
    dtype = torch.bfloat16 if gpu.is_gpu else torch.float32
    where = torch.cuda.get_device_name(gpu.device) if gpu.is_gpu else machine()
    rollouts, size, everies = (16, 8, (1, 2)) if tiny else (chosen.rollouts, 256, (1, 4, 16))
    with torch.device(gpu.device):
        torch.set_default_dtype(dtype)
        model = t5(TINY if tiny else FLAN_T5_XL, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
        torch.set_default_dtype(torch.float32)
        student = t5(TINY if tiny else T5_BASE, seed=1)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    rate = matrix_rate(gpu, 256 if tiny else 8192, dtype)
    print(f"{where}: {rate / 1e12:.2f} TFLOP/s ({dtype}); teacher {weights / 2**30:.1f} GiB\n", flush=True)

    results = {"size": size, "device": where, "tiny": tiny, "matrix_flops": rate, "weights_bytes": weights}
    plain = [scoring_plainly(gpu, model, rollouts, n) for n in (4, 1)]  # as transformers has it
    fuse_gelu(model)  # as `Teacher.load` does
    ours = [scoring(gpu, model, rollouts, n, chosen.batch_tokens, rate) for n in (4, 1)]
    results["scoring"] = [compared(*both) for both in zip(ours, plain, strict=True)]
    show_scoring(results)

    results["exactness"] = exact = exactness(gpu, TINY if tiny else T5_SMALL)
    print(f"float32 against float64: {exact['largest_difference']:.1e}, logits up to {exact['largest_logit']:.1f}\n")
    keep(chosen, results)
    results["budgets"] = budgets(gpu, model, rollouts)
    print("\n".join(results["budgets"]["said"]) + "\n", flush=True)

    keep(chosen, results)
    results["learning"] = {"with teacher": learning(gpu, student, teacher_of(model), size, everies)}
    del model
    results["learning"]["without teacher"] = learning(gpu, student, None, size)
    show_learning(results)
    keep(chosen, results)


if __name__ == "__main__":
    main()
