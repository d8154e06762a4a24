"""Who made what: the records by which prompts, rollouts and scores say where they come from."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from operator import not_
from typing import Annotated, Any, Literal

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
    """What was made of each text before a model was given it: the options of these names. Of conversations `chat` is
    true."""

    template: str = "{prompt}"
    chat: bool = False
    system: str = ""
    template_arg: tuple[str, ...] = Field(default=(), exclude_if=not_)
    """`NAME=JSON`, by name. Left out where there are none."""
    prefill: str = Field(default="", exclude_if=not_)
    """Left out where there is none."""

    def __str__(self) -> str:
        return (
            f"--template {self.template!r}"
            + (" --chat" if self.chat else "")
            + (f" --system {self.system!r}" if self.system else "")
            + "".join(f" --template-arg {one}" for one in self.template_arg)
            + (f" --prefill {self.prefill!r}" if self.prefill else "")
        )


class DataInfo(Record):
    name: Name
    fingerprint: Sha256
    """Of the rendered prompt texts, in order."""
    template: str
    """`{prompt}` where the text was used as it is; with a chat, the whole turn; `{messages}` of conversations."""
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


class Mismatch(Record):
    """How far the log-probabilities of an engine that drew completions are from those that the policy's own weights
    gave in the process that asked for them (rollouts/engine.py): of each token the difference, in nats, 5 at most."""

    engine: Name
    """The name that the server has for the policy."""
    mean: float = Field(ge=0, allow_inf_nan=False)
    """Of the absolute differences."""
    largest: float = Field(ge=0, allow_inf_nan=False)
    far: float = Field(ge=0, le=1)
    """Share of the tokens whose two probabilities differ by more than a factor of 2."""

    def __str__(self) -> str:
        return (
            f"{self.engine}: its log-probabilities differ by {self.mean:.2g} nats on average, at most "
            f"{self.largest:.2g}, {self.far:.2%} of the tokens by more than a factor of 2"
        )

    @classmethod
    def of_all(cls, parts: Sequence[tuple[int, Mismatch]]) -> Mismatch | None:
        """Of several parts, each with its number of tokens; None of nothing."""
        total = sum(tokens for tokens, _ in parts)
        if not total:
            return None
        mean, far = (sum(n * getattr(part, name) for n, part in parts) / total for name in ("mean", "far"))
        names = ", ".join(dict.fromkeys(part.engine for _, part in parts))
        return cls(engine=names, mean=mean, largest=max(part.largest for _, part in parts), far=min(far, 1.0))


SAME_ANSWERS = 0.02
"""Nats by which the answers of one served model to the probe may differ from one day, or one replica, to another."""


class Served(Record):
    """What a server answered to the rows that are the same for everybody with its tokenizer (scoring/served.py)."""

    form: Literal["prompt_logprobs", "echo"]
    """How it was asked for log-probabilities."""
    disagreement: float = Field(ge=0, allow_inf_nan=False)
    """Root mean square difference, in nats, between its answers to a row: twice alone, among others, at another
    temperature. Of the worst row."""
    probe: tuple[float, ...]
    """Nats: mean log-probability of the tokens of each row, then of the likeliest tokens of each."""


class TeacherInfo(Record):
    name: Name
    fingerprint: Sha256
    """Of the weights, the architecture and the precision they ran in: the same fingerprint, the same numbers. Of a
    served teacher: of its name, its tokenizer and its answers in whole nats, or what the cache had it under."""
    dtype: str
    """Precision of the body: `served` where only the server knows. The head and its reductions always run in float32.
    """
    served: Served | None = Field(default=None, exclude_if=not_)
    """Of a teacher behind a server: its logits are log-probabilities, so their mean is not known. Left out for one that
    ran in the process."""

    def answers_as(self, other: TeacherInfo) -> bool:
        """Whether both are behind servers, and the probe finds one model."""
        mine, theirs = (info.served.probe if info.served else () for info in (self, other))
        near = [abs(a - b) <= SAME_ANSWERS for a, b in zip(mine, theirs, strict=False)]
        return len(mine) == len(theirs) == sum(near) > 0

    def known_in(self, others: Iterable[TeacherInfo]) -> TeacherInfo:
        """This served teacher under the fingerprint that a cache has for its name and answers, if it has one."""
        same = (other.fingerprint for other in others if other.name == self.name and self.answers_as(other))
        return self.model_copy(update={"fingerprint": next(same, self.fingerprint)})

    def alone_in(self, others: Iterable[TeacherInfo]) -> TeacherInfo:
        """The same. Raises MismatchError where scores of another served model are filed under its fingerprint."""
        if any(other.fingerprint == self.fingerprint and not self.answers_as(other) for other in others):
            what = f"teacher {self.name} ({self.fingerprint[:12]}): two models have scored under this name"
            raise MismatchError(f"{what}; serve one under another name, and score into another cache")
        return self

    def require_known(self, normalization: str, unfinished: str = "bootstrap") -> None:
        """Raise MismatchError for returns of logits, where only log-probabilities are known."""
        lacking = {"centred": "the mean of all logits", "raw": "logits as they are"}.get(normalization)
        option, todo = f"--normalization {normalization}", "--normalization logprob"
        if unfinished == "zero":
            lacking, option, todo = "the logits after the cut", "--unfinished zero", "--unfinished bootstrap"
        if self.served and lacking:
            what = f"teacher {self.name} was behind a server, which gives log-probabilities"
            raise MismatchError(f"{what}: {option} needs {lacking}; use {todo}")


def in_precision(fingerprint: str, dtype: str) -> str:
    """Fingerprint of a teacher: of weights with this fingerprint, run in this precision. So it can be told of a policy
    and a teacher whether they are one model."""
    return hashlib.sha256(f"{fingerprint} in {dtype}".encode()).hexdigest()


def canonical_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


OTHER_TOKENIZER = (
    "a teacher and a student need one tokenizer, as the sizes of one family have (docs/families.md); of another "
    "teacher its texts can be learned: `evaluate --model TEACHER --data DATA --outputs texts.jsonl`, then "
    "`pretrain --model STUDENT --data texts.jsonl --target-field output`"
)
"""What to do about a pair with different tokenizers."""


def require_same_tokenizer(mine: TokenizerInfo, theirs: TokenizerInfo, what: str) -> None:
    """Raise MismatchError where token ids mean different things to two tokenizers.

    what: whose they are and what to do, as "CACHE was encoded by another tokenizer; use …".
    """
    if not mine.encodes_as(theirs):
        raise MismatchError(f"{what}: tokenizers {mine.name} and {theirs.name} encode differently")
