"""A backend whose drafts are often right, so that steps accept many tokens of any request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medusa_export.verification.oracle import oracle_tree
from medusa_runtime import Bundle
from medusa_runtime.backends.base import StepResult
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend


class RightDrafts(OnnxRuntimeBackend):
    """Runs a bundle on the CPU. Before each step it writes drafts that are right down to a random node.

    Args:
        bundle: The bundle.
        texts: The whole text of each row: its prompt, and the answer that is known beforehand.
        options: Further arguments of the backend.
    """

    def __init__(self, bundle: Bundle, texts: Sequence[Sequence[int]], **options: Any) -> None:
        super().__init__(bundle, rows=len(texts), threads=1, **options)
        self._texts, self._rng = texts, np.random.default_rng(0)

    def step(
        self, size: int, prompts: Mapping[int, Sequence[int]] | None = None, rows: Sequence[int] | None = None
    ) -> StepResult:
        tree = self._bundle.tree
        for row, text in enumerate(self._texts):
            root = int(self.lengths[row])
            if row not in (prompts or {}) and root < len(text):
                after = [*text[root + 1 :], *[0] * (tree.max_depth + 1)]
                node = int(self._rng.integers(min(size, tree.size)))
                drafted = oracle_tree(tree, text[root], after, node, self._bundle.model.vocab_size)
                self.drafts[row, 1:] = drafted[1:]
        return super().step(size, prompts, rows)
