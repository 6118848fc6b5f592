"""Steps of several rows with the graph that was derived for one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.backends.base import StepResult
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from medusa_runtime.backends.onnxruntime.row_rules import RowRule


class RowsInTurn(OnnxRuntimeBackend):
    """Runs each row of a step by itself, so that the graph for one row takes the steps of graphs for several.

    Steps have the size that is asked for, as their logits are compared.
    """

    def step(
        self, size: int, prompts: Mapping[int, Sequence[int]] | None = None, rows: Sequence[int] | None = None
    ) -> StepResult:
        chunks, outputs = prompts or {}, []
        for row in self._all_rows if rows is None else rows:
            result = super().step(size, {row: chunks[row]} if row in chunks else {}, [row])
            outputs.append({name: super(RowsInTurn, self).extra_output(name) for name in self._extra_outputs})
        self._of_rows = {name: np.concatenate([each[name] for each in outputs]) for name in self._extra_outputs}
        return result

    def extra_output(self, name: str) -> NDArray[Any]:
        return self._of_rows[name]

    def _row_rule(self, graph: Path | bytes) -> RowRule:
        return RowRule.ANY
