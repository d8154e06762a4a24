"""Decoder-only families against a plain pass over each row alone: scores, gradients, samples, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ketchup_cache.errors import DataError, ModelError, NumericsError
from ketchup_cache.models.fingerprint import state_fingerprint, tokenizer_info, weights_fingerprint
from ketchup_cache.models.forward import Batch, completion_states
from ketchup_cache.models.head import Head
from ketchup_cache.models.load import is_encoder_decoder, load_model, load_tokenizer
from ketchup_cache.provenance import Sampling, TeacherInfo
from ketchup_cache.rollouts.sample import sample_completions
from ketchup_cache.scoring.teacher import Teacher
from ketchup_cache.types import Ragged, Rollouts
from tests.helpers.models import FAMILIES, VOCAB, make_decoder, make_decoder_tokenizer, save_decoder
from tests.helpers.oracle import assert_same_scores, make_rollouts, plain_logits, plain_scores, random_rollouts

TOKENIZER = tokenizer_info(make_decoder_tokenizer(), "tiny")
SEVERAL_ENDS = [1, 7, 11, 23, 40, 51]
"""A random model rarely writes the one EOS. Qwen and Llama stop at several ids too."""


pytestmark = pytest.mark.usefixtures("one_thread")


def make(family: str, **options):
    model = make_decoder(family, **options)
    model.generation_config.eos_token_id = SEVERAL_ENDS
    return model


def teacher_of(model) -> Teacher:
    return Teacher(model, TeacherInfo(name="tiny", fingerprint="0" * 64, dtype="float32"), TOKENIZER)


def assert_scores_are_plain(model, prompts: Ragged, rollouts: Rollouts, budget: int) -> None:
    scores = teacher_of(model).score(prompts, rollouts, batch_tokens=budget)
    assert_same_scores(scores, plain_scores(model, prompts, rollouts, VOCAB))


# ------------------------------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_the_plain_pass(family):
    prompts, rollouts = random_rollouts(0, 14)
    model = make(family)
    for budget in (1, 60, 10_000):
        assert_scores_are_plain(model, prompts, rollouts, budget)


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "llama", "mistral-window", "granite"])
def test_eager_and_sdpa_attention_give_the_same_scores(family):
    prompts, rollouts = random_rollouts(1, 10)
    models = [make(family, attention=name) for name in ("eager", "sdpa")]
    assert [model.config._attn_implementation for model in models] == ["eager", "sdpa"]
    eager, sdpa = (teacher_of(model).score(prompts, rollouts, batch_tokens=500) for model in models)
    assert_same_scores(sdpa, eager)


def test_known_corners():
    """A prompt of one token, EOS alone, pad and EOS ids inside, the same rollout twice, an empty unfinished one."""
    prompts = Ragged.from_rows([[1], [0, 0, 1, 0], [5, 0, 6, 1, 9, 9, 9]], np.int32)
    rollouts = make_rollouts(
        [2, 0, 1, 1, 2, 2, 0],
        [[1], [7], [0, 0, 0, 1], [0], [3, 1, 4, 1], [3, 1, 4, 1], [8, 9, 10, 11, 12, 13]],
        [True, False, True, False, True, True, False],
    )
    for family in ("qwen2", "gpt2", "mistral-window"):
        assert_scores_are_plain(make(family), prompts, rollouts, 10_000)
    batch = Batch(prompts, np.array([0, 2]), Ragged.from_rows([[], [7]], np.int32))
    states, next_states = completion_states(make("qwen2"), batch, next_state=np.array([True, False]))
    assert (len(states), len(next_states)) == (1, 1)
    alone = Batch(prompts, np.array([0]), Ragged.from_rows([[4]], np.int32))
    torch.testing.assert_close(next_states, completion_states(make("qwen2"), alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite"])
def test_what_is_done_to_the_logits_matters_here(family):
    """So that the comparison above would notice if it were left out."""
    key, none = {"gemma2": ("final_logit_softcapping", None), "cohere": ("logit_scale", 1.0),
                 "granite": ("logits_scaling", 1.0)}[family]  # fmt: skip
    prompts, rollouts = random_rollouts(0, 5)
    with_it, without = (plain_scores(make(family, **o), prompts, rollouts, VOCAB) for o in ({}, {key: none}))
    assert np.abs(with_it.max_q - without.max_q).min() > 0.1


@pytest.mark.parametrize("family", ["mistral-window", "gemma2"])
def test_the_sliding_window_matters_here(family):
    prompts, rollouts = random_rollouts(0, 5)
    narrow, wide = (plain_scores(make(family, sliding_window=w), prompts, rollouts, VOCAB) for w in (4, 64))
    assert np.abs(narrow.q - wide.q).max() > 0.1


def test_padding_rows_of_the_head_are_never_used():
    model = make("wide")
    with torch.no_grad():
        model.lm_head.weight[VOCAB:] *= 30
    prompts, rollouts = random_rollouts(0, 8)
    narrow, wide = (plain_scores(model, prompts, rollouts, size).max_q for size in (VOCAB, VOCAB + 12))
    assert (wide > narrow + 1).mean() > 0.5  # they would win
    assert_scores_are_plain(model, prompts, rollouts, 500)
    assert sample(model, samples=8).completions.values.max() < VOCAB


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gemma2"])
def test_gradients_are_those_of_the_plain_pass(family):
    prompts, rollouts = random_rollouts(2, 6)
    model = make(family)
    head = Head.of(model, VOCAB)
    states = completion_states(model, Batch(prompts, rollouts.prompt_index, rollouts.completions))
    targets = torch.tensor(rollouts.completions.values, dtype=torch.long)
    head.log_prob(states, targets).sum().backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for row, prompt in enumerate(rollouts.prompt_index):
        completion = rollouts.completions[row].tolist()
        ids = torch.tensor([[*prompts[prompt].tolist(), *completion]])
        logits = model(ids).logits[0, len(prompts[prompt]) - 1 : -1]
        logits.log_softmax(-1)[range(len(completion)), completion].sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-3, atol=1e-5 * float(p.grad.abs().max()), msg=name)


def test_no_logits_are_computed_for_the_states():
    model, seen = make("qwen2"), []
    model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    prompts, rollouts = random_rollouts(0, 4)
    completion_states(model, Batch(prompts, rollouts.prompt_index, rollouts.completions))
    assert not seen


# ------------------------------------------------------------------------------------------------------ sampling

PROMPTS = Ragged.from_rows(
    [np.random.default_rng(n).integers(2, VOCAB, size=n) for n in (3, 9, 1, 5, 4)] + [[6, 0, 1]], np.int32
)


def sample(model, prompts=PROMPTS, *, first_prompt=0, batch=64, **sampling) -> Rollouts:
    settings = Sampling(**({"max_new_tokens": 10} | sampling))
    return sample_completions(model, VOCAB, prompts, settings, first_prompt=first_prompt, batch=batch)


@pytest.mark.parametrize("family", FAMILIES)
def test_logprob_is_that_of_a_plain_pass(family):
    model = make(family)
    rollouts = sample(model, samples=5, batch=11)
    assert rollouts.finished.any()
    logprob = rollouts.completions.with_values(rollouts.behavior_logprob)
    for row, prompt in enumerate(rollouts.prompt_index):
        completion = rollouts.completions[row]
        plain = plain_logits(model, PROMPTS[prompt], completion)[:, :VOCAB].log_softmax(1)
        np.testing.assert_allclose(logprob[row], plain[range(len(completion)), completion.tolist()], atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_in_a_padded_batch_is_that_of_transformers_alone(family):
    model = make(family)
    rollouts = sample(model, greedy=True)
    real = [[i] for i in range(VOCAB, model.config.vocab_size)]
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt.tolist()])
        own = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=10, bad_words_ids=real or None
        )
        assert rollouts.completions[row].tolist() == own[0, len(prompt) :].tolist()
    assert (rollouts.behavior_logprob == 0).all()


def test_finished_means_that_the_last_token_is_the_first_of_any_eos():
    rollouts = sample(make("qwen2"), samples=60)
    for row, finished in zip(rollouts.completions, rollouts.finished, strict=True):
        ends = np.isin(row, SEVERAL_ENDS)
        assert not ends[:-1].any()
        assert ends[-1] == finished
        assert finished or len(row) == 10
    last = rollouts.completions.values[rollouts.completions.offsets[1:] - 1]
    assert len(set(last.tolist()) & set(SEVERAL_ENDS)) > 2


def test_same_seed_same_rollouts_and_a_part_is_a_part():
    model = make("qwen2")
    prompts = Ragged.concatenate([PROMPTS, PROMPTS])
    whole = sample(model, prompts, samples=3, batch=6, first_prompt=20)
    again = sample(model, prompts, samples=3, batch=6, first_prompt=20)
    part = sample(model, prompts.slice(4, 12), samples=3, batch=6, first_prompt=24)
    assert np.array_equal(whole.completions.values, again.completions.values)
    assert np.array_equal(whole.behavior_logprob, again.behavior_logprob)
    assert np.array_equal(part.completions.values, whole.completions.values[whole.completions.offsets[12] :])
    other = sample(model, prompts, samples=3, batch=6, first_prompt=20, seed=1)
    assert not np.array_equal(other.completions.values, whole.completions.values)


def test_nan_weights_are_named_with_the_token():
    model = make("qwen2")
    with torch.no_grad():
        model.lm_head.weight[7, 3] = torch.nan
    with pytest.raises(NumericsError, match="logits of token 1 hold a NaN"):
        sample(model)


def test_what_the_model_has_no_room_for():
    model = make("gpt2", n_positions=12)
    with pytest.raises(DataError, match=r"have 19 tokens, but .* only 12 positions: lower --max-prompt-tokens"):
        sample(model)
    assert len(sample(model, max_new_tokens=3)) == len(PROMPTS)
    batch = Batch(PROMPTS.slice(1, 2), np.zeros(1, np.int64), Ragged.from_rows([[5] * 4], np.int32))
    assert len(completion_states(model, batch)) == 4  # 9 + 3: the last token is not fed
    with pytest.raises(DataError, match="have 13 tokens"):
        completion_states(model, batch, next_state=np.ones(1, np.bool_))


def test_a_prompt_without_tokens_is_refused():
    prompts = Ragged.from_rows([[5], []], np.int32)
    with pytest.raises(DataError, match="prompt 11 has no tokens"):
        sample(make("qwen2"), prompts, first_prompt=10)


# ------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_comes_back_as_it_was(family, tmp_path):
    folder = save_decoder(tmp_path, family)
    loaded, saved = load_model(str(folder), device="cpu"), make_decoder(family)
    assert not is_encoder_decoder(str(folder))
    assert weights_fingerprint(folder) == state_fingerprint(loaded)
    tied = saved.get_output_embeddings().weight is saved.get_input_embeddings().weight
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    for key, value in saved.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], value, rtol=0, atol=0)


def edit(folder, change):
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("qwen2", lambda w: {k: v for k, v in w.items() if k != "lm_head.weight"}, "lm_head.weight"),
        ("llama", lambda w: {k: v for k, v in w.items() if "layers.1.mlp.up" not in k}, "1 weights missing"),
        ("gpt2", lambda w: w | {"transformer.h.0.attn.other": torch.ones(2)}, "1 weights not part of the model"),
        ("gpt2", lambda w: w | {"transformer.ln_f.weight": torch.ones(7)}, "has shape (7,)"),
    ],
)
def test_an_incomplete_checkpoint_is_refused(family, change, message, tmp_path):
    folder = save_decoder(tmp_path, family)
    edit(folder, change)
    with pytest.raises(ModelError) as refused:
        load_model(str(folder), device="cpu")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_gpt2_file_as_the_hub_has_it(tmp_path):
    """Names without their prefix, and the causal mask and its fill value among the weights."""
    folder = save_decoder(tmp_path, "gpt2")
    masks = {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    edit(folder, lambda weights: {k.removeprefix("transformer."): v for k, v in weights.items()} | masks)
    loaded, saved = load_model(str(folder), device="cpu").state_dict(), make_decoder("gpt2").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in saved.items())


def test_a_model_that_looks_ahead_is_refused(tmp_path):
    """transformers loads BERT as a causal model, without a causal mask."""
    from transformers import BertConfig, BertForMaskedLM, BertLMHeadModel

    shape = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 32, "initializer_range": 0.4}  # fmt: skip
    BertForMaskedLM(BertConfig(**shape)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="looks ahead"):
        Head.of(load_model(str(tmp_path), device="cpu"), VOCAB)
    Head.of(BertLMHeadModel(BertConfig(**shape, is_decoder=True)).eval(), VOCAB)


def test_a_tokenizer_that_ends_every_text_is_refused(tmp_path):
    from tests.helpers.models import make_tokenizer

    folder = save_decoder(tmp_path, tokenizer=make_tokenizer())
    with pytest.raises(ModelError, match="ends every text with '</s>', but a decoder-only model goes on") as refused:
        load_tokenizer(str(folder))
    assert "\n" not in str(refused.value)


def test_config_json_of_a_folder_that_cant_be_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such"}))
    with pytest.raises(ModelError, match="can't be loaded"):
        is_encoder_decoder(str(tmp_path))
