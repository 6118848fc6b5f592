"""Sums over blocks of columns."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from medusa_export.graph.rewrites.block_weights import BLOCK_SUMS
from medusa_export.graph.rewrites.building import initializer
from medusa_export.graph.rewrites.pipeline import Pipeline
from medusa_export.graph.rewrites.rewrite import StepFacts
from medusa_export.targets.onnxruntime.block_sums import SumBlocks


def product(blocks: int, block_size: int) -> ir.Model:
    """The model y = x M, where M sums each block of columns."""
    graph = ir.Graph([], [], nodes=[], name="sums", opset_imports={"": 24})
    given = ir.val("x", ir.DataType.FLOAT, (1, "rows", blocks * block_size))
    ones = np.repeat(np.eye(blocks, dtype=np.float32), block_size, axis=0)
    node = ir.node("MatMul", [given, initializer(graph, f"{BLOCK_SUMS}/{blocks}x{block_size}", ones)])
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    node.outputs[0].shape = ir.Shape((1, "rows", blocks))
    graph.append(node)
    graph.inputs.append(given)
    graph.outputs.append(node.outputs[0])
    return ir.Model(graph, ir_version=11)


@pytest.mark.parametrize(("blocks", "block_size"), [(36, 16), (18, 32), (3, 128)])
def test_rows_have_the_same_bits_for_any_number_of_rows(blocks: int, block_size: int) -> None:
    model = product(blocks, block_size)
    counts = Pipeline("sums", SumBlocks).run(model, StepFacts(margin=0, max_positions=8))
    assert counts == {SumBlocks.name: 1}
    assert [node.op_type for node in model.graph] == ["Reshape", "ReduceSum"]
    given = np.random.default_rng(0).standard_normal((1, 64, blocks * block_size), np.float32)
    for threads in (1, 3):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
        whole = session.run(None, {"x": given})[0]
        np.testing.assert_allclose(whole, given.reshape(1, 64, blocks, block_size).sum(-1), atol=1e-5)
        for rows in (1, 2, 3, 5, 16):
            for start in range(0, 64 - rows, rows):
                part = np.ascontiguousarray(given[:, start : start + rows])
                assert np.array_equal(session.run(None, {"x": part})[0], whole[:, start : start + rows])
