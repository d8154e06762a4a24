"""`pretrain`: cross-entropy on references (teacher fine-tuning) or on a teacher's own outputs (pre-distillation)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ketchup_cache.config.commands import PretrainConfig
from ketchup_cache.console import progress
from ketchup_cache.errors import CacheError, MismatchError, ModelError, NumericsError
from ketchup_cache.method.losses import cross_entropy_loss
from ketchup_cache.models.batching import token_budget_batches
from ketchup_cache.models.fingerprint import state_fingerprint, tokenizer_info
from ketchup_cache.models.forward import Batch, computes_prompts_once, training_states
from ketchup_cache.models.head import Head
from ketchup_cache.models.load import is_encoder_decoder, load_model, load_tokenizer
from ketchup_cache.provenance import PolicyInfo, TokenizerInfo
from ketchup_cache.rollouts.sample import eos_ids
from ketchup_cache.sharing.remote_cache import open_cache
from ketchup_cache.text.prompts import as_chat, kept_examples, tokenize_prompts
from ketchup_cache.text.read import read_examples
from ketchup_cache.training.optimizer import Optimizer
from ketchup_cache.training.origin import Origin
from ketchup_cache.training.run import Run
from ketchup_cache.types import TOKEN_DTYPE, Ragged

RESULT = "model"


@dataclass(frozen=True)
class PretrainReport:
    """`loss_first` and `loss_last`: nats per target token over the first and the last epoch."""

    model: str
    examples: int
    steps: int
    resumed_from: int
    seconds: float
    loss_first: float
    loss_last: float
    fingerprint: str
    already_done: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        if self.already_done:
            return f"nothing to do: the run is finished, its model is in {self.model}"
        return (
            f"{self.examples:,} examples, {self.steps:,} steps in {self.seconds:.0f} s; "
            f"loss {self.loss_first:.3f} → {self.loss_last:.3f} nats/token; model in {self.model}"
        )


def pretrain(config: PretrainConfig) -> PretrainReport:
    """Train `config.model` by teacher forcing. Killed and run again, it goes on from its last checkpoint.

    Raises ConfigError for an output folder in use or of another run, DataError and CacheError for unusable data,
    MismatchError for a cache of another tokenizer, ModelError for a model that does not stop where its tokenizer ends
    a text, NumericsError for NaN, and what loading a model raises.
    """
    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    info = tokenizer_info(tokenizer, config.model)
    data = _from_cache(config, info) if config.cache else _from_references(config, tokenizer)
    with Run(config.out, "pretrain", config).locked() as run:
        if run.report:
            return PretrainReport(**{**run.report, "already_done": True})
        model = load_model(config.model, device=config.device, trust_remote_code=config.trust_remote_code)
        head = Head.of(model, info.vocab_size)
        if config.data and tokenizer.eos_token_id not in eos_ids(model):
            raise ModelError(
                f"{config.model}: its tokenizer ends texts with {tokenizer.eos_token!r} (id {tokenizer.eos_token_id}), "
                f"at which the model does not stop (eos_token_id {eos_ids(model)}): make them agree in its config.json"
            )
        rows = len(data.completions)
        batch_size = min(config.batch_size, rows)
        per_epoch = rows // batch_size
        steps = per_epoch * config.epochs
        run.write_config({"model": state_fingerprint(model), "examples": rows, "steps": steps})
        optimizer = Optimizer(
            model,
            lr=config.lr,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            warmup=config.warmup,
            schedule=config.schedule,
            steps=steps,
        )
        resumed = run.restore(model, optimizer)["step"]
        began = time.monotonic()
        model.train(config.dropout)
        with progress("training", steps - resumed, "steps") as bar:
            for step, rows_of_step in enumerate(_batches(rows, batch_size, config.epochs, config.seed)):
                if step < resumed:
                    continue
                # dropout's randomness belongs to the step, so that a resumed run draws the same
                torch.manual_seed(config.seed * 1_000_003 + step)
                loss, norm = _train_step(model, head, optimizer, data, rows_of_step, config, step)
                run.log({"step": step, "loss": loss, "grad_norm": norm, "lr": optimizer.lr(step)})
                bar.note(f"loss {loss:.3f}")
                bar.advance()
                done = step + 1
                if config.checkpoint_every and done % config.checkpoint_every == 0 and done < steps:
                    run.save_checkpoint(done, model, optimizer, {})
        model.eval()
        losses = [line["loss"] for line in run.metrics()]
        report = PretrainReport(
            model=str(run.out / RESULT),
            examples=rows,
            steps=steps,
            resumed_from=resumed,
            seconds=round(time.monotonic() - began, 1),
            loss_first=float(np.mean(losses[:per_epoch])),
            loss_last=float(np.mean(losses[-per_epoch:])),
            fingerprint=state_fingerprint(model),
        )
        run.finish(RESULT, model, tokenizer, report.to_dict(), Origin(data.policies) if data.policies else None)
    return report


@dataclass(frozen=True)
class _Pairs:
    """Prompts and what to answer: completion i belongs to prompt `prompt_index[i]` and ends with EOS."""

    prompts: Ragged
    prompt_index: NDArray[np.int64]
    completions: Ragged
    policies: tuple[PolicyInfo, ...] = ()
    """Who wrote the completions, where they come from a cache."""


def _from_references(config: PretrainConfig, tokenizer: PreTrainedTokenizerBase) -> _Pairs:
    examples = as_chat(read_examples(config, need_target=True), tokenizer, config)
    prompts = tokenize_prompts(examples, tokenizer, config)
    bare = not is_encoder_decoder(config.model, trust_remote_code=config.trust_remote_code)
    targets = [
        _target_ids(tokenizer, example.target or "", config.max_new_tokens, bare=bare)
        for example in kept_examples(examples, prompts)
    ]
    return _Pairs(prompts.tokens, np.arange(len(prompts)), Ragged.from_rows(targets, TOKEN_DTYPE))


def _target_ids(tokenizer: PreTrainedTokenizerBase, target: str, limit: int, *, bare: bool = False) -> list[int]:
    """Ids of a reference, always ending with EOS unless the limit cuts it.

    bare: without what the tokenizer adds to a text. A decoder-only model is given prompt ids and target ids in one row,
    where a BOS in the middle would be a token that it never writes. The two are tokenised apart, as they are when the
    model writes: a token that spans the border of prompt and target can't be generated after that prompt.
    """
    ids = list(tokenizer(text_target=target, add_special_tokens=not bare, verbose=False)["input_ids"])
    if not ids or ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
    return ids[:limit]


def _from_cache(config: PretrainConfig, info: TokenizerInfo) -> _Pairs:
    """The finished rollouts of one policy. Cut ones would teach the student not to stop."""
    assert config.cache is not None
    cache = open_cache(config.cache)
    policies = cache.policies()
    if config.policy is None and len(policies) > 1:
        names = ", ".join(f"{p.name} ({p.fingerprint[:12]})" for p in policies)
        raise CacheError(f"{config.cache}: holds rollouts of several policies: choose one with --policy: {names}")
    wanted = cache.select_policy(config.policy) if config.policy else None
    prompts, indices, completions, offset = [], [], [], 0
    place: dict[str, int] = {}
    for id_, segment in cache.rollouts():
        if segment.tokenizer.fingerprint != info.fingerprint:
            raise MismatchError(
                f"{config.cache}: was encoded by the tokenizer of {segment.tokenizer.name}, "
                f"which encodes differently from that of {info.name}"
            )
        if wanted and segment.policy.fingerprint != wanted.fingerprint:
            continue
        if (parent := segment.prompts) not in place:
            place[parent] = offset
            prompts.append(cache.load_prompts(parent).tokens)
            offset += len(prompts[-1])
        rollouts = cache.load_rollouts(id_)
        finished = np.flatnonzero(rollouts.finished)
        indices.append(rollouts.prompt_index[finished] + place[parent])
        completions.append(rollouts.completions.take(finished))
    if not sum(map(len, completions)):
        raise CacheError(
            f"{config.cache}: holds no finished rollouts to learn from; make some with `ketchup-cache rollout`"
        )
    by = (wanted,) if wanted else tuple(policies)
    return _Pairs(Ragged.concatenate(prompts), np.concatenate(indices), Ragged.concatenate(completions), by)


def _batches(rows: int, batch_size: int, epochs: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Whole batches, each epoch in an order of its own; what is left over at its end is in another epoch's batches."""
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(rows)
        for start in range(0, rows - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


def _train_step(
    model: PreTrainedModel,
    head: Head,
    optimizer: Optimizer,
    data: _Pairs,
    rows: NDArray[np.int64],
    config: PretrainConfig,
    step: int,
) -> tuple[float, float]:
    """Loss in nats per token, and the gradient's norm. The weights stay as they were if either is not finite."""
    total = int(data.completions.lengths[rows].sum())
    prompt_index = data.prompt_index[rows]
    loss_sum = 0.0
    for chosen in token_budget_batches(
        data.prompts.lengths[prompt_index],
        data.completions.lengths[rows],
        config.micro_batch_tokens,
        prompt_index=prompt_index,
        once=computes_prompts_once(model),
    ):
        batch = Batch.of_rows(data.prompts, data.prompt_index, data.completions, rows[chosen])
        states = training_states(model, batch, config.precision)
        targets = torch.from_numpy(batch.completions.values).long().to(states.device)
        loss = cross_entropy_loss(head.log_prob(states, targets), total)
        if not torch.isfinite(loss):
            raise NumericsError(
                f"step {step}: the loss is {float(loss.detach())}; the weights were not changed. Lower --lr"
            )
        loss.backward()
        loss_sum += float(loss.detach())
    return loss_sum, optimizer.step(step)
