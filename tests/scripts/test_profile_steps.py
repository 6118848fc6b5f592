"""The profile of a step: each node counts, under the part of the graph that it belongs to."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from support.script import load_script
from support.stock import Stock


@pytest.mark.parametrize("kv_cache", [None, "int8"], ids=["fused attention", "attention of plain operators"])
def test_every_part_takes_time(stock: Stock, kv_cache: str | None) -> None:
    script = load_script("profile_steps")
    bundle = stock.export(kv_cache=kv_cache).bundle
    arguments = [str(bundle.folder), "--sizes", "1,4", "--steps", "2", "--threads", "1"]
    result = CliRunner().invoke(script.main, arguments, catch_exceptions=False)
    rows = {part: line.split()[-1] for part in script.PARTS for line in result.output.splitlines() if part in line}
    assert set(rows) == set(script.PARTS)
    assert all(float(milliseconds) > 0 for milliseconds in rows.values())


def test_nodes_that_are_fused_when_a_bundle_is_loaded_are_products() -> None:
    """The file of a bundle in int4 has no ``MatMulNBits``: ONNX Runtime makes them."""
    script = load_script("profile_steps")
    names = ["norm", "product", "Rotary", "scores", "output", "norm", "gate", "sum", "norm", "head", "first", "best"]
    kinds = ["RMSNormalization", "MatMulNBits", "RotaryEmbedding", "FusedMatMul", "MatMulNBits",
             "SkipSimplifiedLayerNormalization", "MatMulNBits", "Add", "SkipSimplifiedLayerNormalization",
             "MatMulNBits", "MatMulNBits", "ArgMax"]  # fmt: skip
    nodes = [script.Node(f"{name}{i}", kind) for i, (name, kind) in enumerate(zip(names, kinds, strict=True))]
    products, attention, norms, others, lm_head, heads, accepting = script.PARTS
    parts = script.parts_of(nodes)
    assert [parts[node] for node in nodes] == [
        norms, products, attention, attention, products, norms, products, others, norms, lm_head, heads, accepting,
    ]  # fmt: skip
