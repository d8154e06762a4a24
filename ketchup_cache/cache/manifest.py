"""What a segment says about itself (schemas/cache-format.md).

A segment's id is the SHA-256 of its manifest's bytes; the manifest holds the length and SHA-256 of every data file.
So an id pins every byte of the data, and of everything its parents hold.
"""

from __future__ import annotations

from operator import not_
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from ketchup_cache import provenance
from ketchup_cache.provenance import Record, Sha256, TokenizerInfo

FORMAT = "ketchup-cache"
FORMAT_VERSION = 2

Kind = Literal["prompts", "rollouts", "scores"]
KINDS: tuple[Kind, ...] = ("prompts", "rollouts", "scores")
"""Parents before children."""
Storage = Literal["lossless", "compact"]


class FileEntry(Record):
    length: int = Field(ge=0)
    """Bytes."""
    sha256: Sha256


class ArrayEntry(Record):
    dtype: Literal["bool", "uint8", "uint16", "uint32", "int64", "float16", "float32"]
    shape: tuple[Annotated[int, Field(ge=0)], ...]


class PromptsInfo(Record):
    kind: Literal["prompts"] = "prompts"
    tokenizer: TokenizerInfo
    data: provenance.DataInfo
    start: int = Field(ge=0)
    """Place of the first prompt in the data set."""


class RolloutsInfo(Record):
    kind: Literal["rollouts"] = "rollouts"
    prompts: Sha256
    """Parent: id of the prompts segment."""
    prompt_start: int = Field(ge=0)
    prompt_stop: int = Field(ge=0)
    """Rows of the parent this segment holds completions for: `samples` consecutive rows each."""
    policy: provenance.PolicyInfo
    tokenizer: TokenizerInfo
    sampling: provenance.Sampling
    storage: Storage = "lossless"
    """compact: log-probabilities in float16."""
    original: Sha256 | None = None
    """Of a compact segment of version 1: id of the lossless one with the same rows. Readers use each row once."""
    finished: int | None = Field(default=None, ge=0, exclude_if=lambda count: count is None)
    """Rollouts that ended in EOS before the length limit. Not in version 1."""
    engine: provenance.Mismatch | None = Field(default=None, exclude_if=not_)
    """Of rollouts that an engine drew behind a server. Left out for those that were drawn in the process."""


class ScoresInfo(Record):
    kind: Literal["scores"] = "scores"
    rollouts: Sha256
    """Parent: id of the rollouts segment."""
    row_start: int = Field(ge=0)
    row_stop: int = Field(ge=0)
    """Rows of the parent that are scored here."""
    teacher: provenance.TeacherInfo
    tokenizer: TokenizerInfo
    keep_top: int = Field(default=0, ge=0)
    """How many of the largest logits of each state are kept. 0: none, and no arrays for them."""
    storage: Storage = "lossless"
    """compact: float16 `q`, and the other scores as float16 distances from the maximum."""

    @model_validator(mode="after")
    def _no_more_than_all(self) -> ScoresInfo:
        if self.keep_top > self.tokenizer.vocab_size:
            raise ValueError(f"keeps {self.keep_top} logits of a vocabulary of {self.tokenizer.vocab_size}")
        return self


Info = Annotated[PromptsInfo | RolloutsInfo | ScoresInfo, Field(discriminator="kind")]


class Manifest(Record):
    format: Literal["ketchup-cache"] = "ketchup-cache"
    version: Literal[1, 2] = 2
    tool: str
    """Name and version of the program that wrote the segment."""
    author: Annotated[str, StringConstraints(min_length=1, max_length=200)] = Field(default="", exclude_if=not_)
    """Who made the segment, in version 1, where they chose to say so. Left out of the bytes otherwise."""
    created: str
    """UTC, ISO 8601, to the microsecond: `2026-01-31T12:00:00.000000Z`."""
    rows: int = Field(ge=0)
    tokens: int = Field(ge=0)
    """Prompt tokens in a prompts segment, completion tokens in the others."""
    info: Info
    arrays: dict[str, ArrayEntry]
    files: dict[str, FileEntry]

    @property
    def kind(self) -> Kind:
        return self.info.kind

    def to_bytes(self) -> bytes:
        """Canonical JSON: sorted keys, no spaces, UTF-8. The id is the hash of exactly these bytes."""
        return provenance.canonical_json(self.model_dump(mode="json"))

    @property
    def data_bytes(self) -> int:
        """Of all data files."""
        return sum(file.length for file in self.files.values())
