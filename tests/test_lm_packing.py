"""Packed rows of the decoder against one row for each completion, and the plan against its definition."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import random_rollouts
from tiny import make_t5

from ketchup_cache.lm import forward
from ketchup_cache.lm.forward import Batch, completion_states
from ketchup_cache.lm.packing import pack, pays
from ketchup_cache.types import Ragged

ROWS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=14)


@given(ROWS, st.integers(1, 24))
def test_every_completion_has_a_place_of_its_own_beside_others_of_its_prompt(rows, widest):
    prompt, lengths = (np.array(column) for column in zip(*rows, strict=True))
    packing = pack(prompt, lengths, widest)
    assert (packing.prompt[packing.row] == prompt).all()
    taken = np.zeros((len(packing.prompt), packing.width), int)
    for place in range(len(rows)):
        taken[packing.row[place], packing.column[place] :][: lengths[place]] += 1
    assert taken.max() == 1
    assert taken.sum() == lengths.sum()
    assert (np.diff(taken, axis=1) <= 0).all()  # no holes
    used = taken.sum(1)
    several = np.bincount(packing.row) > 1
    assert (used[several] <= widest).all()
    # no row could have taken the first completion of the next one of its prompt
    for row in range(len(used) - 1):
        if packing.prompt[row] == packing.prompt[row + 1]:
            first = lengths[(packing.row == row + 1) & (packing.column == 0)][0]
            assert used[row] + first > widest
    assert (np.diff(packing.prompt) >= 0).all()


@given(ROWS)
def test_a_token_sees_its_own_completion_up_to_itself(rows):
    prompt, lengths = (np.array(column) for column in zip(*rows, strict=True))
    packing = pack(prompt, lengths, 20)
    mask = packing.mask(lengths, torch.float32, torch.device("cpu"))
    assert mask.shape == (len(packing.prompt), 1, packing.width, packing.width)
    assert set(mask.unique().tolist()) <= {0.0, torch.finfo(torch.float32).min}
    for place in range(len(rows)):
        row, start = packing.row[place], packing.column[place]
        for t in range(lengths[place]):
            seen = torch.nonzero(mask[row, 0, start + t] == 0).flatten().tolist()
            assert seen == list(range(start, start + t + 1))
    assert (mask == 0).any(-1).all()  # a row of nothing would be a mean over everything


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("widest", [0, 7, 10, 192])
def test_states_do_not_depend_on_the_packing(version, widest, monkeypatch):
    model = make_t5(version)
    prompts, rollouts = random_rollouts(3, 12)
    batch = Batch(prompts, rollouts.prompt_index, rollouts.completions)
    next_state = ~rollouts.finished
    monkeypatch.setattr(forward, "PACKED_WIDTH", widest)
    states, after = completion_states(model, batch, next_state=next_state)
    alone = [
        completion_states(
            model,
            Batch.of_rows(prompts, batch.prompt_index, batch.completions, np.array([row])),
            next_state=next_state[[row]],
        )
        for row in range(12)
    ]
    torch.testing.assert_close(states, torch.cat([s for s, _ in alone]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after, torch.cat([a for _, a in alone]), rtol=1e-4, atol=1e-5)


def test_keys_and_values_of_a_prompt_are_computed_once():
    model, rows = make_t5(), []
    attention = model.decoder.block[0].layer[1].EncDecAttention
    attention.k.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[0]))
    prompts, rollouts = random_rollouts(5, 24, prompts=4)
    completion_states(model, Batch(prompts, rollouts.prompt_index, rollouts.completions))
    assert rows == [len(np.unique(rollouts.prompt_index))]


def test_packing_pays_for_long_prompts_of_wide_models():
    eight = np.full(8, 12)
    assert pays(np.array([180]), eight, 512)
    assert not pays(np.array([9]), eight, 64)  # 9 · 64 < 12 · (96 − 12)
    assert pays(np.array([16]), eight, 64)  # 16 · 64 > 12 · (96 − 12)
    assert pays(np.array([16]), eight[:1], 64)
    assert not pays(np.array([], int), eight[:0], 64)


@pytest.mark.parametrize("widest", [0, 192])
def test_a_prompt_without_completions_takes_nobodys_place(widest, monkeypatch):
    """As many rows as prompts, but not one of each."""
    model, prompts = make_t5(), Ragged.from_rows([[5, 6, 1], [7, 8, 9, 1]], np.int32)
    completions = Ragged.from_rows([[3, 4], [11, 12, 13]], np.int32)
    monkeypatch.setattr(forward, "PACKED_WIDTH", widest)
    together = completion_states(model, Batch(prompts, np.array([1, 1]), completions))
    alone = completion_states(model, Batch(prompts.take([1]), np.array([0, 0]), completions))
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
