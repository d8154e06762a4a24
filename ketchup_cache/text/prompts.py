"""Prompts as a model is given them: rendered by a template, or as a turn of a chat, and tokenised."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from transformers import PreTrainedTokenizerBase

from ketchup_cache.config.options import DataOptions, PromptOptions
from ketchup_cache.console import one_line, say
from ketchup_cache.errors import ConfigError, DataError
from ketchup_cache.provenance import PromptForm
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
    span: tuple[int, int] | None = field(default=None, compare=False)
    """Place in `prompt` of the longest text that came from the data: what may be cut. None: all of it."""

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
        turn = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template's own errors (no system turns, as Gemma's) and Jinja's
        wanted = "give --system TEXT, " if "system" in str(error).lower() else ""
        hint = "leave --system out" if system else f"{wanted}leave --chat out, or use --template"
        raise ConfigError([f"--chat: the chat template can't be used ({one_line(error)}): {hint}"]) from None
    if system.strip() not in turn:
        raise ConfigError(["--chat: the chat template leaves the text of --system out: put it into --template"])
    return turn


def form_of(options: PromptOptions) -> PromptForm:
    """The part of the options that decides what is made of a text."""
    return PromptForm(template=options.template, chat=options.chat, system=options.system)


# ------------------------------------------------------------------------------------------------------------ tokens


@dataclass(frozen=True)
class Kept:
    """examples: as the model is given them. prompts: the token ids of their prompts, one row each. cut: how many of
    them lost tokens (`long_prompts="truncate"`)."""

    examples: list[Example]
    prompts: Prompts
    cut: int


def tokenize_prompts(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, options: DataOptions) -> Kept:
    """The examples that are kept, and the token ids of their prompts.

    With `options.chat` each prompt becomes a user turn (`user_turn`); without it, the tokenizer adds its special
    tokens. A prompt of more than `options.max_prompt_tokens` tokens is refused, cut or left out, as
    `options.long_prompts` says; how many is said. What is cut is the end of the longest text that came from the data:
    the template and the tokenizer's special tokens stay.

    Raises DataError for a prompt without tokens, for one that is refused, and where no prompt is left; the errors of
    `user_turn`.
    """
    if options.chat:
        turns = [{"role": "user", "content": "x"}]
        with suppress(Exception):  # a template that wants more turns is refused below
            if not user_turn("x", tokenizer)[len(tokenizer.apply_chat_template(turns, tokenize=False)) :]:
                say("--chat: the chat template does not open the assistant's turn; the model goes on behind the user's")
        examples = [replace(e, prompt=user_turn(e.prompt, tokenizer, options.system)) for e in examples]
    limit, rows, kept, cut = options.max_prompt_tokens, [], [], 0
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
                tokens, cut = _cut(example, tokenizer, limit, where), cut + 1
            rows.append(np.asarray(tokens, TOKEN_DTYPE))
            kept.append(example)
    if not rows:
        hint = f"all {len(examples):,} have more than {limit:,} tokens: raise --max-prompt-tokens, or set"
        raise DataError(f"{options.data}: no prompt left: {hint} --long-prompts truncate")
    for number, what in ((cut, "are cut"), (len(examples) - len(kept), "are left out")):
        if number:
            say(f"{options.data}: {number:,} of {len(examples):,} prompts have more than {limit:,} tokens and {what} "
                f"(--max-prompt-tokens, --long-prompts {options.long_prompts})")  # fmt: skip
    ids = np.frombuffer(b"".join(example.id for example in kept), np.uint8).reshape(-1, 16)
    return Kept(kept, Prompts(ids, Ragged.from_rows(rows, TOKEN_DTYPE)), cut)


def _cut(example: Example, tokenizer: PreTrainedTokenizerBase, limit: int, where: str) -> list[int]:
    """Ids of the prompt without as many tokens as are too many, from the end of `example.span`."""
    if not tokenizer.is_fast:
        raise DataError(f"{where} prompt is too long, and this tokenizer can't say where to cut: --long-prompts drop")
    encoded = tokenizer(example.prompt, return_offsets_mapping=True, verbose=False)
    start, stop = example.span or (0, len(example.prompt))
    tokens, places = encoded["input_ids"], encoded["offset_mapping"]
    inside = [i for i, (first, last) in enumerate(places) if start <= first < last <= stop]
    if len(inside) < (too_many := len(tokens) - limit):
        hint = "raise --max-prompt-tokens, or shorten --template"
        raise DataError(f"{where} template alone takes more than {limit:,} tokens: {hint}")
    return [token for i, token in enumerate(tokens) if i not in set(inside[len(inside) - too_many :])]


def target_ids(
    tokenizer: PreTrainedTokenizerBase, target: str, *, limit: int | None = None, bare: bool = False
) -> list[int]:
    """Ids of a reference, always ending with EOS unless the limit cuts it.

    bare: without what the tokenizer adds to a text. A decoder-only model is given prompt ids and target ids in one row,
    where a BOS in the middle would be a token that it never writes. The two are tokenised apart, as they are when the
    model writes: a token that spans the border of prompt and target can't be generated after that prompt.
    """
    ids = list(tokenizer(text_target=target, add_special_tokens=not bare, verbose=False)["input_ids"])
    if not ids or ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
    return ids[:limit]
