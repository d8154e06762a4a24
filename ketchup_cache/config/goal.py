"""What a run of `learn` aims at: one teacher or several, and a task reward."""

from __future__ import annotations

import os
import re
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, model_validator

from ketchup_cache.config.options import LossOptions, SelectOptions
from ketchup_cache.config.values import split_list

COLUMN = "column:"
"""What begins the name of a column in --reward-data, in place of a number or a function."""


def _weight(value: str) -> str:
    if not re.fullmatch(rf"{COLUMN}.+|\d+(\.\d*)?(e-?\d+)?|\.\d+", value):
        raise ValueError("must be numbers of 0 or more, or column:NAME")
    return value


Weight = Annotated[str, BeforeValidator(str), AfterValidator(_weight)]


def several(names: str | None) -> tuple[str | None, ...]:
    """Names separated by commas; a folder whose name has one is itself."""
    return (names,) if names is None or os.path.exists(names) else tuple(split_list(names))


class GoalOptions(SelectOptions, LossOptions):
    """Teachers and rewards"""

    teacher: str | None = None
    """Teacher that scores new rollouts in this process: a folder or a Hub id; several, separated by commas. Without it
    and --scores-from, learning is offline: from the scores in the cache."""
    teacher_weights: Annotated[tuple[Weight, ...], BeforeValidator(split_list)] = ()
    """Weights of the returns of several teachers (--scored-by A,B or --teacher A,B), in their order, separated by
    commas: numbers, or column:NAME of --reward-data. Default: equal ones, 1 together."""
    reward_data: str = ""
    """Data of the prompts, as `rollout` read them: the references and columns that --reward and column:NAME take."""
    reward_split: str = "train"
    """Split of --reward-data, if it is a Hugging Face dataset."""

    @property
    def teachers(self) -> tuple[str | None, ...]:
        """Names; (None,) for the only one that there is."""
        return several(self.teacher or self.scored_by)

    @property
    def weights_of_teachers(self) -> tuple[str, ...]:
        return self.teacher_weights or (str(1 / len(self.teachers)),) * len(self.teachers)

    @model_validator(mode="after")
    def _goal_is_one(self) -> GoalOptions:
        names, weights = self.teachers, self.weights_of_teachers
        columns = [text for text in (*weights, self.reward) if text.startswith(COLUMN)]
        fixed = 0.0 if columns and columns != [self.reward] else sum(map(float, weights))
        if len(weights) != len(names):
            raise ValueError(f"teacher_weights has {len(weights)} for {len(names)} teachers (--scored-by, --teacher)")
        if len(names) > 1 and self.scored_by and len(several(self.scored_by)) != len(names):
            raise ValueError("teacher and scored_by name different teachers: leave one of the two out")
        if len(names) > 1 and vars(self).get("teacher_url"):
            raise ValueError(
                "teacher_url is one teacher: of several, `score` by each into the cache, then learn offline"
            )
        if self.exact and (len(names) > 1 or fixed != 1):
            raise ValueError("exact takes the kept logits of one teacher of weight 1: several keep different tokens")
        if self.cost == "kl" and abs(fixed - 1) > 1e-6:
            raise ValueError("cost kl is a distance to one distribution: give --teacher-weights numbers that sum to 1")
        if self.teacher_weights and fixed == 0 and not self.reward and not columns:
            raise ValueError("teacher_weights are all 0 and there is no --reward: nothing would be learned")
        if columns and not self.reward_data:
            raise ValueError(f"{columns[0]} is a column of --reward-data: give that too")
        if self.reward_data and not columns and not self.reward:
            raise ValueError("reward_data is for --reward and column:NAME of --teacher-weights: leave it out")
        if "return" in vars(self).get("metric", ()) and (len(names) > 1 or self.teacher_weights):
            raise ValueError("metric return is of one teacher: evaluate under each, and choose another --metric here")
        return self
