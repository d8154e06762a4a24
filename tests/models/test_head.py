from dataclasses import replace

import pytest
import torch
import transformers

from ketchup_cache.errors import ModelError
from ketchup_cache.method.divergences import student_buckets
from ketchup_cache.models import forward
from ketchup_cache.models.head import BLOCK, STATES_AT_ONCE, Head, _Buckets
from tests.helpers.errors import refuses
from tests.helpers.models import FAMILIES, make_decoder, make_model, make_t5
from tests.helpers.oracle import assert_same_scores, plain_scores, random_rollouts
from tests.helpers.scoring import teacher_of


def tiny_gemma():
    """An encoder-decoder whose cap is in the config of its decoder."""
    torch.manual_seed(0)
    stack = {
        "vocab_size": 60, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": 2, "num_key_value_heads": 1, "final_logit_softcapping": 2.0,
        "initializer_range": 0.5, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    config = transformers.T5GemmaConfig(encoder=stack, decoder=stack, vocab_size=60, decoder_start_token_id=0)
    return transformers.T5GemmaForConditionalGeneration(config).eval()


CHANGED = {
    "t5-1.1 with a bias": lambda model: setattr(model.lm_head, "bias", torch.nn.Parameter(torch.randn(60))),
    "t5-1.0 that declares a cap": lambda model: setattr(model.config, "final_logit_softcapping", 5.0),  # not believed
    "bart with a bias": lambda model: model.final_logits_bias.normal_(),
}


@pytest.mark.parametrize("name", ["t5-1.0", "t5-1.1", *CHANGED, "t5gemma", *FAMILIES])
def test_scores_are_those_of_the_models_own_logits(name):
    model = tiny_gemma() if name == "t5gemma" else make_model(name.split()[0])
    CHANGED.get(name, lambda model: None)(model)
    prompts, rollouts = random_rollouts(0, 14)
    plain = plain_scores(model, prompts, rollouts)
    for budget in (1, 60, 10_000):
        assert_same_scores(teacher_of(model).score(prompts, rollouts, batch_tokens=budget), plain)


SPOILED = {
    "power": lambda logits: logits**3,
    "a cap that the config does not speak of": lambda logits: 5 * torch.tanh(logits / 5),
    "log-softmax": lambda logits: logits.log_softmax(-1),
    "mixture": lambda logits: logits + logits.roll(1, -1),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_head_that_cant_be_reproduced_is_refused(name):
    model = make_t5()
    model.register_forward_hook(lambda _, __, output: output.__setitem__("logits", SPOILED[name](output.logits)))
    refuses(ModelError, r"T5ForConditionalGeneration: its logits can't be reproduced", Head.of, model, 60)


def test_a_model_that_a_batch_confuses_is_refused(monkeypatch):
    """Its states depend on padding: the probe compares a padded batch with rows alone."""
    monkeypatch.setattr(forward, "is_ragged", lambda _: False)
    model = make_t5()
    encode = model.encoder.forward
    model.encoder.forward = lambda attention_mask, **more: encode(
        attention_mask=torch.ones_like(attention_mask), **more
    )
    refuses(ModelError, "padded batch", Head.of, model, 60)


def test_a_model_smaller_than_the_tokenizer_is_refused():
    refuses(ModelError, "the tokenizer has 61 tokens, but T5ForConditionalGeneration only 60", Head.of, make_t5(), 61)


@pytest.mark.parametrize("model", [make_t5("1.1", vocab_size=72), make_decoder("wide")], ids=["t5", "wide"])
def test_padding_rows_of_the_head_are_never_used(model):
    with torch.no_grad():
        model.lm_head.weight[60:] = torch.cat([100 * model.lm_head.weight[:6], -100 * model.lm_head.weight[:6]])
    prompts, rollouts = random_rollouts(0, 9)
    plain, wide = (plain_scores(model, prompts, rollouts, vocab_size=size) for size in (60, 72))
    assert (wide.max_q > plain.max_q + 1).all()  # they would win
    assert_same_scores(teacher_of(model).score(prompts, rollouts, batch_tokens=500), plain)


def reductions(logits, targets) -> tuple[torch.Tensor, ...]:
    """q, max_q, logsumexp and mean_q from their definitions."""
    return logits.gather(1, targets[:, None])[:, 0], logits.amax(1), logits.logsumexp(1), logits.mean(1)


def test_the_head_is_float32_under_a_bfloat16_body():
    """A bfloat16 head errs by more than the gaps that returns are made of."""
    model = make_t5("1.1", scale=5).to(torch.bfloat16)
    head = Head.of(model, 60)
    states = torch.randn(40, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.arange(40)

    with torch.no_grad():
        exact = reductions(states.double() @ model.lm_head.weight[:60].double().T, targets)
        rounded = reductions(model.lm_head(states)[:, :60].float(), targets)
    for value, expected in zip(head.reduce(states, targets), exact, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-4)
    assert (rounded[1].double() - exact[1]).abs().max() > 0.01


@pytest.mark.parametrize("block", [1, 7, 60, 100])
@pytest.mark.parametrize("offset", [0.0, 300.0, -300.0])
def test_blocks_of_the_vocabulary_change_nothing(block, offset, monkeypatch):
    """Wherever the largest logit stands, and where exponentials of the logits themselves would overflow or vanish."""
    head = replace(Head.of(make_t5("1.1", scale=20), 60), bias=torch.full((1, 80), offset))  # as BART has one
    monkeypatch.setitem(BLOCK, "cpu", block * 5)
    monkeypatch.setitem(STATES_AT_ONCE, "cpu", 5)
    states = torch.randn(33, 32, generator=torch.Generator().manual_seed(1)) * 3
    targets = torch.arange(33) % 60
    logits = head.logits(states).double()
    found = head.reduce(states, targets)
    for value, expected in zip(found, reductions(logits, targets), strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-4)
    assert (found[0] <= found[1]).all()
    best = head.reduce(states, logits.argmax(1))
    assert torch.equal(best[0], best[1])  # of the same product, so that no gap is negative or a rounding error


@pytest.mark.parametrize("kept", [1, 7, 60])
@pytest.mark.parametrize("name", ["t5-1.1", *CHANGED, "t5gemma", "gemma2", "cohere"])
def test_buckets_are_those_of_all_logits_in_value_and_gradient(name, kept):
    model = tiny_gemma() if name == "t5gemma" else make_model(name.split()[0])
    CHANGED.get(name, lambda model: None)(model)
    head, random = Head.of(model, 60), torch.Generator().manual_seed(0)
    states = (3 * torch.randn(11, head.projection.weight.shape[1], generator=random)).requires_grad_()
    ids = torch.rand(11, 60, generator=random).topk(kept).indices
    targets = torch.randint(60, (11,), generator=random)
    logits, (buckets, logprob) = head.logits(states), head.buckets(states, ids, targets, chunk=4)
    plain = student_buckets(logits, ids), logits.log_softmax(1)[torch.arange(11), targets]
    if kept == 60:
        assert (buckets[:, -1] == -torch.inf).all()
    ours = buckets[:, : plain[0].shape[1]], logprob
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    weights = [torch.randn(of.shape, generator=random) for of in plain]
    inputs = [states, *(p for p in head.projection.parameters() if p.requires_grad)]
    grads = (
        torch.autograd.grad(sum((of * w).sum() for of, w in zip(found, weights, strict=True)), inputs)
        for found in (ours, plain)
    )
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("post", [None, lambda logits: 2 * torch.tanh(logits / 2)])
def test_the_gradient_of_buckets_is_that_of_small_steps(post):
    """In float64, with a token beside which the others are nothing, and targets among the kept and not."""
    random = torch.Generator().manual_seed(0)
    sizes = (4, 3), (9, 3), (9,)
    inputs = [torch.randn(size, generator=random, dtype=torch.float64, requires_grad=True) for size in sizes]
    with torch.no_grad():
        inputs[2][5] = 30
    ids, targets = torch.tensor([[5, 1], [2, 3], [5, 0], [4, 8]]), torch.tensor([5, 3, 7, 5])
    torch.autograd.gradcheck(lambda *given: _Buckets.apply(*given, ids, targets, post, 3), inputs, atol=1e-7)


def test_log_prob_keeps_no_logits_for_the_backward_pass():
    model = make_t5("1.1")
    head = Head.of(model, 60)
    states, targets = torch.randn(64, 32, requires_grad=True), torch.randint(60, (64,))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        (states @ model.lm_head.weight.T).log_softmax(1)
        assert (64, 60) in kept
        kept.clear()
        head.buckets(states, targets[:, None], targets, chunk=8)
    assert not [shape for shape in kept if shape[-1:] == (60,)]


def test_the_head_follows_a_model_in_training():
    model = make_t5("1.0").train()
    head = Head.of(model, 60)
    assert model.training
    states = torch.randn(3, 32)
    before = head.logits(states)
    with torch.no_grad():
        model.shared.weight.mul_(2)
    torch.testing.assert_close(head.logits(states), 2 * before)


def test_no_states_give_no_values():
    head = Head.of(make_t5(), 60)
    none, targets = torch.empty(0, 32), torch.empty(0, dtype=torch.long)
    assert [value.shape for value in head.reduce(none, targets)] == [(0,)] * 4
    assert head.log_prob(none, targets).shape == (0,)
