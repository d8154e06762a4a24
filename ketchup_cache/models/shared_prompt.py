"""A prompt of a decoder-only model once for all its completions, which stand behind it in one row.

A row is the prompt but for its last token, then, for each completion, that last token and the completion. A mask hides
the completions from each other, and each counts its positions from the prompt's end, as if it stood there alone.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from ketchup_cache.types import Ragged

SHARING = {"cohere", "gpt2", "granite", "llama", "mistral", "qwen2", "qwen3"}
"""Architectures that take positions and a mask of the whole square as they are given. Each is compared with plain
passes in the tests, and `Head.of` compares it again when a model is loaded."""

WIDEST = 2048
"""Tokens of a row with several completions: attention grows with its square, and most of it is masked out."""


def can_share(model: PreTrainedModel) -> bool:
    """Whether completions of this model may share a row. A sliding window counts places in a row, not positions."""
    config = model.config
    layers = getattr(config, "layer_types", None) or ["full_attention"]
    windowed = getattr(config, "sliding_window", None) is not None or set(layers) != {"full_attention"}
    return config.model_type in SHARING and not windowed


class SharedRows(NamedTuple):
    """R rows for B completions.

    inputs: token ids; positions: in the text of prompt and completion, from 0; parts: 0 for a prompt, 1, 2, … for its
    completions. row, column: [B], where the last prompt token before each completion stands.
    """

    inputs: Ragged
    positions: Ragged
    parts: Ragged
    row: NDArray[np.int64]
    column: NDArray[np.int64]

    @classmethod
    def of(
        cls, prompts: Ragged, prompt_index: NDArray[np.int64], completions: Ragged, read: NDArray[np.int64]
    ) -> SharedRows:
        """read: [B], states that are wanted of each completion; its last token is fed only if there is one after it."""
        row, column = np.zeros(len(read), np.int64), np.zeros(len(read), np.int64)
        rows: list[list[tuple[NDArray, NDArray, NDArray]]] = []  # of each piece of a row: inputs, positions, parts
        width, last = 0, -1
        for place in np.argsort(prompt_index, kind="stable"):
            prompt = prompts[prompt_index[place]]
            own = np.append(prompt[-1:], completions[place][: max(read[place] - 1, 0)])
            if prompt_index[place] != last or width + len(own) > WIDEST:
                last, width = int(prompt_index[place]), len(prompt) - 1
                rows.append([(prompt[:-1], np.arange(width), np.zeros(width, np.int64))])
            row[place], column[place] = len(rows) - 1, width
            rows[-1].append((own, len(prompt) - 1 + np.arange(len(own)), np.full(len(own), len(rows[-1]))))
            width += len(own)
        columns = ([np.concatenate(arrays) for arrays in zip(*pieces, strict=True)] for pieces in rows)
        ids, places, names = (Ragged.from_rows(arrays, np.int64) for arrays in zip(*columns, strict=True))
        return cls(ids, places, names, row, column)

    def mask(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[R, 1, W, W], added to the attention scores. Behind a row's end a token sees itself alone."""
        part = torch.from_numpy(self.parts.padded(-1)).to(device)
        mine, theirs = part[:, :, None], part[:, None, :]
        seen = ((mine == theirs) | (theirs == 0) & (mine > 0)).tril()
        return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
