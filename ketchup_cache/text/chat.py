"""Chat models: the prompt as a user's turn, in the words of the tokenizer's own chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ketchup_cache.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def user_turn(text: str, tokenizer: PreTrainedTokenizerBase, system: str = "") -> str:
    """`text` as the user's turn, after `system` where there is one, with the assistant's turn open: what a chat model
    goes on from. The special tokens are in it, BOS too where the template has one: tokenise it without adding any.

    Raises ConfigError for a tokenizer without a chat template, or one whose template refuses the turns.
    """
    if not tokenizer.chat_template:
        raise ConfigError(["--chat: the model's tokenizer has no chat template: leave --chat out, or use --template"])
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": text})
    try:
        rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template's own errors (no system turns, as Gemma's) and Jinja's
        hint = "leave --system out" if system else "leave --chat out, or use --template"
        raise ConfigError(
            [f"--chat: the chat template can't be used ({' '.join(str(error).split())}): {hint}"]
        ) from None
    assert isinstance(rendered, str)
    return rendered
