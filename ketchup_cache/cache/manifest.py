"""What a segment says about itself (format version 1, schemas/cache-format.md).

A segment's id is the SHA-256 of its manifest's bytes; the manifest holds the length and SHA-256 of every data file.
So an id pins every byte of the data, and of everything its parents hold.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

FORMAT = "ketchup-cache"
FORMAT_VERSION = 1

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Kind = Literal["prompts", "rollouts", "scores"]
Storage = Literal["lossless", "compact"]


def _without_credentials(name: str) -> str:
    if re.search(r"//[^/\s]*@", name):
        raise ValueError("is an address with credentials; leave them out")
    return name


Name = Annotated[str, AfterValidator(_without_credentials)]
"""Where something came from: a path, a Hub id, an address. Anybody may read it."""


class Record(BaseModel):
    # an error must not repeat its input, which may hold a credential
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True)


class FileEntry(Record):
    length: int = Field(ge=0)
    """Bytes."""
    sha256: Sha256


class ArrayEntry(Record):
    dtype: Literal["bool", "uint8", "uint16", "uint32", "int64", "float16", "float32"]
    shape: tuple[Annotated[int, Field(ge=0)], ...]


class TokenizerInfo(Record):
    name: Name
    """Where it was loaded from: a path or a Hub id. Never an address with credentials."""
    fingerprint: Sha256
    """Of what it encodes (lm/fingerprint.py), so that equal tokenizers from different places agree."""
    vocab_size: int = Field(ge=1)
    """Largest token id + 1: the real vocabulary, without the padding rows of a model's head."""


class DataInfo(Record):
    name: Name
    fingerprint: Sha256
    """Of the rendered prompt texts, in order."""
    template: str
    """`{prompt}` where the text was used as it is."""


class PolicyInfo(Record):
    name: Name
    fingerprint: Sha256
    """Of the weights and the architecture."""
    step: int | None = Field(default=None, ge=0)
    """Optimizer step of the run that produced these weights; null for a model given by the user."""


class Sampling(Record):
    """How completions were drawn. The default is the paper's Algorithm 1: the full softmax at temperature 1."""

    greedy: bool = False
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    top_k: int = Field(default=0, ge=0)
    """0: off."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_new_tokens: int = Field(default=64, ge=1)
    samples: int = Field(default=1, ge=1)
    """Completions per prompt."""
    seed: int = Field(default=0, ge=0)
    calculator: bool = False
    """What stands between `<<` and `=` was computed, and its tokens forced."""


class TeacherInfo(Record):
    name: Name
    fingerprint: Sha256
    """Of the weights, the architecture and the precision they ran in: the same fingerprint, the same numbers."""
    dtype: str
    """Precision of the body. The head and its reductions always run in float32."""


class PromptsInfo(Record):
    kind: Literal["prompts"] = "prompts"
    tokenizer: TokenizerInfo
    data: DataInfo
    start: int = Field(ge=0)
    """Place of the first prompt in the data set."""


class RolloutsInfo(Record):
    kind: Literal["rollouts"] = "rollouts"
    prompts: Sha256
    """Parent: id of the prompts segment."""
    prompt_start: int = Field(ge=0)
    prompt_stop: int = Field(ge=0)
    """Rows of the parent this segment holds completions for: `samples` consecutive rows each."""
    policy: PolicyInfo
    tokenizer: TokenizerInfo
    sampling: Sampling
    storage: Storage = "lossless"
    """compact: log-probabilities in float16."""
    original: Sha256 | None = None
    """Of a compact segment: id of the lossless one with the same rows. Readers that find both use each row once."""


class ScoresInfo(Record):
    kind: Literal["scores"] = "scores"
    rollouts: Sha256
    """Parent: id of the rollouts segment."""
    row_start: int = Field(ge=0)
    row_stop: int = Field(ge=0)
    """Rows of the parent that are scored here."""
    teacher: TeacherInfo
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
    version: Literal[1] = 1
    tool: str
    """Name and version of the program that wrote the segment."""
    author: Annotated[str, StringConstraints(min_length=1, max_length=200)] = ""
    """Who made the segment, where they chose to say so. Left out of the bytes otherwise."""
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
        record = self.model_dump(mode="json")
        if not self.author:
            del record["author"]
        return canonical_json(record)

    @property
    def id(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()


def in_precision(fingerprint: str, dtype: str) -> str:
    """Fingerprint of a teacher: of weights with this fingerprint, run in this precision. So it can be told of a policy
    and a teacher whether they are one model."""
    return hashlib.sha256(f"{fingerprint} in {dtype}".encode()).hexdigest()


def canonical_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
