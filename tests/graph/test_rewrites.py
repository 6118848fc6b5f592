"""Rewrites: counted, failing by name, added by an extension; derived graphs that can't be made are left out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from medusa_export.cli import main
from medusa_export.common.errors import ExtensionError, RewriteError
from medusa_export.graph.export import build_graph
from medusa_export.graph.rewrites.linears import LayOutLinears
from medusa_export.graph.rewrites.pipeline import Pipeline
from medusa_export.graph.rewrites.rewrite import NotApplicableError, Rewrite, StepFacts
from medusa_export.graph.rewrites.standard import STANDARD
from medusa_export.step.step import MedusaStep
from medusa_export.targets.onnxruntime.derive import derive_graphs
from medusa_export.targets.onnxruntime.group_query_attention import FuseGroupQueryAttention
from medusa_export.targets.onnxruntime.pipelines import CUDA, ONE_ROW, SEVERAL_ROWS
from medusa_runtime import Bundle, MedusaEngine, Tree
from medusa_runtime.bundles.bundle import (
    DESCRIPTION,
    GRAPH,
    GRAPHS,
    ONNXRUNTIME_BATCH_GRAPH,
    ONNXRUNTIME_CUDA_GRAPH,
    ONNXRUNTIME_GRAPH,
)
from support.decoding import export, greedy, make_step, random_heads
from support.extensions.silu import FuseSilu
from support.stock import Stock
from support.tiny_models import SEEDS, SUPPORTED_FAMILIES, families, tiny_model

PROMPT = [(7 * i * i + 3) % 101 for i in range(13)]
STEP = StepFacts(margin=4, max_positions=512)


class Failing(Rewrite):
    """Removes an output of the first node that it meets, then fails."""

    name = "failing"

    def apply(self, model: ir.Model) -> int:
        model.graph.outputs.pop()
        raise KeyError("no such node")


class Invalid(Rewrite):
    """Gives the attention of a layer a type of operator that doesn't exist."""

    name = "invalid"

    def apply(self, model: ir.Model) -> int:
        node = next(node for node in model.graph if node.op_type.endswith("Attention"))
        node.op_type = "NoSuchAttention"
        return 1


class Cyclic(Rewrite):
    """Makes a node read what is computed from it."""

    name = "cyclic"

    def apply(self, model: ir.Model) -> int:
        node = next(node for node in model.graph if node.op_type.endswith("Attention"))
        node.replace_input_with(0, node.outputs[0])
        return 1


def smallest_step() -> MedusaStep:
    """A step that is quick to trace: one layer, no heads, no sampling."""
    step = make_step(tiny_model("llama", num_hidden_layers=1), None, Tree())
    step.sampling = False
    return step


def without_derived_graphs(bundle: Bundle, folder: Path) -> None:
    """Makes a copy of a bundle's folder, without the derived graphs. onnx refuses files with several hard links."""
    for name in bundle.files:
        if name not in GRAPHS[1:]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.folder / name, folder / name)


@pytest.mark.parametrize("family", families("llama", others=SUPPORTED_FAMILIES))
def test_a_derived_graph_that_cant_be_made_is_left_out(family: str, stock: Stock, tmp_path: Path) -> None:
    bundle = stock.family(family).bundle
    step = StepFacts(margin=bundle.tree.max_depth, max_positions=bundle.model.max_positions)
    without_derived_graphs(bundle, tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    for damaged in (Failing, Invalid, Cyclic) if family == "llama" else (Cyclic,):
        with ONE_ROW.registered(damaged), SEVERAL_ROWS.registered(damaged), CUDA.registered(damaged):
            graphs = derive_graphs(tmp_path, step)
        assert tuple(graphs) == GRAPHS[1:]
        for facts in graphs.values():
            assert facts.left_out
            assert not facts.rewrites
        assert {path.name for path in tmp_path.iterdir()} == left

    files = {name: facts for name, facts in bundle.files.items() if name in left or "/" in name}
    (tmp_path / DESCRIPTION).write_text(replace(bundle, files=files, graphs=graphs).to_json())
    expected = greedy(tiny_model(family, SEEDS.get(family, 0)), PROMPT, 12)
    with MedusaEngine.load(tmp_path, threads=1) as engine:
        for size in (1, 9):
            assert list(engine.generate(PROMPT, max_new_tokens=12, tree_size=size).token_ids) == expected


@pytest.mark.slow
def test_an_export_goes_on_without_a_derived_graph(tmp_path: Path) -> None:
    with SEVERAL_ROWS.registered(Failing):
        bundle = export(smallest_step(), tmp_path / "bundle")
    assert [name for name in bundle.files if name.endswith(".onnx")] == [
        GRAPH,
        ONNXRUNTIME_CUDA_GRAPH,
        ONNXRUNTIME_GRAPH,
    ]
    assert bundle.graphs[ONNXRUNTIME_BATCH_GRAPH].left_out == (
        "The rewrite 'failing' of the graph model.onnxruntime.batch.onnx failed: KeyError: 'no such node'."
    )


@pytest.mark.slow
def test_a_failing_rewrite_of_the_standard_graph_is_named() -> None:
    step = smallest_step()
    with STANDARD.registered(Failing, after=LayOutLinears), pytest.raises(RewriteError, match="'failing'") as error:
        build_graph(step)
    assert (error.value.graph, error.value.rewrite) == (GRAPH, "failing")
    assert "no such node" in str(error.value)


@pytest.mark.slow
def test_a_rewrite_of_an_extension(stock: Stock) -> None:
    model = tiny_model("llama")
    step = make_step(model, random_heads(model))
    step.sampling = False
    with ONE_ROW.registered(FuseSilu):
        bundle = Bundle.load(stock.folder("fused-silu", lambda out: export(step, out)))
    silus = model.config.num_hidden_layers + 1  # one in each layer, and one for all heads
    assert bundle.graphs[ONNXRUNTIME_GRAPH].rewrites["fuse_silu"] == silus
    assert (
        json.loads((bundle.folder / DESCRIPTION).read_text())["graphs"][ONNXRUNTIME_GRAPH]["rewrites"]["fuse_silu"]
        == silus
    )
    graph = onnx.load(bundle.folder / ONNXRUNTIME_GRAPH, load_external_data=False)
    assert sum(op_types(graph.graph, "QuickGelu")) == silus
    expected = greedy(tiny_model("llama"), PROMPT, 24)
    with MedusaEngine.load(bundle.folder, threads=1) as engine:
        for size in (1, 5, 9):
            assert list(engine.generate(PROMPT, max_new_tokens=24, tree_size=size).token_ids) == expected


def op_types(graph: onnx.GraphProto, op_type: str) -> Iterator[int]:
    """1 for each node of a type, in a graph and in its branches."""
    for node in graph.node:
        yield int(node.op_type == op_type)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from op_types(attribute.g, op_type)


def test_counts_of_a_bundle(stock: Stock) -> None:
    bundle = stock.export("llama").bundle
    layers = bundle.model.num_layers
    assert bundle.graphs[GRAPH].rewrites["fuse_rms_norm"] == 2 * layers + 1
    assert bundle.graphs[ONNXRUNTIME_GRAPH].rewrites["fuse_group_query_attention"] == layers
    assert bundle.graphs[ONNXRUNTIME_BATCH_GRAPH].rewrites["fuse_multi_head_attention"] == layers
    assert list(bundle.graphs[ONNXRUNTIME_GRAPH].rewrites) == [rewrite.name for rewrite in ONE_ROW.rewrites]
    result = CliRunner().invoke(main, ["inspect", str(bundle.folder)])
    assert f"rewrites: fuse_rms_norm {2 * layers + 1}, fuse_rotary_embedding {2 * layers}" in result.output


@pytest.mark.slow
def test_reasons_of_a_bundle(stock: Stock) -> None:
    """Attention for several rows has no soft cap in ONNX Runtime, and Gemma 2 needs one."""
    bundle = stock.export("gemma2").bundle
    assert "soft cap" in (bundle.graphs[ONNXRUNTIME_BATCH_GRAPH].left_out or "")
    result = CliRunner().invoke(main, ["inspect", str(bundle.folder)])
    assert f"{ONNXRUNTIME_BATCH_GRAPH} is left out. The rewrite 'fuse_multi_head_attention'" in " ".join(
        result.output.split()
    )


def test_bundles_without_counts_load(stock: Stock, tmp_path: Path) -> None:
    """Bundles of older versions lack the counts."""
    bundle = stock.export("llama").bundle
    folder = tmp_path / "bundle"
    folder.mkdir()
    for name in bundle.files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(bundle.folder / name)
    description = json.loads((bundle.folder / DESCRIPTION).read_text())
    del description["graphs"]
    (folder / DESCRIPTION).write_text(json.dumps(description))
    assert Bundle.load(folder).graphs == {}


def test_a_pipeline_takes_each_name_once() -> None:
    pipeline = Pipeline("test", LayOutLinears)
    with pytest.raises(ExtensionError, match="has a rewrite 'lay_out_linears' already"):
        pipeline.register(LayOutLinears)
    pipeline.register(Invalid, after=LayOutLinears)
    pipeline.register(Failing, after=LayOutLinears)
    assert [rewrite.name for rewrite in pipeline.rewrites] == ["lay_out_linears", "failing", "invalid"]


def test_preconditions_are_checked_before_anything_changes() -> None:
    shape = ir.Shape(["batch", 2, "capacity", 12])
    cache = ir.Value(name="past_key_0", shape=shape, type=ir.TensorType(ir.DataType.FLOAT))
    attention = ir.node("Attention", [cache, cache, cache])
    model = ir.Model(ir.Graph([cache], attention.outputs, nodes=[attention], opset_imports={"": 24}), ir_version=11)
    with pytest.raises(NotApplicableError, match="head_dim is 12"):
        FuseGroupQueryAttention(STEP)(model)
    with pytest.raises(RewriteError, match="can't be applied: head_dim is 12, and GroupQueryAttention needs"):
        ONE_ROW.run(model, STEP)
