"""AdamW with warm-up and gradient clipping, and the gradient of a batch summed up over micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ketchup_cache.config.options import StepOptions
from ketchup_cache.errors import NumericsError
from ketchup_cache.models.forward import Batch, computes_prompts_once, training_states
from ketchup_cache.models.head import Head
from ketchup_cache.types import ScoredRollouts

CHUNK = 1024
"""States whose logits are held at once."""
Options = TypeVar("Options", bound=StepOptions, covariant=True)
Loss = Callable[[NDArray, Tensor, Tensor], Tensor]
"""Loss of a micro-batch, of the places of its n tokens in the batch's, the head's input [n, D], and the tokens [n]."""


class Optimizer:
    """AdamW (β = 0.9, 0.999; paper, Table 4) whose learning rate is a function of the step number alone."""

    def __init__(self, model: nn.Module, options: StepOptions, steps: int) -> None:
        """steps: of the whole run, for the schedule."""
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        decay = options.weight_decay
        self.adamw = torch.optim.AdamW(self.named.values(), lr=options.lr, betas=(0.9, 0.999), weight_decay=decay)
        self._options, self._steps = options, steps

    def lr(self, step: int) -> float:
        """Learning rate of optimizer step `step`, counted from 0. Decay reaches zero after the last step."""
        warmup, schedule = self._options.warmup, self._options.schedule
        warmup = int(warmup if warmup >= 1 else warmup * self._steps)
        rate = self._options.lr * min(1.0, (step + 1) / (warmup + 1))
        if schedule == "constant" or step < warmup:
            return rate
        left = (self._steps - step) / max(self._steps - warmup, 1)
        return rate * (left if schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)

    def step(self, step: int) -> float:
        """Apply the accumulated gradient and clear it; returns its norm before clipping.

        Raises NumericsError, leaving the weights as they were, where the norm is not finite.
        """
        norm = float(nn.utils.clip_grad_norm_(self.named.values(), self._options.max_grad_norm))
        if not math.isfinite(norm):
            raise NumericsError(f"step {step}: the gradient is {norm}; the weights were not changed. Lower --lr")
        for group in self.adamw.param_groups:
            group["lr"] = self.lr(step)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """AdamW's moments under names: `<parameter>/exp_avg`, …"""
        return {
            f"{name}/{key}": value.contiguous()
            for name, parameter in self.named.items()
            for key, value in self.adamw.state.get(parameter, {}).items()
        }

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        for key, value in tensors.items():
            name, moment = key.rsplit("/", 1)
            parameter = self.named[name]
            # AdamW keeps its step counter on the CPU, the moments beside the parameter
            device = "cpu" if moment == "step" else parameter.device
            self.adamw.state[parameter][moment] = value.to(device)


def in_chunks(
    terms: Callable[..., tuple[Tensor, ...]], states: Tensor, targets: Tensor, places: NDArray
) -> list[Tensor]:
    """`terms` of [n, …] states, targets and places, in parts of at most `CHUNK` rows, put together again. Each part's
    logits are computed again in the backward pass: [n, V] is never held for the whole batch.
    """
    spans = [slice(start, start + CHUNK) for start in range(0, max(len(places), 1), CHUNK)]
    parts = [checkpoint(terms, states[s], targets[s], places[s], use_reentrant=False) for s in spans]
    return [torch.cat(values) for values in zip(*parts, strict=True)]


@dataclass(frozen=True)
class Learner(Generic[Options]):
    """A model in training, with all that an optimizer step needs besides data."""

    model: PreTrainedModel
    head: Head
    optimizer: Optimizer
    options: Options

    def micro_batches(self, batch: Batch, rows: NDArray) -> Iterator[tuple[NDArray, Batch]]:
        """The given rows of a batch in parts of at most `micro_batch_tokens` tokens, each with the places [n] of its
        tokens among all of the batch."""
        once = computes_prompts_once(self.model)
        for chosen in batch.split(rows, self.options.micro_batch_tokens, once=once):
            yield batch.completions.places(chosen)[0], batch.take(chosen)

    def inputs(self, part: Batch) -> tuple[Tensor, Tensor]:
        """The head's input at every completion token [n, D] float32, and these tokens [n] int64 on its device."""
        states = training_states(self.model, part, self.options.precision)
        return states, torch.from_numpy(part.completions.values).long().to(states.device)

    def accumulate(self, batch: Batch, rows: NDArray, loss: Loss, step: int) -> float:
        """Add the gradient of `loss`, a sum over tokens, for these rows; returns its value.

        Raises NumericsError where it is not finite; the weights are then as before.
        """
        total = 0.0
        for places, part in self.micro_batches(batch, rows):
            value = loss(places, *self.inputs(part))
            number = float(value.detach())
            if not math.isfinite(number):
                raise NumericsError(f"step {step}: the loss is {number}; the weights were not changed. Lower --lr")
            value.backward()
            total += number
        return total


def all_rows(batch: ScoredRollouts) -> Batch:
    """Prompts and completions of scored rollouts, for a forward pass."""
    return Batch(batch.prompts.tokens, batch.rollouts.prompt_index, batch.rollouts.completions)
