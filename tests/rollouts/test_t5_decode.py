"""Decoding steps of a T5 against the model's own forward pass over each row, alone and from its beginning."""

from unittest.mock import Mock

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import ketchup_cache.rollouts.decode as decode_module
import ketchup_cache.rollouts.t5_decode as t5_module
from ketchup_cache.rollouts.t5_decode import ROOM, T5Rows, can_step
from ketchup_cache.types import Ragged
from tests.helpers.models import make_model
from tests.helpers.oracle import assert_same_rollouts, sample

LENGTHS = np.array([5, 9, 1, 4, 7])
LONGEST = ROOM + 4
KINDS = ("1.0", "1.1", "mt5")


def make(kind: str):
    return make_model(kind if kind == "mt5" else f"t5-{kind}")


@torch.no_grad()
def own_logits(model, encoded, prompt: int, given: list[int]) -> torch.Tensor:
    states = encoded[prompt : prompt + 1, : LENGTHS[prompt]]
    output = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=states)
    return model(encoder_outputs=output, decoder_input_ids=torch.tensor([given]), use_cache=False).logits[0, -1].float()


@torch.no_grad()
def compare(model, stays: dict[int, list[int]], *, tolerance: float = 1e-4) -> T5Rows:
    """Takes the rows of `stays` after the steps it names; compares all rows at all steps."""
    encoded = torch.randn(len(LENGTHS), LENGTHS.max(), model.config.d_model).to(model.dtype)
    for prompt, length in enumerate(LENGTHS):
        encoded[prompt, length:] = 50.0  # nobody may look there
    rows = T5Rows(model, LENGTHS, encoded, LONGEST)
    held = [(prompt, [0]) for prompt in range(len(LENGTHS))]
    rng = np.random.default_rng(0)
    for step in range(LONGEST):
        if step < 11 or step > ROOM - 2:  # around all that leave, and where room is made
            expected = torch.stack([own_logits(model, encoded, *row) for row in held])
            assert (rows.logits - expected).abs().max() <= tolerance * expected.abs().max()
        if step in stays:
            rows.take(torch.tensor(stays[step]))
            held = [(held[row][0], list(held[row][1])) for row in stays[step]]
        tokens = rng.integers(2, 60, size=len(held))
        for (_, given), token in zip(held, tokens, strict=True):
            given.append(int(token))
        if step + 1 < LONGEST:
            rows.advance(torch.from_numpy(tokens))
    return rows


SAMPLES = [p for p in range(5) for _ in range(3)]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_models_own_pass(kind):
    model = make(kind)
    assert can_step(model)
    # first prompt 3 keeps one, others two or three; then prompt 1, the longest, has nobody left
    some = {2: [0, 1, 2, 3, 4, 6, 7, 8, 9, 12, 13, 14], 5: [0, 1, 6, 7, 8, 9, 11], 9: [4, 5], ROOM + 2: [1]}
    rows = compare(model, {0: SAMPLES} | some)
    assert len(rows._lengths) == 1
    assert rows._across[0][0].shape[2] == LENGTHS[4]  # and nothing is kept of longer prompts that have left


def test_without_samples_and_with_all_to_the_end(monkeypatch):
    compare(make("1.1"), {4: [1, 2, 4]})
    assert compare(make("1.0"), {0: SAMPLES})._slot is None  # queries go in as they are
    monkeypatch.setattr("tests.rollouts.test_t5_decode.LENGTHS", np.full(5, 6))
    assert compare(make("1.0"), {0: SAMPLES})._mask is None  # of prompts of one length


def test_in_bfloat16():
    model = make("1.1").to(torch.bfloat16)
    assert can_step(model)
    compare(model, {0: SAMPLES, 3: [0, 2, 3, 4, 9]}, tolerance=0.1)


def test_a_prompts_keys_are_held_once_for_its_samples():
    model = make("1.0")
    rows = T5Rows(model, LENGTHS, torch.randn(5, 9, 32), 8)
    rows.take(torch.tensor(SAMPLES))
    assert {len(kept) for layer in rows._across for kept in layer} == {5}
    rows.take(torch.tensor([0, 1, 2, 3, 4, 5]))
    assert {len(kept) for layer in rows._across for kept in layer} == {2}


# ----------------------------------------------------------------------------------------------- whom it is used for


def test_the_loop_uses_it(monkeypatch):
    model, made = make("1.0"), Mock(wraps=T5Rows)
    monkeypatch.setattr(decode_module, "T5Rows", made)
    prompts = Ragged.from_rows([[5, 6, 7, 1], [8, 1]], np.int32)
    ours = sample(model, prompts, samples=4, max_new_tokens=6)
    assert made.call_count == 1
    monkeypatch.setattr(decode_module, "can_step", lambda _: False)
    assert_same_rollouts(ours, sample(model, prompts, samples=4, max_new_tokens=6), tolerance=2e-5)
    assert made.call_count == 1


def hook(part: nn.Module) -> None:
    part.register_forward_hook(lambda *_: None)


def own_forward(part: nn.Module) -> None:
    part.forward = type(part).forward.__get__(part)


CHANGES = {
    "a subclass": lambda model: setattr(model, "__class__", type("Another", (type(model),), {})),
    "half precision": lambda model: model.to(torch.float16),
    "a hook on the model": hook,
    "a hook on a layer": lambda model: hook(model.decoder.block[1].layer[1]),
    "a hook on attention": lambda model: hook(model.decoder.block[0].layer[0].SelfAttention),
    "a layer with a forward of its own": lambda model: own_forward(model.decoder.block[0]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_others_decode_by_their_own_pass(change):
    model = make("1.0")
    change(model)
    assert not can_step(model)


@pytest.mark.parametrize("change", ["scaled", "renamed"])
def test_a_t5_that_computes_something_else(change, monkeypatch):
    """As another version of transformers might: it is compared once, and then decodes by its own pass."""
    model = make("1.1")
    kind = type(model.decoder.block[0].layer[1].EncDecAttention)
    if change == "renamed":
        monkeypatch.delattr(kind, "compute_bias")
    else:
        own = kind.forward
        halved = lambda *given, **more: (0.5 * (found := own(*given, **more))[0], *found[1:])  # noqa: E731
        monkeypatch.setattr(kind, "forward", halved)
    assert not can_step(model)
    monkeypatch.undo()
    assert not can_step(model)  # it was asked once
    assert can_step(make("1.1"))
    assert t5_module._agreed[model] is False
