"""`pretrain`: cross-entropy on references (teacher fine-tuning) or on a teacher's own outputs (pre-distillation)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ketchup_cache.cache.index import parent_id
from ketchup_cache.config.commands import PretrainConfig
from ketchup_cache.console import Report, say, warn
from ketchup_cache.errors import CacheError, DataError, MismatchError, ModelError
from ketchup_cache.evaluation.outputs import EvalSet
from ketchup_cache.method.losses import cross_entropy_loss
from ketchup_cache.models.fingerprint import state_fingerprint, tokenizer_info
from ketchup_cache.models.forward import Batch
from ketchup_cache.models.head import Head
from ketchup_cache.models.load import is_encoder_decoder, load_model, load_tokenizer
from ketchup_cache.models.origin import Origin, prompts_as_trained
from ketchup_cache.parallel.group import group
from ketchup_cache.provenance import OTHER_TOKENIZER, PolicyInfo, PromptForm, TokenizerInfo, require_same_tokenizer
from ketchup_cache.rollouts.sample import stop_ids
from ketchup_cache.sharing.remote_cache import open_cache
from ketchup_cache.text.prompts import form_of, reply_ids, tokenize_prompts
from ketchup_cache.text.read import read_examples
from ketchup_cache.training.batches import seed_of
from ketchup_cache.training.dev import DevSet, best_text
from ketchup_cache.training.optimizer import Learner
from ketchup_cache.training.run import Callback, Run, steps_text
from ketchup_cache.training.source import prompt_form
from ketchup_cache.types import TOKEN_DTYPE, Ragged, concatenated


@dataclass(frozen=True)
class PretrainReport(Report):
    """`loss_first` and `loss_last`: nats per target token over the first and the last epoch (of a run of one, over its
    halves); None where no step was taken. model: folder of the best
    one on the dev set; without a dev set, that of the last step. lost: what was cut or left out, and how many. dev: see
    `DevSet.summary`."""

    model: str
    examples: int
    steps: int
    resumed_from: int
    seconds: float
    loss_first: float | None
    loss_last: float | None
    fingerprint: str
    lost: dict[str, int] = field(default_factory=dict)
    stopped: str = ""
    dev: dict[str, Any] | None = None
    already_done: bool = False

    def __str__(self) -> str:
        if self.already_done:
            return f"nothing to do: the run is finished, its model is in {self.model}"
        head = steps_text(self.steps, self.seconds, self.resumed_from, self.stopped)
        loss = "nothing was learned"
        if self.loss_first is not None and self.loss_last is not None:
            loss = f"loss {self.loss_first:.3f} → {self.loss_last:.3f} nats/token"
        lost = "".join(f"; {n:,} {what}" for what, n in self.lost.items())
        return f"{self.examples:,} examples{lost}, {head}; {loss}; {best_text(self.dev, self.model)}"


def pretrain(config: PretrainConfig, callbacks: Sequence[Callback] = ()) -> PretrainReport:
    """Train `config.model` by teacher forcing. Killed and run again, it goes on from its last checkpoint; with more
    `epochs`, a run is lengthened.

    Raises ConfigError for an output folder in use or of another run, DataError and CacheError for unusable data,
    MismatchError for a cache of another tokenizer, ModelError for a model that does not stop where its tokenizer ends
    a text, NumericsError for NaN, and what loading a model raises.
    """
    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    info = tokenizer_info(tokenizer, config.model)
    with Run("pretrain", config, callbacks).locked() as run:
        if report := run.finished(PretrainReport):
            return report
        if config.cache:
            given = _from_cache(config, info, run.recorded.get("segments"))
            prompts = prompts_as_trained(config, config.model, given.form)
        else:
            prompts = prompts_as_trained(config, config.model)
            given = _from_references(prompts, tokenizer)
        data = given.batch
        how = config.metric, config.rouge_tokenizer
        dev_data = EvalSet.read(prompts.dev_data, tokenizer, config.model, *how) if prompts.dev_data else None
        digest = given.digest
        if run.recorded.get("data", digest) != digest:
            what = "is not the data that the run began with; bring it back, or choose another --out"
            raise MismatchError(f"{config.data or config.cache}: {what}")
        model = load_model(config.model, device=config.device, trust_remote_code=config.trust_remote_code, fit=config)
        head = Head.of(model, info.vocab_size)
        rows = len(data.completions)
        per_epoch = rows // (batch_size := min(config.batch_size, rows))
        steps = per_epoch * config.epochs
        dev = DevSet(config, dev_data, run.out, run.publish, steps, run.recorded) if dev_data else None
        begun = model.base_fingerprint if config.lora_rank else state_fingerprint(model)
        learner = Learner.of(model, head, config, steps, keep_start=dev is not None)
        run.gather = learner.gather
        run.describe(model, tokenizer, Origin(pretrained_on=given.policies, prompts=given.form, tokenizer=info))
        if dev is not None:
            dev.start(model, head, tokenizer, learner.parts)
        resolved = {"examples": rows, "steps": steps, "data": digest, "segments": given.segments}
        resolved["model"] = begun
        run.restore(learner)
        if dev is not None:
            dev.restore(run.resumed)
            resolved["eval_every"] = dev.every
        run.write_config(resolved)
        learner.model.train(config.dropout)

        @lru_cache(maxsize=1)
        def order(epoch: int) -> NDArray[np.int64]:
            """Of an epoch's examples; those that are left over at its end are in another epoch's batches."""
            return np.random.default_rng([config.seed, epoch]).permutation(rows)

        def step(number: int) -> tuple[dict[str, Any], str]:
            # dropout's randomness belongs to the step, so that a resumed run draws the same, and to the process
            torch.manual_seed(seed_of(group().rank, seed_of(config.seed, number)))
            epoch, place = divmod(number, per_epoch)
            chosen = order(epoch)[place * batch_size :][:batch_size]
            total = int(data.completions.lengths[chosen].sum())

            def loss(places: NDArray, states: Tensor, targets: Tensor) -> Tensor:
                return cross_entropy_loss(learner.head.log_prob(states, targets), total)

            nats = learner.accumulate(data, chosen, loss, number)
            norm = learner.optimizer.step(number)
            return {
                "step": number,
                "loss": nats,
                "grad_norm": norm,
                "lr": learner.optimizer.lr(number),
            }, f"loss {nats:.3f}"

        losses = [line["loss"] for line in run.train(learner, steps, step, dev=dev)]
        learner.model.eval()
        n = max(1, min(per_epoch, len(losses) // 2))
        first, last = (float(np.mean(part)) if part else None for part in (losses[:n], losses[-n:]))
        done = str(run.out / "best"), rows, run.done, run.resumed, run.seconds, first, last
        lost = {what: n for what, n in given.lost.items() if n}
        summary = dev.summary() if dev else None
        report = PretrainReport(*done, run.fingerprint(), lost, run.stopped, summary)
        run.finish(report, dev)
    return report


@dataclass(frozen=True)
class Examples:
    """What is learned. policies: who wrote it. form: of the prompts. lost: what was cut or left out, and how many."""

    batch: Batch
    policies: tuple[PolicyInfo, ...]
    form: PromptForm | None
    lost: dict[str, int]
    segments: list[str] = field(default_factory=list)
    """Ids of the rollouts that they come from."""

    @property
    def digest(self) -> str:
        """Of all token ids: a run goes on with the data that it began with."""
        prompts, completions = self.batch.prompts, self.batch.completions
        parts = (prompts.values, prompts.offsets, self.batch.prompt_index, completions.values, completions.offsets)
        return hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).hexdigest()


def _from_references(config: PretrainConfig, tokenizer: PreTrainedTokenizerBase) -> Examples:
    """Raises DataError for targets over the limit where they are refused, and where no example is left; ModelError for
    a model that does not stop where they end."""
    given = read_examples(config, need_target=True, turns=config.turns)
    bare = not is_encoder_decoder(config.model, trust_remote_code=config.trust_remote_code)
    stops = stop_ids(config.model, trust_remote_code=config.trust_remote_code)
    if not given[0].talk and tokenizer.eos_token_id not in stops:
        raise ModelError(
            f"{config.model}: its tokenizer ends texts with {tokenizer.eos_token!r} (id {tokenizer.eos_token_id}), "
            f"at which the model does not stop (eos_token_id {stops}): make them agree in its config.json"
        )
    kept, limit = tokenize_prompts(given, tokenizer, config, stops=stops), config.max_new_tokens
    targets = [reply_ids(tokenizer, example, bare=bare) for example in kept.examples]
    long = np.array([len(ids) > limit for ids in targets])
    lost = {"prompts cut": kept.cut, "prompts left out": len(given) - len(kept.examples)}
    lost |= {f"targets {'left out' if config.long_targets == 'drop' else 'cut'}": int(long.sum())}
    if long.any():
        what = f"{long.sum():,} of {len(targets):,} targets have more than {limit:,} tokens (up to "
        what += f"{max(map(len, targets)):,}, with EOS)"
        if config.long_targets == "refuse":
            hint = "raise --max-new-tokens, or set --long-targets to drop or truncate"
            raise DataError(f"{config.data}: {what}: {hint}")
        done = "left out" if config.long_targets == "drop" else "cut: they lose their end and EOS"
        warn(f"{config.data}: {what} and are {done} (--max-new-tokens, --long-targets)")
    rows = np.flatnonzero(~long) if config.long_targets == "drop" else np.arange(len(targets))
    if not len(rows):
        raise DataError(f"{config.data}: no example left: raise --max-new-tokens")
    completions = Ragged.from_rows([targets[row][:limit] for row in rows], TOKEN_DTYPE)
    return Examples(Batch(kept.prompts.tokens, rows, completions), (), form_of(config, given), lost)


def _from_cache(config: PretrainConfig, info: TokenizerInfo, wanted: list[str] | None) -> Examples:
    """The finished rollouts of one policy. Cut ones would teach the student not to stop. wanted: the segments of a run
    that goes on, whatever has come into the cache since."""
    assert config.cache is not None
    cache = open_cache(config.cache)
    cache.agree()
    if wanted:  # with their prompts, as if there were no others
        cache.pin([*wanted, *(parent_id(cache.entry(id_).info) for id_ in wanted)])
    policy = cache.select_policy(config.policy)
    prompts, indices, completions, offset = [], [], [], 0
    place: dict[str, int] = {}
    unfinished, segments = 0, list[str]()
    for id_, segment in cache.rollouts():
        what = f"{config.cache}: was encoded by another tokenizer; {OTHER_TOKENIZER}"
        require_same_tokenizer(info, segment.tokenizer, what)
        if segment.policy.fingerprint != policy.fingerprint:
            continue
        segments.append(id_)
        if (parent := segment.prompts) not in place:
            place[parent] = offset
            prompts.append(cache.load_prompts(parent).tokens)
            offset += len(prompts[-1])
        rollouts = cache.load_rollouts(id_)
        finished = np.flatnonzero(rollouts.finished)
        unfinished += len(rollouts) - len(finished)
        indices.append(rollouts.prompt_index[finished] + place[parent])
        completions.append(rollouts.completions.take(finished))
    if not sum(map(len, completions)):
        raise CacheError(f"{config.cache}: holds no finished rollouts; make some with `ketchup-cache rollout`")
    batch = Batch(concatenated(prompts), np.concatenate(indices), concatenated(completions))
    if unfinished:
        rows = len(batch.completions) + unfinished
        say(f"{config.cache}: {unfinished:,} of {rows:,} rollouts were cut at --max-new-tokens and are left out: they "
            "would teach not to stop; make longer ones with `ketchup-cache rollout`")  # fmt: skip
    return Examples(batch, (policy,), prompt_form(cache), {"unfinished rollouts left out": unfinished}, segments)
