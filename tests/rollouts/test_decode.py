"""The decoding loop against transformers' `generate`, and against every row alone with the numbers of its place."""

import numpy as np
import pytest
import torch
import transformers

import ketchup_cache.rollouts.sample as sample_module
from ketchup_cache.rollouts.decode import LEAVE, can_decode
from ketchup_cache.types import Ragged, Rollouts
from tests.helpers.models import ENCODERS, ENDS, FAMILIES, VOCAB, make_model
from tests.helpers.oracle import assert_same_rollouts, plain_logits, rows_of, sample as sample_prompts

PROMPTS = Ragged.from_rows([np.random.default_rng(n).integers(2, VOCAB, size=n) for n in (3, 9, 1, 5, 30, 4)], np.int32)
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": 0,
}  # fmt: skip
TOLERANCE = 3e-5


def make(family: str, ends: list[int] = ENDS):
    return make_model(family, ends=ends)


def sample(model, prompts=PROMPTS, **settings) -> Rollouts:
    return sample_prompts(model, prompts, **{"batch": 24, "max_new_tokens": 20} | settings)


def assert_as_by_generate(monkeypatch, model, prompts=PROMPTS, **settings) -> Rollouts:
    ours = sample(model, prompts, **settings)
    with monkeypatch.context() as patched:
        patched.setattr(sample_module, "can_decode", lambda _: False)
        patched.setattr(sample_module, "decode", None)
        assert_same_rollouts(ours, sample(model, prompts, **settings), TOLERANCE)
    return ours


@pytest.mark.parametrize("family", ["t5-1.0", "t5-1.1", *ENCODERS, *FAMILIES])
def test_tokens_are_those_of_generate(family, monkeypatch):
    model = make(family)
    assert can_decode(model)
    assert_as_by_generate(monkeypatch, model, greedy=True)
    ours = assert_as_by_generate(monkeypatch, model, samples=6, seed=4)
    assert len(set(ours.completions.lengths.tolist())) > 2
    assert_as_by_generate(monkeypatch, model, samples=5, temperature=0.8, top_k=30, top_p=0.9, batch=3)


@pytest.mark.parametrize("family", ["t5-1.1", "qwen2"])
def test_every_row_is_what_it_would_be_alone(family):
    """One row, no padding, no keys kept, nobody else: the first token whose cumulative share passes its number."""
    model, samples, longest, seed, first = make(family), 4, 12, 9, 50
    rollouts = sample(model, samples=samples, seed=seed, max_new_tokens=longest, first_prompt=first, batch=8)
    for row, (prompt, completion, logprob) in enumerate(rows_of(rollouts)):
        assert prompt == row // samples
        numbers = np.random.default_rng([seed, first + prompt]).random((samples, longest))[row % samples]
        written: list[int] = []
        for step in range(longest):
            logits = plain_logits(model, PROMPTS[prompt], written, after=True)[-1, :VOCAB]
            shares = logits.double().softmax(0).numpy()
            written.append(int(np.argmax(shares.cumsum() > numbers[step])))
            assert logprob[step] == pytest.approx(np.log(shares[written[-1]]), abs=1e-4)
            if written[-1] in ENDS:
                break
        assert completion == written


@pytest.mark.parametrize("family", ["t5-1.1", "bart", "qwen2", "bloom-alibi"])
@pytest.mark.parametrize("greedy", [False, True])
def test_rows_that_have_ended_are_not_computed(family, greedy):
    model, seen = make(family, ends=list(range(0, VOCAB, 4))), []  # (rows, tokens of each) of every pass
    name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    model.register_forward_pre_hook(lambda _, __, inputs: seen.append(tuple(inputs[name].shape)), with_kwargs=True)
    sample(model, max_new_tokens=1)  # the first time it is found out what the model's steps are worth
    seen.clear()
    lengths = sample(model, samples=1 if greedy else 8, greedy=greedy, batch=64).completions.lengths
    assert seen[0][0] == len(PROMPTS)  # a prompt is read once for all its samples
    if model.config.is_encoder_decoder:
        assert {tokens for _, tokens in seen} == {1}
    for step, (rows, _) in enumerate(seen[1:], start=1):
        going = int((lengths > step).sum())  # rows that need token `step`
        assert going <= rows < going / (1 - LEAVE) + 1
    assert len(seen) == lengths.max()
    assert greedy or min(rows for rows, _ in seen[1:]) <= 4


def test_logits_of_a_prompt_are_not_computed():
    model, seen = make("qwen2"), []
    sample(model, max_new_tokens=1)
    model.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[:2])))
    sample(model, samples=2)
    assert seen[0] == (len(PROMPTS), 1)


def test_long_prompts_are_encoded_apart_from_short_ones(monkeypatch):
    model, seen = make("t5-1.0"), []
    rng = np.random.default_rng(1)
    lengths = rng.permutation([4] * 30 + [100] * 30 + [400] * 6)
    prompts = Ragged.from_rows([rng.integers(2, VOCAB, size=n) for n in lengths], np.int32)
    assert_as_by_generate(monkeypatch, model, prompts, batch=100, max_new_tokens=4)
    model.get_encoder().register_forward_hook(lambda _, __, out: seen.append(out.last_hidden_state.shape[:2]))
    sample(model, prompts, batch=100, max_new_tokens=4)
    assert sum(rows for rows, _ in seen) == len(prompts)
    assert sum(rows * width for rows, width in seen) < 0.35 * len(lengths) * lengths.max()


# --------------------------------------------------------------------------------------------- what it does not know


def other(name: str):
    torch.manual_seed(0)
    if name == "phi3":  # computes its keys anew when a row grows past the positions it was trained on
        return transformers.Phi3ForCausalLM(transformers.Phi3Config(**SMALL))
    if name == "mamba":  # a state instead of keys and values
        small = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
        return transformers.MambaForCausalLM(transformers.MambaConfig(**small))
    model = make("qwen2")
    if name == "remote code":
        model.is_remote_code = lambda: True
    elif name == "own generate":
        own = model.generate
        model.generate = lambda **inputs: own(**inputs)
    else:
        inherited = getattr(type(model), name)
        model.__class__ = type("Own", (type(model),), {name: lambda *given, **kwargs: inherited(*given, **kwargs)})
    return model


@pytest.mark.parametrize(
    "name",
    ["phi3", "mamba", "remote code", "own generate", "prepare_inputs_for_generation",
     "_update_model_kwargs_for_generation", "generate"],
)  # fmt: skip
def test_other_models_are_left_to_generate(name, monkeypatch):
    model = other(name).eval()
    model.generation_config.eos_token_id = ENDS
    assert not can_decode(model)
    monkeypatch.setattr(sample_module, "decode", None)
    rollouts = sample(model, samples=3, max_new_tokens=6)
    assert len(rollouts) == 3 * len(PROMPTS)
    if name not in ("phi3", "mamba"):
        monkeypatch.undo()
        assert_same_rollouts(rollouts, sample(make("qwen2"), samples=3, max_new_tokens=6), TOLERANCE)


def test_other_layers_and_forward_passes_are_left_to_generate(monkeypatch):
    """Layers that keep something else; a pass that takes no encoder output."""
    layers, forward = make("qwen2"), make("t5-1.0")
    config = transformers.Qwen3NextConfig(**SMALL, num_key_value_heads=2)
    assert "linear_attention" in config.layer_types
    monkeypatch.setattr(layers, "config", config)
    monkeypatch.setattr(forward, "forward", lambda input_ids, past_key_values=None, **more: None)
    assert not can_decode(layers)
    assert not can_decode(forward)
