"""Mixtures of experts: the products, what a graph reads of them, and how their weights are stored."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor

import medusa_export
from medusa_export.compat.transformers import experts_function, experts_of
from medusa_export.graph.export import build_graph
from medusa_export.graph.weights import StepWeights
from medusa_export.models.checkpoints import open_model
from medusa_export.models.weight_types import WeightTypes
from medusa_export.step.attention import ATTENTION_NAME
from medusa_export.step.experts import EXPERTS_NAME
from medusa_export.step.reference import load_reference
from medusa_export.step.step import MedusaStep
from medusa_export.verification.stored_matrices import stored_matrices, use_stored_matrices
from medusa_runtime.bundles.bundle import ONNXRUNTIME_GRAPH
from medusa_runtime.bundles.tree import Tree
from support.decoding import export
from support.packed_models import write_packed_experts
from support.tiny_models import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mixtral of one layer. Its files hold a matrix per expert."""
    folder = tmp_path_factory.mktemp("mixtral")
    tiny_model("mixtral", num_hidden_layers=1).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["mixtral", "phimoe", "gpt_oss"])
def test_experts_compute_what_those_of_transformers_do(family: str) -> None:
    model = tiny_model(family)
    experts = experts_of(model)[0]
    count = experts.down_proj.shape[0]
    hidden = torch.randn(11, 64, generator=torch.Generator().manual_seed(1))
    chosen = torch.stack([torch.arange(11) % count, (torch.arange(11) + 1) % count], dim=1)
    shares = torch.linspace(0.1, 1.0, 22).view(11, 2)
    with experts_function(model, EXPERTS_NAME):
        own = experts(hidden, chosen, shares)
    with experts_function(model, "eager"):
        expected = experts(hidden, chosen, shares)
    torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-5)
    assert experts.config._experts_implementation != EXPERTS_NAME


@pytest.mark.slow
def test_stacks_of_experts_are_read_once(folder: Path, tmp_path: Path) -> None:
    """Each expert has a product and a matrix of its own, in the order of the stack."""
    opened = open_model(str(folder), dtype=torch.float32, attn_implementation=ATTENTION_NAME)
    reads: Counter[str] = Counter()

    def counted(name: str) -> Tensor:
        reads[name] += 1
        return opened.readers[name]()

    readers = {name: partial(counted, name) for name in opened.readers}
    step = MedusaStep(opened.model, None, Tree(), sampling=False).eval()
    graph = build_graph(step, weights=StepWeights(step, readers))
    assert not reads  # tracing needs no values
    bundle = export(step, tmp_path / "bundle", graph=graph)
    assert reads == Counter(opened.readers.keys())
    model = onnx.load(bundle.graph)
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    experts = experts_of(tiny_model("mixtral", num_hidden_layers=1))[0]
    prefix = "step.model.model.layers.0.mlp.experts"
    assert not {f"{prefix}.gate_up_proj", f"{prefix}.down_proj"} & set(stored)
    for name in ("gate_up_proj", "down_proj"):
        for index, matrix in enumerate(getattr(experts, name)):
            assert (stored[f"{prefix}.{name}.{index}.T"] == matrix.T.numpy()).all()
    readers_of = Counter(value for node in model.graph.node if node.op_type == "MatMul" for value in node.input)
    assert all(readers_of[name] == 1 for name in stored if name.startswith(prefix))


@pytest.mark.slow
def test_blocks_of_a_file_are_kept(tmp_path: Path) -> None:
    """A file holds two matrices per expert, which are one in the model, and a third."""
    opened = open_model(
        str(write_packed_experts(tmp_path / "model")), dtype=torch.float32, attn_implementation=ATTENTION_NAME
    )
    prefix = "model.layers.0.mlp.experts"
    assert set(opened.blocks) == {f"{prefix}.{name}.{i}" for name in ("gate_up_proj", "down_proj") for i in range(4)}
    step = MedusaStep(opened.model, None, Tree(), sampling=False).eval()
    weights = StepWeights(step, opened.readers, blocks=opened.blocks, packed=opened.packed)
    graph = build_graph(step, weights=weights, types=WeightTypes(layers="int4")).model.graph
    for name, stored in opened.blocks.items():
        stack, _, place = name.rpartition(".")
        blocks = stored.read()
        assert torch.equal(blocks.dequantized(), opened.readers[stack]()[int(place)])
        values = graph.initializers[f"step.model.{name}/int4/values"].const_value
        assert (values.numpy().astype("uint8") == blocks.values.numpy()).all()
    assert not weights.dequantized


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_experts_are_stored_as_integers(kind: str, folder: Path, tmp_path: Path) -> None:
    """Derived graphs round activations too. In a random model, that makes routers choose other experts."""
    bundle = medusa_export.export(folder, tmp_path / "b", init_heads=2, top_k=2, weights=kind, sampling=False)
    graph = onnx.load(bundle.folder / ONNXRUNTIME_GRAPH, load_external_data=False).graph
    fused = [node for node in graph.node if node.op_type == "MatMulNBits" and any("experts" in i for i in node.input)]
    assert len(fused) == 8
    assert bundle.panel is None  # the tokens decide how many rows a product has
    outcome = medusa_export.verify(tmp_path / "b", folder, max_new_tokens=8, tree_sizes=[1, "full"])
    checks = {check.name: check for check in outcome.checks}
    assert checks["stored weights"].passed
    assert checks["model.onnx: logits"].passed
    assert checks["model.onnx: logits"].figures["max_abs"] < 1e-4
    assert checks["tokens, plain decoding and the reference"].passed


@pytest.mark.slow
def test_matrices_of_experts_that_are_stored_as_one_are_integers_each(tmp_path: Path) -> None:
    """DBRX keeps the rows of all experts in one matrix. Each expert has blocks of its own."""
    tiny_model("dbrx", num_hidden_layers=1).save_pretrained(tmp_path / "model")
    bundle = medusa_export.export(
        tmp_path / "model", tmp_path / "b", init_heads=2, top_k=2, weights="int8", sampling=False
    )
    step = load_reference(bundle, str(tmp_path / "model"), None)
    assert use_stored_matrices(step, bundle).passed
    names = {name for stored in stored_matrices(bundle) for name in stored.weights if "experts" in name}
    assert len(names) == 12
    assert {"w1.0of4", "v1.3of4", "w2[1of4]"} <= {name.partition("mlp.")[2] for name in names}
