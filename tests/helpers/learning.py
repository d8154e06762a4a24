"""What the learner's tests share: options on the tiny models, a whole cache as one batch, the gradient of one step."""

from __future__ import annotations

import torch

from ketchup_cache.config.commands import LearnConfig
from ketchup_cache.training.batches import Stream


def config(tmp_path, folders, **options) -> LearnConfig:
    defaults = {"student": str(folders[0]), "cache": tmp_path / "cache", "out": tmp_path / "run", "batch_size": 4}
    return LearnConfig(**(defaults | {"lr": 1e-3, "steps": 3, "device": "cpu"} | options))


def whole_batch(cache):
    """All rollouts of a one-segment cache in the stream's own order."""
    (ref,) = cache.scored()
    return next(Stream(cache, [ref], ref.row_stop - ref.row_start, seed=0))


class CapturedGradient:
    """In the optimizer's place: keeps the gradient instead of stepping."""

    def __init__(self, model):
        self.model, self.gradient = model, {}

    def step(self, step):
        for name, p in self.model.named_parameters():
            self.gradient[name] = p.grad.clone() if p.grad is not None else torch.zeros_like(p)
            p.grad = None
        return 0.0

    def lr(self, step):
        return 0.0
