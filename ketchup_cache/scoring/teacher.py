"""The teacher: a frozen model whose logits are the Q-values. The only module that holds one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from ketchup_cache.config.servers import ScoringOptions
from ketchup_cache.errors import MismatchError, ModelError, NumericsError
from ketchup_cache.models.fingerprint import tokenizer_info, weights_fingerprint
from ketchup_cache.models.forward import Batch, computes_prompts_once, states_and_next
from ketchup_cache.models.head import Head
from ketchup_cache.models.load import load_model, load_tokenizer
from ketchup_cache.models.memory import MOST, TokenBudget, free, out_of_memory
from ketchup_cache.provenance import TeacherInfo, TokenizerInfo, in_precision
from ketchup_cache.types import TOKEN_DTYPE, Ragged, Rollouts, Scores, TopLogits

SMALL = 0.02
"""Of the memory that is free: a teacher whose weights take less of it may stay while a student learns."""


class Teacher:
    """info: what scores by this teacher are filed under. tokenizer: what its token ids mean. small: by SMALL."""

    def __init__(self, model: PreTrainedModel, info: TeacherInfo, tokenizer: TokenizerInfo) -> None:
        """Raises ModelError where the model's logits can't be reproduced (`Head.of`)."""
        self.info, self.tokenizer = info, tokenizer
        self._model = model.eval()
        self._head = Head.of(model, tokenizer.vocab_size)
        self._devices = {parameter.device for parameter in model.parameters()}
        size = sum(parameter.nbytes for parameter in model.parameters())
        self.small = all(device.type in MOST and size < SMALL * free(device) for device in self._devices)

    @classmethod
    def load(
        cls, name: str, options: ScoringOptions, known: tuple[TeacherInfo, TokenizerInfo] | None = None
    ) -> Teacher:
        """known: what `identify` found, where it was asked before. Raises ModelError (`load_model`, `Head.of`)."""
        info, tokenizer = known or cls.identify(name, options)
        placed = options.model_dump(include={"dtype", "quantize", "device", "device_map", "trust_remote_code"})
        return cls(load_model(name, **placed), info, tokenizer)

    @staticmethod
    def identify(name: str, options: ScoringOptions) -> tuple[TeacherInfo, TokenizerInfo]:
        """Who the teacher is, from its files alone: no weights are loaded. Raises ModelError."""
        tokenizer = tokenizer_info(load_tokenizer(name, trust_remote_code=options.trust_remote_code), name)
        fingerprint = in_precision(weights_fingerprint(name), options.filed_as)
        return TeacherInfo(name=name, fingerprint=fingerprint, dtype=options.filed_as), tokenizer

    @torch.no_grad()
    def score(
        self,
        prompts: Ragged,
        rollouts: Rollouts,
        *,
        batch_tokens: int | Literal["auto"] | TokenBudget,
        keep_top: int = 0,
        rows: NDArray[np.int64] | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> Scores:
        """Scores of every completion token, in the order of the rows.

        prompts: the token ids that `rollouts.prompt_index` points into. rows: the rows of `rollouts` to score; None
        for all. batch_tokens: largest batch, in tokens (`Batch.size`); results do not depend on it, and running out of
        memory halves it. A `TokenBudget` keeps what was found for the next call. keep_top: how many of the largest
        logits of each state to keep (`Scores.top`), at most all. on_batch: called with the number of completion
        tokens after each batch.

        Raises MismatchError for token ids that the teacher does not have, NumericsError for NaN or infinite logits,
        and ModelError where not even a single row fits into memory.
        """
        names = np.arange(len(rollouts)) if rows is None else rows
        whole = Batch(prompts, rollouts.prompt_index[names], rollouts.completions.take(names))
        self._check_ids("completion of rollout", whole.completions, names)
        used = np.unique(whole.prompt_index)
        self._check_ids("prompt", prompts.take(used), used)

        once = computes_prompts_once(self._model)
        budget = batch_tokens if isinstance(batch_tokens, TokenBudget) else TokenBudget(batch_tokens)
        top = min(keep_top, self.tokenizer.vocab_size)
        done = [(np.zeros(0, np.int64), Scores.empty(0, 0, top))]
        # taken from the end: the longest prompts come first, so memory runs out early or not at all
        waiting = whole.split(np.arange(len(names)), budget.tokens, once=once)
        while waiting:
            places = waiting.pop()
            batch, part = whole.take(places), None
            size = batch.size(once=once)
            budget.watch(self._devices)
            try:
                part = self._score_batch(batch, rollouts.finished[names[places]], names[places], top)
            except Exception as error:
                if not out_of_memory(error):
                    raise
            if part is None:  # outside the except block, whose traceback would keep the batch's memory
                if len(places) == 1:
                    of_prompt, of_completion = len(batch.prompts.values), len(batch.completions.values)
                    tokens = f"{of_prompt:,} prompt and {of_completion:,} completion tokens"
                    what = f"rollout row {names[places[0]]} ({tokens}) does not fit into memory on its own"
                    todo = "use --dtype bfloat16 or --device-map auto, or sample with a lower --max-prompt-tokens"
                    raise ModelError(f"{what}: {todo}")
                budget.halve(size)
                waiting.append(places)
            if (part is None or budget.fitted(size)) and waiting:
                waiting = whole.split(np.sort(np.concatenate(waiting)), budget.tokens, once=once)
            if part is not None:
                done.append((places, part))
                if on_batch:
                    on_batch(len(part.q))
        order = np.concatenate([places for places, _ in done])
        scored = Scores.concatenate([part for _, part in done])
        return scored.take(whole.completions.take(order), np.argsort(order))

    def _score_batch(self, batch: Batch, finished: NDArray, names: NDArray, keep_top: int) -> Scores:
        states, next_states = states_and_next(self._model, batch, ~finished)
        targets = torch.tensor(batch.completions.values, dtype=torch.long, device=self._head.device)
        reduced = self._head.reduce(states, targets, keep_top=keep_top)
        q, max_q, logsumexp, mean_q, *largest = (values.cpu().numpy() for values in reduced)
        top = TopLogits(largest[0], largest[1].astype(TOKEN_DTYPE), largest[2]) if largest else None
        _, next_max_q, next_logsumexp, _ = self._head.reduce(next_states, targets.new_zeros(len(next_states)))
        final_max_q = np.zeros(len(names), np.float32)
        final_max_q[~finished] = next_max_q.cpu().numpy()

        finite = np.isfinite((q, max_q, logsumexp, mean_q)).all(axis=0)
        finite_next = np.isfinite(next_logsumexp.cpu().numpy())
        bad = np.append(np.repeat(names, batch.completions.lengths)[~finite], names[~finished][~finite_next])
        if len(bad):
            hint = "its weights are damaged" if self.info.dtype == "float32" else "try --dtype float32"
            what = f"teacher {self.info.name} gives NaN or infinite logits; {hint}"
            raise NumericsError(f"rollout row {bad.min()}: {what}")
        return Scores(q, max_q, logsumexp, mean_q, final_max_q, top)

    def _check_ids(self, what: str, tokens: Ragged, names: NDArray[np.int64]) -> None:
        vocab_size = self.tokenizer.vocab_size
        if (bad := np.flatnonzero((tokens.values < 0) | (tokens.values >= vocab_size))).size:
            row = names[np.searchsorted(tokens.offsets, bad[0], side="right") - 1]
            has = f"teacher {self.info.name} has {vocab_size:,} tokens: it was written with another tokenizer"
            raise MismatchError(f"{what} row {row} holds token id {tokens.values[bad[0]]}, but {has}")
