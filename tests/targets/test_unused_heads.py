"""Products of heads that a step does not draft with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from medusa_export.graph.rewrites.pipeline import Pipeline
from medusa_export.graph.rewrites.rewrite import StepFacts
from medusa_export.targets.onnxruntime.unused_heads import SkipUnusedHeads

HEADS, SIZE = 3, 8


def two_blocks(folder: Path, prefix: str = "step.heads.") -> ir.Model:
    """The model y = (x A) B, where A and B are stacks of one matrix per head in a file of weights."""
    graph = ir.Graph([], [], nodes=[], name="heads", opset_imports={"": 24})
    ids = ir.val("input_ids", ir.DataType.INT64, ("batch", "step"))
    states = ir.val("x", ir.DataType.FLOAT, ("batch", SIZE))
    graph.inputs.extend([ids, states])
    for name in ("first", "second"):
        stack = np.random.default_rng(len(name)).standard_normal((HEADS, SIZE, SIZE), np.float32)
        weight = ir.val(f"{prefix}{name}", const_value=ir.tensor(stack), shape=stack.shape, dtype=ir.DataType.FLOAT)
        graph.register_initializer(weight)
        graph.append(ir.node("MatMul", [states, weight]))
        states = graph[-1].outputs[0]
    states.name, states.type, states.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape((HEADS, "batch", SIZE))
    graph.outputs.append(states)
    ir.save(ir.Model(graph, ir_version=11), folder / "heads.onnx", external_data="heads.data", size_threshold_bytes=0)
    return ir.load(folder / "heads.onnx")


def results(file: Path, tokens: int, states: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(file)
    given = {"input_ids": np.zeros((len(states), tokens), np.int64), "x": states}
    (found,) = session.run(["y"], {value.name: given[value.name] for value in session.get_inputs()})
    return np.asarray(found)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_step_of_s_tokens_multiplies_with_the_matrices_of_s_minus_1_heads(tmp_path: Path, batch: int) -> None:
    model = two_blocks(tmp_path)
    counts = Pipeline("heads", SkipUnusedHeads).run(model, StepFacts(margin=2, max_positions=8))
    assert counts == {SkipUnusedHeads.name: 2}
    ir.save(model, tmp_path / "skipped.onnx")
    states = np.random.default_rng(0).standard_normal((batch, SIZE), np.float32)
    whole = results(tmp_path / "heads.onnx", 1, states)
    for tokens in range(1, HEADS + 3):
        found, active = results(tmp_path / "skipped.onnx", tokens, states), min(tokens - 1, HEADS)
        np.testing.assert_allclose(found[:active], whole[:active], atol=1e-5)
        assert found.shape == whole.shape
        assert not found[active:].any()


def test_the_matrices_are_parts_of_the_stored_stack(tmp_path: Path) -> None:
    model = two_blocks(tmp_path)
    stack = model.graph.initializers["step.heads.second"].const_value
    assert stack is not None
    Pipeline("heads", SkipUnusedHeads).run(model, StepFacts(margin=2, max_positions=8))
    for head in range(HEADS):
        part = model.graph.initializers[f"step.heads.second[{head}]"].const_value
        assert isinstance(part, ir.ExternalTensor)
        assert np.array_equal(part.numpy(), stack.numpy()[head])


def test_other_stacks_stay_as_they_are(tmp_path: Path) -> None:
    model = two_blocks(tmp_path, prefix="step.model.experts.")
    counts = Pipeline("heads", SkipUnusedHeads).run(model, StepFacts(margin=2, max_positions=8))
    assert counts == {SkipUnusedHeads.name: 0}
