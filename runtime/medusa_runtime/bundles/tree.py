"""The draft tree: the nodes that one step verifies, and the parent of each.

A tree is a prefix-closed set of *rank paths* (MEDUSA, arXiv 2401.10774, section 2.1.2). The path ``(0, 2)`` is the
third-best token of head 2 below the best token of head 1. Node 0 is the root, the token that the base model has already
chosen. Nodes are stored parents first, in the order of their value. So every prefix of the node list is a tree of its
own: a step that takes in the first R nodes verifies a tree of R nodes.
"""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from medusa_runtime.errors import TreeError

# The most nodes of a tree that is read. One step verifies all nodes, so a tree of 64 nodes is already large.
MAX_NODES = 4096
MAX_DEPTH = 64
MAX_RANK = 65_535

Rank = Annotated[int, Meta(ge=0, le=MAX_RANK)]
RankPath = Annotated[tuple[Rank, ...], Meta(min_length=1, max_length=MAX_DEPTH)]


def _parents_first(paths: Sequence[RankPath]) -> list[RankPath]:
    """The paths, each moved behind its ancestors. Paths that are in such an order stay as they are."""
    ordered: dict[RankPath, None] = {}
    for path in paths:
        for depth in range(1, len(path) + 1):
            ordered.setdefault(path[:depth])
    return list(ordered)


def _checked(path: object) -> RankPath:
    if not isinstance(path, (list, tuple)) or not path:
        raise TreeError(f"A tree path must be a non-empty list of ranks, but got {reprlib.repr(path)}.")
    if len(path) > MAX_DEPTH:
        raise TreeError(f"A tree path is {len(path)} deep: {MAX_DEPTH} is the most that is possible.")
    for rank in path:
        if not isinstance(rank, int) or isinstance(rank, bool) or not 0 <= rank <= MAX_RANK:
            raise TreeError(
                f"The tree path {reprlib.repr(list(path))} holds {reprlib.repr(rank)}: ranks are integers from 0 to "
                f"{MAX_RANK:,}."
            )
    return tuple(path)


@dataclass(frozen=True)
class Tree:
    """A draft tree of ``size`` nodes, the root included.

    Attributes:
        paths: The rank path of each node but the root, parents first.
    """

    paths: tuple[RankPath, ...] = ()

    @classmethod
    def from_paths(
        cls,
        paths: Iterable[Sequence[int]],
        *,
        max_depth: int | None = None,
        top_k: int | None = None,
    ) -> Tree:
        """Makes a tree of rank paths: checks them and orders them parents first.

        Args:
            paths: Rank paths in any order. If the most valuable come first, every prefix is the best tree of its size.
            max_depth: The number of heads. Below them only the path of best candidates can continue, for lookup hits.
            top_k: The number of candidates per head: ranks are smaller.

        Raises:
            TreeError: A path is malformed, repeated, without its parent, too deep, or uses too high a rank.
        """
        checked = [_checked(path) for path in paths]
        if len(checked) >= MAX_NODES:
            raise TreeError(f"The tree has {len(checked) + 1:,} nodes: at most {MAX_NODES:,} are possible.")
        known = set(checked)
        if len(known) != len(checked):
            repeated = next(path for path, times in Counter(checked).items() if times > 1)
            raise TreeError(f"The tree path {list(repeated)} is listed twice: list each node once.")
        for path in checked:
            if len(path) > 1 and path[:-1] not in known:
                raise TreeError(
                    f"The tree is not prefix-closed: it has {list(path)}, but not its parent {list(path[:-1])}. "
                    "Add the parent, or drop the path."
                )
            if max_depth is not None and len(path) > max_depth and (any(path) or not max_depth):
                raise TreeError(
                    f"The tree path {list(path)} is {len(path)} deep, but there are {max_depth} heads: only the path "
                    "of best candidates may continue below them. Use a shallower tree or more heads."
                )
            if top_k is not None and max(path) >= top_k:
                raise TreeError(
                    f"The tree path {list(path)} uses rank {max(path)}, but only ranks below {top_k} are drafted. "
                    "Raise top-k, or drop the path."
                )
        return cls(tuple(_parents_first(checked)))

    @property
    def size(self) -> int:
        """Number of nodes, the root included (T)."""
        return len(self.paths) + 1

    @cached_property
    def max_depth(self) -> int:
        """Depth of the deepest node (M); the root has depth 0."""
        return max((len(path) for path in self.paths), default=0)

    @property
    def top_k(self) -> int:
        """Number of candidates of each head that the tree uses."""
        return max((max(path) for path in self.paths), default=-1) + 1

    @cached_property
    def depths(self) -> NDArray[np.int64]:
        """Depth of each node, [T]."""
        return np.array([0, *(len(path) for path in self.paths)], dtype=np.int64)

    @cached_property
    def ranks(self) -> NDArray[np.int64]:
        """Rank of each node among its head's candidates, [T]; 0 for the root."""
        return np.array([0, *(path[-1] for path in self.paths)], dtype=np.int64)

    @cached_property
    def parents(self) -> NDArray[np.int64]:
        """Index of each node's parent, [T]; the root is its own parent."""
        index = {path: i + 1 for i, path in enumerate(self.paths)}
        return np.array([0, *(index.get(path[:-1], 0) for path in self.paths)], dtype=np.int64)

    @cached_property
    def node_paths(self) -> NDArray[np.int64]:
        """The nodes from the root to each node, [T, max_depth + 1]; padded with 0 behind the node."""
        table = np.zeros((self.size, self.max_depth + 1), dtype=np.int64)
        for node in range(1, self.size):
            depth = int(self.depths[node])
            table[node] = table[self.parents[node]]
            table[node, depth] = node
        return table

    @cached_property
    def best_path_siblings(self) -> tuple[tuple[int, ...], ...]:
        """The nodes of the path of best candidates with their siblings, by depth from 1 on.

        Each entry holds the siblings in the order of their ranks. The first of them is the node of the path.
        """
        groups: list[tuple[int, ...]] = []
        parent = 0
        while found := [node for node in range(1, self.size) if self.parents[node] == parent]:
            groups.append(tuple(sorted(found, key=lambda node: int(self.ranks[node]))))
            parent = groups[-1][0]
        return tuple(groups)

    def insert(self, proposed: Sequence[int], drafted: NDArray[np.int64], size: int) -> None:
        """Puts the tokens of a lookup hit into a draft of the heads.

        The tokens become the path of best candidates. At each of its depths the heads' candidates move back by one
        rank. The last one is dropped, or the one that equals the token.

        Args:
            proposed: The tokens that the lookup proposes, the next one first.
            drafted: Tokens by node, [T]; changed in place.
            size: Number of nodes that will be verified. Later nodes stay as they are.
        """
        for token, group in zip(proposed, self.best_path_siblings, strict=False):
            nodes = [node for node in group if node < size]
            if not nodes:
                return
            others = [other for other in drafted[nodes].tolist() if other != token]
            drafted[nodes] = [token, *others][: len(nodes)]

    @cached_property
    def ancestor_mask(self) -> NDArray[np.bool_]:
        """The nodes that each node attends to, [T, T]: row n is True at n and at its ancestors."""
        mask = np.eye(self.size, dtype=np.bool_)
        for node in range(1, self.size):
            mask[node] |= mask[self.parents[node]]
        return mask

    def prefix(self, size: int) -> Tree:
        """The tree of the first ``size`` nodes, the root included.

        Raises:
            TreeError: ``size`` is not between 1 and the size of this tree.
        """
        if not 1 <= size <= self.size:
            raise TreeError(f"A tree of {self.size} nodes has no prefix of {size}: choose 1 to {self.size}.")
        return Tree(self.paths[: size - 1])

    def draw(self) -> str:
        """The tree as text. A line per node shows its rank and its number in the node list."""
        children: dict[int, list[int]] = {}
        for node in range(1, self.size):
            children.setdefault(int(self.parents[node]), []).append(node)
        lines = ["root"]

        def visit(node: int, indent: str) -> None:
            below = children.get(node, [])
            for i, child in enumerate(below):
                last = i == len(below) - 1
                lines.append(f"{indent}{'└─' if last else '├─'} {self.ranks[child]}  #{child}")
                visit(child, indent + ("   " if last else "│  "))

        visit(0, "")
        return "\n".join(lines)
