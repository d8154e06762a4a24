"""What one, two and three processes must do alike. Started by torchrun with a folder: `python -m` this module."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ketchup_cache import open_cache
from ketchup_cache.cli import main
from ketchup_cache.config.commands import EvaluateConfig, LearnConfig, PretrainConfig, RolloutConfig, ScoreConfig
from ketchup_cache.evaluation.evaluate import evaluate
from ketchup_cache.models.forward import Batch, training_states
from ketchup_cache.models.head import Head
from ketchup_cache.models.sharded import Sharded
from ketchup_cache.parallel.group import Group, by_first, group
from ketchup_cache.rollouts.rollout import rollout
from ketchup_cache.scoring.score import score
from ketchup_cache.training.learn import learn
from ketchup_cache.training.optimizer import Optimizer
from ketchup_cache.training.pretrain import pretrain
from ketchup_cache.types import Ragged
from tests.helpers.learning import killed_before
from tests.helpers.models import VOCAB, make_model

KINDS = ("t5", "decoder")
STEPS, CHECKPOINT, KILLED = 20, 5, 7
LEARNED: dict[str, dict[str, Any]] = {
    "ketchup": {"k": 2, "baseline": "mean", "refresh_every": 10, "metric": "bleu,loss,return", "eval_every": 20},
    "reverse-kl": {"keep_top": 8},
    "seqkd": {},
}
PARTS = {"t5": ("ketchup",), "decoder": ("ketchup", "reverse-kl")}
"""What is learned by FSDP, too."""


@contextmanager
def first_gradient(file: Path) -> Iterator[None]:
    """Writes down what the first optimizer step applies, summed over the processes, and how many bytes of weights and
    gradient a process holds."""
    real, seen = Group.sum_gradients, list[int]()

    def kept(self: Group, parameters: Any) -> None:
        real(self, every := list(parameters))
        if not seen:
            grads = {str(i): p.grad for i, p in enumerate(every) if p.grad is not None}
            held = (getattr(tensor, "to_local", tensor.clone)().nbytes for tensor in [*every, *grads.values()])
            seen.append(max(self.gathered(sum(held))))
            whole = {name: getattr(grad, "full_tensor", grad.clone)() for name, grad in grads.items()}
            if self.first:
                save_file(whole, file, {"bytes": str(seen[0])})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Group, "sum_gradients", kept)
        yield


def options_of(folder: Path, kind: str, method: str, cache: Path) -> LearnConfig:
    """Of a run of `method` on a cache."""
    teacher = {"teacher": str(folder / kind / "teacher")} if method == "ketchup" else {}
    dev = {"eval_data": str(folder / "prompts.jsonl"), "eval_limit": 7} if method == "ketchup" else {}
    given = {"student": str(folder / kind / "student"), "cache": cache, "device": "cpu", "max_new_tokens": 12}
    given |= {
        "samples": 2,
        "batch_size": 8,
        "micro_batch_tokens": 128,
        "lr": 3e-4,
        "rollout_batch": 6,
        "batch_tokens": 128,
    }
    given |= {"steps": STEPS, "checkpoint_every": CHECKPOINT, "method": method, "out": cache.parent / method}
    return LearnConfig(**given | teacher | dev | LEARNED[method])


def in_parts(folder: Path, kind: str, method: str) -> LearnConfig:
    """Of the same run by FSDP; in small micro-batches, so that one process has fewer than the other."""
    config = options_of(folder, kind, method, folder / "2" / kind / "learned")
    parts = {"fsdp": True, "micro_batch_tokens": 64, "out": config.out.with_name(f"{method}-fsdp")}
    return config.model_copy(update=parts)


@by_first
def copied(cache: Path, target: Path) -> Path:
    """The cache of a single process, as it was before it learned."""
    kept = cache.with_name("kept")
    for source, place in ((cache, kept), (kept, target)):
        if not place.exists():
            shutil.copytree(source, place)
    return target


def everything(folder: Path) -> None:
    """Every command that several processes may do, into folder/COUNT."""
    data, done = str(folder / "prompts.jsonl"), {}
    for kind in KINDS:
        own = folder / str(group().size) / kind
        student, teacher, cache = str(folder / kind / "student"), str(folder / kind / "teacher"), own / "cache"
        of_all = {"data": data, "cache": cache, "device": "cpu", "max_new_tokens": 12, "rollout_batch": 6}
        made = [rollout(RolloutConfig(student=student, samples=2, first=30, **of_all))]
        made += [rollout(RolloutConfig(student=teacher, greedy=True, **of_all))]
        scoring = {"teacher": teacher, "cache": cache, "keep_top": 8, "device": "cpu", "batch_tokens": 128}
        scored = score(ScoreConfig(commit_tokens=200, **scoring))
        # the order of training follows the segments, whose order in time is another where several commit
        of_one = copied(folder / "1" / kind / "cache", own / "learned")
        for method in LEARNED:
            with first_gradient(own / f"{method}.safetensors"):
                learn(options_of(folder, kind, method, of_one))
        given = {"model": student, "data": data, "device": "cpu", "max_new_tokens": 12}
        given |= {"dropout": False, "batch_size": 8, "epochs": 4, "micro_batch_tokens": 128, "lr": 3e-4}
        runs: dict[str, dict[str, Any]] = {"pretrain": {}} if kind == "decoder" else {}
        if group().size < 3:
            runs["adapter"] = {"lora_rank": 4, "gradient_checkpointing": True, "epochs": 1}
        for name, more in runs.items():
            for fsdp in (False, True) if group().size == 2 else (False,):
                place = own / (f"{name}-fsdp" if fsdp else name)
                with first_gradient(place.with_suffix(".safetensors")):
                    pretrain(PretrainConfig(**given | more | {"fsdp": fsdp, "out": place}))
        if group().size == 2:
            for method in PARTS[kind]:
                with first_gradient(own / f"{method}-fsdp.safetensors"):
                    learn(in_parts(folder, kind, method))
        asked = {
            "model": student,
            "data": data,
            "teacher": teacher,
            "metrics": "bleu,loss",
            "outputs": own / "out.jsonl",
        }
        found = evaluate(EvaluateConfig(max_new_tokens=12, rollout_batch=6, device="cpu", **asked))
        seen = [[one.rollouts, one.tokens, one.already_there] for one in made]
        done[kind] = {"rollouts": seen, "scored": [scored.already, scored.computed + scored.copied]}
        done[kind] |= {"return": found.returns and found.returns.mean, **(found.metrics or {})}
        done[kind]["segments"] = len(open_cache(cache).scored())
    if group().first:
        (folder / str(group().size) / "done.json").write_text(json.dumps(done))


def check_families_in_parts() -> None:
    """The gradient of models whose passes are of other kinds than those below, against a whole model's."""
    rng, lengths = np.random.default_rng(0), ((7, 3, 5), (4, 6, 2, 5, 3))
    rows = ([rng.integers(3, VOCAB, size=n) for n in some] for some in lengths)
    prompts, completions = (Ragged.from_rows(tokens, np.int32) for tokens in rows)
    batch = Batch(prompts, np.array([0, 0, 1, 2, 2]), completions)
    for family in ("bart", "gemma2", "mixtral"):
        model = make_model(family)
        head, expected = Head.of(model, VOCAB), copy.deepcopy(model)
        parts = Sharded(model, torch.device("cpu"))
        mine = batch.take(np.arange(group().rank, 5, group().size))
        for compute, of, some in (
            (partial(training_states, expected), head.on(expected), batch),
            (parts.states, head.on(parts.model), mine),
        ):
            chosen = torch.from_numpy(some.completions.values).long()
            of.log_prob(compute(some, "float32"), chosen).sum().backward()
        parts.gather()
        named = dict(parts.model.named_parameters())
        for (name, one), whole in zip(expected.named_parameters(), model.parameters(), strict=True):
            assert torch.equal(one, whole), (family, name)
            if one.grad is not None:
                torch.testing.assert_close(named[name].grad.full_tensor(), one.grad, rtol=1e-4, atol=1e-4)


def in_step(step: int, what: Any) -> None:
    """The last process does something in this optimizer step of what follows."""
    real = Optimizer.step

    def other(self: Optimizer, number: int) -> float:
        if number == step and group().rank == group().size - 1:
            what()
        return real(self, number)

    Optimizer.step = other  # type: ignore[method-assign]


def begin(folder: Path) -> int:
    """All, then a run in parts that dies, then one in which a process is killed."""
    check_families_in_parts()
    everything(folder)
    with killed_before(KILLED):
        learn(in_parts(folder, "t5", "seqkd"))

    def die() -> None:
        (folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)

    in_step(KILLED, die)
    return main([*words_of(chained(folder)), "--fsdp"])


def end(folder: Path) -> int:
    """The ends of these runs, then all, then one in which a process is told to stop."""
    learn(in_parts(folder, "t5", "seqkd"))
    learn(chained(folder).model_copy(update={"fsdp": True}))
    everything(folder)
    in_step(KILLED, lambda: os.kill(os.getpid(), signal.SIGTERM))
    return main(words_of(chained(folder).model_copy(update={"out": folder / "stopped"})))


def chained(folder: Path) -> LearnConfig:
    """Of a run that goes on in other numbers of processes, on a cache of its own."""
    copied(folder / "1" / "t5" / "cache", folder / "chained")
    chosen = options_of(folder, "t5", "ketchup", folder / "chained")
    return chosen.model_copy(update={"out": folder / "chain"})


def words_of(config: LearnConfig) -> list[str]:
    given = config.model_dump(mode="json", exclude_unset=True).items()
    texts = {key: ",".join(value) if isinstance(value, list) else str(value) for key, value in given}
    return ["learn", *(word for key, value in texts.items() for word in (f"--{key.replace('_', '-')}", value))]


if __name__ == "__main__":
    sys.exit({"begin": begin, "end": end}[sys.argv[1]](Path(sys.argv[2])))
