"""The teacher: a frozen model whose logits are the Q-values. The only module that holds one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from ketchup_cache.errors import MismatchError, ModelError, NumericsError
from ketchup_cache.lm.batching import token_budget_batches
from ketchup_cache.lm.fingerprint import tokenizer_info, weights_fingerprint
from ketchup_cache.lm.forward import Batch, completion_states
from ketchup_cache.lm.head import Head
from ketchup_cache.lm.load import load_model, load_tokenizer, resolve_folder
from ketchup_cache.store.manifest import TeacherInfo, TokenizerInfo
from ketchup_cache.types import Ragged, Rollouts, Scores


class Teacher:
    """info: what scores by this teacher are filed under. tokenizer: what its token ids mean."""

    def __init__(self, model: PreTrainedModel, info: TeacherInfo, tokenizer: TokenizerInfo) -> None:
        """Raises ModelError where the model's logits can't be reproduced (`Head.of`)."""
        self.info = info
        self.tokenizer = tokenizer
        self._model = model.eval()
        self._head = Head.of(model, tokenizer.vocab_size)

    @classmethod
    def load(
        cls,
        name: str,
        *,
        dtype: str = "float32",
        device: str = "auto",
        device_map: str | None = None,
        trust_remote_code: bool = False,
    ) -> Teacher:
        """Raises ModelError (`lm.load`, `Head.of`)."""
        info, tokenizer = cls.identify(name, dtype=dtype, trust_remote_code=trust_remote_code)
        model = load_model(name, dtype=dtype, device=device, device_map=device_map, trust_remote_code=trust_remote_code)
        return cls(model, info, tokenizer)

    @staticmethod
    def identify(
        name: str, *, dtype: str = "float32", trust_remote_code: bool = False
    ) -> tuple[TeacherInfo, TokenizerInfo]:
        """Who the teacher is, from its files alone: no weights are loaded. Raises ModelError."""
        tokenizer = tokenizer_info(load_tokenizer(name, trust_remote_code=trust_remote_code), name)
        fingerprint = weights_fingerprint(resolve_folder(name), dtype=dtype)
        return TeacherInfo(name=name, fingerprint=fingerprint, dtype=dtype), tokenizer

    @torch.no_grad()
    def score(
        self,
        prompts: Ragged,
        rollouts: Rollouts,
        *,
        batch_tokens: int,
        on_batch: Callable[[int], None] | None = None,
    ) -> Scores:
        """Scores of every completion token, in the order of `rollouts`.

        prompts: the token ids that `rollouts.prompt_index` points into. batch_tokens: largest padded batch, in tokens;
        results do not depend on it, and running out of GPU memory halves it. on_batch: called with the number of
        completion tokens after each batch.

        Raises MismatchError for token ids that the teacher does not have, NumericsError for NaN or infinite logits,
        and ModelError where not even a single row fits into memory.
        """
        self._check_ids(prompts, rollouts)
        completions = rollouts.completions
        scores = Scores.empty(len(completions.values), len(rollouts))
        places = completions.with_values(np.arange(len(completions.values)))
        prompt_lengths = prompts.lengths[rollouts.prompt_index]

        def batches(rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
            """In reverse order, to pop from; the longest rows come first, so that memory runs out early or never."""
            parts = token_budget_batches(
                prompt_lengths[rows], completions.lengths[rows], batch_tokens, prompt_index=rollouts.prompt_index[rows]
            )
            return [rows[part] for part in parts]

        waiting = batches(np.arange(len(rollouts)))
        while waiting:
            rows = waiting.pop()
            try:
                part = self._score_batch(prompts, rollouts, rows)
            except torch.OutOfMemoryError:
                if len(rows) == 1:
                    length = prompt_lengths[rows[0]] + completions.lengths[rows[0]]
                    raise ModelError(
                        f"rollout row {rows[0]} ({length:,} tokens) does not fit into GPU memory on its own: "
                        "use --dtype bfloat16, a larger GPU or --device-map auto"
                    ) from None
                torch.cuda.empty_cache()
                batch_tokens //= 2
                waiting = batches(np.sort(np.concatenate([*waiting, rows])))
                continue
            own = places.take(rows).values
            for field in fields(Scores):
                where = rows if field.name == "final_max_q" else own
                getattr(scores, field.name)[where] = getattr(part, field.name)
            if on_batch:
                on_batch(len(own))
        return scores

    def _score_batch(self, prompts: Ragged, rollouts: Rollouts, rows: NDArray[np.int64]) -> Scores:
        batch = Batch.of_rows(prompts, rollouts.prompt_index, rollouts.completions, rows)
        unfinished = ~rollouts.finished[rows]
        states, next_states = completion_states(self._model, batch, next_state=unfinished)
        targets = torch.tensor(batch.completions.values, dtype=torch.long, device=states.device)
        per_token = [values.cpu().numpy() for values in self._head.reduce(states, targets)]
        final_max_q = np.zeros(len(rows), np.float32)
        _, next_max_q, _, _ = self._head.reduce(next_states, targets.new_zeros(len(next_states)))
        final_max_q[unfinished] = next_max_q.cpu().numpy()

        finite = np.logical_and.reduce([np.isfinite(values) for values in per_token])
        row_of_token = np.repeat(rows, batch.completions.lengths)
        if (bad := np.append(row_of_token[~finite], rows[~np.isfinite(final_max_q)])).size:
            hint = "" if self.info.dtype == "float32" else "; use --dtype float32"
            raise NumericsError(f"rollout row {bad[0]}: teacher {self.info.name} gives NaN or infinite logits{hint}")
        q, max_q, logsumexp, mean_q = per_token
        return Scores(q, max_q, logsumexp, mean_q, final_max_q)

    def _check_ids(self, prompts: Ragged, rollouts: Rollouts) -> None:
        vocab_size = self.tokenizer.vocab_size
        for what, tokens in (("prompt", prompts), ("rollout", rollouts.completions)):
            if (bad := np.flatnonzero((tokens.values < 0) | (tokens.values >= vocab_size))).size:
                row = np.searchsorted(tokens.offsets, bad[0], side="right") - 1
                raise MismatchError(
                    f"{what} row {row} holds token id {tokens.values[bad[0]]}, but teacher {self.info.name} "
                    f"has {vocab_size:,} tokens: it was written with another tokenizer"
                )
