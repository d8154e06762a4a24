"""What a run aims at: the weighted sum of its teachers' returns, and a task reward."""

from __future__ import annotations

import hashlib
import inspect
import math
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ketchup_cache.cache.cache import Cache
from ketchup_cache.cache.index import ScoredRef
from ketchup_cache.config.commands import LearnConfig
from ketchup_cache.config.goal import COLUMN
from ketchup_cache.console import one_line
from ketchup_cache.errors import DataError
from ketchup_cache.evaluation.task_metrics import import_function
from ketchup_cache.method.mixture import weighted_scores
from ketchup_cache.parallel.group import group
from ketchup_cache.text.prompts import Example, tokenize_prompts
from ketchup_cache.text.read import column, read_examples
from ketchup_cache.types import ScoredRollouts


class Goal:
    """fingerprint: of the data, for the run's record; empty without any."""

    def __init__(self, config: LearnConfig, prompts: LearnConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """prompts: the options, with the form of prompts that the student was trained with.

        Raises ConfigError for a reward that can't be imported, DataError for data that can't be read, or that has a row
        without a number in a column that is needed.
        """
        self._config, self._decode, self.fingerprint = config, tokenizer.decode, ""
        self._rows: dict[bytes, Example] = {}
        if config.reward_data:
            options = prompts.data_options(config.reward_data, config.reward_split)
            examples = read_examples(options, records=True)
            kept = tokenize_prompts(examples, tokenizer, options, unique=True).examples
            self._rows = {example.id: example for example in kept}
        self._weights = [self._numbers(text) for text in config.weights_of_teachers]
        self._reward = self._numbers(config.reward) if config.reward.startswith(COLUMN) else None
        own = config.reward and self._reward is None
        self._function = import_function(config.reward, "--reward") if own else None
        if self._rows:
            content = repr([(id_.hex(), row.references, row.record) for id_, row in self._rows.items()])
            self.fingerprint = hashlib.sha256(content.encode(errors="surrogatepass")).hexdigest()

    def _numbers(self, text: str) -> float | dict[bytes, float]:
        """A number, or those of a column by the ids of the prompts."""
        if not text.startswith(COLUMN):
            return float(text)
        name, found = text.removeprefix(COLUMN), {}
        for id_, row in self._rows.items():
            value = column(row.record or {}, name)
            where = f"{self._config.reward_data}: row {row.row}: {name!r}"
            try:
                found[id_] = math.nan if isinstance(value, bool) else float(value)
            except (TypeError, ValueError):
                found[id_] = math.nan
            if not math.isfinite(found[id_]):
                raise DataError(f"{where} is {value!r}, not a number; fill it in, or leave the row out")
            if text in self._config.weights_of_teachers and found[id_] < 0:
                raise DataError(f"{where} is {value!r}; a weight of a teacher is 0 or more")
        return found

    def _row(self, id_: bytes) -> Example:
        if row := self._rows.get(id_):
            return row
        what = f"has no row for prompt {id_.hex()} of the cache"
        raise DataError(f"{self._config.reward_data}: {what}; give the data and the template that `rollout` was given")

    def _each(self, numbers: float | dict[bytes, float], batch: ScoredRollouts) -> NDArray[np.float64]:
        """[B], of the prompts of a batch."""
        if isinstance(numbers, float):
            return np.full(len(batch), numbers)
        ids = batch.prompts.ids[batch.rollouts.prompt_index]
        return np.array([numbers[self._row(id_.tobytes()).id] for id_ in ids])

    def load(self, cache: Cache, ref: ScoredRef) -> ScoredRollouts:
        """As `Cache.load_scored`, with the scores whose returns are the weighted sum of the teachers' returns.

        Raises DataError for a prompt without weights, or with no weight above 0 where a mixture is wanted.
        """
        part = cache.load_scored(ref)
        if self._weights == [1.0]:
            return part
        top, vocab = self._config.top_needed, cache.entry(ref.scores_id).info.tokenizer.vocab_size
        scores = [part.scores, *(cache.load_scores_of(ref, id_) for id_ in ref.beside)]
        weights = np.array([self._each(one, part) for one in self._weights])
        if top and not (weights.sum(0) > 0).all():
            raise DataError("--teacher-weights: a row has the weights 0 alone, which is no mixture of distributions")
        scores = [one.with_top(min(top, vocab)) for one in scores]
        return replace(part, scores=weighted_scores(scores, weights, part.rollouts.completions, vocab))

    def rewards(self, batch: ScoredRollouts) -> NDArray[np.float64] | None:
        """[B] R of each rollout; None without any. Raises DataError where the function fails, or gives no number."""
        if self._reward is not None:
            return self._each(self._reward, batch)
        if (function := self._function) is None:
            return None
        rollouts, what = batch.rollouts, f"--reward {self._config.reward}"
        given: dict[str, Any] = {}
        if self._rows:
            rows = [self._row(id_.tobytes()) for id_ in batch.prompts.ids[rollouts.prompt_index]]
            for name in dict.fromkeys(name for row in rows for name in row.record or {}):
                given[name] = [(row.record or {}).get(name) for row in rows]
            given["targets"] = [list(row.references) for row in rows]
        of = {"prompts": batch.prompts.tokens.take(rollouts.prompt_index), "completions": rollouts.completions}
        given |= {name: [self._decode(ids, skip_special_tokens=True) for ids in part] for name, part in of.items()}
        given |= {"completion_ids": [ids.tolist() for ids in rollouts.completions]}
        given |= {"finished": rollouts.finished.tolist()}
        try:
            takes = inspect.signature(function).parameters
            if not any(one.kind is one.VAR_KEYWORD for one in takes.values()):
                given = {name: given[name] for name in takes if name in given}
            found = group().from_first(lambda: list(function(**given)))  # it may draw numbers
            values = np.array([math.nan if one is None else one for one in found], np.float64)
        except Exception as error:  # whatever the user's function raises
            raise DataError(f"{what}: {type(error).__name__}: {one_line(error)}") from error
        if values.shape != (len(rollouts),):
            raise DataError(f"{what}: gives {list(values.shape)} values for {len(rollouts)} completions")
        if (bad := np.flatnonzero(~np.isfinite(values))).size:
            text = self._decode(rollouts.completions[bad[0]], skip_special_tokens=True)
            raise DataError(f"{what}: gives no number for {len(bad)} completions of a batch (first: {text[:60]!r})")
        return values
