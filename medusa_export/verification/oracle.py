"""Drafts that are right down to a chosen node, made from the base model's own continuation.

Untrained heads are hardly ever right, and trained heads seldom at deep nodes. With their drafts alone, checks would
never reach most of the code that accepts and commits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.bundles.tree import Tree


def oracle_tree(tree: Tree, root: int, continuation: Sequence[int], node: int, vocab_size: int) -> NDArray[np.int64]:
    """Returns token ids for a tree so that a step accepts ``node`` and no node below it.

    Args:
        tree: The tree.
        root: The token that the base model has chosen.
        continuation: The tokens that it chooses next, one more than the tree is deep or longer.
        node: The node to accept.
        vocab_size: V.

    Returns:
        [T]: right tokens on the path to ``node``, wrong tokens at all other nodes.
    """
    path = set(tree.node_paths[node, 1 : tree.depths[node] + 1].tolist())
    ids = np.empty(tree.size, np.int64)
    ids[0] = root
    for other in range(1, tree.size):
        right = continuation[int(tree.depths[other]) - 1]
        # Wrong tokens of one depth differ from each other, like the candidates of a head.
        ids[other] = right if other in path else (right + 1 + other % (vocab_size - 1)) % vocab_size
    return ids
