"""Completions that share a row behind their prompt, against rows of their own."""

from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from ketchup_cache.models import forward, shared_prompt as shared
from ketchup_cache.models.forward import Batch, completion_states, states_and_next
from ketchup_cache.models.shared_prompt import SharedRows, can_share
from ketchup_cache.types import Ragged
from tests.helpers.models import FAMILIES, make_decoder

SHARED = ("qwen2", "qwen2-tied", "qwen3", "gpt2", "llama", "cohere", "granite", "wide")


def ragged(rows) -> Ragged:
    return Ragged.from_rows(rows, np.int32)


def make_batch(seed: int = 0) -> Batch:
    """Prompts of 1 to 9 tokens with none, one and several completions each."""
    rng = np.random.default_rng(seed)
    prompts = ragged([rng.integers(3, 60, n) for n in (1, 9, 4, 6)])
    owners = np.array([1, 0, 1, 3, 1, 0, 3])
    return Batch(prompts, owners, ragged([rng.integers(3, 60, rng.integers(1, 8)) for _ in owners]))


def test_which_models_share():
    models = {family: make_decoder(family) for family in FAMILIES}
    assert {family for family, model in models.items() if can_share(model)} == set(SHARED)
    assert can_share(make_decoder("mistral-window", sliding_window=None))


@pytest.mark.parametrize("widest", [2048, 14, 1])
@pytest.mark.parametrize("family", SHARED)
def test_states_are_those_of_rows_of_their_own(family, widest, monkeypatch):
    """With all completions of a prompt in a row, with some, and with one."""
    monkeypatch.setattr(shared, "WIDEST", widest)
    model, batch = make_decoder(family), make_batch()
    after = np.arange(7) % 2 == 0
    forward.longest_mixed(model)  # found out by passes of its own
    passes = Mock(wraps=forward.head_input)
    monkeypatch.setattr(forward, "head_input", passes)
    with torch.no_grad():
        states, next_states = states_and_next(model, batch, after)
        monkeypatch.setattr(forward, "can_share", lambda _: False)
        own, own_next = states_and_next(model, batch, after)
    torch.testing.assert_close(states, own, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(next_states, own_next, rtol=1e-4, atol=1e-5)
    rows = [len(call.kwargs["input_ids"]) for call in passes.call_args_list]
    assert rows[1] == 7
    assert rows[0] == 3 if widest == 2048 else rows[0] > 3


def test_one_completion_a_prompt_needs_no_mask(monkeypatch):
    model = make_decoder("qwen2")
    batch = Batch(ragged([[5, 6], [7]]), np.array([0, 1]), ragged([[8], [9, 10]]))
    monkeypatch.setattr(forward, "_shared_pass", None)
    assert len(completion_states(model, batch)) == 3


ROWS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6)), min_size=1, max_size=12)


@given(ROWS, st.integers(1, 40))
def test_the_layout_against_its_definition(rows, widest):
    owners, lengths = (np.array(column, np.int64) for column in zip(*rows, strict=True))
    prompts = ragged([[100 * (i + 1) + t for t in range(i + 1)] for i in range(4)])
    completions = ragged([[1000 * (i + 1) + t for t in range(n)] for i, n in enumerate(lengths)])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shared, "WIDEST", widest)
        found = SharedRows.of(prompts, owners, completions, lengths)
    seen = (found.mask(torch.float32, torch.device("cpu")) == 0)[:, 0].numpy()
    for place, (row, column) in enumerate(zip(found.row, found.column, strict=True)):
        whole = [*prompts[owners[place]], *completions[place]]
        for t in range(max(int(lengths[place]), 1)):
            here = column + t
            visible = np.flatnonzero(seen[row, here])
            size = len(prompts[owners[place]]) + t
            assert found.inputs[row][visible].tolist() == whole[:size]
            assert found.positions[row][visible].tolist() == list(range(size))
