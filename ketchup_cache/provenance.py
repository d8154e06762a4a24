"""Who made what: the records by which prompts, rollouts and scores say where they come from."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, StringConstraints

from ketchup_cache.errors import MismatchError

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


def _without_credentials(name: str) -> str:
    if re.search(r"//[^/\s]*@", name):
        raise ValueError("is an address with credentials; leave them out")
    return name


Name = Annotated[str, AfterValidator(_without_credentials)]
"""Where something came from: a path, a Hub id, an address. Anybody may read it."""


class Record(BaseModel):
    # an error must not repeat its input, which may hold a credential
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True)


class TokenizerInfo(Record):
    name: Name
    """Where it was loaded from: a path or a Hub id. Never an address with credentials."""
    fingerprint: Sha256
    """Of what it encodes (models/fingerprint.py), so that equal tokenizers from different places agree."""
    vocab_size: int = Field(ge=1)
    """Largest token id + 1: the real vocabulary, without the padding rows of a model's head."""
    _earlier: frozenset[str] = PrivateAttr(default=frozenset())
    """Of a loaded tokenizer, in no file: its fingerprints in earlier versions, which held the id that pads."""

    def encodes_as(self, stored: TokenizerInfo) -> bool:
        return self.vocab_size == stored.vocab_size and stored.fingerprint in {self.fingerprint, *self._earlier}


class PromptForm(Record):
    """What was made of each text before a model was given it: the options of these names."""

    template: str = "{prompt}"
    chat: bool = False
    system: str = ""

    def __str__(self) -> str:
        return (
            f"--template {self.template!r}"
            + (" --chat" if self.chat else "")
            + (f" --system {self.system!r}" if self.system else "")
        )


class DataInfo(Record):
    name: Name
    fingerprint: Sha256
    """Of the rendered prompt texts, in order."""
    template: str
    """`{prompt}` where the text was used as it is; with a chat, the whole turn."""
    form: PromptForm | None = None
    """The options that made the prompts; null where the writer did not record them."""


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


def in_precision(fingerprint: str, dtype: str) -> str:
    """Fingerprint of a teacher: of weights with this fingerprint, run in this precision. So it can be told of a policy
    and a teacher whether they are one model."""
    return hashlib.sha256(f"{fingerprint} in {dtype}".encode()).hexdigest()


def canonical_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def require_same_tokenizer(mine: TokenizerInfo, theirs: TokenizerInfo, what: str) -> None:
    """Raise MismatchError where token ids mean different things to two tokenizers.

    what: whose they are and what to do, as "CACHE was encoded by another tokenizer; use …".
    """
    if not mine.encodes_as(theirs):
        raise MismatchError(f"{what}: tokenizers {mine.name} and {theirs.name} encode differently")
