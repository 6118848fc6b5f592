"""The lookup tables of a draft tree that a step reads."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from medusa_export.heads.base import DraftTree
from medusa_runtime.bundles.tree import Tree


class TreeTables(nn.Module):
    """The lookup tables of a draft tree, as constants of the graph.

    T is the number of nodes, M is the depth of the tree.

    Args:
        tree: The draft tree.
        num_heads: K, the number of heads that draft it.

    Attributes:
        size: T.
        depth: M.
        depths: [T], the depth of each node.
        parents: [T], the index of each node's parent; the root is its own parent.
        paths: [T, M + 1], the nodes from the root to each node, filled up with 0.
        path_lengths: [T], the number of nodes on each node's path.
        ancestors: [T, T] boolean, True at [n, m] where m is on the path of n, the root left out. A node is accepted
            if all these nodes are confirmed.
        visible: [T * (T + 2)] boolean, the entries that each node attends to. Column 0 stands for all committed
            entries, column m + 1 for node m, and column T + 1 for slots behind the tree.
        candidates: [T - 1], the place of each drafted node's token among the candidates, laid out [K, top_k].
    """

    depths: Tensor
    parents: Tensor
    paths: Tensor
    path_lengths: Tensor
    ancestors: Tensor
    visible: Tensor
    candidates: Tensor

    def __init__(self, tree: Tree, num_heads: int) -> None:
        super().__init__()
        self.size, self.depth = tree.size, tree.max_depth
        self._top_k, self._num_heads = tree.top_k, num_heads
        on_path = torch.from_numpy(tree.ancestor_mask)
        committed = torch.ones(tree.size, 1, dtype=torch.bool)
        self.register_buffer("visible", torch.cat([committed, nn.functional.pad(on_path, (0, 1))], dim=1).flatten())
        self.register_buffer("ancestors", on_path & (torch.arange(tree.size) > 0))
        self.register_buffer("depths", torch.from_numpy(tree.depths))
        self.register_buffer("path_lengths", torch.from_numpy(tree.depths + 1))
        self.register_buffer("parents", torch.from_numpy(tree.parents))
        self.register_buffer("paths", torch.from_numpy(tree.node_paths))
        # A node below the last head takes that head's candidates.
        head = np.minimum(tree.depths[1:], num_heads) - 1
        self.register_buffer("candidates", torch.from_numpy(head * tree.top_k + tree.ranks[1:]))

    @property
    def drafting(self) -> DraftTree:
        """The part of the tables that heads draft with."""
        return DraftTree(self._num_heads, self._top_k, self.candidates, self.depths, self.parents)
