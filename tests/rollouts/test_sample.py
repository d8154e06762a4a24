"""Sampling against a plain forward pass of each row on its own: the law of the samples, and their log-probabilities."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from ketchup_cache.errors import ConfigError, ModelError, NumericsError
from ketchup_cache.provenance import Sampling
from ketchup_cache.rollouts.sample import sample_completions
from ketchup_cache.types import Ragged, Rollouts
from tests.helpers.models import WORDS, make_t5

VOCAB = len(WORDS) + 3
ENDS = [1, 5, 9, 17, 23]
"""A random model rarely draws the one EOS: with several, some rollouts end early, some late, some not."""


pytestmark = pytest.mark.usefixtures("one_thread")


def make_prompts(*lengths: int, vocab: int = VOCAB) -> Ragged:
    rng = np.random.default_rng(0)
    return Ragged.from_rows([[*rng.integers(2, vocab, size=n), 1] for n in lengths], np.int32)


PROMPTS = make_prompts(3, 7, 1, 5, 4)


def make_model(version: str = "1.1", *, ends: list[int] = ENDS, **shape):
    model = make_t5(version, **shape)
    model.generation_config.eos_token_id = ends
    return model


def sample(model, prompts=PROMPTS, *, first_prompt=0, batch=64, vocab=VOCAB, on_batch=None, **sampling) -> Rollouts:
    settings = Sampling(**({"max_new_tokens": 10} | sampling))
    return sample_completions(
        model, vocab, prompts, settings, first_prompt=first_prompt, batch=batch, on_batch=on_batch
    )


def assert_same(one: Rollouts, other: Rollouts) -> None:
    assert one.completions.offsets.tolist() == other.completions.offsets.tolist()
    for name in ("prompt_index", "behavior_logprob", "forced", "finished"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    assert np.array_equal(one.completions.values, other.completions.values)


@torch.no_grad()
def plain_logits(model, prompt, completion) -> np.ndarray:
    """[T, V] float64: one row, no padding, no cache, no `generate`."""
    decoder_input = [0, *completion[:-1]]
    logits = model(input_ids=torch.tensor([list(prompt)]), decoder_input_ids=torch.tensor([decoder_input])).logits
    return logits[0].double().numpy()


def log_softmax(scores: np.ndarray) -> np.ndarray:
    shifted = scores - scores.max()
    return shifted - np.log(np.exp(shifted).sum())


def literal_logprob(logits: np.ndarray, token: int, *, temperature=1.0, top_k=0, top_p=1.0) -> float:
    """log π(token) after temperature, then top-k, then top-p, from their definitions."""
    scores = logits[:VOCAB] / temperature
    order = np.argsort(-scores)
    kept = order[: top_k or len(order)]
    shares = np.exp(log_softmax(scores[kept]))
    # the smallest number of most likely tokens whose probability is at least top_p
    enough = next(n for n in range(1, len(kept) + 1) if n == len(kept) or shares[:n].sum() >= top_p)
    kept = kept[:enough]
    assert token in kept
    return float(log_softmax(scores[kept])[list(kept).index(token)])


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize(
    "warping",
    [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}, {"temperature": 1.5, "top_k": 20, "top_p": 0.9}],
    ids=str,
)
def test_logprob_is_that_of_a_plain_forward_pass(version, warping):
    model = make_model(version, vocab_size=VOCAB + 20)
    rollouts = sample(model, samples=4, batch=8, **warping)
    assert 0 < rollouts.finished.sum() < len(rollouts)
    logprob = rollouts.completions.with_values(rollouts.behavior_logprob)
    for row, prompt in enumerate(rollouts.prompt_index):
        completion = rollouts.completions[row]
        logits = plain_logits(model, PROMPTS[prompt], completion)
        literal = [literal_logprob(at, token, **warping) for at, token in zip(logits, completion, strict=True)]
        assert logprob[row] == pytest.approx(literal, abs=1e-4)


def test_samples_follow_the_law_of_the_policy():
    """Chi-square of 20,000 completions of up to two tokens, against the product of the conditionals."""
    vocab, n = 8, 20_000
    model, prompts = make_model(vocab_size=vocab, ends=[1]), make_prompts(4, vocab=vocab)
    rollouts = sample(model, prompts, vocab=vocab, samples=n, batch=5_000, max_new_tokens=2, seed=3)
    counts: dict[tuple[int, ...], int] = {}
    for row in rollouts.completions:
        counts[tuple(row.tolist())] = counts.get(tuple(row.tolist()), 0) + 1

    def statistic(temperature: float) -> tuple[float, int]:
        """(chi-square, cells), the rare cells taken together."""
        expected = {}
        for pair in itertools.product(range(vocab), repeat=2):
            first, second = (np.exp(log_softmax(at / temperature)) for at in plain_logits(model, prompts[0], pair))
            if pair[0] == 1:
                expected[1,] = n * first[1]
            else:
                expected[pair] = n * first[pair[0]] * second[pair[1]]
        assert sum(expected.values()) == pytest.approx(n)
        assert counts.keys() <= expected.keys()
        cells = [(expected[c], counts.get(c, 0)) for c in expected if expected[c] >= 5]
        rare = (sum(e for e in expected.values() if e < 5), n - sum(seen for _, seen in cells))
        cells += [rare] if rare[0] >= 5 else []
        return sum((seen - e) ** 2 / e for e, seen in cells), len(cells)

    chi_square, cells = statistic(1.0)
    assert cells > 20
    # mean cells - 1, standard deviation sqrt(2 (cells - 1)): five of them is a chance of about one in 100,000
    limit = cells - 1 + 5 * np.sqrt(2 * (cells - 1))
    assert chi_square < limit
    assert statistic(1.1)[0] > 2 * limit  # and the test would notice a policy that is only a little different


def test_unlikely_tokens_are_drawn_as_often_as_they_are_likely():
    """transformers leaves all but the 50 most likely tokens out where it is not told otherwise."""
    vocab, n = 400, 4_000
    model, prompts = make_model(vocab_size=vocab, ends=[1], scale=0.5), make_prompts(4, vocab=vocab)
    drawn = sample(model, prompts, vocab=vocab, samples=n, batch=n, max_new_tokens=1).completions.values
    policy = np.exp(log_softmax(plain_logits(model, prompts[0], [0])[0]))
    for unlikely in (np.argsort(-policy)[50:], np.argsort(-policy)[200:]):
        share = policy[unlikely].sum()
        assert share > 0.1
        assert np.isin(drawn, unlikely).mean() == pytest.approx(share, abs=5 * np.sqrt(share * (1 - share) / n))


def test_greedy_is_that_of_transformers():
    model = make_model(vocab_size=VOCAB)
    rollouts = sample(model, greedy=True, batch=2)
    for row, prompt in enumerate(PROMPTS):
        own = model.generate(torch.tensor([prompt.tolist()]), do_sample=False, num_beams=1, max_new_tokens=10)
        assert rollouts.completions[row].tolist() == own[0, 1:].tolist()
    assert rollouts.finished.any()
    assert (rollouts.behavior_logprob == 0).all()


def test_finished_means_that_the_last_token_is_the_first_eos():
    several = [1, *range(5, VOCAB, 6)]
    rollouts = sample(make_model(ends=several), samples=60)
    lengths = rollouts.completions.lengths
    for row, finished in zip(rollouts.completions, rollouts.finished, strict=True):
        ends = np.isin(row, several)
        assert not ends[:-1].any()
        assert ends[-1] == finished
        assert finished or len(row) == 10
    assert (rollouts.finished & (lengths == 10)).any()  # EOS as the last token that fits
    assert (rollouts.finished & (lengths == 1)).any()
    assert len(set(rollouts.completions.values[rollouts.completions.offsets[1:] - 1]) & set(several)) > 3


def test_pad_id_in_the_middle_is_a_token_like_any_other():
    """T5's `generate` pads finished rows with the same id."""
    model = make_model(vocab_size=12, ends=[1])
    prompts = make_prompts(4, vocab=12)
    rollouts = sample(model, prompts, vocab=12, samples=200)
    logprob = rollouts.completions.with_values(rollouts.behavior_logprob)
    inside = [row for row in range(200) if (rollouts.completions[row][:-1] == 0).any() and rollouts.finished[row]]
    last = [row for row in range(200) if rollouts.completions[row][-1] == 0]
    assert inside
    assert last
    assert not rollouts.finished[last].any()
    for row in inside[:5] + last[:5]:
        completion = rollouts.completions[row]
        logits = plain_logits(model, prompts[0], completion)
        plain = [log_softmax(at)[token] for at, token in zip(logits, completion, strict=True)]
        assert logprob[row] == pytest.approx(plain, abs=1e-4)


def test_padding_rows_of_the_head_are_never_drawn():
    model = make_model(vocab_size=VOCAB + 50)
    with torch.no_grad():
        model.lm_head.weight[VOCAB:] *= 20  # what would be drawn nearly always
    assert sample(model, vocab=VOCAB + 50).completions.values.max() >= VOCAB
    for settings in ({"samples": 20}, {"greedy": True}):
        rollouts = sample(model, **settings)
        assert rollouts.completions.values.max() < VOCAB
        assert np.isfinite(rollouts.behavior_logprob).all()


# ------------------------------------------------------------------------------------------------- determinism


def test_same_seed_same_rollouts_and_the_global_random_state_is_left_alone():
    model = make_model()
    first = sample(model, samples=3, batch=6, seed=5)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    assert_same(first, sample(model, samples=3, batch=6, seed=5))
    assert torch.equal(torch.get_rng_state(), before)
    assert not np.array_equal(sample(model, samples=3, batch=6, seed=6).completions.values, first.completions.values)


def test_equal_prompts_and_samples_differ():
    prompts = PROMPTS.take([0, 0, 0, 0])
    rollouts = sample(make_model(), prompts, samples=2, batch=2)
    assert len({tuple(row) for row in rollouts.completions}) == 8


def test_a_part_of_the_prompts_gives_that_part_of_the_rollouts():
    """What a restart does: the seed of a batch is that of its place, not of what was sampled before."""
    model, prompts = make_model(), make_prompts(*range(1, 11))
    whole = sample(model, prompts, samples=3, batch=6, first_prompt=20)
    part = sample(model, prompts.slice(4, 10), samples=3, batch=6, first_prompt=24)
    tokens = slice(whole.completions.offsets[12], None)
    assert np.array_equal(part.completions.values, whole.completions.values[tokens])
    assert np.array_equal(part.behavior_logprob, whole.behavior_logprob[tokens])
    assert np.array_equal(part.prompt_index, whole.prompt_index[12:] - 4)


@pytest.mark.parametrize(("samples", "batch", "sizes"), [(3, 7, [6, 6, 3]), (5, 2, [2, 2, 1] * 5), (2, 64, [10])])
def test_rows_are_in_the_order_of_the_prompts_whatever_the_batch(samples, batch, sizes):
    model, batches = make_model(), []
    rollouts = sample(model, samples=samples, batch=batch, on_batch=batches.append)
    assert batches == sizes
    assert rollouts.prompt_index.tolist() == [p for p in range(5) for _ in range(samples)]
    logprob = rollouts.completions.with_values(rollouts.behavior_logprob)
    for row, prompt in enumerate(rollouts.prompt_index):  # the rows belong to the prompts they claim
        logits = plain_logits(model, PROMPTS[prompt], rollouts.completions[row])
        first = log_softmax(logits[0, :VOCAB])[rollouts.completions[row][0]]
        assert logprob[row][0] == pytest.approx(first, abs=1e-4)


@pytest.mark.parametrize("batch", [2, 7, 64])
def test_the_batch_decides_nothing(batch):
    model = make_model()
    one, other = sample(model, samples=5, batch=11), sample(model, samples=5, batch=batch)
    assert [row.tolist() for row in one.completions] == [row.tolist() for row in other.completions]
    np.testing.assert_allclose(one.behavior_logprob, other.behavior_logprob, rtol=0, atol=2e-5)


def test_prompts_of_similar_length_are_decoded_together():
    model, seen = make_model(), []
    model.get_encoder().register_forward_hook(lambda _, __, out: seen.append(out.last_hidden_state.shape[:2]))
    sample(model, make_prompts(3, 30, 4, 29, 5, 28), samples=2, batch=6)
    assert seen == [(3, 31), (3, 6)]


def test_a_prompt_is_encoded_once_for_all_its_samples():
    model, seen = make_model(), []
    model.get_encoder().register_forward_hook(lambda _, __, out: seen.append(len(out.last_hidden_state)))
    sample(model, samples=16, batch=32)
    assert seen == [2, 2, 1]


# --------------------------------------------------------------------------------------- the model as it is given


def test_generation_defaults_of_the_checkpoint_do_not_change_the_policy():
    neutral, opinionated = make_model(vocab_size=VOCAB), make_model(vocab_size=VOCAB)
    defaults = {
        "temperature": 0.1, "top_k": 1, "top_p": 0.1, "min_p": 0.5, "typical_p": 0.2, "repetition_penalty": 9.0,
        "no_repeat_ngram_size": 1, "encoder_no_repeat_ngram_size": 1, "encoder_repetition_penalty": 3.0,
        "min_length": 9, "min_new_tokens": 9, "max_length": 3, "max_time": 1e-9, "num_beams": 3, "length_penalty": 2.0,
        "forced_bos_token_id": 7, "forced_eos_token_id": 8, "suppress_tokens": [4, 6], "begin_suppress_tokens": [10],
        "bad_words_ids": [[11]], "exponential_decay_length_penalty": (1, 9.0), "guidance_scale": 3.0,
        "num_return_sequences": 3, "return_dict_in_generate": True, "output_scores": True, "use_cache": False,
    }  # fmt: skip
    own = opinionated.generation_config
    for name, value in defaults.items():
        assert hasattr(own, name)
        setattr(own, name, value)
    assert_same(sample(opinionated, samples=3), sample(neutral, samples=3))
    assert_same(sample(opinionated, greedy=True), sample(neutral, greedy=True))
    assert opinionated.generation_config is own
    assert all(getattr(own, name) == value for name, value in defaults.items())


def test_dropout_is_off_and_the_mode_restored():
    model = make_model()
    expected = sample(model)
    model.train()
    assert_same(sample(model), expected)
    assert model.training
    assert model.encoder.block[0].training


def test_end_ids_come_from_either_config():
    model = make_model(ends=[1])
    expected = sample(model, samples=30)
    model.generation_config.eos_token_id = None
    assert model.config.eos_token_id == 1
    assert_same(sample(model, samples=30), expected)
    model.config.eos_token_id = None
    with pytest.raises(ModelError, match="no eos_token_id"):
        sample(model)


def test_decoder_start_may_be_in_the_generation_config_alone():
    model = make_model()
    expected = sample(model)
    model.config.decoder_start_token_id = None
    model.generation_config.decoder_start_token_id = 0
    assert_same(sample(model), expected)


@pytest.mark.parametrize("greedy", [False, True])
def test_nan_weights(greedy):
    model = make_model()
    own = model.generation_config
    with torch.no_grad():
        model.lm_head.weight[7, 3] = torch.nan
    with pytest.raises(NumericsError, match="logits of token 1 hold a NaN or infinity") as caught:
        sample(model, greedy=greedy)
    assert "\n" not in str(caught.value)
    assert model.generation_config is own


def test_several_greedy_samples_are_refused():
    with pytest.raises(ConfigError, match="--samples 1"):
        sample(make_model(), greedy=True, samples=2)


def test_model_narrower_than_the_tokenizer():
    with pytest.raises(
        ModelError, match=f"{VOCAB + 1} tokens, but T5ForConditionalGeneration only {VOCAB}: not a pair"
    ):
        sample(make_model(), vocab=VOCAB + 1)


def test_half_precision_body():
    """The distribution is that of the logits the model gives, in float32 from there on."""
    model = make_model().to(torch.bfloat16)
    rollouts = sample(model, samples=8)
    logprob = rollouts.completions.with_values(rollouts.behavior_logprob)
    for row, prompt in enumerate(rollouts.prompt_index):
        first = log_softmax(plain_logits(model, PROMPTS[prompt], rollouts.completions[row][:1])[0, :VOCAB])
        assert logprob[row][0] == pytest.approx(first[rollouts.completions[row][0]], abs=0.1)
