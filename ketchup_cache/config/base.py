"""What all option classes are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def _folder_or_address(value: Path | str) -> Path | str:
    return Path(value) if isinstance(value, str) and "://" not in value else value


CacheAddress = Annotated[str | Path, AfterValidator(_folder_or_address)]
"""A folder, or an address: pathlib would make one slash of the two in s3://."""
Positive = Annotated[int, Field(ge=1)]


def _tokens_or_auto(value: Any) -> Any:
    if value == "auto":
        return value
    try:
        number = int(value) if isinstance(value, str | int) and not isinstance(value, bool) else 0
    except ValueError:
        number = 0
    if number < 1:
        raise ValueError("must be a whole number of 1 or more, or auto")
    return number


TokensOrAuto = Annotated[Positive | Literal["auto"], BeforeValidator(_tokens_or_auto)]
