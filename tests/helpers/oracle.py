"""The plain way, to compare with: one row at a time, no padding, no cache, all logits, reductions in float64."""

from collections.abc import Iterator

import numpy as np
import torch

from ketchup_cache.models.forward import Batch
from ketchup_cache.provenance import Sampling
from ketchup_cache.rollouts.sample import sample_completions
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


def random_batch(seed: int = 0, rows: int = 12) -> Batch:
    prompts, rollouts = random_rollouts(seed, rows)
    return Batch(prompts, rollouts.prompt_index, rollouts.completions)


def sample(model, prompts: Ragged, *, first_prompt=0, batch=64, vocab=60, on_batch=None, **sampling) -> Rollouts:
    how, places = Sampling(**({"max_new_tokens": 10} | sampling)), {"first_prompt": first_prompt, "batch": batch}
    return sample_completions(model, vocab, prompts, how, **places, on_batch=on_batch)


def rows_of(rollouts: Rollouts) -> Iterator[tuple[int, list[int], np.ndarray]]:
    """(place of the prompt, completion, log-probabilities) of each row."""
    logprob = rollouts.completions.with_values(rollouts.behavior_logprob)
    for prompt, completion, of_tokens in zip(rollouts.prompt_index, rollouts.completions, logprob, strict=True):
        yield int(prompt), completion.tolist(), of_tokens


def assert_same_rollouts(one: Rollouts, other: Rollouts, tolerance: float = 0.0) -> None:
    """All but the log-probabilities to the bit."""
    for name in ("prompt_index", "forced", "finished"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    assert [row.tolist() for row in one.completions] == [row.tolist() for row in other.completions]
    np.testing.assert_allclose(one.behavior_logprob, other.behavior_logprob, rtol=0, atol=tolerance)


def row_logits(model, prompt, completion, *, after: bool = False) -> torch.Tensor:
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


plain_logits = torch.no_grad()(row_logits)


def plain_states(model, batch: Batch) -> list[torch.Tensor]:
    """[T + 1, D] of each row, with gradients: the head's input, by the model's own pass over the row alone. State t has
    seen a_1 … a_{t-1}, the last one the whole completion."""
    found: list[torch.Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: found.append(inputs[0][0]))
    for prompt, completion in zip(batch.prompt_index, batch.completions, strict=True):
        row_logits(model, batch.prompts[prompt], completion, after=True)
    hook.remove()
    return [states[-len(tokens) - 1 :] for states, tokens in zip(found, batch.completions, strict=True)]


def gradients(model, states: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a sum of the states [n, D] in which each number has another weight."""
    model.zero_grad()
    (states * torch.linspace(-1, 1, states.numel(), dtype=states.dtype).view_as(states)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: dict, theirs: dict, tolerance: float) -> None:
    """tolerance: of each number, and of the largest of its tensor."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        atol = tolerance * float(expected.abs().max())
        torch.testing.assert_close(ours[name], expected, rtol=tolerance, atol=atol, msg=name)


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


def chi_square(expected, seen) -> tuple[float, float]:
    """The statistic, rare cells taken together, and a limit that it passes about once in 100,000 times: mean cells - 1,
    standard deviation sqrt(2 (cells - 1)), five of them."""
    expected, seen = np.asarray(expected, float), np.asarray(seen, float)
    common = expected >= 5
    cells = [*zip(expected[common], seen[common], strict=True), (expected[~common].sum(), seen[~common].sum())]
    cells = cells if cells[-1][0] >= 5 else cells[:-1]
    assert len(cells) > 20
    limit = len(cells) - 1 + 5 * np.sqrt(2 * (len(cells) - 1))
    return sum((number - mean) ** 2 / mean for mean, number in cells), limit
