"""The plain way, to compare with: one row at a time, no padding, no cache, all logits, reductions in float64."""

from __future__ import annotations

import numpy as np
import torch

from ketchup_cache.types import PER_TOKEN, Ragged, Rollouts, Scores


def make_rollouts(prompt_index, completions, finished) -> Rollouts:
    rows = Ragged.from_rows(completions, np.int32)
    behavior, forced = np.zeros(len(rows.values), np.float32), np.zeros(len(rows.values), np.bool_)
    return Rollouts(np.asarray(prompt_index, np.int64), rows, behavior, forced, np.asarray(finished, np.bool_))


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


@torch.no_grad()
def plain_logits(model, prompt, completion, *, after: bool = False) -> torch.Tensor:
    """[T, V] logits of one row alone, by the model's own forward and head: row t has seen the prompt and a_1 … a_{t-1}.
    after: one row more, which has seen the whole completion."""
    given = [int(token) for token in (completion if after else completion[:-1])]
    prompt = [int(token) for token in prompt]
    ids = torch.tensor([prompt if model.config.is_encoder_decoder else [*prompt, *given]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    if not model.config.is_encoder_decoder:
        return model(**inputs).logits[0, len(prompt) - 1 :]
    started = torch.tensor([[model.config.decoder_start_token_id, *given]])
    return model(**inputs, decoder_input_ids=started, decoder_attention_mask=torch.ones_like(started)).logits[0]


def plain_row_scores(model, prompt, completion, finished: bool, vocab_size: int) -> dict[str, np.ndarray]:
    """The arrays of `Scores` of one row, in float64."""
    logits = plain_logits(model, prompt, completion, after=True)[:, :vocab_size].double()
    inside = logits[:-1]
    return {
        "q": inside[range(len(completion)), [int(token) for token in completion]].numpy(),
        "max_q": inside.amax(1).numpy(),
        "logsumexp": inside.logsumexp(1).numpy(),
        "mean_q": inside.mean(1).numpy(),
        "final_max_q": np.array([0.0 if finished else float(logits[-1].max())]),
    }


def plain_scores(model, prompts: Ragged, rollouts: Rollouts, vocab_size: int = 60) -> Scores:
    rows = zip(rollouts.prompt_index, rollouts.completions, rollouts.finished, strict=True)
    found = [plain_row_scores(model, prompts[index], tokens, done, vocab_size) for index, tokens, done in rows]
    return Scores(**{name: np.concatenate([row[name] for row in found]) for name in found[0]})


def assert_same_scores(ours: Scores, plain: Scores, tolerance: float = 1e-4) -> None:
    """All but the largest logits (`Scores.top`), which plain scores do not keep."""
    for name in (*PER_TOKEN, "final_max_q"):
        values = getattr(ours, name)
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, getattr(plain, name), rtol=tolerance, atol=tolerance, err_msg=name)


def assert_bfloat16_gradient(rounded: dict, exact: dict) -> None:
    """That a gradient is float32 of bfloat16 products: near the exact one as a whole, and not it."""
    assert rounded.keys() == exact.keys()
    assert {g.dtype for g in rounded.values()} == {torch.float32}
    flat, plain = (torch.cat([grads[name].flatten() for name in exact]) for grads in (rounded, exact))
    error = float((flat - plain).norm() / plain.norm())
    assert 2**-12 < error < 2**-3, error  # a product is rounded by 2**-9; these wide random weights make more of it
