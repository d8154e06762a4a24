"""Scoring speed: `Teacher.score` against the plain way, on random weights of T5-small's shape.

    python benchmarks/scoring.py [--rollouts 48]

The plain way: every rollout a row of its own with an encoder pass of its own, random batches of 8 padded to their
longest, logits for all positions of the padded batch, then gather and max. Both run on the same rollouts, and their
values are compared.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from transformers import T5Config, T5ForConditionalGeneration

from ketchup_cache.lm.load import pick_device
from ketchup_cache.store.manifest import TeacherInfo, TokenizerInfo
from ketchup_cache.teacher import Teacher
from ketchup_cache.types import Ragged, Rollouts

VOCAB_SIZE = 32_100
"""T5's tokenizer; its head has 28 rows more."""


def make_rollouts(n: int, per_prompt: int, seed: int = 0) -> tuple[Ragged, Rollouts]:
    """Prompts log-normal around 100 tokens, completions of 25 ± 8."""
    rng = np.random.default_rng(seed)
    prompt_lengths = np.clip(rng.lognormal(np.log(100), 0.5, n // per_prompt), 8, 512).astype(int)
    prompts = Ragged.from_rows([rng.integers(2, VOCAB_SIZE, length) for length in prompt_lengths], np.int32)
    lengths = np.clip(rng.normal(25, 8, n), 2, 64).astype(int)
    completions = Ragged.from_rows([rng.integers(2, VOCAB_SIZE, length) for length in lengths], np.int32)
    nothing = np.zeros(len(completions.values))
    prompt_index = np.repeat(np.arange(len(prompts)), per_prompt)
    return prompts, Rollouts(
        prompt_index, completions, nothing.astype(np.float32), nothing.astype(bool), np.ones(n, dtype=bool)
    )


@torch.no_grad()
def plain_way(model: T5ForConditionalGeneration, prompts: Ragged, rollouts: Rollouts) -> dict[str, Ragged]:
    order = np.random.default_rng(1).permutation(len(rollouts))
    rows: dict[str, list] = {"q": [None] * len(rollouts), "max_q": [None] * len(rollouts)}
    for start in range(0, len(order), 8):
        batch = order[start : start + 8]
        inputs = prompts.take(rollouts.prompt_index[batch])
        completions = rollouts.completions.take(batch)
        targets = torch.tensor(completions.padded(), dtype=torch.long, device=model.device)
        mask = np.arange(inputs.lengths.max()) < inputs.lengths[:, None]
        logits = model(
            input_ids=torch.tensor(inputs.padded(), dtype=torch.long, device=model.device),
            attention_mask=torch.tensor(mask, dtype=torch.long, device=model.device),
            decoder_input_ids=torch.cat([targets.new_zeros(len(batch), 1), targets[:, :-1]], dim=1),
            use_cache=False,
        ).logits[..., :VOCAB_SIZE]
        q, max_q = logits.gather(2, targets[..., None])[..., 0].cpu(), logits.amax(2).cpu()
        for place, row in enumerate(batch):
            rows["q"][row] = q[place, : completions.lengths[place]].numpy()
            rows["max_q"][row] = max_q[place, : completions.lengths[place]].numpy()
    return {name: Ragged.from_rows(values, np.float32) for name, values in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=48, help="completions per measurement (multiple of 4)")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="largest padded batch of Teacher.score")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()

    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(decoder_start_token_id=0)).eval().to(pick_device(options.device))
    teacher = Teacher(
        model,
        TeacherInfo(name="random T5-small", fingerprint="0" * 64, dtype="float32"),
        TokenizerInfo(name="T5", fingerprint="0" * 64, vocab_size=VOCAB_SIZE),
    )
    print(f"{model.num_parameters() / 1e6:.0f}M parameters, {model.device}, {torch.get_num_threads()} threads")
    for per_prompt in (1, 4):
        prompts, rollouts = make_rollouts(options.rollouts, per_prompt)
        tokens = len(rollouts.completions.values)
        teacher.score(prompts, rollouts, rows=np.arange(4), batch_tokens=options.batch_tokens)  # warm up

        began = time.perf_counter()
        scores = teacher.score(prompts, rollouts, batch_tokens=options.batch_tokens)
        ours = tokens / (time.perf_counter() - began)
        began = time.perf_counter()
        plain = plain_way(model, prompts, rollouts)
        plainly = tokens / (time.perf_counter() - began)

        for name, values in plain.items():
            np.testing.assert_allclose(getattr(scores, name), values.values, rtol=1e-4, atol=1e-4, err_msg=name)
        print(
            f"{per_prompt} per prompt: {ours:,.0f} completion tokens/s, plain way {plainly:,.0f}; "
            f"{ours / plainly:.1f} times as fast, equal values ({tokens:,} tokens)"
        )


if __name__ == "__main__":
    main()
