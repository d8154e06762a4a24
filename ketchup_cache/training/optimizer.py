"""AdamW with warm-up and gradient clipping, and the gradient of a batch summed up over micro-batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from ketchup_cache.config.options import StepOptions
from ketchup_cache.errors import NumericsError
from ketchup_cache.method.losses import Staleness
from ketchup_cache.models.forward import Batch, computes_prompts_once, training_states
from ketchup_cache.models.head import Head
from ketchup_cache.models.load import pick_device
from ketchup_cache.parallel.group import group
from ketchup_cache.types import ScoredRollouts

if TYPE_CHECKING:
    from ketchup_cache.models.sharded import Sharded

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
        how: dict[str, Any] = {"lr": options.lr, "betas": (0.9, 0.999), "weight_decay": options.weight_decay}
        # without it a CPU goes through a weight ten times a step; on a GPU torch has its own choice
        how["fused"] = all(type(p) is nn.Parameter and p.device.type == "cpu" for p in self.named.values()) or None
        self.adamw = torch.optim.AdamW(self.named.values(), **how)
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
        group().sum_gradients(self.named.values())
        clipped = nn.utils.clip_grad_norm_(self.named.values(), self._options.max_grad_norm)
        norm = float(getattr(clipped, "full_tensor", lambda: clipped)())
        if not math.isfinite(norm):
            raise NumericsError(f"step {step}: the gradient is {norm}; the weights were not changed. Lower --lr")
        for options in self.adamw.param_groups:
            options["lr"] = self.lr(step)
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

    def empty_tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Of the names that `tensors` gives: AdamW has its step counter on the CPU, the moments beside the weights."""
        parts = ((name, *name.rsplit("/", 1)) for name in names)
        return {
            name: torch.zeros(()) if moment == "step" else torch.zeros_like(self.named[of].detach())
            for name, of, moment in parts
        }

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        for key, value in tensors.items():
            name, moment = key.rsplit("/", 1)
            self.adamw.state[self.named[name]][moment] = value


@dataclass(frozen=True)
class Learner(Generic[Options]):
    """A model in training, with all that an optimizer step needs besides data. parts: where it is in parts, `model` and
    `head` being theirs."""

    model: PreTrainedModel
    head: Head
    optimizer: Optimizer
    options: Options
    parts: Sharded | None = None

    @classmethod
    def of(
        cls, model: PreTrainedModel, head: Head, config: Any, steps: int, *, keep_start: bool = False
    ) -> Learner[Any]:
        """config: of `learn` or `pretrain`. With `fsdp` the model, on the CPU, gives its weights to parts; `gather`
        brings them back. keep_start: as `Sharded` takes it. Raises ModelError."""
        if not config.fsdp:
            return cls(model, head, Optimizer(model, config, steps), config)
        from ketchup_cache.models.sharded import Sharded

        parts = Sharded(model, pick_device(config.device), keep_start=keep_start)
        return cls(parts.model, head.on(parts.model), Optimizer(parts.model, config, steps), config, parts)

    def gather(self, *, to_write: bool = False) -> None:
        """Before the model itself is used for anything but training, by all processes; it lasts until they train again.
        to_write: the first alone uses it, to write or to hash it."""
        if self.parts:
            self.parts.gather(to_write=to_write)

    def micro_batches(self, batch: Batch, rows: NDArray) -> Iterator[tuple[NDArray, Batch]]:
        """The given rows of a batch in parts of at most `micro_batch_tokens` tokens, each with the places [n] of its
        tokens among all of the batch. Of several processes each has rows of its own, as many tokens as any other.

        Where the model is in parts, one that has fewer micro-batches than another goes through a row for nothing: `n`
        is 0 then."""
        once, spare = computes_prompts_once(self.model), rows[:1]
        if group().size > 1:
            rows = rows[np.argsort(batch.prompt_index[rows], kind="stable")]  # samples of a prompt share its encoding
            rows = group().cut(rows, batch.prompts.lengths[batch.prompt_index[rows]] + batch.completions.lengths[rows])
        chosen = batch.split(rows, self.options.micro_batch_tokens, once=once)
        if self.parts:
            self.parts.release()
        for number, some in enumerate(group().level(chosen, spare) if self.parts else chosen):
            places = batch.completions.places(some)[0]
            yield places if number < len(chosen) else places[:0], batch.take(some)
        if self.parts:
            self.parts.reshard()

    def inputs(self, places: NDArray, part: Batch) -> tuple[Tensor, Tensor]:
        """Of a micro-batch: the head's input at every completion token [n, D] float32, and these tokens [n] int64 on
        its device."""
        compute = self.parts.states if self.parts else partial(training_states, self.model)
        states = compute(part, self.options.precision)
        targets = torch.from_numpy(part.completions.values).long().to(states.device)
        return (states, targets) if len(places) else (states[:0], targets[:0])

    def accumulate(self, batch: Batch, rows: NDArray, loss: Loss, step: int) -> float:
        """Add the gradient of `loss`, a sum over tokens, for these rows; returns its value.

        Of several processes each adds that of its own rows; the value is that of all.

        Raises NumericsError where it is not finite; the weights are then as before.
        """
        total = 0.0
        for places, part in self.micro_batches(batch, rows):
            value = loss(places, *self.inputs(places, part))
            number = float(value.detach())
            if not math.isfinite(number):
                raise NumericsError(f"step {step}: the loss is {number}; the weights were not changed. Lower --lr")
            value.backward()
            total += number
        return float(group().summed(np.array([total]))[0])


def of_all_processes(staleness: Staleness) -> Staleness:
    """That of the whole batch, from that of the rows of each process."""
    tokens, *sums = group().summed(np.array(astuple(staleness))).tolist()
    return Staleness(int(tokens), *sums)


def all_rows(batch: ScoredRollouts) -> Batch:
    """Prompts and completions of scored rollouts, for a forward pass."""
    return Batch(batch.prompts.tokens, batch.rollouts.prompt_index, batch.rollouts.completions)
