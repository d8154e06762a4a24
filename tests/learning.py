"""What the learner's tests share: its options on the tiny models, and a whole cache as one batch."""

from __future__ import annotations

from ketchup_cache.config import LearnConfig
from ketchup_cache.learn.stream import Stream


def config(tmp_path, folders, **options) -> LearnConfig:
    defaults = {"student": str(folders[0]), "cache": tmp_path / "cache", "out": tmp_path / "run", "batch_size": 4}
    return LearnConfig(**(defaults | {"lr": 1e-3, "steps": 3, "device": "cpu"} | options))


def whole_batch(cache):
    """All rollouts of a one-segment cache in the stream's own order."""
    (ref,) = cache.scored()
    return next(Stream(cache, [ref], ref.row_stop - ref.row_start, seed=0))
