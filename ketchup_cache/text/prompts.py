"""Prompts as a model is given them: rendered by a template, or as a turn of a chat, and tokenised."""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ketchup_cache.config.options import DataOptions, PromptOptions
from ketchup_cache.console import one_line, say
from ketchup_cache.errors import ConfigError, DataError
from ketchup_cache.provenance import PromptForm
from ketchup_cache.types import TOKEN_DTYPE, Prompts, Ragged

TOKENIZE_AT_ONCE = 4096


@dataclass(frozen=True)
class Conversation:
    """messages: what stands before a turn of the assistant, at least one. reply: that turn, where the data has it.
    tools: what the row says of the tools, for the template."""

    messages: Sequence[dict[str, Any]]
    reply: dict[str, Any] | None = None
    tools: list[Any] | None = None


@dataclass(frozen=True)
class Example:
    """One prompt as the model is given it.

    target: the reference, None where there is none. more: further ones. row: 1-based place in the data, for what is
    said to the user: the line of a JSONL file, the row (without the header) of others.
    """

    prompt: str
    target: str | None
    row: int = field(default=0, compare=False)
    span: tuple[int, int] | None = field(default=None, compare=False)
    """Place in `prompt` of the longest text that came from the data: what may be cut. None: all of it."""
    more: tuple[str, ...] = ()
    talk: Conversation | None = field(default=None, compare=False)
    """Of a conversation, which is no `prompt` until it is rendered."""
    written: tuple[str, int] | None = field(default=None, compare=False)
    """The conversation's reply as the chat template writes it, and the token that ends it."""
    record: dict[str, Any] | None = field(default=None, compare=False)
    """All columns of its row, where they were asked for."""

    @property
    def references(self) -> tuple[str, ...]:
        """All of them."""
        return () if self.target is None else (self.target, *self.more)

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


def by_template(
    talk: Conversation, tokenizer: PreTrainedTokenizerBase, options: PromptOptions, where: str, *, closed: bool = False
) -> str:
    """The messages by the tokenizer's chat template, with the assistant's turn opened, and begun by `options.prefill`;
    `closed`: with the reply as that turn. where: how an error begins.

    The result holds all special tokens, BOS too where the template has one: tokenise it without adding any. Raises
    ConfigError for messages that the template refuses, and where it leaves the text of `options.system` out.
    """
    turns, system = [*talk.messages, *([talk.reply] if closed and talk.reply else [])], options.system
    if system and (own := turns[0]["role"] != "system"):
        turns.insert(0, {"role": "system", "content": system})
    how: dict[str, Any] = {"tools": talk.tools, "add_generation_prompt": not closed}
    how |= {name: json.loads(text) for name, text in (one.split("=", 1) for one in options.template_arg)}
    try:
        (text := str(tokenizer.apply_chat_template(turns, tokenize=False, **how))).encode()
    except Exception as error:  # a template's own errors (no system turns, as Gemma's; roles) and Jinja's
        wanted = "give --system TEXT, " if "system" in str(error).lower() else ""
        without = "leave --chat out, or use --template" if where.startswith("--chat") else "or leave the row out"
        hint = "leave --system out" if system else wanted + without
        raise ConfigError([f"{where} chat template can't be used ({one_line(error)}): {hint}"]) from None
    if system and own and system.strip() not in text:
        raise ConfigError(["--chat: the chat template leaves the text of --system out: put it into --template"])
    return text if closed else text + options.prefill


def user_turn(text: str, tokenizer: PreTrainedTokenizerBase, options: PromptOptions) -> str:
    """`text` as the user's turn of a chat: `by_template`."""
    return by_template(Conversation([{"role": "user", "content": text}]), tokenizer, options, "--chat: the")


def _in_conversation(
    example: Example, tokenizer: PreTrainedTokenizerBase, options: DataOptions, stops: Sequence[int]
) -> Example:
    """With its prompt; with `stops` also with its reply as the model has to write it: what the template writes behind
    the prompt, up to the first text of a token at which the model stops."""
    talk, where = example.talk or Conversation([]), f"{options.data}: row {example.row}: the"
    prompt = by_template(talk, tokenizer, options, where)
    if not stops or talk.reply is None:
        return replace(example, prompt=prompt)
    whole = by_template(talk, tokenizer, options, where, closed=True)
    if not whole.startswith(prompt):
        what = f"writes the assistant's turn otherwise than a prompt begins it ({one_line(prompt[-40:])!r})"
        raise DataError(f"{where} chat template {what}: use --template-arg, another --prefill or another template")
    ends = {str(tokenizer.decode([id_], skip_special_tokens=False)): id_ for id_ in stops if id_ < len(tokenizer)}
    reply = whole[len(prompt) :]
    at, end = min(((reply.find(end), end) for end in ends if end in reply), default=(0, ""))
    if not end:
        what = f"ends the assistant's turn with no token at which the model stops ({', '.join(map(repr, ends))})"
        raise DataError(f"{where} chat template {what}: correct eos_token_id in the model's generation_config.json")
    return replace(example, prompt=prompt, target=example.target or reply[:at], written=(reply[:at], ends[end]))


def _check_chat(options: PromptOptions, tokenizer: PreTrainedTokenizerBase, *, messages: bool) -> None:
    """Say where a chat template does not open the assistant's turn. messages: whether the data are conversations.

    Raises ConfigError for a tokenizer without a template, a cut through a conversation, and an argument that the
    template does not know.
    """
    if not tokenizer.chat_template:
        what, todo = ("messages", "take a chat model") if messages else ("--chat", "leave --chat out")
        raise ConfigError([f"{what}: the model's tokenizer has no chat template: {todo}, or use --template"])
    if options.long_prompts == "truncate":
        raise ConfigError(["long_prompts truncate would cut off the end of a conversation: use refuse or drop"])
    for one in (one for one in options.template_arg if one.split("=")[0] not in str(tokenizer.chat_template)):
        raise ConfigError([f"--template-arg {one}: the chat template knows no such name: leave it out"])
    turn = Conversation([{"role": "user", "content": "x"}])
    with suppress(ConfigError):  # a template that wants more turns is refused, if it is, at a row
        shut, opened = (by_template(turn, tokenizer, PromptOptions(), "", closed=closed) for closed in (True, False))
        if len(opened) <= len(shut):
            say("--chat: the chat template does not open the assistant's turn; the model goes on behind the user's")


def form_of(options: PromptOptions, examples: Sequence[Example]) -> PromptForm:
    """The part of the options that decides what is made of these: conversations are a chat."""
    form = options.model_dump(include=set(PromptForm.model_fields))
    return PromptForm.model_validate(form | ({"chat": True} if examples[0].talk else {}))


# ------------------------------------------------------------------------------------------------------------ tokens


@dataclass(frozen=True)
class Kept:
    """examples: as the model is given them. prompts: the token ids of their prompts, one row each. cut: how many of
    them lost tokens (`long_prompts="truncate"`). duplicates: how many are left out because an earlier one is the same.
    """

    examples: list[Example]
    prompts: Prompts
    cut: int
    duplicates: int = 0


def tokenize_prompts(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    options: DataOptions,
    *,
    stops: Sequence[int] = (),
    unique: bool = False,
) -> Kept:
    """The examples that are kept, and the token ids of their prompts. unique: each prompt once.

    Conversations are rendered (`by_template`), and with `options.chat` each prompt becomes a user turn; otherwise the
    tokenizer adds its special tokens. stops: ids at which the model stops; with them, replies are `written`. A prompt
    of more than `options.max_prompt_tokens` tokens is refused, cut or left out, as `options.long_prompts` says; how
    many is said. What is cut is the end of the longest text that came from the data: the template and the tokenizer's
    special tokens stay.

    Raises DataError for a prompt without tokens, for one that is refused, for a conversation that the template can't
    render, or whose reply does not go on from its prompt, and where no prompt is left; ConfigError for a chat that
    can't be had, and the errors of `by_template`.
    """
    messages, given = examples[0].talk is not None, len(examples)
    if messages or options.chat:
        _check_chat(options, tokenizer, messages=messages)
    elif options.template_arg or options.prefill:
        raise ConfigError(["--template-arg and --prefill are of a chat: set --chat too, or leave them out"])
    if messages:
        examples = [_in_conversation(example, tokenizer, options, stops) for example in examples]
    elif options.chat:
        examples = [replace(e, prompt=user_turn(e.prompt, tokenizer, options)) for e in examples]
    examples = without_duplicates(examples) if unique else examples
    limit, rows, kept, cut = options.max_prompt_tokens, [], [], 0
    special = {"add_special_tokens": not (options.chat or messages), "return_attention_mask": False, "verbose": False}
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
    return Kept(kept, Prompts(ids, Ragged.from_rows(rows, TOKEN_DTYPE)), cut, given - len(examples))


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


def reply_ids(
    tokenizer: PreTrainedTokenizerBase, example: Example, *, limit: int | None = None, bare: bool = False
) -> list[int]:
    """Ids of what a model has to write behind the prompt: of the reference (`target_ids`), or of `example.written`."""
    if example.written is None:
        return target_ids(tokenizer, example.target or "", limit=limit, bare=bare)
    text, end = example.written
    return [*tokenizer(text_target=text, add_special_tokens=False, verbose=False)["input_ids"], end][:limit]


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
