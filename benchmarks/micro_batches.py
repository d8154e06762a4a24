"""Length-bucketed micro-batches against padded batches of 8 in random order, and what the log-probabilities hold.

    python -m benchmarks.micro_batches [--rollouts 32]

Random weights of T5-small's shape, the realistic mix of lengths. Both ways take the gradient of the same loss over
the same rollouts: `policy_gradient_step`'s way (token-budget micro-batches sorted by length, each prompt encoded once,
head on real tokens in recomputed chunks), and the usual one (rows shuffled, 8 a batch, each padded to the longest,
logits [B, T, V]). The gradients are compared in float64 on a small model, where rounding leaves little room for a
difference.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import torch

from benchmarks.common import T5_SMALL, VOCAB, forget_peak, options, peak, publish, sample, t5, table, timed
from ketchup_cache.config.commands import LearnConfig
from ketchup_cache.models.forward import Batch, completion_states
from ketchup_cache.models.head import Head, _Buckets
from ketchup_cache.types import ScoredRollouts

BUDGET = LearnConfig.model_fields["micro_batch_tokens"].default


def bucketed(model: Any, head: Head, batch: ScoredRollouts, weight: np.ndarray, budget: int = BUDGET) -> None:
    """As in training/policy_gradient.py, without the metrics."""
    prompts, rollouts = batch.prompts.tokens, batch.rollouts
    weights, whole = (
        rollouts.completions.with_values(weight),
        Batch(prompts, rollouts.prompt_index, rollouts.completions),
    )
    for rows in whole.split(np.arange(len(rollouts)), budget, once=True):
        part = whole.take(rows)
        states = completion_states(model, part)
        logprob = head.log_prob(states, torch.from_numpy(part.completions.values).long())
        (-(torch.from_numpy(weights.take(rows).values) * logprob).sum() / len(weight)).backward()


def padded(model: Any, batch: ScoredRollouts, weight: np.ndarray, vocab: int, rows_at_once: int = 8) -> None:
    prompts, rollouts = batch.prompts.tokens, batch.rollouts
    weights = rollouts.completions.with_values(weight)
    order = np.random.default_rng(1).permutation(len(rollouts))
    for start in range(0, len(order), rows_at_once):
        rows = order[start : start + rows_at_once]
        inputs, targets = prompts.take(rollouts.prompt_index[rows]), rollouts.completions.take(rows)
        mask = np.arange(inputs.lengths.max()) < inputs.lengths[:, None]
        chosen = torch.from_numpy(targets.padded().astype(np.int64))
        logits = model(
            input_ids=torch.from_numpy(inputs.padded().astype(np.int64)),
            attention_mask=torch.from_numpy(mask.astype(np.int64)),
            decoder_input_ids=torch.cat([chosen.new_zeros(len(rows), 1), chosen[:, :-1]], 1),
            use_cache=False,
        ).logits[..., :vocab]
        logprob = logits.log_softmax(-1).gather(2, chosen[..., None])[..., 0]
        # zero where padded, so the padding is in the arithmetic and not in the gradient
        (-(torch.from_numpy(weights.take(rows).padded()) * logprob).sum() / len(weight)).backward()


def padding(rollouts: int, samples: int) -> dict[str, float]:
    """Tokens that encoder and decoder read in padded batches of 8, over those that ours read: each once."""
    batch = sample(0, rollouts, samples=samples)
    prompts, lengths = batch.prompts.tokens.lengths, batch.rollouts.completions.lengths
    index = batch.rollouts.prompt_index
    shuffled = np.random.default_rng(1).permutation(rollouts)
    fixed = [shuffled[start : start + 8] for start in range(0, rollouts, 8)]
    return {
        "rollouts": rollouts,
        "samples": samples,
        "encoder": sum(len(rows) * prompts[index[rows]].max() for rows in fixed) / prompts.sum(),
        "decoder": sum(len(rows) * lengths[rows].max() for rows in fixed) / lengths.sum(),
    }


def largest_difference() -> float:
    """Of the two gradients in float64, relative to the largest element of each tensor.

    T5 takes its attention's softmax in float32 even then, so the rounding that is left is float32's.
    """
    vocab = 1_000
    model = t5({"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}, vocab_size=vocab)
    batch = sample(0, 48, vocab=vocab)
    weight = np.random.default_rng(0).normal(size=len(batch.scores.q))
    gradients = []
    head = Head.of(model, vocab)
    model.double()
    # the head is float32 by design; here the same function of float64 weights

    def log_prob(self: Head, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        nothing = targets.new_empty(len(targets), 0)
        return _Buckets.apply(states, model.lm_head.weight[: self.vocab_size], None, nothing, targets, None, 256)[1]

    double = type("Double", (Head,), {"log_prob": log_prob})
    head = double(**vars(head))
    for way in (lambda: bucketed(model, head, batch, weight, 2_000), lambda: padded(model, batch, weight, vocab)):
        model.zero_grad()
        way()
        gradients.append([p.grad.clone() for p in model.parameters()])
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in zip(*gradients, strict=True))


def memory_of(way: str, tokens: int) -> None:
    """Prints the peak bytes above the weights, states and gradients of a head's forward and backward pass."""
    model = t5({**T5_SMALL, "num_layers": 1})
    head = Head.of(model, VOCAB)
    states = torch.randn(tokens, 512, requires_grad=True)
    targets = torch.randint(3, VOCAB, (tokens,))
    head.log_prob(states[:8], targets[:8]).sum().backward()  # gradients and buffers exist
    before = forget_peak()
    if way == "chunked":
        logprob = head.log_prob(states, targets)
    else:
        logprob = head.logits(states).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    logprob.sum().backward()
    print(peak() - before)


def main() -> None:
    chosen = options(
        __doc__,
        rollouts=(24, "rollouts of a gradient"),
        memory=("", "(used by the script itself)"),
        tokens=(6_400, "completion tokens of a micro-batch, for the memory"),
    )
    if chosen.memory:
        memory_of(chosen.memory, chosen.tokens)
        return
    difference = largest_difference()
    print(f"gradients in float64 differ by at most {difference:.1e} of the largest element", flush=True)
    assert difference < 1e-7
    counted = [padding(256, samples) for samples in (1, 4)]
    head_line = ("256 rollouts, samples of a prompt", "encoder reads", "decoder reads")
    print(table(head_line, [(f["samples"], f"{f['encoder']:.2f}", f"{f['decoder']:.2f}") for f in counted]))
    print("(tokens of padded batches of 8, over those that ours read)\n", flush=True)
    model = t5(T5_SMALL)
    head = Head.of(model, VOCAB)
    rollouts = 16 if chosen.short else chosen.rollouts
    rows, results = [], []
    for samples in (1, 4):
        batch = sample(0, rollouts, samples=samples)
        weight = np.random.default_rng(0).normal(size=len(batch.scores.q)).astype(np.float32)
        found: dict[str, Any] = {"samples": samples, "rollouts": rollouts, "tokens": len(weight)}
        gradients = []
        for name, way in (
            ("bucketed", lambda: bucketed(model, head, batch, weight)),  # noqa: B023
            ("padded", lambda: padded(model, batch, weight, VOCAB)),  # noqa: B023
        ):
            model.zero_grad()
            found[f"{name}_seconds"], found[f"{name}_cpu_seconds"], _ = timed(way)
            gradients.append([p.grad.clone() for p in model.parameters()])
        found["ratio"] = found["padded_seconds"] / found["bucketed_seconds"]
        found["cpu_ratio"] = found["padded_cpu_seconds"] / found["bucketed_cpu_seconds"]
        found["float32_difference"] = max(
            float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in zip(*gradients, strict=True)
        )
        results.append(found)
        rows.append(
            (
                samples,
                f"{found['bucketed_seconds']:.1f}",
                f"{found['padded_seconds']:.1f}",
                f"{found['ratio']:.2f}",
                f"{found['cpu_ratio']:.2f}",
                f"{found['float32_difference']:.1e}",
            )
        )
    head_line = ("samples of a prompt", "bucketed s", "padded s", "ratio, wall", "ratio, CPU", "gradients differ")
    print(table(head_line, rows), flush=True)
    memory = {}
    for way in ("chunked", "plain"):
        words = [
            sys.executable,
            "-m",
            "benchmarks.micro_batches",
            "--memory",
            way,
            "--tokens",
            str(1_600 if chosen.short else chosen.tokens),
        ]
        memory[way] = int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    memory["share"] = memory["chunked"] / memory["plain"]
    print(
        f"\nlog-probabilities forward and backward: {memory['chunked'] / 1e6:.0f} MB in recomputed chunks, "
        f"{memory['plain'] / 1e6:.0f} MB with all logits: {memory['share']:.0%}"
    )
    publish(
        "micro_batches", chosen, float64_difference=difference, padding=counted, ways=results, head_memory_bytes=memory
    )


if __name__ == "__main__":
    main()
