"""AdamW with warm-up, gradient clipping, and a refusal to step on NaN."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from ketchup_cache.errors import NumericsError


class Optimizer:
    """AdamW (β = 0.9, 0.999; paper, Table 4) whose learning rate is a function of the step number alone."""

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        weight_decay: float,
        max_grad_norm: float,
        warmup: int,
        schedule: Literal["constant", "linear"],
        steps: int,
    ) -> None:
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.adamw = torch.optim.AdamW(self.named.values(), lr=lr, betas=(0.9, 0.999), weight_decay=weight_decay)
        self.peak, self.warmup, self.schedule, self.steps = lr, warmup, schedule, steps
        self.max_grad_norm = max_grad_norm

    def lr(self, step: int) -> float:
        """Learning rate of optimizer step `step`, counted from 0. Linear decay reaches zero after the last step."""
        rate = self.peak * min(1.0, (step + 1) / (self.warmup + 1))
        if self.schedule == "linear" and step >= self.warmup:
            rate *= (self.steps - step) / max(self.steps - self.warmup, 1)
        return rate

    def step(self, step: int) -> float:
        """Apply the accumulated gradient and clear it; returns its norm before clipping.

        Raises NumericsError, leaving the weights as they were, where the norm is not finite.
        """
        norm = float(nn.utils.clip_grad_norm_(self.named.values(), self.max_grad_norm))
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
