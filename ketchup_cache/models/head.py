"""The language-model head in float32, whatever precision the model's body runs in.

A bfloat16 logit around 40 is one of 39.75, 40, 40.25: a maximum of 32,000 such numbers is a tie, and a gap of two of
them is noise. So the head's weights, products and reductions are float32 here, over the real vocabulary only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ketchup_cache.errors import ModelError
from ketchup_cache.models.forward import Batch, decoder_start, head_input, states_and_next
from ketchup_cache.models.load import evaluating, input_device
from ketchup_cache.types import Ragged

STATES_AT_ONCE = {"cuda": 4096, "cpu": 1024}
"""States whose logits `Head.reduce` takes together, by kind of device; other kinds take what a CPU takes."""
BLOCK = {"cuda": 2**28, "cpu": 2**21}
"""Logits (states × vocabulary) that it holds at once. On a GPU all of T5's vocabulary for all these states, 0.5 GB. The
8 MB of a CPU stay in its cache from the product to the last of the reductions."""

POST_OPERATIONS: dict[str, Callable[[float, Tensor], Tensor]] = {
    "final_logit_softcapping": lambda cap, logits: cap * torch.tanh(logits / cap),  # Gemma
    "logits_soft_cap": lambda cap, logits: cap * torch.tanh(logits / cap),  # RecurrentGemma
    "logit_scale": lambda scale, logits: scale * logits,  # Cohere
    "logits_scaling": lambda divisor, logits: logits / divisor,  # Granite
}
"""What architectures do to the head's output, by the key of their config that holds the number."""


@dataclass(frozen=True, eq=False)
class Head:
    """Logits of a model's head from the states of `completion_states`, in float32.

    Reads the model's weights at each call, so it follows a model in training, and gradients flow into them.

    projection: the head's module. bias: added behind it, beside its own. post_operation: what is done to the logits.
    vocab_size: the tokenizer's; rows of the weight beyond it are padding and never used.
    """

    projection: Any
    bias: Tensor | None
    post_operation: Callable[[Tensor], Tensor] | None
    vocab_size: int

    @classmethod
    def of(cls, model: PreTrainedModel, vocab_size: int) -> Head:
        """The head of `model`, checked against the model's own logits on a small batch.

        vocab_size: the tokenizer's; rows of the weight beyond it are padding and never used.
        Raises ModelError where the weight has fewer rows, or where the logits can't be reproduced.
        """
        projection = model.get_output_embeddings()
        weight = getattr(projection, "weight", None)
        name = type(model).__name__
        if weight is None or weight.dim() != 2:
            raise ModelError(f"{name} has no linear language-model head; its logits can't be reproduced")
        if len(weight) < vocab_size:
            raise ModelError(f"the tokenizer has {vocab_size:,} tokens, but {name} only {len(weight):,}: not a pair")
        added = getattr(model, "final_logits_bias", None)  # BART and Marian
        states, logits = _probe(model, vocab_size)
        tolerance = 1e-4 if weight.dtype == torch.float32 else 2**-6  # bfloat16 keeps 8 bits
        near = tolerance * logits.abs().max().item()
        for operation in _post_operations(model) if states.shape[1:] == weight.shape[1:] else ():
            head = cls(projection, added, operation, vocab_size)
            if torch.allclose(head.logits(states), logits, rtol=tolerance, atol=near):
                return head
        raise ModelError(f"{name}: its logits can't be reproduced from its head's input; such a head is not supported")

    def on(self, model: PreTrainedModel) -> Head:
        """That of a copy of the model."""
        added = getattr(model, "final_logits_bias", None)
        return replace(self, projection=model.get_output_embeddings(), bias=added)

    @property
    def device(self) -> torch.device:
        """Where logits come out; targets belong there too."""
        return self.projection.weight.device

    def logits(self, states: Tensor, of: slice | None = None) -> Tensor:
        """States [n, D] of any float dtype → logits [n, V] in float32, or those `of` a part of the vocabulary."""
        of = of or slice(0, self.vocab_size)
        weight, bias = self.projection.weight[of], self._bias(of)
        logits = _product(states.to(weight.device), weight)
        logits = logits if bias is None else logits + bias
        return self.post_operation(logits) if self.post_operation else logits

    def _bias(self, of: slice) -> Tensor | None:
        """What is added to the product, [V] float32."""
        both = (getattr(self.projection, "bias", None), self.bias)
        found = [bias.flatten()[of].float() for bias in both if bias is not None]
        return sum(found[1:], found[0]) if found else None

    def log_prob(self, states: Tensor, targets: Tensor) -> Tensor:
        """Log-softmax of the chosen tokens. states: [n, D], targets: [n] int64 → [n] float32, nats."""
        return self.buckets(states, targets.new_empty(len(targets), 0), targets)[1]

    def buckets(
        self, states: Tensor, ids: Tensor, targets: Tensor, *, chunk: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the tokens `ids` and, behind them, of all others together, [n, m + 1] float32, as
        `divergences.student_buckets` gives them (with m = V the last is −inf); and those of `targets`, [n] float32.

        states: [n, D]. ids: [n, m] int64, distinct in a row. targets: [n] int64. chunk: states whose logits are held
        together, for speed: they are computed again in the backward pass, and [n, V] is never held.
        """
        kind = states.device.type if states.device.type in BLOCK else "cpu"
        chunk = chunk or min(STATES_AT_ONCE[kind], max(BLOCK[kind] // self.vocab_size, 256))
        ids, targets = ids.to(self.device), targets.to(self.device)
        weight, bias = self.projection.weight[: self.vocab_size].float(), self._bias(slice(0, self.vocab_size))
        states = states.to(self.device).float()
        buckets, logprob = _Buckets.apply(states, weight, bias, ids, targets, self.post_operation, chunk)
        return buckets, logprob

    @torch.no_grad()
    def reduce(self, states: Tensor, targets: Tensor, *, keep_top: int = 0) -> tuple[Tensor, ...]:
        """States [n, D] and targets [n] int64 → q, max_q, logsumexp and mean_q (`Scores`), each [n] float32.

        With keep_top, also top_q [n, keep_top] float32 and top_ids [n, keep_top] int64, largest first, and
        rest_logsumexp [n] float32 over the others.
        """
        kind = states.device.type
        size = STATES_AT_ONCE.get(kind, STATES_AT_ONCE["cpu"])
        block = max(BLOCK.get(kind, BLOCK["cpu"]) // size, 1)
        if keep_top:  # a row's largest are looked for among all of it
            size, block = max(size * block // self.vocab_size, 1), self.vocab_size
        chunks = zip(states.split(size), targets.split(size), strict=True)
        parts = [self._reduce(*chunk, block, keep_top) for chunk in chunks]
        return tuple(torch.cat(values) for values in zip(*parts, strict=True))

    def _reduce(self, states: Tensor, targets: Tensor, block: int, keep_top: int) -> tuple[Tensor, ...]:
        """A block of the vocabulary at a time, each reduced while it is in the processor's cache. The sum of
        exponentials is kept relative to the largest logit so far, and shrinks whenever a larger one comes."""
        states = states.to(self.device)
        max_q = states.new_full((len(states),), -torch.inf, dtype=torch.float32)
        q, total, total_exp = torch.zeros_like(max_q), torch.zeros_like(max_q), torch.zeros_like(max_q)
        top: tuple[Tensor, ...] = ()
        for start in range(0, self.vocab_size, block):
            logits = self.logits(states, slice(start, min(start + block, self.vocab_size)))
            here = targets - start
            inside = (here >= 0) & (here < logits.shape[1])
            chosen = logits.gather(1, here.clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1)
            q = torch.where(inside, chosen, q)
            total += logits.sum(1)
            largest = torch.maximum(max_q, logits.amax(1))
            if keep_top:
                top = _top(logits, keep_top)
            exponentials = logits.sub_(largest[:, None]).exp_().sum(1)
            total_exp = total_exp * (max_q - largest).exp() + exponentials
            max_q = largest
        return q, max_q, max_q + total_exp.log(), total / self.vocab_size, *top


class _Buckets(torch.autograd.Function):
    """`Head.buckets`. The gradient of the logits is made where the logits are, so that a block of them stays in a
    processor's cache. Autograd makes six such tensors anew."""

    @staticmethod
    def forward(
        context: Any, states: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, targets: Tensor,
        post: Callable[[Tensor], Tensor] | None, chunk: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        n = len(states)
        buckets, logprob, rest = states.new_empty(n, ids.shape[1] + 1), states.new_empty(n), states.new_empty(n, 1)
        for rows, logits in _blocks(states, weight, bias, chunk):
            logits = post(logits) if post else logits
            kept, chosen = logits.gather(1, ids[rows]), logits.gather(1, targets[rows, None])
            others = logits.scatter_(1, ids[rows], -torch.inf)
            largest = others.amax(1, keepdim=True).clamp(min=torch.finfo(others.dtype).min)
            rest[rows] = largest + others.sub_(largest).exp_().sum(1, keepdim=True).log()
            total = torch.logaddexp(rest[rows], kept.logsumexp(1, keepdim=True))
            buckets[rows] = torch.cat([kept, rest[rows]], 1) - total
            logprob[rows] = (chosen - total)[:, 0]
        context.save_for_backward(states, weight, bias, ids, targets, buckets, rest)
        context.how = post, chunk
        return buckets, logprob

    @staticmethod
    def backward(context: Any, of_buckets: Tensor, of_logprob: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, bias, ids, targets, buckets, rest = context.saved_tensors
        post, chunk = context.how
        needed = zip((states, weight, bias), context.needs_input_grad, strict=False)
        new = torch.empty_like if len(states) else torch.zeros_like
        of_states, of_weight, of_bias = (new(of) if need else None for of, need in needed)
        # the gradient of a logit z with probability p, G being the sum of all that come in: of a kept one g − G p, of
        # the others (g of the rest − G p of the rest) · their share of the rest, and g more of a target
        of_logit = of_buckets - (of_buckets.sum(1, keepdim=True) + of_logprob[:, None]) * buckets.exp()
        for rows, logits in _blocks(states, weight, bias, chunk):
            if post:
                through: Any = torch.func.vjp(post, logits)
                logits, back = through[0].clone(), through[1]
            logits.sub_(rest[rows]).exp_().mul_(of_logit[rows, -1:]).scatter_(1, ids[rows], of_logit[rows, :-1])
            logits.scatter_add_(1, targets[rows, None], of_logprob[rows, None])
            if post:
                (logits,) = back(logits)
            if of_states is not None:
                torch.mm(logits, weight, out=of_states[rows])
            if of_weight is not None:
                of_weight.addmm_(logits.T, states[rows], beta=int(rows.start > 0))  # with 0, whatever is there
            if of_bias is not None:
                of_bias.copy_(logits.sum(0) + (of_bias if rows.start else 0))
        return of_states, of_weight, of_bias, None, None, None, None


def _blocks(states: Tensor, weight: Tensor, bias: Tensor | None, chunk: int) -> Iterator[tuple[slice, Tensor]]:
    """The head's product for so many states after the other, all in one place."""
    place = states.new_empty(min(chunk, len(states)), len(weight))
    for start in range(0, len(states), chunk):
        rows = slice(start, min(start + chunk, len(states)))
        product = torch.mm(states[rows], weight.T, out=place[: rows.stop - start])
        yield rows, product if bias is None else product.add_(bias)


def _top(logits: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest of each row of all logits [n, V], their ids, and the logsumexp of the others: −inf where none are."""
    top_q, top_ids = logits.topk(keep, dim=1)
    others = logits.scatter(1, top_ids, -torch.inf)
    if keep == logits.shape[1]:
        return top_q, top_ids, others[:, 0]
    largest = others.amax(1)
    return top_q, top_ids, largest + others.sub_(largest[:, None]).exp_().sum(1).log()


def _product(states: Tensor, weight: Tensor) -> Tensor:
    """States [n, D] × weight [v, D] → [n, v] float32. A product of two bfloat16 numbers is exact in float32, so where a
    GPU sums them up in float32 they need not be made larger first."""
    if states.is_cuda and states.dtype == weight.dtype == torch.bfloat16 and not torch.is_grad_enabled():
        return torch.mm(states, weight.T, out_dtype=torch.float32)
    return F.linear(states.float(), weight.float())


def _post_operations(model: PreTrainedModel) -> list[Callable[[Tensor], Tensor] | None]:
    """The operations this model's config speaks of first, then none."""
    configs = [model.config, model.config.get_text_config(decoder=True)]
    declared = {key: [v for config in configs if (v := getattr(config, key, None))] for key in POST_OPERATIONS}
    return [*(partial(POST_OPERATIONS[key], values[0]) for key, values in declared.items() if values), None]


@torch.no_grad()
def _probe(model: PreTrainedModel, vocab_size: int) -> tuple[Tensor, Tensor]:
    """The model's own forward pass over four random rows, one at a time, with nothing of ours in it: the head's
    input [n, D] and the logits [n, V] float32. Two of them have the same prompt, so that a packed row is among ours.

    Raises ModelError where `completion_states` gets other states for the same rows.
    """
    rng = np.random.default_rng(0)
    rows = ([rng.integers(vocab_size, size=length) for length in lengths] for lengths in ((7, 4, 1), (3, 5, 1, 4)))
    prompts, completions = (Ragged.from_rows(tokens, np.int32) for tokens in rows)
    batch = Batch(prompts, np.array([0, 1, 2, 1]), completions)
    with evaluating(model):
        own_passes = map(partial(own_pass, model), prompts.take(batch.prompt_index), completions)
        states, logits = zip(*own_passes, strict=True)
        # fed one token more than the rows alone: a model that looks ahead is found out too
        ours, _ = states_and_next(model, batch, np.ones(4, np.bool_))
    own = torch.cat(states)
    # rounding differs between one row and four: in bfloat16 by percents after many layers
    tolerance = (1e-3 if own.dtype == torch.float32 else 0.1) * own.abs().max()
    if not ((ours - own).abs() <= tolerance).all():
        what = "computes other states in a padded batch than alone, or looks ahead: not supported"
        raise ModelError(f"{type(model).__name__} {what}")
    return own, torch.cat(logits)[:, :vocab_size].float()


def own_pass(model: PreTrainedModel, prompt: NDArray, completion: NDArray) -> tuple[Tensor, Tensor]:
    """The head's input [T, D] and the logits [T, vocabulary] for one completion."""
    inputs, first = {}, 0
    if model.config.is_encoder_decoder:
        started = torch.tensor([[decoder_start(model), *completion[:-1]]], device=input_device(model))
        inputs = {"decoder_input_ids": started, "decoder_attention_mask": torch.ones_like(started)}
    else:
        prompt, first = np.append(prompt, completion[:-1]), len(prompt) - 1
    inputs["input_ids"] = torch.tensor(prompt[None], dtype=torch.long, device=input_device(model))
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])  # without masks, some mask by token id
    return head_input(model, **inputs)[0, first:], model(**inputs, use_cache=False).logits[0, first:]
