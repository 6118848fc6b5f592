"""The constraints of one request while it runs."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.bundles.contract import MASK_BITS, mask_bytes
from medusa_runtime.bundles.tree import Tree
from medusa_runtime.constraints.edits import EditedTokens, Edits
from medusa_runtime.constraints.grammar import NOTHING_LEFT, GrammarWalk
from medusa_runtime.constraints.options import Constraints
from medusa_runtime.errors import RequestError

NO_PENALTIES = {"repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}
ALL_TOKENS = 255  # a byte of a mask with all bits set


class RowConstraints:
    """The constraints of a request, and the facts about its text so far that they depend on.

    Args:
        constraints: The constraints.
        prompt_ids: The tokens of the prompt.
        end_token_ids: The tokens that end the answer.
        vocab_size: Size of the vocabulary.
        tree: The draft tree.
        walk: Follows the grammar; None without one.
    """

    def __init__(
        self,
        constraints: Constraints,
        prompt_ids: Sequence[int],
        end_token_ids: Collection[int],
        vocab_size: int,
        tree: Tree,
        walk: GrammarWalk | None = None,
    ) -> None:
        self._constraints = constraints
        self._edits = EditedTokens(constraints, prompt_ids)
        self._walk = walk
        self._most_edits: int | None = None
        self._parents, self._depths = tree.parents.tolist(), tree.depths
        self._early = constraints.min_new_tokens  # tokens before which no end token is allowed
        self._no_end = np.full(mask_bytes(vocab_size), ALL_TOKENS, np.uint8)
        self._ends, self._banned = frozenset(end_token_ids), frozenset(map(int, constraints.banned_token_ids))
        for token in end_token_ids:
            self._no_end[token // MASK_BITS] &= ~np.uint8(1 << token % MASK_BITS)

    @property
    def penalties(self) -> dict[str, float]:
        """The row's values of the graph's inputs for penalties."""
        return {name: getattr(self._constraints, name) for name in NO_PENALTIES}

    def limit_edits(self, most: int) -> None:
        """Sets the most edited tokens that a step of the request may have.

        Raises:
            RequestError: The next step may have more.
        """
        self._most_edits = most
        self._check_edits()

    def extend(self, tokens: Sequence[int]) -> None:
        """Takes note of tokens that the answer grows by.

        Raises:
            RequestError: The constraints left no token, or the grammar became too complex. Or there are more edited
                tokens now than a step may have.
        """
        too_early = () if self._walk is not None else tokens[: self._early]
        if not (self._banned.isdisjoint(tokens) and self._ends.isdisjoint(too_early)):
            raise RequestError(NOTHING_LEFT)  # a step takes any token if all are excluded
        self._edits.extend(tokens)
        self._check_edits()
        self._early = max(self._early - len(tokens), 0)
        if self._walk is not None:
            self._walk.extend(tokens)

    def edits(self, drafted: Sequence[int]) -> Edits:
        """The edited tokens of a step that verifies the tokens ``drafted``, besides the root."""
        return self._edits.of_step(drafted)

    def masks(self, nodes: NDArray[np.int64]) -> NDArray[np.uint8] | None:
        """The tokens that are allowed after each node, a bit per token; None if all are.

        Args:
            nodes: [S], the token of each node, the root's first. A draft that the grammar forbids is replaced here
                where the grammar leaves one token only.

        Returns:
            [S, ⌈V / 8⌉]. The values of nodes that can't be accepted are undefined.
        """
        if self._walk is None and not self._early:
            return None
        if self._walk is None:
            masks = np.full((len(nodes), len(self._no_end)), ALL_TOKENS, np.uint8)
        else:
            masks = self._walk.masks(nodes, self._parents)
        early = self._depths[: len(nodes)] < self._early
        longer = masks[early] & self._no_end
        masks[early] = np.where(longer.any(axis=1, keepdims=True), longer, masks[early])
        return masks

    def _check_edits(self) -> None:
        count = self._edits.most(len(self._parents) - 1)
        if self._most_edits is not None and count > self._most_edits:
            raise RequestError(
                f"The constraints change the logits of {count:,} different tokens: of those with a bias or a ban, and "
                f"with penalties of those in the text and the draft tree. This backend takes {self._most_edits:,}. "
                "Name fewer tokens, shorten the text, or ask for no penalties."
            )
