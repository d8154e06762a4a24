"""What a trained model's folder says of it, beside the weights: whose text it learned, and in what form."""

from __future__ import annotations

import json
from typing import TypeVar

from pydantic import Field, ValidationError

from ketchup_cache.config.options import PromptOptions
from ketchup_cache.config.resolve import flag
from ketchup_cache.console import one_line, warn
from ketchup_cache.errors import ConfigError, MismatchError, ModelError
from ketchup_cache.models.fingerprint import tokenizer_info
from ketchup_cache.models.folders import ORIGIN, resolve_folder
from ketchup_cache.models.load import load_tokenizer
from ketchup_cache.provenance import PolicyInfo, PromptForm, Record, TokenizerInfo

AnyOptions = TypeVar("AnyOptions", bound=PromptOptions)


class Origin(Record):
    """All of it is empty for a model that was not trained here."""

    tool: str = ""
    command: str = ""
    step: int | None = None
    """Optimizer step after which the model was taken."""
    metrics: dict[str, float] = Field(default_factory=dict)
    """Its values on the dev set."""
    pretrained_on: tuple[PolicyInfo, ...] = ()
    """The policies whose text it was pre-distilled on."""
    prompts: PromptForm | None = None
    """The form of the prompts that it was trained with."""
    tokenizer: TokenizerInfo | None = None
    """What encoded them."""
    base: str | None = None
    """Of an adapter: fingerprint of the model that it belongs to."""


def read_origin(model: str) -> Origin:
    """An empty one where the folder holds none, or can't be found. Raises ModelError for one that is damaged."""
    try:
        path = resolve_folder(model) / ORIGIN
    except ModelError:  # whoever loads the model says it
        return Origin()
    try:
        return Origin.model_validate(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else Origin()
    except (OSError, ValueError, RecursionError) as error:
        todo = "bring it back, or delete it and give the form of the prompts by options"
        raise ModelError(f"{path}: can't be used ({one_line(error)}); {todo}") from None


def prompts_as_trained(options: AnyOptions, model: str, form: PromptForm | None = None) -> AnyOptions:
    """The options with the form of prompts that `model` was trained with, where they don't say another.

    form: of the prompts that it is to be trained on now; it comes before what the model remembers. A form that differs
    is warned of. Raises MismatchError where the model's tokenizer is not the one that it was trained with.
    """
    trust = getattr(options, "trust_remote_code", False)
    remembered, trained = (origin := read_origin(model)).prompts, origin.tokenizer
    if trained and not tokenizer_info(load_tokenizer(model, trust_remote_code=trust), model).encodes_as(trained):
        todo = "bring back the tokenizer files of its run"
        raise MismatchError(f"{model}: its tokenizer is not the one that it was trained with; {todo}")
    if form and remembered and form != remembered:
        warn(f"{model}: was trained with prompts of another form ({remembered}), these have {form}")
    known = form or remembered
    if known is None:
        return options
    given = {name: getattr(options, name) for name in PromptForm.model_fields if name in options.model_fields_set}
    also = dict.fromkeys(["system", "template_arg", "prefill"] if given else [])  # not taken over then: said, if so
    others = {name: now for name in also | given if (now := getattr(options, name)) != getattr(known, name)}
    if others:
        texts = ", ".join(f"{flag(name)} {getattr(known, name)!r}, not {value!r}" for name, value in others.items())
        warn(f"{model}: was trained with {texts}")
    if given:  # a template of the user's inside a remembered chat would be neither form
        return options
    try:
        return type(options).model_validate(options.model_dump(exclude_unset=True) | known.model_dump())
    except ValidationError as error:
        why = one_line(error.errors()[0]["msg"].removeprefix("Value error, "))
        raise ConfigError([f"{model}: was trained with {known}: {why}"]) from None
