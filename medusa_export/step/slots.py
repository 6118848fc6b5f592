"""The arithmetic of slots: where the entries of one step are, and which of them each new token attends to.

C is the capacity of a cache, M the depth of the tree, S the number of new tokens. Entry i of a row is in slot M + i.
A step writes one contiguous block of M + S entries to each cache, from slot ``cache_lengths`` on: the last M committed
entries again, then the S new ones. The M slots in front make room for the block of a row that has fewer than M entries.

``medusa_runtime`` has the same arithmetic for capacities, in whole numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medusa_export.heads.sizes import Size
from medusa_export.step.tree_tables import TreeTables


def block_slots(first: Tensor, length: Size) -> Tensor:
    """The slots of each row's block, [B, length], from its first slot [B]."""
    return first[:, None] + torch.arange(length, device=first.device)


class StepSlots:
    """Positions, visible entries and carried entries of one step.

    A chunk of a prompt is a chain: token i attends to all tokens before it. A draft is a tree: a node attends to the
    committed entries and to its own path, and its position is ``cache_lengths`` plus its depth.

    Args:
        tables: The lookup tables of the tree.
        num_new: S, the number of new tokens in each row.
        is_prefill: [B] boolean, True in rows that take in a chunk of a prompt.
        cache_lengths: [B], the number of committed entries.

    Attributes:
        positions: [B, S], the position of each new token in its text.
    """

    def __init__(self, tables: TreeTables, num_new: Size, is_prefill: Tensor, cache_lengths: Tensor) -> None:
        self._tables = tables
        self._new = torch.arange(num_new)
        self._node = self._new.clamp(max=tables.size - 1)
        self._is_prefill = is_prefill
        self._lengths = cache_lengths.unsqueeze(1)
        offsets = torch.where(is_prefill.unsqueeze(1), self._new, tables.depths[self._node])
        self.positions = self._lengths + offsets

    def visible(self, capacity: Size) -> Tensor:
        """The slots that each new token attends to, [B, S, C] boolean, without any sliding window."""
        tables = self._tables
        entry = self._entry_of_slot(capacity)
        new = self._new_of_entry(entry)
        column = (new.clamp(-1, tables.size) + 1).unsqueeze(1)
        in_tree = tables.visible[(self._node * (tables.size + 2)).unsqueeze(1) + column]
        in_chunk = new.unsqueeze(1) <= self._new.unsqueeze(1)
        prefill = self._is_prefill.unsqueeze(1).unsqueeze(1)
        return ((prefill & in_chunk) | (~prefill & in_tree)) & (entry >= 0)

    def entry_positions(self, capacity: Size) -> Tensor:
        """The position of each slot's entry, [B, C]; < 0 in the slots in front."""
        entry = self._entry_of_slot(capacity)
        new = self._new_of_entry(entry)
        depth = self._tables.depths[new.clamp(0, self._tables.size - 1)]
        is_node = (new >= 0) & ~self._is_prefill.unsqueeze(1)
        return entry + torch.where(is_node, depth - new, 0)

    def carried(self, path: Tensor, added: Tensor) -> Tensor:
        """The last M committed entries at the end of the step, [B, M], as indices into the block of M + S entries.

        Args:
            path: [B, M + 1], the accepted nodes from the root on.
            added: [B], the number of entries that the step commits.
        """
        margin = self._tables.depth
        kept = added.unsqueeze(1) + torch.arange(-margin, 0)  # index among the added entries; < 0: committed before
        accepted = torch.where(self._is_prefill.unsqueeze(1), kept, path.gather(1, kept.clamp(0, margin)))
        return torch.where(kept < 0, kept, accepted) + margin

    def _entry_of_slot(self, capacity: Size) -> Tensor:
        """The entry in each slot, [C]; < 0 in the slots in front."""
        return torch.arange(capacity) - self._tables.depth

    def _new_of_entry(self, entry: Tensor) -> Tensor:
        """The index of each entry among the new ones, [B, C]; < 0 where it was committed before the step."""
        return entry - self._lengths
