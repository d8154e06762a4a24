"""Scoring and learning at the size of the paper's models, on a GPU. Makes its own random weights; downloads nothing.

    python benchmarks/gpu.py            # FLAN-T5-XL-shaped teacher (3B, bfloat16), T5-base-shaped student
    python benchmarks/gpu.py --tiny     # the same on toy sizes, on any machine

- the rate of a plain bfloat16 matrix product, in TFLOP/s;
- scoring: completion tokens/s through `Teacher.score`, its share of that rate (counting only the operations of the
  weights that a token passes, prompts once), peak memory;
- learning: seconds of an optimizer step of the student with and without the teacher in memory, peak memory of
  both.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import torch
from common import T5_BASE, VOCAB, fingerprint, machine, options, publish, rss, sample, t5, table

from ketchup_cache.config import LearnConfig
from ketchup_cache.learn.step import train_step
from ketchup_cache.lm.head import Head
from ketchup_cache.store.manifest import TeacherInfo, TokenizerInfo
from ketchup_cache.teacher import Teacher
from ketchup_cache.training.optim import Optimizer
from ketchup_cache.types import ScoredRollouts

FLAN_T5_XL = {"d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_heads": 32}
TINY = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory(device: torch.device) -> int:
    """Peak bytes of tensors since the last `forget`; without a GPU the resident memory of the process."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else rss()


def forget(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def matrix_rate(device: torch.device, size: int, dtype: torch.dtype, repeats: int = 10) -> float:
    """Operations per second of a square matrix product: two for each multiply and add."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(repeats + 3):
        wait(device)
        began = time.perf_counter()
        a @ b
        wait(device)
        times.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(times[3:])


def needed_operations(model: Any, batch: ScoredRollouts) -> float:
    """Two per weight that a token passes: encoder, and cross-attention keys and values, for each prompt token once;
    decoder and head for each completion token. Attention products of token pairs are not counted.
    """
    config = model.config
    wide = config.d_kv * config.num_heads
    cross = config.num_decoder_layers * 2 * config.d_model * wide
    encoder = sum(p.numel() for name, p in model.encoder.named_parameters() if "embed_tokens" not in name)
    decoder = sum(p.numel() for name, p in model.decoder.named_parameters() if "embed_tokens" not in name)
    prompt_tokens, tokens = len(batch.prompts.tokens.values), len(batch.scores.q)
    return 2.0 * (prompt_tokens * (encoder + cross) + tokens * (decoder - cross + config.d_model * VOCAB))


def step_seconds(student: Any, head: Head, batch: ScoredRollouts, config: LearnConfig, device: torch.device) -> float:
    optimizer = Optimizer(student, lr=1e-5, weight_decay=0, max_grad_norm=1, warmup=0, schedule="constant", steps=9)
    times = []
    for step in range(4):
        wait(device)
        began = time.perf_counter()
        train_step(student, head, optimizer, batch, config, step)
        wait(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def main() -> None:
    chosen = options(
        __doc__,
        tiny=(False, "toy sizes"),
        device=("cuda" if torch.cuda.is_available() else "cpu", "where to run"),
        rollouts=(2048, "rollouts to score, 4 of each prompt"),
        batch_tokens=(65_536, "largest padded batch of the teacher"),
    )
    device = torch.device(chosen.device)
    tiny = chosen.tiny or chosen.short
    if device.type == "cpu" and not tiny:
        raise SystemExit("no GPU here: 3B parameters on a CPU take hours; use --tiny to see that the script works")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    gated = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    with torch.device(device):
        teacher_model = t5(TINY if tiny else FLAN_T5_XL, **gated).to(dtype)
        student = t5(TINY if tiny else T5_BASE, seed=1)
    rate = matrix_rate(device, 256 if tiny else 8192, dtype)

    info = TeacherInfo(name="random", fingerprint=fingerprint("t"), dtype=str(dtype).removeprefix("torch."))
    teacher = Teacher(teacher_model, info, TokenizerInfo(name="t5", fingerprint=fingerprint("w"), vocab_size=VOCAB))
    batch = sample(0, 16 if tiny else chosen.rollouts)
    rows = np.arange(len(batch))
    teacher.score(batch.prompts.tokens, batch.rollouts, rows=rows[-16:], batch_tokens=chosen.batch_tokens)
    forget(device)
    wait(device)
    began = time.perf_counter()
    scores = teacher.score(batch.prompts.tokens, batch.rollouts, batch_tokens=chosen.batch_tokens)
    seconds = time.perf_counter() - began
    tokens = len(scores.q)
    scoring = {
        "tokens_per_second": tokens / seconds,
        "flops": needed_operations(teacher_model, batch) / seconds,
        "peak_bytes": memory(device),
        "weights_bytes": sum(p.numel() * p.element_size() for p in teacher_model.parameters()),
    }
    scoring["share_of_matrix_rate"] = scoring["flops"] / rate

    config = LearnConfig(student="", cache="", batch_size=256)  # type: ignore[arg-type]
    few = sample(1, 8 if tiny else 256)
    head = Head.of(student, VOCAB)
    learning = {}
    for name in ("with teacher", "without teacher"):
        if name == "without teacher":
            del teacher, teacher_model
            if device.type == "cuda":
                torch.cuda.empty_cache()
        forget(device)
        learning[name] = {"seconds": step_seconds(student, head, few, config, device), "peak_bytes": memory(device)}

    where = torch.cuda.get_device_name(device) if device.type == "cuda" else machine()
    print(
        table(
            ("", where),
            [
                ("matrix product", f"{rate / 1e12:.2f} TFLOP/s ({info.dtype})"),
                ("scoring", f"{scoring['tokens_per_second']:,.0f} completion tokens/s"),
                ("share of the matrix rate", f"{scoring['share_of_matrix_rate']:.1%}"),
                ("peak memory, scoring", f"{scoring['peak_bytes'] / 2**30:.2f} GiB"),
                *((f"learning step, {n}", f"{e['seconds']:.3f} s") for n, e in learning.items()),
                *((f"peak memory, learning {n}", f"{e['peak_bytes'] / 2**30:.2f} GiB") for n, e in learning.items()),
            ],
        )
    )
    if tiny and chosen.out is None:
        return
    publish("gpu", chosen, device=where, tiny=tiny, matrix_flops=rate, scoring=scoring, learning=learning)


if __name__ == "__main__":
    main()
