"""What the shipped tasks share to train their teachers: teacher forcing, on pairs that are drawn afresh."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

Draw = Callable[[random.Random, bool], tuple[str, str]]
"""Of a random generator and whether mistakes are wanted: a prompt and its target."""

Pair = tuple[list[int], list[int]]
"""Token ids of a prompt and of its target."""

BATCH, PEAK = 64, 2e-3
SURE = 0.6
"""Share of the steps on right targets only. Mistakes from the start keep a model from learning what is right."""


def train_on_fresh(model: Any, tokenizer: Any, draw: Draw, held_out: set[str], seed: int, steps: int) -> None:
    """`fit` on fresh pairs whose prompts are not in `held_out`.

    Targets with mistakes, later on, teach the model to go on after an error; without them it is so sure of itself that
    every error costs a student the same as stopping at once.
    """
    rng = random.Random(f"teacher-{seed}")
    pool: list[Pair] = []

    def fresh(mistakes: bool) -> tuple[str, str]:
        while True:
            prompt, target = draw(rng, mistakes)
            if prompt not in held_out:
                return prompt, target

    def batch(step: int) -> list[Pair]:
        if not pool:  # a few batches at a time, of similar length
            pairs = [fresh(step > SURE * steps) for _ in range(16 * BATCH)]
            sources = tokenizer([p for p, _ in pairs]).input_ids
            targets = tokenizer([t for _, t in pairs]).input_ids
            ordered = sorted(zip(sources, targets, strict=True), key=lambda pair: len(pair[1]))
            chunks = [ordered[k : k + BATCH] for k in range(0, len(ordered), BATCH)]
            rng.shuffle(chunks)
            pool.extend(pair for chunk in chunks for pair in chunk)
        rows = pool[:BATCH]
        del pool[:BATCH]
        return rows

    fit(model, batch, steps, warm=200)


def fit(model: Any, batch: Callable[[int], list[Pair]], steps: int, warm: int) -> None:
    """Teacher forcing with AdamW, linear warm-up and decay. batch: of a step, its pairs of token ids; no id is 0."""
    import torch
    from torch.nn.functional import cross_entropy

    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, weight_decay=0.0)
    started = time.time()

    def pad(rows: list[list[int]]) -> Any:
        width = max(len(row) for row in rows)
        return torch.tensor([row + [0] * (width - len(row)) for row in rows])

    model.train()
    for step in range(steps):
        rows = batch(step)
        source, target = pad([row[0] for row in rows]), pad([row[1] for row in rows])
        shifted = torch.cat([torch.zeros_like(target[:, :1]), target[:, :-1]], 1)
        rate = (step + 1) / warm if step < warm else 1 - (step - warm) / max(1, steps - warm)
        for group in optimizer.param_groups:
            group["lr"] = PEAK * rate
        output = model(
            input_ids=source, attention_mask=(source != 0).long(), decoder_input_ids=shifted, use_cache=False
        )
        loss = cross_entropy(output.logits[target != 0], target[target != 0])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1} loss {loss.item():.4f} ({time.time() - started:.0f} s)", flush=True)
    model.eval()
