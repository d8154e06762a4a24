"""Decoder-only families against a plain pass over each row alone: scores and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ketchup_cache.errors import DataError, ModelError
from ketchup_cache.models.fingerprint import tokenizer_info
from ketchup_cache.models.forward import Batch, completion_states, states_and_next
from ketchup_cache.models.head import Head
from ketchup_cache.models.load import load_model
from ketchup_cache.provenance import TeacherInfo
from ketchup_cache.scoring.teacher import Teacher
from ketchup_cache.types import Ragged, Rollouts
from tests.helpers.models import FAMILIES, VOCAB, make_decoder, make_decoder_tokenizer
from tests.helpers.oracle import assert_same_scores, make_rollouts, plain_scores, random_rollouts, row_logits, rows_of

TOKENIZER = tokenizer_info(make_decoder_tokenizer(), "tiny")
pytestmark = pytest.mark.usefixtures("one_thread")


def teacher_of(model) -> Teacher:
    return Teacher(model, TeacherInfo(name="tiny", fingerprint="0" * 64, dtype="float32"), TOKENIZER)


def assert_scores_are_plain(model, prompts: Ragged, rollouts: Rollouts, budget: int) -> None:
    scores = teacher_of(model).score(prompts, rollouts, batch_tokens=budget)
    assert_same_scores(scores, plain_scores(model, prompts, rollouts, VOCAB))


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_the_plain_pass(family):
    prompts, rollouts = random_rollouts(0, 14)
    model = make_decoder(family)
    for budget in (1, 60, 10_000):
        assert_scores_are_plain(model, prompts, rollouts, budget)


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "llama", "mistral-window", "granite"])
def test_eager_and_sdpa_attention_give_the_same_scores(family):
    prompts, rollouts = random_rollouts(1, 10)
    models = [make_decoder(family, attention=name) for name in ("eager", "sdpa")]
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
        assert_scores_are_plain(make_decoder(family), prompts, rollouts, 10_000)
    batch = Batch(prompts, np.array([0, 2]), Ragged.from_rows([[], [7]], np.int32))
    states, next_states = states_and_next(make_decoder("qwen2"), batch, np.array([True, False]))
    assert (len(states), len(next_states)) == (1, 1)
    alone = Batch(prompts, np.array([0]), Ragged.from_rows([[4]], np.int32))
    torch.testing.assert_close(next_states, completion_states(make_decoder("qwen2"), alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite"])
def test_what_is_done_to_the_logits_matters_here(family):
    """So that the comparison above would notice if it were left out."""
    key, none = {"gemma2": ("final_logit_softcapping", None), "cohere": ("logit_scale", 1.0),
                 "granite": ("logits_scaling", 1.0)}[family]  # fmt: skip
    prompts, rollouts = random_rollouts(0, 5)
    with_it, without = (plain_scores(make_decoder(family, **o), prompts, rollouts, VOCAB) for o in ({}, {key: none}))
    assert np.abs(with_it.max_q - without.max_q).min() > 0.1


@pytest.mark.parametrize("family", ["mistral-window", "gemma2"])
def test_the_sliding_window_matters_here(family):
    prompts, rollouts = random_rollouts(0, 5)
    narrow, wide = (plain_scores(make_decoder(family, sliding_window=w), prompts, rollouts, VOCAB) for w in (4, 64))
    assert np.abs(narrow.q - wide.q).max() > 0.1


def test_padding_rows_of_the_head_are_never_used():
    model = make_decoder("wide")
    with torch.no_grad():
        model.lm_head.weight[VOCAB:] *= 30
    prompts, rollouts = random_rollouts(0, 8)
    narrow, wide = (plain_scores(model, prompts, rollouts, size).max_q for size in (VOCAB, VOCAB + 12))
    assert (wide > narrow + 1).mean() > 0.5  # they would win
    assert_scores_are_plain(model, prompts, rollouts, 500)


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gemma2"])
def test_gradients_are_those_of_the_plain_pass(family):
    prompts, rollouts = random_rollouts(2, 6)
    model, batch = make_decoder(family), Batch(prompts, rollouts.prompt_index, rollouts.completions)
    targets = torch.tensor(rollouts.completions.values, dtype=torch.long)
    Head.of(model, VOCAB).log_prob(completion_states(model, batch), targets).sum().backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for prompt, completion, _ in rows_of(rollouts):
        logprob = row_logits(model, prompts[prompt], completion).log_softmax(-1)
        logprob[range(len(completion)), completion].sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(ours[name], p.grad, rtol=1e-3, atol=1e-5 * float(p.grad.abs().max()), msg=name)


def test_no_logits_are_computed_for_the_states():
    model, seen = make_decoder("qwen2"), []
    model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    prompts, rollouts = random_rollouts(0, 4)
    completion_states(model, Batch(prompts, rollouts.prompt_index, rollouts.completions))
    assert not seen


def test_what_the_model_has_no_room_for():
    model = make_decoder("gpt2", n_positions=12)
    batch = Batch(Ragged.from_rows([range(9)], np.int32), np.zeros(1, np.int64), Ragged.from_rows([[5] * 4], np.int32))
    assert len(completion_states(model, batch)) == 4  # 9 + 3: the last token is not fed
    with pytest.raises(DataError, match="have 13 tokens"):
        states_and_next(model, batch, np.ones(1, np.bool_))


def test_a_model_that_looks_ahead_is_refused(tmp_path):
    """transformers loads BERT as a causal model, without a causal mask."""
    from transformers import BertConfig, BertForMaskedLM, BertLMHeadModel

    shape = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 32, "initializer_range": 0.4}  # fmt: skip
    BertForMaskedLM(BertConfig(**shape)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="looks ahead"):
        Head.of(load_model(str(tmp_path), device="cpu"), VOCAB)
    Head.of(BertLMHeadModel(BertConfig(**shape, is_decoder=True)).eval(), VOCAB)
