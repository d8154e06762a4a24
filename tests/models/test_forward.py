import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from ketchup_cache.errors import DataError, ModelError
from ketchup_cache.models import forward
from ketchup_cache.models.forward import Batch, completion_states, decoder_start, states_and_next, training_states
from ketchup_cache.types import Ragged
from tests.helpers.errors import refuses
from tests.helpers.models import STRETCHED, make_model, make_t5
from tests.helpers.oracle import assert_same_gradients, gradients, plain_states, random_batch, row_logits


@pytest.fixture(params=["t5-1.0", "t5-1.1", "qwen2", "mistral-window"])
def model(request):
    """An encoder-decoder, and a decoder-only model that shares its prompts' rows or does not."""
    return make_model(request.param)


def test_states_are_those_of_each_row_alone(model):
    batch = random_batch(rows=9)
    next_state = np.arange(9) % 3 == 0
    states, next_states = states_and_next(model, batch, next_state)
    plain = plain_states(model, batch)
    torch.testing.assert_close(states, torch.cat([row[:-1] for row in plain]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(next_states, torch.stack([plain[i][-1] for i in (0, 3, 6)]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(completion_states(model, batch), states, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", STRETCHED)
def test_a_long_row_changes_no_neighbour(family):
    """Each row by a model of its own, which has read nothing before. Longest rows first, or last, and twice."""
    model = make_model(family)
    assert [forward.longest_mixed(make_model(name)) for name in (family, "llama", "t5-1.0")] == [16, math.inf, math.inf]
    prompts, completions = [[*range(3, 3 + n)] for n in (3, 30, 14)], [[5, 6, 7], [8] * 9, [9, 10], [11] * 5, [12]]
    for owners in ([0, 1, 2, 0, 1], [1, 0, 0, 2, 2]):
        batch = Batch(*(Ragged.from_rows(prompts, np.int32), np.array(owners), Ragged.from_rows(completions, np.int32)))
        for _ in range(2):
            states, after = states_and_next(model, batch, np.ones(5, np.bool_))
            plain = [plain_states(make_model(family), batch.take(np.array([i])))[0] for i in range(5)]
            torch.testing.assert_close(states, torch.cat([row[:-1] for row in plain]), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(after, torch.stack([row[-1] for row in plain]), rtol=1e-4, atol=1e-5)


def test_a_model_that_cant_forget_a_long_row_is_refused():
    model = make_model("llama-dynamic")
    model.model.rotary_emb.original_max_seq_len = 0
    refuses(ModelError, "computes a row otherwise after a longer one: not supported", forward.longest_mixed, model)


def test_a_state_predicts_its_token_and_has_not_seen_it(model):
    """Changing a_t changes the states after it and no other; that is what an off-by-one breaks, in either direction."""
    prompt = Ragged.from_rows([[5, 6, 1]], np.int32)
    before, after = (
        completion_states(model, Batch(prompt, np.zeros(1, np.int64), Ragged.from_rows([tokens], np.int32)))
        for tokens in ([7, 8, 9, 10], [7, 8, 11, 10])
    )
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, True, True, False]


def test_each_prompt_is_computed_once_and_no_padding():
    """Five completions of two prompts of 2 and 3 tokens: the encoder, and keys of cross-attention, see 5 tokens."""
    seen, model = [], make_t5()
    for module in (model.encoder.block[1].layer[1].DenseReluDense, model.decoder.block[1].layer[1].EncDecAttention.k):
        module.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[0]))
    prompts = Ragged.from_rows([[5, 1], [6, 7, 1]], np.int32)
    completion_states(model, Batch(prompts, np.array([0, 1, 0, 1, 0]), Ragged.from_rows([[3]] * 5, np.int32)))
    assert seen == [5, 5]


def test_no_logits_are_computed_and_nothing_stays_behind(model):
    vocabulary_sized = []
    model.lm_head.register_forward_hook(lambda *_: vocabulary_sized.append(1))
    completion_states(model, random_batch(rows=9))
    assert not vocabulary_sized
    assert not model.lm_head._forward_pre_hooks
    unknown = Ragged.from_rows([[99]], np.int32)
    with pytest.raises(IndexError):  # from inside the model: there is no such token id
        completion_states(model, Batch(unknown, np.zeros(1, np.int64), unknown))
    assert not model.lm_head._forward_pre_hooks
    row_logits(model, [1, 1], [1])
    assert vocabulary_sized


def test_another_thread_may_use_the_model_meanwhile(model):
    batch = random_batch(rows=9)
    expected = completion_states(model, batch)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(lambda: [row_logits(model, [1, 1], [1]).shape for _ in range(50)])
        while not other.done():
            torch.testing.assert_close(completion_states(model, batch), expected)
    assert set(other.result()) == {(1, 60)}


def test_gradients_are_those_of_the_plain_pass(model):
    batch = random_batch(rows=5)
    ours = gradients(model, completion_states(model, batch))
    plain = gradients(model, torch.cat([row[:-1] for row in plain_states(model, batch)]))
    assert_same_gradients(ours, plain, tolerance=1e-4)


@torch.no_grad()
def test_bfloat16_training_errs_as_the_models_own_pass_under_autocast(model):
    """Of the float32 states, in float32, and with weights that stay as they were."""
    batch = random_batch(rows=9)
    exact, rounded = (training_states(model, batch, precision) for precision in ("float32", "bfloat16"))
    torch.testing.assert_close(exact, completion_states(model, batch), rtol=0, atol=0)
    assert {rounded.dtype, *(p.dtype for p in model.parameters())} == {torch.float32}
    assert not torch.is_autocast_enabled("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        own = torch.cat([row[:-1] for row in plain_states(model, batch)]).float()
    error, own_error = (float((states - exact).norm() / exact.norm()) for states in (rounded, own))
    assert 2**-12 < error < 1.2 * own_error


def test_an_empty_unfinished_completion_has_only_a_next_state(model):
    prompts, completions = Ragged.from_rows([[5, 6, 1]], np.int32), Ragged.from_rows([[], [7]], np.int32)
    batch = Batch(prompts, np.zeros(2, np.int64), completions)
    states, next_states = states_and_next(model, batch, np.array([True, False]))
    torch.testing.assert_close(next_states, states)  # both have seen the prompt alone


def test_rows_of_a_larger_set_bring_their_prompts_along():
    whole, rows = random_batch(1, 8), np.array([6, 2, 3, 6])
    batch = whole.take(rows)
    assert len(batch.prompts) == len(set(whole.prompt_index[rows])) < 4
    for place, row in enumerate(rows):
        assert batch.prompts[batch.prompt_index[place]].tolist() == whole.prompts[whole.prompt_index[row]].tolist()
        assert batch.completions[place].tolist() == whole.completions[row].tolist()


def test_a_prompt_without_tokens_is_refused():
    batch = Batch(Ragged.from_rows([[5], []], np.int32), np.array([0, 1]), Ragged.from_rows([[3], [4]], np.int32))
    refuses(DataError, "prompt 1 of the batch has no tokens", completion_states, make_t5(), batch)


def test_a_model_without_a_start_token_is_refused():
    model = make_t5()
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = None
    refuses(ModelError, "decoder_start_token_id", decoder_start, model)
