"""Profiles the steps of a bundle by tree size: adds up ONNX Runtime's times of operators by part of the graph.

Usage: python scripts/profile_steps.py BUNDLE --sizes 1,2,4,6,8,10
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import onnx
import onnxruntime
from rich import box
from rich.console import Console
from rich.table import Table

from medusa_export.commands.options import sizes as as_sizes
from medusa_runtime import Bundle
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend
from medusa_runtime.bundles.bundle import ONNXRUNTIME_GRAPH

NORMS = ("LayerNormalization", "RMSNormalization")
PARTS = (
    "layers: matrix products", "layers: attention", "layers: norms", "layers: all else",
    "lm_head", "heads: matrix products", "accepting and drafting: all else",
)  # fmt: skip
FILL, WARM_UP = 64, 3


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """All nodes in order. A node with branches is replaced by the nodes of its branches."""
    for node in graph.node:
        branches = [attribute.g for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH]
        for branch in branches:
            yield from nodes_of(branch)
        if not branches:
            yield node


def parts_of(graph: onnx.GraphProto) -> dict[str, str]:
    """The part of the graph that each node belongs to, by the node's name.

    The layers end at the last norm. The first matrix product after it is ``lm_head``; later ones are of the heads.
    """
    nodes = list(nodes_of(graph))
    last = max(i for i, node in enumerate(nodes) if node.op_type.endswith(NORMS))
    found = {}
    for i, node in enumerate(nodes):
        product = node.op_type in ("MatMul", "Gemm", "FusedMatMul")
        if i <= last:
            kinds = {product: 0, node.op_type.endswith("Attention"): 1, node.op_type.endswith(NORMS): 2}
            found[node.name] = PARTS[kinds.get(True, 3)]
        elif product:
            found[node.name] = PARTS[5 if "lm_head" in found.values() else 4]
        else:
            found[node.name] = PARTS[6]
    return found


def profiled(bundle: Bundle, size: int, steps: int, threads: int) -> list[dict[str, Any]]:
    """ONNX Runtime's profiling events of steps that verify ``size`` nodes."""
    with tempfile.TemporaryDirectory() as scratch:

        class Options(onnxruntime.SessionOptions):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.enable_profiling = True
                self.profile_file_prefix = f"{scratch}/profile"

        usual, onnxruntime.SessionOptions = onnxruntime.SessionOptions, Options
        try:
            backend = OnnxRuntimeBackend(bundle, threads=threads)
        finally:
            onnxruntime.SessionOptions = usual
        backend.reserve(FILL + (steps + WARM_UP + 1) * (bundle.tree.max_depth + 1) + bundle.tree.size)
        backend.step(FILL, {0: [token % bundle.model.vocab_size for token in range(FILL)]})
        for _ in range(WARM_UP + steps):
            backend.step(size)
        events: list[dict[str, Any]] = json.loads(Path(backend._session.end_profiling()).read_text(encoding="utf-8"))
    runs = sorted((e for e in events if e["name"] == "model_run"), key=lambda e: e["ts"])
    return [event for event in events if event["ts"] >= runs[-steps]["ts"]]


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="BUNDLE")
@click.option("--sizes", callback=as_sizes, default="1,2,4,6,8,10", show_default=True, help="Tree sizes.")
@click.option("--steps", default=20, show_default=True, help="Steps per tree size.")
@click.option("--threads", default=2, show_default=True, help="Threads of ONNX Runtime.")
def main(folder: Path, sizes: list[int], steps: int, threads: int) -> None:
    """Prints milliseconds per step by part of the graph. Each node counts with its fastest run."""
    bundle = Bundle.load(folder)
    parts = parts_of(onnx.load(folder / ONNXRUNTIME_GRAPH, load_external_data=False).graph)
    columns: dict[int, Counter[str]] = {}
    for size in sizes:
        durations: dict[str, list[int]] = defaultdict(list)
        for event in profiled(bundle, size, steps, threads):
            durations[event["name"]].append(event["dur"])
        columns[size] = Counter({"whole step": min(durations["model_run"])})
        for name, taken in durations.items():
            node = name.removesuffix("_kernel_time")
            if node != name and node in parts:
                # The fastest run of each node: on a busy machine other nodes are slow in every step.
                columns[size][parts[node]] += min(taken)
    table = Table("part", *map(str, sizes), box=box.SIMPLE_HEAD)
    for part in (*PARTS, "whole step"):
        table.add_row(part, *(f"{columns[size][part] / 1e3:.2f}" for size in sizes))
    Console().print(table)


if __name__ == "__main__":
    main()
