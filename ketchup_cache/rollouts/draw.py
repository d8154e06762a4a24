"""A token drawn from each row's distribution by one uniform number: the first at which the cumulative sum passes it.

`torch.multinomial` draws a number for every token of the vocabulary, which on a CPU takes longer than the head. Here
a row has one number a step, of its own: it depends on the seed, the prompt's place and the sample's, and on nothing
else, so what a row draws is the same whichever rows are computed beside it.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 128
"""Tokens whose probabilities are summed before any cumulative sum is taken: of the sums first, then within one block.
A cumulative sum over all of a large vocabulary takes seven times as long."""
FEW = 8
"""Blocks up to which one cumulative sum is sooner done than two."""


def uniforms(seed: int, place: int, samples: slice, longest: int) -> NDArray[np.float64]:
    """Numbers in [0, 1) of some samples of one prompt, [samples, longest], the same whichever others are asked for.

    place: of the prompt in the data. samples: from the first to the last, without a step.
    """
    return np.random.default_rng([seed, place]).random((samples.stop, longest))[samples]


def number_type(device: torch.device) -> torch.dtype:
    """What uniform numbers and cumulative sums are in."""
    return torch.float32 if device.type == "mps" else torch.float64  # which has no float64


def draw(scores: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """A token of each row and its log-probability, nats: i with Σ_{j<i} p_j ≤ u < Σ_{j≤i} p_j, p = softmax(scores).

    scores: [n, V] float32, -inf for what must not be drawn, at least one of a row finite, no NaN. uniform: [n] of
    `number_type`, in [0, 1). Returns [n] int64 and [n] float32.

    A token of probability 0 is never drawn, whatever is rounded: where a sum is passed, its last term was positive.
    The cumulative sums are of `number_type`, the sums of blocks float32: as exact as the exponentials themselves.
    """
    largest = scores.amax(1, keepdim=True)
    size, blocks = scores.shape[1], -(-scores.shape[1] // BLOCK)
    weights = scores.new_empty(len(scores), blocks * BLOCK)
    torch.sub(scores, largest, out=weights[:, :size]).exp_()
    weights[:, size:] = 0
    if blocks <= FEW:
        upto = weights.cumsum(1, dtype=uniform.dtype)
        total = upto[:, -1:]
        token = _passes(upto, uniform[:, None] * total)
    else:
        weights = weights.view(len(scores), blocks, BLOCK)
        sums = weights.sum(2)
        upto = sums.cumsum(1, dtype=uniform.dtype)
        total = upto[:, -1:]
        amount = uniform[:, None] * total
        block = _passes(upto, amount)
        within = weights[torch.arange(len(scores), device=scores.device), block[:, 0]].cumsum(1, dtype=uniform.dtype)
        own = sums.gather(1, block).to(uniform.dtype)
        # what is left of it, on the scale of the block's other sum: the two differ in their last bits
        rest = (amount - (upto.gather(1, block) - own)) * (within[:, -1:] / own)
        token = block * BLOCK + _passes(within, rest)
    logprob = scores.gather(1, token) - largest - total.log()
    return token[:, 0], logprob[:, 0].float()


def _passes(upto: Tensor, amount: Tensor) -> Tensor:
    """The first place at which growing sums [n, m] are larger than an amount [n, 1], rounded down to where they are."""
    most = upto[:, -1:]
    return torch.searchsorted(upto, torch.minimum(amount, torch.nextafter(most, torch.zeros_like(most))), right=True)
