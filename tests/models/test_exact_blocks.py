"""Matrices that a file holds in blocks of integers reach a graph as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from medusa_export.graph.export import build_graph
from medusa_export.graph.weights import StepWeights
from medusa_export.models.checkpoint import LoadedModel
from medusa_export.models.checkpoints import open_model
from medusa_export.models.gguf.blocks import BLOCK_KINDS
from medusa_export.models.weight_types import WeightType, WeightTypes
from medusa_export.step.attention import ATTENTION_NAME
from medusa_export.step.step import MedusaStep
from medusa_runtime.bundles.tree import Tree
from support.gguf_files import write_gguf
from support.packed_models import write_awq, write_compressed, write_gptq
from support.tiny_models import tiny_model

_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}


def quantized_gguf(kind: Kind) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        folder.mkdir()
        return write_gguf(folder / "model.gguf", tiny_model("llama", vocab_size=300), kind=kind)

    return write


def compressed(layout: str, dtype: torch.dtype = torch.float16, **weights: object) -> Callable[[Path], Path]:
    return lambda folder: write_compressed(folder, dtype, layout, **weights)


# The writer, the bits, and the number of matrices. GGUF files hold the embeddings and the output projection too.
SOURCES: dict[str, tuple[Callable[[Path], Path], int, int]] = {
    "GPTQ": (lambda folder: write_gptq(folder)[0], 4, 14),
    "GPTQ, symmetric": (lambda folder: write_gptq(folder, symmetric=True)[0], 4, 14),
    "GPTQ, 8 bits": (lambda folder: write_gptq(folder, bits=8, symmetric=True)[0], 8, 14),
    "AWQ": (lambda folder: write_awq(folder)[0], 4, 14),
    "compressed int4": (compressed("pack-quantized", **_INT4), 4, 14),
    "compressed int4, zero points": (compressed("pack-quantized", **_INT4, symmetric=False), 4, 14),
    "compressed int8": (compressed("int-quantized", num_bits=8, type="int", strategy="channel"), 8, 14),
    "Q4_0": (quantized_gguf(Kind.Q4_0), 4, 16),
    "Q5_0": (quantized_gguf(Kind.Q5_0), 8, 16),
    "Q8_0": (quantized_gguf(Kind.Q8_0), 8, 16),
    "Q4_1": (quantized_gguf(Kind.Q4_1), 4, 16),
    "Q5_1": (quantized_gguf(Kind.Q5_1), 8, 16),
}
# Kinds with minima, whose offsets fp32 alone holds. Rounding differs in the last bit.
WITH_OFFSETS = ("Q4_1", "Q5_1")


def opened(source: Path, dtype: torch.dtype) -> LoadedModel:
    return open_model(str(source), dtype=dtype, attn_implementation=ATTENTION_NAME)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", SOURCES)
def test_blocks_hold_what_the_readers_read(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    write, bits, count = SOURCES[kind]
    model = opened(write(tmp_path / "model"), dtype)
    if kind in WITH_OFFSETS and dtype is torch.float16:
        assert not model.blocks
        return
    assert len(model.blocks) == count
    for name, stored in model.blocks.items():
        blocks = stored.read()
        assert (blocks.bits, blocks.block_size) == (stored.bits, stored.block_size)
        assert stored.bits == bits
        assert (blocks.zero_points is not None) == stored.has_zero_points
        for size in (16, 32):
            if stored.fit(stored.bits, size):
                again = blocks.split(size, dtype).dequantized()
                expected = model.readers[name]()
                assert (blocks.offsets is not None) == stored.has_offsets == (kind in WITH_OFFSETS)
                assert float((again - expected).abs().max()) <= (1e-6 if stored.has_offsets else 0.0), name


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: write_gptq(folder, desc_act=True)[0],
        compressed("float-quantized", num_bits=8, type="float", strategy="tensor"),
    ],
)
def test_what_no_blocks_hold_has_none(write: Callable[[Path], Path], tmp_path: Path) -> None:
    model = opened(write(tmp_path / "model"), torch.float32)
    assert not model.blocks
    assert len(model.packed) >= 14


def test_scales_that_a_dtype_would_round_are_no_exact_blocks(tmp_path: Path) -> None:
    source, _ = write_gptq(tmp_path / "model")  # scales in fp16
    assert not opened(source, torch.bfloat16).blocks


@pytest.mark.parametrize("kind", BLOCK_KINDS)
def test_gguf_blocks_are_those_of_the_library(kind: str) -> None:
    """The bytes are random, and scales are any finite number."""
    held, number = BLOCK_KINDS[kind], Kind[kind]
    columns, width = gguf.GGML_QUANT_SIZES[number]
    rows = np.random.default_rng(0).integers(0, 256, (8, 4, width), dtype=np.uint8)
    at = width - 2 if kind == "Q6_K" else 0
    scales = np.random.default_rng(1).normal(size=(8, 4, 1)).astype(np.float16)
    rows[..., at : at + 2] = scales.view(np.uint8)
    if held.has_offsets:
        rows[..., 2:4] = scales[::-1].copy().view(np.uint8)  # of the minima
    rows = rows.reshape(8, -1)
    values, factors, *offsets = held.unpack(rows)
    centred = values.astype(np.float32) - (1 << (held.bits - 1))
    ours = centred.reshape(8, -1, held.block_size) * factors[..., None]
    theirs = gguf.quants.dequantize(rows, number)
    assert theirs.shape == (8, 4 * columns)
    assert len(offsets) == held.has_offsets
    if offsets:
        ours += offsets[0][..., None]
        np.testing.assert_allclose(ours.reshape(8, -1), theirs, atol=1e-6 * np.abs(theirs).max())
    else:
        np.testing.assert_array_equal(ours.reshape(8, -1), theirs)


def stored_matrices(model: LoadedModel, kind: WeightType) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The matrices in blocks of a graph, dequantized, and the weights that were dequantized to make it."""
    step = MedusaStep(model.model, None, Tree()).eval()
    weights = StepWeights(step, model.readers, blocks=model.blocks, packed=model.packed)
    graph = build_graph(step, weights=weights, types=WeightTypes.all(kind)).model.graph
    bits = int(kind.removeprefix("int"))
    made = {}
    for node in graph:
        if node.op_type == "DequantizeLinear":
            values, scales, zero_points = (
                torch.from_numpy(value.const_value.numpy().astype(np.float32)) for value in node.inputs if value
            )
            size = node.attributes["block_size"].as_int()
            centred = values.unflatten(1, (-1, size)) - zero_points[..., None]
            name = node.inputs[0].name.removesuffix(f"/int{bits}/values")
            made[name] = (centred * scales[..., None]).flatten(1)
    return made, weights.dequantized


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["AWQ", "compressed int8", "Q4_0"])
def test_a_graph_stores_the_integers_of_the_file(kind: str, tmp_path: Path) -> None:
    """Products of one input are merged, and their blocks with them."""
    write, bits, _ = SOURCES[kind]
    model = opened(write(tmp_path / "model"), torch.float32)
    made, dequantized = stored_matrices(model, "int4" if bits == 4 else "int8")
    assert len(made) == 9  # q, k and v as one; o; gate and up as one; down; the output projection
    for name, values in made.items():
        parts = [part.removeprefix("step.model.") for part in name.split("+")]
        if set(parts) <= set(model.blocks):
            expected = torch.cat([model.readers[part]() for part in parts])
            assert torch.equal(values, expected), name
    assert not dequantized


def kinds_of(model: LoadedModel, types: WeightTypes) -> dict[str, set[str]]:
    """Returns the types in which a graph stores the matrices of each part."""
    step = MedusaStep(model.model, None, Tree()).eval()
    weights = StepWeights(step, model.readers, blocks=model.blocks, packed=model.packed)
    found: dict[str, set[str]] = {}
    for facts in build_graph(step, weights=weights, types=types).matrices:
        found.setdefault(facts.part, set()).add(str(facts).partition(" ")[2])
    return found


@pytest.mark.slow
def test_symmetric_blocks_are_asked_for(tmp_path: Path) -> None:
    model = opened(quantized_gguf(Kind.Q4_1)(tmp_path / "model"), torch.float32)
    kept = kinds_of(model, WeightTypes.all("int4"))
    assert kept["layers"] == kept["lm_head"] == {"int4, blocks of 32 with scales and offsets"}
    rounded = kinds_of(model, WeightTypes.all("int4", keep_zero_points=False))
    assert rounded["layers"] == rounded["lm_head"] == {"int4, blocks of 32 with scales"}


@pytest.mark.slow
def test_the_facts_say_that_eight_bits_are_kept(tmp_path: Path) -> None:
    model = opened(quantized_gguf(Kind.Q8_0)(tmp_path / "model"), torch.float32)
    kinds = kinds_of(model, WeightTypes(layers="int4", lm_head="int4", block_size=16))
    assert kinds == {
        "layers": {"int8, blocks of 16 with scales"},
        "lm_head": {"int8, blocks of 16 with scales"},
        "embeddings": {"float32"},
    }
    narrowed = kinds_of(model, WeightTypes(layers="int4", lm_head="int4", narrowed=frozenset({"lm_head"})))
    assert narrowed["layers"] == {"int8, blocks of 32 with scales"}
    assert narrowed["lm_head"] == {"int4, blocks of 32 with scales"}


@pytest.mark.slow
def test_other_bits_than_those_of_the_file_are_rounded(tmp_path: Path) -> None:
    model = opened(write_gptq(tmp_path / "model")[0], torch.float32)
    _, dequantized = stored_matrices(model, "int8")
    assert len(dequantized) == 14
    assert set(dequantized.values()) == {"GPTQ of 4 bits"}
