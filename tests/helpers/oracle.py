"""Scores the plain way, to compare with: one row at a time, no padding, all logits, reductions in float64."""

from __future__ import annotations

import numpy as np

from ketchup_cache.types import Ragged, Rollouts, Scores


def make_rollouts(prompt_index, completions, finished) -> Rollouts:
    rows = Ragged.from_rows(completions, np.int32)
    tokens = len(rows.values)
    return Rollouts(
        np.asarray(prompt_index, np.int64),
        rows,
        np.zeros(tokens, np.float32),
        np.zeros(tokens, np.bool_),
        np.asarray(finished, np.bool_),
    )


def random_rollouts(seed: int, n: int, *, prompts: int = 4, vocab_size: int = 60) -> tuple[Ragged, Rollouts]:
    """Prompts of 1 to 9 tokens, each with EOS (1), some with the pad id (0) inside; completions of 1 to 7 tokens."""
    rng = np.random.default_rng(seed)
    tokens = Ragged.from_rows([[*rng.integers(0, vocab_size, rng.integers(0, 9)), 1] for _ in range(prompts)], np.int32)
    finished = rng.random(n) < 0.6
    completions = [
        [*rng.integers(2, vocab_size, rng.integers(0, 7)), 1 if done else rng.integers(2, vocab_size)]
        for done in finished
    ]
    return tokens, make_rollouts(rng.integers(0, prompts, n), completions, finished)


def plain_scores(model, prompts: Ragged, rollouts: Rollouts, vocab_size: int = 60) -> Scores:
    import torch

    per_token, final = [], []
    for row, completion in enumerate(rollouts.completions):
        prompt = torch.tensor(prompts[rollouts.prompt_index[row]][None], dtype=torch.long)
        if model.config.is_encoder_decoder:
            decoder_input = torch.tensor([[model.config.decoder_start_token_id, *completion]])
            with torch.no_grad():
                logits = model(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    decoder_input_ids=decoder_input,
                    decoder_attention_mask=torch.ones_like(decoder_input),
                ).logits[0, :, :vocab_size]
        else:
            both = torch.cat([prompt, torch.tensor([completion.tolist()])], 1)
            with torch.no_grad():
                logits = model(both, attention_mask=torch.ones_like(both), use_cache=False).logits[0, :, :vocab_size]
            logits = logits[prompt.shape[1] - 1 :]
        q_all = logits.double().numpy()  # [T + 1, V]: state t has seen a_1 … a_{t-1}; the last one all of them
        largest = q_all.max(axis=1)
        logsumexp = largest + np.log(np.exp(q_all - largest[:, None]).sum(axis=1))
        n = len(completion)
        per_token.append([q_all[np.arange(n), completion], largest[:n], logsumexp[:n], q_all[:n].mean(axis=1)])
        final.append(0.0 if rollouts.finished[row] else largest[n])
    q, max_q, logsumexp, mean_q = (np.concatenate(values) for values in zip(*per_token, strict=True))
    return Scores(q, max_q, logsumexp, mean_q, np.array(final))


def assert_same_scores(ours: Scores, plain: Scores, tolerance: float = 1e-4) -> None:
    for name, values in vars(ours).items():
        if name == "top":
            continue  # plain scores have all logits: see tests/scoring/test_keep_top.py
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, getattr(plain, name), rtol=tolerance, atol=tolerance, err_msg=name)
