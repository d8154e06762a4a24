"""What the calculator costs in decoding: seconds per decoding step with it and without it.

    python -m benchmarks.calculator [--batch 64] [--steps 64]

A T5 of T5-small's shape and one of the shipped task's student, random weights, sampling to a fixed length. The extra
time of the processor is also taken on its own, on rows that write an annotation again and again: the worst case.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from ketchup_cache.provenance import Sampling
from ketchup_cache.rollouts.calculator import Calculator, ForcedResults
from ketchup_cache.rollouts.sample import sample_completions
from ketchup_cache.types import Ragged

TASK = Path(__file__).resolve().parents[1] / "data" / "reason"


def make_model(vocab_size: int, **shape: int) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=vocab_size, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, dropout_rate=0.0, **shape
    )
    model = T5ForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = vocab_size - 1  # a token that is never drawn: rows of one length
    return model


def seconds_per_step(
    model: T5ForConditionalGeneration, calculator: Calculator, on: bool, batch: int, steps: int
) -> float:
    prompts = Ragged.from_rows([[*range(3, 23), 1]] * batch, np.int32)
    sampling = Sampling(max_new_tokens=steps, calculator=on)
    vocab_size = model.config.vocab_size - 1
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        sample_completions(model, vocab_size, prompts, sampling, first_prompt=0, batch=batch, calculator=calculator)
        best = min(best, time.perf_counter() - began)
    return best / steps


def processor_alone(calculator: Calculator, ids: list[int], batch: int, vocab_size: int) -> float:
    """Rows at different places of `ids`, again and again; forced tokens take the place of what they would write."""
    forcing, rows = ForcedResults(calculator), torch.zeros(batch, 1, dtype=torch.long)
    spent, steps = 0.0, 200
    for step in range(steps):
        scores = torch.zeros(batch, vocab_size)
        began = time.perf_counter()
        forcing(rows, scores)
        spent += time.perf_counter() - began
        chosen = torch.tensor([ids[(row + step) % len(ids)] for row in range(batch)])
        rows = torch.where(scores.isinf().any(1), scores.argmax(1), chosen)[:, None]
    return spent / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=64)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(TASK / "tokenizer")
    ids = tokenizer("<<12*8=", add_special_tokens=False)["input_ids"]
    small = {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8}
    student = {"d_model": 48, "d_kv": 12, "d_ff": 96, "num_layers": 2, "num_heads": 4}
    print(f"batch {args.batch}, {torch.get_num_threads()} threads, ms per decoding step, best of 3")
    for name, vocab_size, shape in (("T5-small", 32_128, small), ("student", len(tokenizer) + 1, student)):
        model, calculator = make_model(vocab_size, **shape), Calculator(tokenizer, name)
        off, on = (1e3 * seconds_per_step(model, calculator, on, args.batch, args.steps) for on in (False, True))
        alone = 1e3 * processor_alone(calculator, ids, args.batch, vocab_size)
        print(f"{name:10} without {off:7.2f}   with {on:7.2f}   processor alone, annotations all the time {alone:6.3f}")


if __name__ == "__main__":
    main()
