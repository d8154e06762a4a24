"""Sampling against a plain forward pass of each row on its own: the law of the samples, and their log-probabilities."""

import functools
import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from ketchup_cache.errors import ConfigError, DataError, ModelError, NumericsError
from ketchup_cache.types import Ragged
from tests.helpers.errors import refuses
from tests.helpers.models import ENDS, FAMILIES, STRETCHED, VOCAB, make_model
from tests.helpers.oracle import assert_same_rollouts, chi_square, plain_logits, rows_of, sample

ONE_OF_EACH = pytest.mark.parametrize("family", ["t5-1.1", "qwen2"])


def make_prompts(*lengths: int, vocab: int = VOCAB) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return Ragged.from_rows([[*rng.integers(2, vocab, size=n), 1] for n in lengths], np.int32)


PROMPTS = Ragged.from_rows([*make_prompts(3, 7, 1, 5), [6, 0, 1]], np.int32)
WARPINGS = [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}, {"temperature": 1.5, "top_k": 20, "top_p": 0.9}]


def make(family: str = "t5-1.1", *, ends: list[int] = ENDS, **shape):
    return make_model(family, ends=ends, **shape)


def literal_logprob(logits: torch.Tensor, token: int, *, temperature=1.0, top_k=VOCAB, top_p=1.0) -> float:
    """log π(token) after temperature, then top-k, then top-p, from their definitions."""
    scores, order = (logits[:VOCAB] / temperature).sort(descending=True)
    shares = scores[:top_k].softmax(0)
    # the smallest number of most likely tokens whose probability is at least top_p
    kept = next(n for n in range(1, top_k + 1) if n == top_k or shares[:n].sum() >= top_p)
    return float(scores[:kept].log_softmax(0)[order[:kept].tolist().index(token)])


def assert_logprobs_are_plain(model, prompts, rows, *, tolerance: float = 2e-4, **warping) -> None:
    for prompt, completion, logprob in rows:
        logits = plain_logits(model, prompts[prompt], completion).double()
        literal = [literal_logprob(at, token, **warping) for at, token in zip(logits, completion, strict=True)]
        assert logprob == pytest.approx(literal, abs=tolerance)


@pytest.mark.parametrize(
    ("family", "warping"), [*itertools.product(["t5-1.0", "t5-1.1"], WARPINGS), *((name, {}) for name in FAMILIES)]
)
def test_logprob_is_that_of_a_plain_forward_pass(family, warping):
    model = make(family, **({"vocab_size": VOCAB + 20} if family.startswith("t5") else {}))
    rollouts = sample(model, PROMPTS, samples=5, batch=11, **warping)
    assert 0 < rollouts.finished.sum() < len(rollouts)
    assert_logprobs_are_plain(model, PROMPTS, rows_of(rollouts), **warping)


def test_samples_follow_the_law_of_the_policy():
    """Chi-square of 20,000 completions of up to two tokens, against the product of the conditionals."""
    vocab, n = 8, 20_000
    model, prompts = make(vocab_size=vocab, ends=[1]), make_prompts(4, vocab=vocab)
    rollouts = sample(model, prompts, vocab=vocab, samples=n, batch=5_000, max_new_tokens=2, seed=3)
    counts = Counter(tuple(row.tolist()) for row in rollouts.completions)

    def statistic(temperature: float) -> tuple[float, float]:
        expected = {}
        for pair in itertools.product(range(vocab), repeat=2):
            first, second = (plain_logits(model, prompts[0], pair).double() / temperature).softmax(1).numpy()
            expected[pair[:1] if pair[0] == 1 else pair] = n * first[pair[0]] * (1 if pair[0] == 1 else second[pair[1]])
        assert sum(expected.values()) == pytest.approx(n)
        assert counts.keys() <= expected.keys()
        return chi_square(list(expected.values()), [counts[cell] for cell in expected])

    (chi, limit), (other_chi, _) = statistic(1.0), statistic(1.1)
    assert chi < limit < other_chi / 2  # and the test would notice a policy that is only a little different


@pytest.mark.parametrize("family", STRETCHED)
def test_a_long_prompt_changes_no_neighbours_rollouts(family):
    """Each prompt by a model of its own, which has read nothing before."""
    prompts = Ragged.from_rows([np.arange(3, 3 + n) for n in (4, 30, 12, 4, 17)], np.int32)
    rollouts = sample(make(family), prompts, samples=3)
    alone = [sample(make(family), prompts.slice(i, i + 1), samples=3, first_prompt=i) for i in range(5)]
    for i, own in enumerate(alone):
        assert_same_rollouts(rollouts.rows(3 * i, 3 * i + 3), replace(own, prompt_index=own.prompt_index + i), 1e-5)


def make_causal(name: str, **shape):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(vocab_size=VOCAB, bos_token_id=0, eos_token_id=1, **shape)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.4)
    return model


def test_a_model_that_padding_confuses_samples_without():
    """It counts positions from the row's start, padding or not."""
    sizes = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
    model = make_causal("Bart", **sizes, is_decoder=True, is_encoder_decoder=False, forced_eos_token_id=None)
    assert_logprobs_are_plain(model, PROMPTS, rows_of(sample(model, PROMPTS, samples=2)))


def test_a_model_whose_cache_errs_is_refused():
    """A step with keys and values of earlier ones gives other logits than the pass over the whole text."""
    model = make("llama")
    plain = model.forward

    def forward(*given, **named):
        output = plain(*given, **named)
        output.logits = output.logits + (named["input_ids"].shape[1] == 1) * torch.linspace(0, 1, VOCAB)
        return output

    model.forward = functools.wraps(plain)(forward)
    refuses(ModelError, "its own pass over the text gives", sample, model, PROMPTS)


def test_a_model_that_any_neighbour_confuses_is_refused():
    model = make_causal("Rwkv", hidden_size=32, num_hidden_layers=2, attention_hidden_size=32)
    refuses(ModelError, "draws tokens with other probabilities than its own pass", sample, model, PROMPTS)


@pytest.mark.parametrize("family", ["t5-1.1", *FAMILIES])
def test_greedy_in_a_padded_batch_is_that_of_transformers_alone(family):
    model = make(family)
    rollouts = sample(model, PROMPTS, greedy=True, batch=4)
    padding = [[i] for i in range(VOCAB, model.config.vocab_size)] or None
    for prompt, completion, _ in rows_of(rollouts):
        ids = torch.tensor([PROMPTS[prompt].tolist()])
        settings = {"do_sample": False, "num_beams": 1, "max_new_tokens": 10, "bad_words_ids": padding}
        own = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0].tolist()
        assert completion == own[1 if model.config.is_encoder_decoder else ids.shape[1] :]
    assert (rollouts.behavior_logprob == 0).all()


@ONE_OF_EACH
def test_finished_means_that_the_last_token_is_the_first_eos(family):
    several = [1, *range(5, VOCAB, 6)]
    rollouts = sample(make(family, ends=several), PROMPTS, samples=60)
    lengths = rollouts.completions.lengths
    for row, finished in zip(rollouts.completions, rollouts.finished, strict=True):
        assert np.isin(row, several).tolist() == [False] * (len(row) - 1) + [finished]
        assert finished or len(row) == 10
    assert {1, 10} <= set(lengths[rollouts.finished])  # EOS as the last token that fits
    assert len(set(rollouts.completions.values[rollouts.completions.offsets[1:] - 1]) & set(several)) > 3


def test_pad_id_in_the_middle_is_a_token_like_any_other():
    """T5's `generate` pads finished rows with the same id."""
    model, prompts = make(vocab_size=12, ends=[1]), make_prompts(4, vocab=12)
    rollouts = sample(model, prompts, vocab=12, samples=200)
    rows = list(zip(rows_of(rollouts), rollouts.finished, strict=True))
    inside = [row for row, done in rows if done and 0 in row[1][:-1]]
    last = [(row, done) for row, done in rows if row[1][-1] == 0]
    assert inside
    assert {done for _, done in last} == {False}
    assert_logprobs_are_plain(model, prompts, inside[:5] + [row for row, _ in last[:5]])


@pytest.mark.parametrize(("family", "shape"), [("t5-1.1", {"vocab_size": VOCAB + 12}), ("wide", {})])
def test_padding_rows_of_the_head_are_never_drawn(family, shape):
    model = make(family, **shape)
    model.lm_head.weight.data[VOCAB:] *= 20  # what would be drawn nearly always
    assert sample(model, PROMPTS, vocab=VOCAB + 12).completions.values.max() >= VOCAB
    for settings in ({"samples": 20}, {"greedy": True}):
        rollouts = sample(model, PROMPTS, **settings)
        assert rollouts.completions.values.max() < VOCAB
        assert np.isfinite(rollouts.behavior_logprob).all()


# ------------------------------------------------------------------------------------------------- determinism


@ONE_OF_EACH
def test_same_seed_same_rollouts_and_the_global_random_state_is_left_alone(family):
    model, settings = make(family), {"samples": 3, "batch": 6}
    first = sample(model, PROMPTS, seed=5, **settings)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    assert_same_rollouts(first, sample(model, PROMPTS, seed=5, **settings))
    assert torch.equal(torch.get_rng_state(), before)
    assert not np.array_equal(sample(model, PROMPTS, seed=6, **settings).completions.values, first.completions.values)


def test_equal_prompts_and_samples_differ():
    assert len({tuple(row) for row in sample(make(), PROMPTS.take([0] * 4), samples=2, batch=2).completions}) == 8


@ONE_OF_EACH
def test_a_part_of_the_prompts_gives_that_part_of_the_rollouts(family):
    """What a restart does: what a row draws depends on its place, not on what was sampled before."""
    model, prompts = make(family), make_prompts(*range(1, 11))
    whole = sample(model, prompts, samples=3, batch=6, first_prompt=20)
    part = sample(model, prompts.slice(4, 10), samples=3, batch=6, first_prompt=24)
    assert_same_rollouts(replace(part, prompt_index=part.prompt_index + 4), whole.rows(12, 30))


@pytest.mark.parametrize(("samples", "batch", "sizes"), [(3, 7, [6, 6, 3]), (5, 2, [2, 2, 1] * 5), (2, 64, [10])])
def test_rows_are_in_the_order_of_the_prompts_whatever_the_batch(samples, batch, sizes):
    model, batches = make(), []
    rollouts = sample(model, PROMPTS, samples=samples, batch=batch, on_batch=batches.append)
    assert batches == sizes
    assert rollouts.prompt_index.tolist() == [p for p in range(5) for _ in range(samples)]
    assert_logprobs_are_plain(model, PROMPTS, rows_of(rollouts))  # the rows belong to the prompts they claim
    assert_same_rollouts(rollouts, sample(model, PROMPTS, samples=samples, batch=11), tolerance=2e-5)


@pytest.mark.parametrize(
    ("lengths", "samples", "batch", "expected"),
    [((3, 30, 4, 29, 5, 28), 2, 6, [(3, 31), (3, 6)]), ((3, 3, 3, 3, 3), 16, 32, [(2, 4), (2, 4), (1, 4)])],
    ids=["similar lengths together", "once for all samples"],
)
def test_how_prompts_are_encoded(lengths, samples, batch, expected):
    model, seen = make(), []
    model.get_encoder().register_forward_hook(lambda _, __, out: seen.append(out.last_hidden_state.shape[:2]))
    sample(model, make_prompts(*lengths), samples=samples, batch=batch)
    assert seen == expected


# --------------------------------------------------------------------------------------- the model as it is given


def test_generation_defaults_of_the_checkpoint_do_not_change_the_policy():
    neutral, opinionated = make(), make()
    defaults = {
        "temperature": 0.1, "top_k": 1, "top_p": 0.1, "min_p": 0.5, "typical_p": 0.2, "repetition_penalty": 9.0,
        "no_repeat_ngram_size": 1, "encoder_no_repeat_ngram_size": 1, "encoder_repetition_penalty": 3.0,
        "min_length": 9, "min_new_tokens": 9, "max_length": 3, "max_time": 1e-9, "num_beams": 3, "length_penalty": 2.0,
        "forced_bos_token_id": 7, "forced_eos_token_id": 8, "suppress_tokens": [4, 6], "begin_suppress_tokens": [10],
        "bad_words_ids": [[11]], "exponential_decay_length_penalty": (1, 9.0), "guidance_scale": 3.0,
        "num_return_sequences": 3, "return_dict_in_generate": True, "output_scores": True, "use_cache": False,
    }  # fmt: skip
    own = opinionated.generation_config
    assert defaults.keys() <= vars(own).keys()
    vars(own).update(defaults)
    for settings in ({"samples": 3}, {"greedy": True}):
        assert_same_rollouts(sample(opinionated, PROMPTS, **settings), sample(neutral, PROMPTS, **settings))
    assert opinionated.generation_config is own
    assert defaults.items() <= vars(own).items()


def test_dropout_is_off_and_the_mode_restored():
    model = make()
    expected = sample(model, PROMPTS)
    model.train()
    assert_same_rollouts(sample(model, PROMPTS), expected)
    assert model.training
    assert model.encoder.block[0].training


def test_end_and_start_ids_come_from_either_config():
    model = make(ends=[1])
    expected = sample(model, PROMPTS, samples=30)
    model.generation_config.eos_token_id = model.config.decoder_start_token_id = None
    assert (model.config.eos_token_id, model.generation_config.decoder_start_token_id) == (1, 0)
    assert_same_rollouts(sample(model, PROMPTS, samples=30), expected)
    model.config.eos_token_id = None
    refuses(ModelError, "no eos_token_id", sample, model, PROMPTS)


@pytest.mark.parametrize(("family", "greedy"), [("t5-1.1", False), ("t5-1.1", True), ("qwen2", False)])
def test_nan_weights_are_named_with_the_token(family, greedy):
    model = make(family)
    own = model.generation_config
    model.lm_head.weight.data[7, 3] = torch.nan
    refuses(NumericsError, r"^.*logits of token 1 hold a NaN or infinity.*$", sample, model, PROMPTS, greedy=greedy)
    assert model.generation_config is own


@pytest.mark.parametrize(
    ("family", "shape", "prompts", "settings", "error", "message"),
    [
        ("t5-1.1", {}, PROMPTS, {"greedy": True, "samples": 2}, ConfigError, "--samples 1"),
        ("t5-1.1", {}, PROMPTS, {"vocab": VOCAB + 1}, ModelError,
         f"{VOCAB + 1} tokens, but T5ForConditionalGeneration only {VOCAB}: not a pair"),
        ("gpt2", {"n_positions": 12}, PROMPTS, {}, DataError,
         "have 18 tokens, but .* only 12 positions: lower --max-prompt-tokens"),
        ("qwen2", {}, Ragged.from_rows([[5], []], np.int32), {"first_prompt": 10}, DataError,
         "prompt 11 has no tokens"),
    ],
)  # fmt: skip
def test_what_cant_be_sampled(family, shape, prompts, settings, error, message):
    refuses(error, message, sample, make(family, **shape), prompts, **settings)


def test_half_precision_body():
    """The distribution is that of the logits the model gives, in float32 from there on."""
    model = make().to(torch.bfloat16)
    rows = [(prompt, tokens[:1], logprob[:1]) for prompt, tokens, logprob in rows_of(sample(model, PROMPTS, samples=8))]
    assert_logprobs_are_plain(model, PROMPTS, rows, tolerance=0.1)
