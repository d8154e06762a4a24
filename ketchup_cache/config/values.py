"""The kinds of values that options have, and how their texts are read."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator

Normalization = Literal["raw", "centred", "logprob", "advantage"]
Baseline = Literal["none", "mean", "batch-mean", "min-variance", "leave-one-out"]
METRICS = ("rouge1", "rouge2", "rougeL", "bleu", "chrf", "ter", "exact", "accuracy", "gsm8k", "rouge", "loss", "return")
"""Names of metrics. gsm8k is accuracy by its older name; rouge is all three."""
LOWER_IS_BETTER = ("ter", "loss")


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @field_validator("*")
    @classmethod
    def _home(cls, value: Any) -> Any:
        """A shell replaces ~ at the start of a word only: not in a YAML file, nor in --out=~/run."""
        return value.expanduser() if isinstance(value, Path) else value


def _folder_or_address(value: Path | str) -> Path | str:
    return Path(value) if isinstance(value, str) and "://" not in value else value


CacheAddress = Annotated[str | Path, AfterValidator(_folder_or_address)]
"""A folder, or an address: pathlib would make one slash of the two in s3://."""
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Above0 = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _tokens_or_auto(value: Any) -> Any:
    if value == "auto" or (str(value).strip().isdecimal() and int(value) > 0):
        return value
    raise ValueError("must be a whole number of 1 or more, or auto")


def split_list(value: Any) -> Any:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def chat_arguments(value: Any) -> Any:
    """NAME=VALUE texts in one spelling, in the order of the names, of each the last."""
    texts = [str(one) for one in (value if isinstance(value, (list, tuple)) else [value])]
    if not all(re.match(r"[^\W\d]\w*=", text) for text in texts):
        raise ValueError("must be NAME=VALUE, as enable_thinking=false")
    given = {name: _json_or_text(text) for name, text in (text.split("=", 1) for text in texts)}
    return tuple(f"{name}={json.dumps(given[name], ensure_ascii=False)}" for name in sorted(given))


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=str)
    except (ValueError, RecursionError):
        return text


def _shard(text: str) -> str:
    """As `3/16`. `slurm`: the place of this task in its array."""
    if text == "slurm":
        names = ("ID", "MIN", "MAX", "COUNT")
        task, first, last, count = (int(os.environ.get(f"SLURM_ARRAY_TASK_{name}", -1)) for name in names)
        if count < 0 or last - first + 1 != count:
            what = "follow each other" if count > 0 else "be there: this is no task of an array"
            raise ValueError(f"needs a Slurm array whose numbers {what}; give a part such as 3/16")
        text = f"{task - first + 1}/{count}"
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError("must be a part such as 3/16, the third of sixteen, or slurm")
    return text


Shard = Annotated[str, AfterValidator(_shard)]
RougeTokenizer = Literal["ascii", "unicode", "characters"]


def own_function(name: str) -> str:
    if not name or re.fullmatch(r"\w+(\.\w+)*:\w+|column:.+", name):
        return name
    raise ValueError("must be package.module:function, or column:NAME")


def _metric(name: str) -> str:
    if name in METRICS or re.fullmatch(r"\w+(\.\w+)*:\w+", name):
        return name
    raise ValueError(f"knows no metric {name!r}: choose from {', '.join(METRICS)}, or package.module:function")


MetricList = Annotated[tuple[Annotated[str, AfterValidator(_metric)], ...], BeforeValidator(split_list)]
TokensOrAuto = Annotated[Positive | Literal["auto"], BeforeValidator(_tokens_or_auto)]
