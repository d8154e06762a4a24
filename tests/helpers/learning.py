"""What the learner's tests share: options on the tiny models, a whole cache as one batch, the gradient of one step."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ketchup_cache.cli import main
from ketchup_cache.config.commands import LearnConfig, ScoreConfig
from ketchup_cache.models.head import Head
from ketchup_cache.models.load import load_model
from ketchup_cache.scoring.report import ScoreReport
from ketchup_cache.scoring.score import Scorer, follow
from ketchup_cache.sharing.remote_cache import open_cache
from ketchup_cache.shipped import task
from ketchup_cache.training.batches import Stream
from ketchup_cache.training.optimizer import Learner, Optimizer
from tests.helpers.models import WORDS

TASK = task("translate")


@contextmanager
def following(place: str | Path) -> Iterator[Future[ScoreReport]]:
    """`score --follow` by the shipped teacher, in a thread, while the block runs."""
    options = ScoreConfig(teacher=str(TASK / "teacher"), cache=place, device="cpu", follow=True, poll=0.02)
    cache, scorer, stop = open_cache(place, create=True), Scorer(options), threading.Event()
    refresh = cache.refresh

    def stoppable() -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        refresh()

    cache.refresh = stoppable  # type: ignore[method-assign]
    scorer.stay()  # two threads can't load models at once
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(follow, cache, scorer)
        try:
            yield running
        finally:
            stop.set()
            running.result(60)


def config(tmp_path, folders, **options) -> LearnConfig:
    defaults = {"student": str(folders[0]), "cache": tmp_path / "cache", "out": tmp_path / "run", "batch_size": 4}
    return LearnConfig(**(defaults | {"lr": 1e-3, "steps": 3, "device": "cpu"} | options))


def run(*words: object) -> None:
    """A command of ours, which must succeed."""
    assert main([str(word) for word in words]) == 0


def json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def metrics(run: Path) -> list[dict]:
    return json_lines(run / "metrics.jsonl")


def assert_same_weights(one: Path, other: Path, result: str = "last") -> None:
    """Of the results of two runs, bit for bit."""
    one, other = (load_file(run / result / "model.safetensors") for run in (one, other))
    for name, tensor in one.items():
        assert torch.equal(other[name], tensor), name


class Killed(BaseException):
    """In the place of SIGKILL: nothing of ours catches it."""


@contextmanager
def killed_before(step: int) -> Iterator[None]:
    """The block dies before this optimizer step."""
    real = Optimizer.step

    def dying(self, number):
        if number == step:
            raise Killed
        return real(self, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Optimizer, "step", dying)
        with pytest.raises(Killed):
            yield


def whole_batch(cache):
    """All rollouts of a one-segment cache in the stream's own order."""
    (ref,) = cache.scored()
    return next(Stream(cache, [ref], ref.row_stop - ref.row_start, seed=0))


def learner_of(folder, options, vocab: int = len(WORDS) + 3) -> Learner:
    """The model in a folder, with a `CapturedGradient` for its optimizer."""
    model = load_model(str(folder), device="cpu")
    return Learner(model, Head.of(model, vocab), CapturedGradient(model), options)


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
