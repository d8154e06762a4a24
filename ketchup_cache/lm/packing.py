"""Several completions of one prompt in one row of the decoder, so that what belongs to the prompt is computed once.

In a row of its own, every completion projects its prompt's encoder states to cross-attention keys and values again,
in every layer: for short completions of long prompts that costs more than the completions themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PACKED_WIDTH = 192
"""Longest row that is packed: self-attention grows with its square, and most of that is masked out."""
PACKABLE = {"t5", "mt5", "umt5"}
"""Architectures whose decoder knows positions only by their difference, so that a completion may stand anywhere in a
row. `Head.of` checks the model's own numbers against a packed row."""


@dataclass(frozen=True)
class Packing:
    """Where B completions stand in R rows of the decoder.

    row, column: [B], of each completion's first token. prompt: [R], the prompt of each row. width: of the longest row.
    """

    row: NDArray[np.int64]
    column: NDArray[np.int64]
    prompt: NDArray[np.int64]
    width: int

    def ids(self, completions: list[NDArray]) -> NDArray[np.int64]:
        """[R, W] decoder inputs: the tokens of each completion at its place, zero behind the last."""
        out = np.zeros((len(self.prompt), self.width), np.int64)
        for row, column, tokens in zip(self.row, self.column, completions, strict=True):
            out[row, column : column + len(tokens)] = tokens
        return out

    def mask(self, lengths: NDArray[np.int64], dtype: torch.dtype, device: torch.device) -> Tensor:
        """[R, 1, W, W], added to the attention scores: a token sees its own completion up to itself, nothing else.

        What stands behind the last completion is a completion of its own, so that no row of the mask is empty.
        """
        segment = np.full((len(self.prompt), self.width), -1, np.int64)
        for place, (row, column) in enumerate(zip(self.row, self.column, strict=True)):
            segment[row, column : column + lengths[place]] = place
        part = torch.from_numpy(segment).to(device)
        seen = (part[:, :, None] == part[:, None, :]).tril()
        return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def pays(prompt_lengths: NDArray[np.int64], lengths: NDArray[np.int64], hidden: int) -> bool:
    """Whether packing saves more than it costs, by its multiplications for one completion of c tokens of a prompt of p.

    Saved: keys and values of the prompt, 2·p·hidden². Lost: self-attention to the other completions of the row,
    which is computed and masked out, 2·c·(width − c)·hidden.
    """
    if not len(prompt_lengths) or not len(lengths):
        return False
    completion = float(lengths.mean())
    width = min(float(PACKED_WIDTH), completion * len(lengths) / len(prompt_lengths))
    return float(prompt_lengths.mean()) * hidden > completion * max(width - completion, 0.0)


def pack(prompt_index: NDArray[np.int64], lengths: NDArray[np.int64], widest: int = PACKED_WIDTH) -> Packing:
    """Completions of one prompt side by side, in their order, in rows of at most `widest` tokens (or one completion).

    prompt_index, lengths: [B]. Rows are in the order of the prompts.
    """
    row, column = np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.int64)
    prompt: list[int] = []
    used = width = 0
    for place in np.argsort(prompt_index, kind="stable"):
        of, length = int(prompt_index[place]), int(lengths[place])
        if not prompt or prompt[-1] != of or used + length > widest:
            prompt.append(of)
            used = 0
        row[place], column[place] = len(prompt) - 1, used
        used += length
        width = max(width, used)
    return Packing(row, column, np.array(prompt, np.int64), max(width, 1))
