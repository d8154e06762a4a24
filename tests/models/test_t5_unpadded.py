"""T5 without padding against plain forward passes over single rows, and its groups against their definition."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from ketchup_cache.models import forward, t5_unpadded as ragged
from ketchup_cache.models.forward import Batch, completion_states
from ketchup_cache.models.t5_unpadded import groups_of, is_ragged
from ketchup_cache.types import Ragged
from tests.helpers.models import make_model, make_t5
from tests.helpers.oracle import assert_same_gradients, gradients, plain_states, random_batch

FAMILY = ("t5-1.0", "t5-1.1", "mt5", "umt5")


@torch.no_grad()
def assert_states_are_plain(model, batch: Batch) -> None:
    alone = torch.cat([states[:-1] for states in plain_states(model, batch)])
    torch.testing.assert_close(completion_states(model, batch), alone, rtol=1e-4, atol=1e-5)


@pytest.fixture(params=[False, True], ids=["", "aligned"])
def aligned(request, monkeypatch):
    """Widths of groups as they are, and rounded up as on a GPU, so that even the longest rows have padding."""
    if request.param:
        monkeypatch.setattr(ragged, "_aligned", lambda width, device: -(-width // 8) * 8)


@pytest.mark.parametrize("at_once", [1, 60, 2**20])
@pytest.mark.parametrize("kind", FAMILY)
def test_states_are_those_of_each_row_alone(kind, at_once, aligned, monkeypatch):
    """Whatever the groups: every row by itself, a few together, all padded to the longest."""
    monkeypatch.setitem(ragged.SCORES_AT_ONCE, "cpu", at_once * 4)
    model = make_model(kind)
    assert is_ragged(model)
    for seed in range(3):
        assert_states_are_plain(model, random_batch(seed))


@pytest.mark.parametrize("causal", [False, True])
def test_the_bias_is_the_models_and_takes_no_memory_of_its_own(causal):
    """Compared with T5's own square of distances, whose rows it has backwards."""
    attention = make_t5("1.0").get_decoder().block[0].layer[0].SelfAttention
    attention.is_decoder = causal
    queries, keys = np.array([3, 7, 6]), np.array([3, 7, 6])
    rows = ragged.Rows.of(queries, keys, 10**6, torch.device("cpu"))
    bias = ragged._Bias(7, causal=causal)
    bias.of(attention, torch.zeros(1))
    corner = bias.corner(rows, 0)
    own = attention.compute_bias(7, 7)[0]
    assert bias._full.untyped_storage().nbytes() == 4 * 4 * 13  # heads, and distances from -6 to 6
    for row, n in enumerate((3, 6, 7)):  # in the order of their lengths
        mine = corner[row if len(corner) > 1 else 0].flip(1)
        allowed = torch.ones(7, 7).tril().bool() if causal else torch.ones(7, 7).bool()
        seen = allowed & (torch.arange(7) < (7 if causal else n))
        torch.testing.assert_close(mine[:, seen], own[:, seen].detach(), check_stride=False)
        assert torch.isneginf(mine[:, ~seen]).all()


def test_no_square_of_positions_is_ever_held():
    """What torch allocates within a pass: a copy of the window that the bias is would be heads × n × n floats."""
    n, model = 384, make_t5("1.0")
    prompts = Ragged.from_rows([np.arange(n) % 20 + 3], np.int32)
    batch = Batch(prompts, np.zeros(1, np.int64), Ragged.from_rows([np.array([5, 6, 1])], np.int32))
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        completion_states(model, batch)
    held = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert model.config.num_heads * 2 * n * 4 < max(held) < model.config.num_heads * n * n * 4 / 4


def test_long_rows_reach_every_bucket_of_the_position_bias():
    """Distances beyond the largest bucket, in both directions, and a batch whose longest row is not alone."""
    model = make_t5("1.0")
    rng = np.random.default_rng(0)
    prompts = Ragged.from_rows([rng.integers(3, 40, n) for n in (90, 2, 61)], np.int32)
    completions = Ragged.from_rows([rng.integers(3, 40, n) for n in (70, 1, 33, 70)], np.int32)
    assert_states_are_plain(model, Batch(prompts, np.array([2, 1, 0, 0]), completions))


def test_empty_completions_have_no_states():
    model = make_t5("1.1")
    prompts = Ragged.from_rows([[5, 1], [6, 7, 1]], np.int32)
    batch = Batch(prompts, np.array([0, 1, 1]), Ragged.from_rows([[], [4, 5], []], np.int32))
    assert_states_are_plain(model, batch)
    nothing = Batch(prompts, np.array([0, 1]), Ragged.from_rows([[], []], np.int32))
    assert completion_states(model, nothing).shape == (0, 32)


@pytest.mark.parametrize("at_once", [60, 2**20])
@pytest.mark.parametrize("kind", FAMILY)
def test_the_gradient_is_that_of_padded_rows(kind, at_once, aligned, monkeypatch):
    """In few groups and many, one of whose prompts nobody asks. In float64: T5 takes its softmax in float32 even then,
    ours does not, hence the tolerance."""
    monkeypatch.setitem(ragged.SCORES_AT_ONCE, "cpu", at_once * 4)
    model, batch, found = make_model(kind).double(), random_batch(1), []
    prompts, unasked = [[9, 8, 1], *batch.prompts], [*batch.completions, []]
    index = np.append(batch.prompt_index + 1, 0)
    batch = Batch(Ragged.from_rows(prompts, np.int32), index, Ragged.from_rows(unasked, np.int32))
    for way in (is_ragged, lambda _: False):
        monkeypatch.setattr(forward, "is_ragged", way)
        found.append(gradients(model, completion_states(model, batch)))
    assert_same_gradients(*found, tolerance=1e-6)


def test_dropout_is_the_layers_own():
    """Off in eval mode; in training each draw is another one, around the mean, which a twin without dropout gives. With
    the dropout of one place off at a time the others still act."""
    model, batch = make_t5("1.0"), random_batch()
    with torch.no_grad():
        plain = completion_states(model, batch)
        model.train()
        torch.manual_seed(0)
        one, two = completion_states(model, batch), completion_states(model, batch)
        assert not torch.equal(one, two)
        assert not torch.equal(one, plain)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        only_attention = completion_states(model, batch)
        assert not torch.equal(only_attention, plain)
        for module in model.modules():
            if hasattr(module, "key_value_proj_dim"):
                module.dropout = 0.0
        torch.testing.assert_close(completion_states(model, batch), plain)


def test_bfloat16_weights_on_a_processor_without_them_compute_in_float32(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    narrow, batch = make_t5("1.1").bfloat16(), random_batch()
    wide = copy.deepcopy(narrow).float()
    with torch.no_grad():
        states = completion_states(narrow, batch)
        assert states.dtype == torch.float32
        torch.testing.assert_close(states, completion_states(wide, batch), rtol=1e-5, atol=1e-6)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    states = completion_states(narrow, batch)
    assert states.dtype == torch.bfloat16  # a gradient is of the weights as they are
    states.float().sum().backward()
    assert narrow.encoder.block[0].layer[0].SelfAttention.q.weight.grad is not None


def test_a_model_spread_over_devices_takes_its_own_pass():
    model = make_t5("1.0")
    model.hf_device_map = {"encoder": 0, "decoder": 1}
    assert not is_ragged(model)


LENGTHS = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 20)), min_size=1, max_size=30)


@given(LENGTHS, st.integers(1, 400))
def test_every_row_with_queries_is_in_one_group(rows, most):
    queries, keys = (np.array(column, np.int64) for column in zip(*rows, strict=True))
    groups = list(groups_of(queries, keys, most))
    assert sorted(int(row) for group in groups for row in group) == np.flatnonzero(queries).tolist()
    for group in groups:
        assert len(group) == 1 or len(group) * queries[group].max() * keys[group].max() <= most
