"""What decoder-only families do in their own way, against a plain pass over each row alone: scores and gradients."""

import numpy as np
import pytest
import torch

from ketchup_cache.errors import DataError, ModelError
from ketchup_cache.models.forward import Batch, completion_states, states_and_next
from ketchup_cache.models.head import Head
from ketchup_cache.models.load import load_model
from ketchup_cache.types import Ragged
from tests.helpers import oracle
from tests.helpers.errors import refuses
from tests.helpers.models import VOCAB, make_decoder
from tests.helpers.oracle import assert_same_gradients, assert_same_scores, gradients, plain_scores, random_rollouts
from tests.helpers.scoring import teacher_of


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "llama", "mistral-window", "granite"])
def test_eager_and_sdpa_attention_give_the_same_scores(family):
    prompts, rollouts = random_rollouts(1, 10)
    models = [make_decoder(family, attention=name) for name in ("eager", "sdpa")]
    assert [model.config._attn_implementation for model in models] == ["eager", "sdpa"]
    eager, sdpa = (teacher_of(model).score(prompts, rollouts, batch_tokens=500) for model in models)
    assert_same_scores(sdpa, eager)


OFF = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0, "sliding_window": 64}


@pytest.mark.parametrize(
    ("family", "key"),
    [("gemma2", "final_logit_softcapping"), ("cohere", "logit_scale"), ("granite", "logits_scaling"),
     ("mistral-window", "sliding_window"), ("gemma2", "sliding_window")],
)  # fmt: skip
def test_what_an_architecture_does_matters_here(family, key):
    """So that a comparison of scores would notice if it were left out: of all maxima, or behind a window's end."""
    prompts, rollouts = random_rollouts(0, 5)
    models = make_decoder(family), make_decoder(family, **{key: OFF[key]})
    with_it, without = (plain_scores(model, prompts, rollouts, VOCAB) for model in models)
    if key == "sliding_window":
        assert np.abs(with_it.q - without.q).max() > 0.1
    else:
        assert np.abs(with_it.max_q - without.max_q).min() > 0.1


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gemma2"])
def test_gradients_are_those_of_the_plain_pass(family):
    model, batch, plain = make_decoder(family), oracle.random_batch(2, 6), []
    targets = torch.tensor(batch.completions.values, dtype=torch.long)
    ours = gradients(model, Head.of(model, VOCAB).log_prob(completion_states(model, batch), targets))
    for prompt, row in zip(batch.prompt_index, batch.completions, strict=True):
        plain.append(oracle.row_logits(model, batch.prompts[prompt], row).log_softmax(1)[range(len(row)), row])
    assert_same_gradients(ours, gradients(model, torch.cat(plain)), tolerance=1e-5)


def test_what_the_model_has_no_room_for():
    model = make_decoder("gpt2", n_positions=12)
    batch = Batch(Ragged.from_rows([range(9)], np.int32), np.zeros(1, np.int64), Ragged.from_rows([[5] * 4], np.int32))
    assert len(completion_states(model, batch)) == 4  # 9 + 3: the last token is not fed
    refuses(DataError, "have 13 tokens", states_and_next, model, batch, np.ones(1, np.bool_))


def test_a_model_that_looks_ahead_is_refused(tmp_path):
    """transformers loads BERT as a causal model, without a causal mask."""
    from transformers import BertConfig, BertForMaskedLM, BertLMHeadModel

    shape = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 32, "initializer_range": 0.4}  # fmt: skip
    BertForMaskedLM(BertConfig(**shape)).save_pretrained(tmp_path)
    refuses(ModelError, "looks ahead", Head.of, load_model(str(tmp_path), device="cpu"), VOCAB)
    Head.of(BertLMHeadModel(BertConfig(**shape, is_decoder=True)).eval(), VOCAB)
