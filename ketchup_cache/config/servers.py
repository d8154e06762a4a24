"""Options of teachers, and of models behind servers: a teacher that scores, a student that an engine samples from."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import model_validator

from ketchup_cache.config.options import DeviceOptions, SamplingOptions
from ketchup_cache.config.values import Above0, Config, Positive, TokensOrAuto


class ServerOptions(Config):
    """Models behind servers"""

    in_flight: Positive = 32
    """Requests to a server at once."""
    idle_timeout: Above0 = 300.0
    """Seconds without a byte of a server after which a request is sent again. A completion comes in one piece, when it
    is whole."""
    retry_for: Above0 = 900.0
    """Seconds that one answer of a server may take, tries included."""

    def require_server(self, whose: str) -> None:
        """Raises ValueError where the options `…_url` and `…_name` don't go together, or the address is none."""
        url = getattr(self, f"{whose}_url")
        if bool(url) != bool(getattr(self, f"{whose}_name")):
            raise ValueError(f"{whose}_url and {whose}_name go together: the address of a server, and its model")
        if url and not re.fullmatch(r"https?://[^/?#@\s]+(/[^?#@\s]*)?", url):
            raise ValueError(f"{whose}_url must be like http://host:8000/v1, without a user, a password or a query")


class EngineOptions(ServerOptions, SamplingOptions):
    """Rollouts by an engine"""

    student_url: str = ""
    """Have a vLLM that serves the student sample the completions: address of its API, as http://host:8000/v1. For
    decoder-only students. A key is read from the environment variable KETCHUP_CACHE_API_KEY."""
    student_name: str = ""
    """With --student-url: the name that the server has for the student."""
    max_mismatch: Above0 = 0.1
    """With --student-url: how far, in nats (mean over the tokens drawn), the server's log-probabilities may be from
    those that the weights of --student give here."""

    @model_validator(mode="after")
    def _engine_can(self) -> EngineOptions:
        self.require_server("student")
        if self.student_url and self.calculator:
            raise ValueError("calculator writes into a completion while it is drawn, which a server can't: leave one")
        if self.student_url and getattr(self, "engine", "local") == "ray":
            raise ValueError("student_url has a server sample, and --engine ray workers of its own: leave one out")
        if self.student_url and getattr(self, "fsdp", False):
            raise ValueError("student_url is given whole weights, which --fsdp keeps in parts: leave one out")
        return self


class ScoringOptions(ServerOptions, DeviceOptions):
    """Teacher"""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the teacher's body. The head and its reductions run in float32."""
    quantize: Literal["none", "int8", "bnb-int8", "bnb-nf4"] = "none"
    """Quantise the teacher's linear layers, but not its head, when it is loaded. int8: weights of 8 bits, by torchao.
    bnb-int8, bnb-nf4: LLM.int8() and NF4 of 4 bits, by bitsandbytes. Its scores are filed apart (docs/quantised.md)."""
    batch_tokens: TokensOrAuto = "auto"
    """Largest batch of the teacher, in tokens of prompts (each once) and completions. auto: what fits into memory."""
    device_map: str | None = None
    """Spread a large teacher over devices: auto, balanced or sequential (by accelerate)."""
    teacher_url: str = ""
    """Teacher behind a server: address of an OpenAI-compatible API, as http://host:8000/v1 (vLLM and others). --dtype,
    --quantize, --batch-tokens and --device-map do not apply. A key is read from the environment variable
    KETCHUP_CACHE_API_KEY."""
    teacher_name: str = ""
    """With --teacher-url: the name that the server has for the model."""
    max_disagreement: Above0 = 0.01
    """With --teacher-url: how far, in nats (root mean square), the server's answers to a row may differ from each
    other."""

    @property
    def filed_as(self) -> str:
        """Precision of the teacher's body, as its scores say it."""
        return self.dtype if self.quantize == "none" else f"{self.dtype}, {self.quantize}"

    @model_validator(mode="after")
    def _server_is_named(self) -> ScoringOptions:
        self.require_server("teacher")
        return self
