"""What all option classes are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def _folder_or_address(value: Any) -> Any:
    return Path(value) if isinstance(value, str) and "://" not in value else value


CacheAddress = Annotated[Path | str, BeforeValidator(_folder_or_address)]
"""A folder, or an address: pathlib would make one slash of the two in s3://."""
Positive = Annotated[int, Field(ge=1)]
