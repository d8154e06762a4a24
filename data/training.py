"""What the shipped tasks share to train their teachers: teacher forcing on pairs that are drawn afresh."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

Draw = Callable[[random.Random, bool], tuple[str, str]]
"""Of a random generator and whether mistakes are wanted: a prompt and its target."""

BATCH, PEAK, WARM = 64, 2e-3, 200
SURE = 0.6
"""Share of the steps on right targets only. Mistakes from the start keep a model from learning what is right."""


def train_on_fresh(model: Any, tokenizer: Any, draw: Draw, held_out: set[str], seed: int, steps: int) -> None:
    """AdamW, linear warm-up and decay, `steps` batches of fresh pairs whose prompts are not in `held_out`.

    Targets with mistakes, later on, teach the model to go on after an error; without them it is so sure of itself that
    every error costs a student the same as stopping at once.
    """
    import torch
    from torch.nn.functional import cross_entropy

    rng = random.Random(f"teacher-{seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, weight_decay=0.0)
    pool: list[tuple[list[int], list[int]]] = []
    started = time.time()

    def pad(rows: list[list[int]]) -> Any:
        width = max(len(row) for row in rows)
        return torch.tensor([row + [0] * (width - len(row)) for row in rows])

    def fresh(mistakes: bool) -> tuple[str, str]:
        while True:
            prompt, target = draw(rng, mistakes)
            if prompt not in held_out:
                return prompt, target

    model.train()
    for step in range(steps):
        if not pool:  # a few batches at a time, of similar length
            pairs = [fresh(step > SURE * steps) for _ in range(16 * BATCH)]
            sources = tokenizer([p for p, _ in pairs]).input_ids
            targets = tokenizer([t for _, t in pairs]).input_ids
            ordered = sorted(zip(sources, targets, strict=True), key=lambda pair: len(pair[1]))
            chunks = [ordered[k : k + BATCH] for k in range(0, len(ordered), BATCH)]
            rng.shuffle(chunks)
            pool = [pair for chunk in chunks for pair in chunk]
        rows, pool = pool[:BATCH], pool[BATCH:]
        source, target = pad([row[0] for row in rows]), pad([row[1] for row in rows])
        mask = (source != 0).long()  # a word never has id 0
        shifted = torch.cat([torch.zeros_like(target[:, :1]), target[:, :-1]], 1)
        rate = (step + 1) / WARM if step < WARM else 1 - (step - WARM) / max(1, steps - WARM)
        for group in optimizer.param_groups:
            group["lr"] = PEAK * rate
        output = model(input_ids=source, attention_mask=mask, decoder_input_ids=shifted, use_cache=False)
        loss = cross_entropy(output.logits[target != 0], target[target != 0])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1} loss {loss.item():.4f} ({time.time() - started:.0f} s)", flush=True)
    model.eval()
