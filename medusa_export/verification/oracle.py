"""Trees that know what the base model will say, so that a check can have any number of their nodes accepted.

Untrained heads are hardly ever right, and trained ones seldom deep down: left to themselves they would
leave most of acceptance and commit unseen.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.bundles.tree import Tree


def oracle_tree(tree: Tree, root: int, continuation: Sequence[int], node: int, vocab_size: int) -> NDArray[np.int64]:
    """Token ids of a tree of which ``node`` will be accepted, and none below it.

    Args:
        tree: The tree.
        root: The token that the base model has chosen.
        continuation: What it will choose after that; at least as many tokens as the tree is deep, plus one.
        node: The node to be accepted.
        vocab_size: V.

    Returns:
        [T]: the right tokens on the path to ``node``, wrong ones everywhere else.
    """
    path = set(tree.node_paths[node, 1 : tree.depths[node] + 1].tolist())
    ids = np.empty(tree.size, np.int64)
    ids[0] = root
    for other in range(1, tree.size):
        right = continuation[int(tree.depths[other]) - 1]
        # Every wrong token of a depth is another one, as the candidates of a head are.
        ids[other] = right if other in path else (right + 1 + other % (vocab_size - 1)) % vocab_size
    return ids
