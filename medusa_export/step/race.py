"""The race that draws a token: the one with the largest p / E wins.

The numbers E are exponentially distributed and come from the host. They depend on the place of the token in the text,
not on the node or the step. So exact sampling gives the same text with every tree, and without one. Rounding changes a
winner only if two tokens are as close to each other as the rounding error. A draw by the cumulative sum would depend on
the rounding of every token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medusa_export.step.indexing import take_rows
from medusa_runtime.bundles.contract import RACE_BLOCK, num_blocks


def race(weights: Tensor, exponentials: Tensor) -> Tensor:
    """Draws tokens [B, U, 1], each with the probability w / Σ w of its weight w.

    w / E is the largest of all with that probability if all E are exponentially distributed. The block of the
    vocabulary is drawn first, by the sum of its weights, then the token in it. That takes fewer numbers than one race
    of all tokens.

    Args:
        weights: [B, U, V], at least 0, not all of them 0.
        exponentials: [B, U, blocks + 256], the numbers E.
    """
    batch, nodes, vocab_size = weights.shape
    blocks = num_blocks(vocab_size)
    weights = torch.nn.functional.pad(weights, (0, blocks * RACE_BLOCK - vocab_size))
    weights = weights.reshape(batch, nodes, blocks, RACE_BLOCK)
    of_blocks, of_tokens = _by_race(exponentials, blocks)
    block = (weights.sum(-1) / of_blocks).argmax(-1, keepdim=True)
    inside = take_rows(weights.flatten(0, 1), block.view(-1, 1)).view(batch, nodes, RACE_BLOCK)
    token: Tensor = block * RACE_BLOCK + (inside / of_tokens).argmax(-1, keepdim=True)
    return token


def lags(logits: Tensor, numbers: NDArray[np.float32], temperature: float, tokens: Sequence[int]) -> Tensor:
    """The distance of tokens [N] from the winners of their races, [N]: the increase of log p that each would need.

    Args:
        logits: [N, V], of the base model.
        numbers: [N, blocks + 256], as ``Draws`` gives them.
        temperature: The temperature; nothing else may shape the distribution.
        tokens: [N], the tokens to look at.
    """
    count, vocab_size = logits.shape
    blocks = num_blocks(vocab_size)
    weights = torch.nn.functional.pad((logits / temperature).softmax(-1), (0, blocks * RACE_BLOCK - vocab_size))
    weights = weights.view(count, blocks, RACE_BLOCK)
    of_blocks, of_tokens = _by_race(torch.from_numpy(numbers), blocks)
    row, drawn = torch.arange(count), torch.as_tensor(tokens)
    block, place = drawn // RACE_BLOCK, drawn % RACE_BLOCK
    among_blocks = (weights.sum(-1) / of_blocks).log()
    inside = (weights[row, block] / of_tokens).log()
    behind: Tensor = among_blocks.amax(-1) - among_blocks[row, block] + inside.amax(-1) - inside[row, place]
    return behind


def _by_race(exponentials: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Splits the numbers into those of the blocks and those of the tokens in a block."""
    place = torch.arange(blocks + RACE_BLOCK)  # a gather by constants, because TensorRT computes a slice's shape
    return exponentials.index_select(-1, place[:blocks]), exponentials.index_select(-1, place[blocks:])
