"""The graph's inputs for constraints, for all rows of a backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.bundles.contract import mask_bytes
from medusa_runtime.constraints.row import ALL_TOKENS, RowConstraints

_FEWEST_EDITS = 64  # the least number of edited tokens, where it is rounded up
_EDIT_VALUES = ("edit_bias", "edit_count", "edit_seen")


class ConstraintRows:
    """The constraints of all rows.

    Args:
        rows: Number of rows.
        vocab_size: Size of the vocabulary.
        tree_size: Nodes of the tree (T).
        rounds_up: True if the number of edited tokens is rounded up to a power of two, so that steps have few shapes.
    """

    def __init__(self, rows: int, vocab_size: int, tree_size: int, *, rounds_up: bool = False) -> None:
        self._rows, self._bytes, self._rounds_up = rows, mask_bytes(vocab_size), rounds_up
        self._tree_size = tree_size
        self._of_row: list[RowConstraints | None] = [None] * rows
        self._unused = [self._arrays(0, masks) for masks in (0, 1)]

    def assign(self, row: int, constraints: RowConstraints | None) -> None:
        """Sets the constraints of a row from its next step on."""
        self._of_row[row] = constraints

    def of_step(
        self,
        size: int,
        width: int,
        prompts: Mapping[int, Sequence[int]],
        rows: Sequence[int],
        drafts: Callable[[], NDArray[np.int64]],
    ) -> dict[str, NDArray[Any]]:
        """The inputs that depend on the text of each row, by name.

        Args:
            size: Tokens per row of the step (S).
            width: Tokens per row that have random numbers (W).
            prompts: Chunks of prompts, by row.
            rows: The rows of the step.
            drafts: Gives the tree of each row, [rows, T]. Drafts that a grammar forbids may be replaced there. It is
                called only if a row has constraints.
        """
        constrained = {row: given for row in rows if (given := self._of_row[row]) is not None}
        drawn = min(size, self._tree_size, width)
        if not constrained:
            return self._unused[drawn > 0]
        masks, nodes = {}, drafts()
        for row, given in constrained.items():
            mask = given.masks(nodes[row, : 1 if row in prompts else drawn])
            if mask is not None:
                masks[row] = mask
        edits = {
            row: given.edits(() if row in prompts else nodes[row, 1:drawn].tolist())
            for row, given in constrained.items()
        }
        most = max(len(edit.tokens) for edit in edits.values())
        if self._rounds_up:
            most = 1 << max(most - 1, _FEWEST_EDITS - 1).bit_length()
        arrays = self._arrays(most, drawn if masks else 1)
        for row, edit in edits.items():
            # A row of fewer tokens repeats its last one. All get the same value, so their order does not matter.
            spare = most - len(edit.tokens)
            arrays["edit_tokens"][row, 0] = np.pad(edit.tokens, (0, spare), mode="edge")
            for name, values in zip(_EDIT_VALUES, edit.values, strict=True):
                arrays[name][row, 0] = np.pad(values, (0, spare), mode="edge")
        for row, mask in masks.items():
            arrays["allowed_tokens"][row, : len(mask)] = mask
            arrays["allowed_tokens"][row, len(mask) :] = mask[-1]
        return arrays

    def _arrays(self, edits: int, masks: int) -> dict[str, NDArray[Any]]:
        """Arrays that change nothing."""
        return {
            "edit_tokens": np.zeros((self._rows, 1, edits), np.int64),
            **{name: np.zeros((self._rows, 1, edits), np.float32) for name in _EDIT_VALUES},
            "allowed_tokens": np.full((self._rows, masks, self._bytes), ALL_TOKENS, np.uint8),
        }
