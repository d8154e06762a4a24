"""`pretrain`: cross-entropy on references (teacher fine-tuning) or on a teacher's own outputs (pre-distillation)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ketchup_cache.config.commands import PretrainConfig
from ketchup_cache.console import Report
from ketchup_cache.errors import CacheError, ModelError
from ketchup_cache.method.losses import cross_entropy_loss
from ketchup_cache.models.fingerprint import state_fingerprint, tokenizer_info
from ketchup_cache.models.forward import Batch
from ketchup_cache.models.head import Head
from ketchup_cache.models.load import is_encoder_decoder, load_model, load_tokenizer
from ketchup_cache.provenance import TokenizerInfo, require_same_tokenizer
from ketchup_cache.rollouts.sample import eos_ids
from ketchup_cache.sharing.remote_cache import open_cache
from ketchup_cache.text.prompts import tokenize_prompts
from ketchup_cache.text.read import read_examples
from ketchup_cache.training.batches import seed_of
from ketchup_cache.training.optimizer import Learner, Optimizer
from ketchup_cache.training.run import Origin, Run
from ketchup_cache.types import TOKEN_DTYPE, Ragged, concatenated


@dataclass(frozen=True)
class PretrainReport(Report):
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
    data, origin = _from_cache(config, info) if config.cache else (_from_references(config, tokenizer), [])
    with Run("pretrain", config).locked() as run:
        if report := run.finished(PretrainReport):
            return report
        model = load_model(config.model, device=config.device, trust_remote_code=config.trust_remote_code)
        head = Head.of(model, info.vocab_size)
        if config.data and tokenizer.eos_token_id not in eos_ids(model):
            raise ModelError(
                f"{config.model}: its tokenizer ends texts with {tokenizer.eos_token!r} (id {tokenizer.eos_token_id}), "
                f"at which the model does not stop (eos_token_id {eos_ids(model)}): make them agree in its config.json"
            )
        rows = len(data.completions)
        per_epoch = rows // (batch_size := min(config.batch_size, rows))
        steps = per_epoch * config.epochs
        run.write_config({"model": state_fingerprint(model), "examples": rows, "steps": steps})
        learner = Learner(model, head, Optimizer(model, config, steps), config)
        run.restore(learner)
        model.train(config.dropout)

        @lru_cache(maxsize=1)
        def order(epoch: int) -> NDArray[np.int64]:
            """Of an epoch's examples; those that are left over at its end are in another epoch's batches."""
            return np.random.default_rng([config.seed, epoch]).permutation(rows)

        def step(number: int) -> tuple[dict[str, Any], str]:
            # dropout's randomness belongs to the step, so that a resumed run draws the same
            torch.manual_seed(seed_of(config.seed, number))
            epoch, place = divmod(number, per_epoch)
            chosen = order(epoch)[place * batch_size :][:batch_size]
            total = int(data.completions.lengths[chosen].sum())

            def loss(places: NDArray, states: Tensor, targets: Tensor) -> Tensor:
                return cross_entropy_loss(head.log_prob(states, targets), total)

            nats = learner.accumulate(data, chosen, loss, number)
            norm = learner.optimizer.step(number)
            return {
                "step": number,
                "loss": nats,
                "grad_norm": norm,
                "lr": learner.optimizer.lr(number),
            }, f"loss {nats:.3f}"

        losses = [line["loss"] for line in run.train(learner, steps, step)]
        model.eval()
        first, last = (float(np.mean(of_epoch)) for of_epoch in (losses[:per_epoch], losses[-per_epoch:]))
        report = PretrainReport(
            str(run.out / "model"), rows, steps, run.resumed, run.seconds, first, last, state_fingerprint(model)
        )
        run.finish("model", (model, tokenizer), report, origin)
    return report


def _from_references(config: PretrainConfig, tokenizer: PreTrainedTokenizerBase) -> Batch:
    examples, prompts = tokenize_prompts(read_examples(config, need_target=True), tokenizer, config)
    bare = not is_encoder_decoder(config.model, trust_remote_code=config.trust_remote_code)
    references = [example.target or "" for example in examples]
    targets = [_target_ids(tokenizer, reference, config.max_new_tokens, bare=bare) for reference in references]
    return Batch(prompts.tokens, np.arange(len(prompts)), Ragged.from_rows(targets, TOKEN_DTYPE))


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


def _from_cache(config: PretrainConfig, info: TokenizerInfo) -> tuple[Batch, Origin]:
    """The finished rollouts of one policy, and that policy. Cut ones would teach the student not to stop."""
    assert config.cache is not None
    cache = open_cache(config.cache)
    policy = cache.select_policy(config.policy)
    prompts, indices, completions, offset = [], [], [], 0
    place: dict[str, int] = {}
    for id_, segment in cache.rollouts():
        what = f"{config.cache}: was encoded by another tokenizer; train a model that has it"
        require_same_tokenizer(info, segment.tokenizer, what)
        if segment.policy.fingerprint != policy.fingerprint:
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
        raise CacheError(f"{config.cache}: holds no finished rollouts; make some with `ketchup-cache rollout`")
    return Batch(concatenated(prompts), np.concatenate(indices), concatenated(completions)), [policy]
