"""Prompts as a model is given them: rendered by a template, or as a turn of a chat, and tokenised."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from transformers import PreTrainedTokenizerBase

from ketchup_cache.config.options import DataOptions
from ketchup_cache.console import one_line
from ketchup_cache.errors import ConfigError, DataError
from ketchup_cache.types import TOKEN_DTYPE, Prompts, Ragged

TOKENIZE_AT_ONCE = 4096


@dataclass(frozen=True)
class Example:
    """One prompt as the model is given it.

    target: the reference, None where there is none. row: 1-based place in the data, for messages: the line of a JSONL
    file, the row (without the header) of others.
    """

    prompt: str
    target: str | None
    row: int = field(default=0, compare=False)

    @cached_property
    def id(self) -> bytes:
        """First 16 bytes of the SHA-256 of `prompt` in UTF-8."""
        return hashlib.sha256(self.prompt.encode()).digest()[:16]


def without_duplicates(examples: Iterable[Example]) -> list[Example]:
    """The first example of every prompt. Rollouts start from these; training and evaluation keep all."""
    first: dict[bytes, Example] = {}
    for example in examples:
        first.setdefault(example.id, example)
    return list(first.values())


# ------------------------------------------------------------------------------------------------ template and chat


def parse_template(template: str) -> list[tuple[str, str | None]]:
    """(text, name of the column after it): `"Q: {prompt}!"` → [("Q: ", "prompt"), ("!", None)].

    Raises ConfigError for a template without {prompt}, or with braces that hold anything but a name.
    """
    try:
        parts = list(string.Formatter().parse(template))
        if any(name is not None and (not name or spec or conversion) for _, name, spec, conversion in parts):
            raise ValueError
    except ValueError:
        braces = "a pair of braces holds the name of a column; write {{ and }} for braces in the text"
        raise ConfigError([f"--template {template!r}: {braces}"]) from None
    if not any(name == "prompt" for _, name, *_ in parts):
        raise ConfigError([f"--template {template!r} must contain {{prompt}}"])
    return [(literal, name) for literal, name, *_ in parts]


def user_turn(text: str, tokenizer: PreTrainedTokenizerBase, system: str = "") -> str:
    """`text` as the user's turn of a chat, by the tokenizer's chat template, with the assistant's turn left open.

    system: text of a system turn before it. The result holds all special tokens, BOS too where the template has one:
    tokenise it without adding any.

    Raises ConfigError for a tokenizer without a chat template, or one whose template refuses the turns.
    """
    if not tokenizer.chat_template:
        raise ConfigError(["--chat: the model's tokenizer has no chat template: leave --chat out, or use --template"])
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": text})
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template's own errors (no system turns, as Gemma's) and Jinja's
        hint = "leave --system out" if system else "leave --chat out, or use --template"
        raise ConfigError([f"--chat: the chat template can't be used ({one_line(error)}): {hint}"]) from None


# ------------------------------------------------------------------------------------------------------------ tokens


Kept = tuple[list[Example], Prompts]
"""Examples as the model is given them, and the token ids of their prompts, one row each."""


def tokenize_prompts(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, options: DataOptions) -> Kept:
    """The examples that are kept, and the token ids of their prompts.

    With `options.chat` each prompt becomes a user turn (`user_turn`); without it, the tokenizer adds its special
    tokens. A prompt of more than `options.max_prompt_tokens` tokens is refused, cut or left out, as
    `options.long_prompts` says.

    Raises DataError for a prompt without tokens, for one that is refused, and where no prompt is left; the errors of
    `user_turn`.
    """
    if options.chat:
        examples = [replace(e, prompt=user_turn(e.prompt, tokenizer, options.system)) for e in examples]
    limit, rows, kept = options.max_prompt_tokens, [], []
    special = {"add_special_tokens": not options.chat, "return_attention_mask": False, "verbose": False}
    for start in range(0, len(examples), TOKENIZE_AT_ONCE):
        chunk = examples[start : start + TOKENIZE_AT_ONCE]
        encoded = tokenizer([example.prompt for example in chunk], **special)["input_ids"]
        for example, tokens in zip(chunk, encoded, strict=True):
            where = f"{options.data}: row {example.row}: the"
            if not tokens:
                hint = "leave the row out, or use a --template that adds some text"
                raise DataError(f"{where} tokenizer makes no token of this prompt, and a model needs one: {hint}")
            if len(tokens) > limit:
                if options.long_prompts == "drop":
                    continue
                if options.long_prompts == "refuse":
                    hint = "raise --max-prompt-tokens, or set --long-prompts to truncate or drop"
                    raise DataError(f"{where} prompt has {len(tokens):,} tokens, more than {limit:,}: {hint}")
                ends = tokens[-1:] if tokens[-1] == tokenizer.eos_token_id else []
                tokens = tokens[: limit - len(ends)] + ends
            rows.append(np.asarray(tokens, TOKEN_DTYPE))
            kept.append(example)
    if not rows:
        hint = f"all {len(examples):,} have more than {limit:,} tokens: raise --max-prompt-tokens, or set"
        raise DataError(f"{options.data}: no prompt left: {hint} --long-prompts truncate")
    ids = np.frombuffer(b"".join(example.id for example in kept), np.uint8).reshape(-1, 16)
    return kept, Prompts(ids, Ragged.from_rows(rows, TOKEN_DTYPE))
