"""``verify`` catches what is wrong: damaged weights and graphs, and other heads and models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from medusa_export.common.errors import VerificationError
from medusa_export.step.step import MedusaStep
from medusa_export.verification.report import as_json, as_junit
from medusa_runtime import Bundle
from medusa_runtime.bundles.bundle import GRAPH, GRAPHS, ONNXRUNTIME_BATCH_GRAPH, ONNXRUNTIME_GRAPH
from support.decoding import TREE, make_step, random_heads
from support.tiny_models import tiny_model
from support.verifying import failed, redescribe, verify


def edit(folder: Path, change: Callable[[onnx.ModelProto], None]) -> Bundle:
    path = folder / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    return redescribe(folder)


@pytest.mark.slow
def test_a_wrong_weight_is_caught(copy: Path, step: MedusaStep) -> None:
    data = copy / "model.onnx.data"
    raw = np.fromfile(data, np.float32)
    raw[len(raw) // 2 : len(raw) // 2 + 64] += 1.0
    raw.tofile(data)
    wrong = failed(verify(redescribe(copy), step))
    assert {"model.onnx: logits", "model.onnxruntime.onnx: logits"} <= wrong


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_graph_that_gives_no_numbers_is_caught(copy: Path, step: MedusaStep, tmp_path: Path, value: float) -> None:
    """NaN is neither larger nor smaller than a tolerance: it fails every check, and no figure hides it."""
    data = copy / "model.onnx.data"
    raw = np.fromfile(data, np.float32)
    raw[len(raw) // 2] = value
    raw.tofile(data)
    outcome = verify(redescribe(copy), step)
    assert failed(outcome) == {check.name for check in outcome.checks}
    checks = {check.name: check for check in outcome.checks}
    for graph in (GRAPH, ONNXRUNTIME_GRAPH, ONNXRUNTIME_BATCH_GRAPH):  # those that run on a CPU
        logits = checks[f"{graph}: logits"]
        assert np.isnan(logits.figures["cosine"])
        assert any("rows of logits hold NaN or infinity" in note for note in logits.notes)
    for name in ("tokens, tree size 1", "sampled tokens"):
        assert any("are not finite numbers" in note for note in checks[name].notes)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    written = json.loads(as_json(outcome), parse_constant=refuse)
    assert written["passed"] is False
    assert written["checks"][0]["figures"]["cosine"] is None
    assert "NaN or infinity" in as_junit(outcome)


@pytest.mark.slow
def test_a_wrong_mask_bit_is_caught(copy: Path, step: MedusaStep) -> None:
    size = 9

    def change(model: onnx.ModelProto) -> None:
        tables = [
            t
            for t in model.graph.initializer
            if t.data_type == onnx.TensorProto.BOOL and list(t.dims) == [size * (size + 2)]
        ]
        (table,) = tables
        values = numpy_helper.to_array(table).copy()
        place = 4 * (size + 2) + 1 + 1  # node 4, (0, 0, 0), no longer sees node 1, its ancestor (0,)
        assert values[place]
        values[place] = False
        table.CopyFrom(numpy_helper.from_array(values, table.name))

    assert "model.onnx: logits" in failed(verify(edit(copy, change), step))


@pytest.mark.slow
def test_a_wrong_position_is_caught(copy: Path, step: MedusaStep) -> None:
    def change(model: onnx.ModelProto) -> None:
        tables = [
            t
            for t in model.graph.initializer
            if t.data_type == onnx.TensorProto.INT64 and np.array_equal(numpy_helper.to_array(t), TREE.depths)
        ]
        (table,) = tables
        values = numpy_helper.to_array(table).copy()
        values[4] += 1
        table.CopyFrom(numpy_helper.from_array(values, table.name))

    assert "model.onnx: logits" in failed(verify(edit(copy, change), step))


@pytest.mark.slow
def test_a_wrong_commit_index_is_caught(copy: Path, step: MedusaStep) -> None:
    def change(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if "next_pending_0" in node.output)
        model.graph.initializer.append(numpy_helper.from_array(np.array(1), "one_off"))
        place = list(model.graph.node).index(node)
        model.graph.node.insert(place, helper.make_node("Sub", [node.input[1], "one_off"], ["wrong_rows"]))
        model.graph.node[place + 1].input[1] = "wrong_rows"

    assert "model.onnx: logits" in failed(verify(edit(copy, change), step))


@pytest.mark.slow
def test_wrong_most_likely_tokens_are_caught(copy: Path, step: MedusaStep) -> None:
    """The least likely ones, with their own log probabilities."""
    for name in GRAPHS:
        model = onnx.load(copy / name, load_external_data=False)
        node = next(node for node in model.graph.node if "top_tokens" in node.output)
        kept = [attribute for attribute in node.attribute if attribute.name != "largest"]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute("largest", 0)])
        (copy / name).write_bytes(model.SerializeToString())
    assert failed(verify(redescribe(copy), step)) == {"sampled tokens"}


@pytest.mark.slow
def test_a_wrong_derived_graph_is_caught(copy: Path, step: MedusaStep) -> None:
    path = copy / "model.onnxruntime.onnx"
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "SkipSimplifiedLayerNormalization":
            next(a for a in node.attribute if a.name == "epsilon").f = 0.5
    path.write_bytes(model.SerializeToString())
    wrong = failed(verify(redescribe(copy), step))
    assert "model.onnxruntime.onnx: logits" in wrong
    assert "model.onnx: logits" not in wrong


@pytest.mark.slow
def test_a_wrong_draw_is_caught(copy: Path, step: MedusaStep) -> None:
    path = copy / "model.onnxruntime.onnx"
    model = onnx.load(path, load_external_data=False)

    def mistake(graph: onnx.GraphProto) -> int:
        """Takes p * E for p / E in both races."""
        count = 0
        numbers = {node.output[0] for node in graph.node if node.op_type == "Gather"}
        for node in graph.node:
            if node.op_type == "Div" and node.input[1] in numbers:
                node.op_type = "Mul"
                count += 1
            count += sum(mistake(attribute.g) for attribute in node.attribute if attribute.type == attribute.GRAPH)
        return count

    assert mistake(model.graph) == 2
    path.write_bytes(model.SerializeToString())
    assert failed(verify(redescribe(copy), step)) == {"sampled tokens"}


def test_wrong_heads_are_caught(tiny_bundle: Bundle) -> None:
    model = tiny_model("llama")
    other = make_step(model, random_heads(model, seed=6))
    wrong = failed(verify(tiny_bundle, other))
    assert {"model.onnx: head logits", "model.onnx: integers of a step"} <= wrong


def test_another_model_is_refused(tiny_bundle: Bundle) -> None:
    model = tiny_model("llama", num_hidden_layers=3)
    with pytest.raises(VerificationError, match="number of layers"):
        verify(tiny_bundle, make_step(model, random_heads(model)))
