"""Tables of cosines and sines by position."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from medusa_export.common.tuning import LARGEST_TABLE
from medusa_export.graph.rewrites.matching import given, producer, rank_of
from medusa_export.targets.onnxruntime.constants import IR_VERSION, initializer, integers
from medusa_export.targets.onnxruntime.heads_layout import unswapped


class RotaryTables:
    """Replaces cosines and sines that the graph computes for the positions of a step by tables of all positions.

    Args:
        graph: The graph that the tables become part of.
        rows: Number of positions in a table.
    """

    def __init__(self, graph: ir.Graph, rows: int) -> None:
        self._graph = graph
        self._rows = rows
        self._tables: dict[ir.Value, tuple[ir.Value, ir.Value] | None] = {}
        self._positions: dict[ir.Value, ir.Value] = {}

    def pack(self, query: ir.Value, key: ir.Value, value: ir.Value) -> tuple[ir.Value | None, ...] | None:
        """Inputs of a ``GroupQueryAttention`` that splits one product, and rotates queries and keys by itself.

        Returns:
            Its inputs query, key, value, cosines, sines and positions; None unless query, key and value are the parts
            of one tensor, and the first two have nothing but the same rotary embedding on their way.
        """
        turned = [producer(query, "RotaryEmbedding"), producer(key, "RotaryEmbedding")]
        if turned[0] is None or turned[1] is None or turned[0].inputs[1:3] != turned[1].inputs[1:3]:
            return None
        parts = [unswapped(tensor) for tensor in (turned[0].inputs[0], turned[1].inputs[0], value)]
        split = producer(parts[0], "Split")
        if split is None or list(split.outputs) != parts:
            return None
        found = [self._table(given(table)) for table in turned[0].inputs[1:3]]
        if found[0] is None or found[1] is None or found[0][1] is not found[1][1]:
            return None
        return split.inputs[0], None, None, found[0][0], found[1][0], found[0][1]

    def gathered(self, values: ir.Value) -> ir.Value | None:
        """``values`` [B, S, d / 2] gathered from a table; None if the table is too large.

        They are the same bits for a position, whatever the other positions of the step.
        """
        found = self._table(values)
        if found is None:
            return None
        node, (_, positions) = ir.node("Gather", list(found)), found
        node.outputs[0].type, node.outputs[0].shape = values.type, values.shape
        maker = positions.producer()
        assert maker is not None
        self._graph.insert_after(maker, node)
        return node.outputs[0]

    def _table(self, values: ir.Value) -> tuple[ir.Value, ir.Value] | None:
        """The table [rows, d / 2] that has ``values`` [B, S, d / 2], and the positions [B, S]; None if too large."""
        if values not in self._tables:
            self._tables[values] = self._evaluate(values)
        return self._tables[values]

    def _evaluate(self, values: ir.Value) -> tuple[ir.Value, ir.Value] | None:
        width = values.shape[-1] if values.shape is not None else None
        positions = _positions_behind(values)
        if positions is None or not isinstance(width, int) or self._rows * width * 4 > LARGEST_TABLE:
            return None
        part = ir.convenience.extract(self._graph, inputs=[positions], outputs=[values])
        evaluator = ReferenceEvaluator(ir.to_proto(ir.Model(part, ir_version=IR_VERSION)))
        (rows,) = evaluator.run(None, {positions.name: np.arange(self._rows)[None]})
        return initializer(self._graph, f"{values.name}", rows[0]), self._clipped(positions)

    def _clipped(self, positions: ir.Value) -> ir.Value:
        """Positions that lie within a table. Those of padding may lie beyond."""
        if positions not in self._positions:
            last = integers(self._graph, "last_position", [self._rows - 1])
            node = ir.node("Min", [positions, last])
            maker = positions.producer()
            assert maker is not None
            self._graph.insert_after(maker, node)
            self._positions[positions] = node.outputs[0]
        return self._positions[positions]


def _positions_behind(values: ir.Value) -> ir.Value | None:
    """The integers [B, S] that values are computed from; None if they are computed from anything else too."""
    found: set[ir.Value] = set()
    stack = [values]
    while stack:
        value = stack.pop()
        if value.dtype == ir.DataType.INT64 and rank_of(value) == 2:
            found.add(value)
        elif not value.is_initializer():
            made_by = value.producer()
            if made_by is None:
                return None
            stack.extend(source for source in made_by.inputs if source is not None)
    return found.pop() if len(found) == 1 else None
