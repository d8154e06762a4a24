"""Token ids as text that can be shown: token by token, and with nothing in it that steers a terminal or a browser."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

NAMED = {"\n": "↵\n", "\t": "⇥"}
HALF = "�"
"""What a tokenizer decodes a part of a character to."""


def visible(text: str) -> str:
    """The text with control characters, bidi marks and the like in writing: `⟨U+202E⟩`. Line feeds stay, marked."""
    return "".join(c if c.isprintable() else NAMED.get(c, f"⟨U+{ord(c):04X}⟩") for c in text)


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to those before it, special tokens too. A character of several tokens is with its
    last one. One text per id; joined they are the text of all."""
    found, start, read = list[str](), 0, 0

    def text(stop: int) -> str:
        return str(tokenizer.decode(ids[start:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    for i in range(len(ids)):
        before, now = text(read), text(i + 1)
        whole = not now.endswith(HALF) or i == len(ids) - 1
        found.append(now[len(before) :] if whole else "")
        if whole:
            start, read = read, i + 1
    return found
