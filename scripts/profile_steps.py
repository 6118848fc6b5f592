"""Profiles the steps of a bundle by tree size: adds up ONNX Runtime's times of operators by part of the graph.

Usage: python scripts/profile_steps.py BUNDLE --sizes 1,2,4,6,8,10
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import onnxruntime
from rich import box
from rich.console import Console
from rich.table import Table

from medusa_export.commands.options import sizes as as_sizes
from medusa_runtime import Bundle
from medusa_runtime.backends.onnxruntime.backend import OnnxRuntimeBackend

PRODUCTS = ("MatMul", "Gemm", "MatMulNBits", "MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat")
OF_ATTENTION = ("Attention", "RotaryEmbedding", "TensorScatter", "ScatterND")
PARTS = (
    "layers: matrix products", "layers: attention", "layers: norms", "layers: all else",
    "lm_head", "heads: matrix products", "accepting and drafting: all else",
)  # fmt: skip
FILL, WARM_UP = 64, 3


@dataclass(frozen=True)
class Node:
    """A node as ONNX Runtime runs it, which may be a fusion of several nodes of the file."""

    name: str
    op_type: str

    @classmethod
    def of(cls, event: Mapping[str, Any]) -> Node | None:
        """The node of a profiling event; None for events of other kinds, and for nodes that only run a branch."""
        op_type = event.get("args", {}).get("op_name", "")
        if not event["name"].endswith("_kernel_time") or op_type in ("If", "Loop"):
            return None
        return cls(event["name"], op_type)


def parts_of(nodes: Sequence[Node]) -> dict[Node, str]:
    """The part of the graph that each node belongs to.

    The layers end at the last norm. The first matrix product after it is ``lm_head``; later ones are of the heads.
    Norms cut the layers into pieces. A piece with an operator of attention is attention, its products with weights
    excepted. ``FusedMatMul`` is a product of activations there, and of weights elsewhere.

    Args:
        nodes: The nodes in the order in which they run.
    """
    last = max(i for i, node in enumerate(nodes) if node.op_type.endswith("Normalization"))
    found: dict[Node, str] = {}
    piece: list[Node] = []
    for node in nodes[: last + 1]:
        if node.op_type in PRODUCTS:
            found[node] = PARTS[0]
        if not node.op_type.endswith("Normalization"):
            piece.append(node)
            continue
        is_attention = any(other.op_type.endswith(OF_ATTENTION) for other in piece)
        for other in piece:
            kind = 1 if is_attention else 0 if other.op_type == "FusedMatMul" else 3
            found.setdefault(other, PARTS[kind])
        found[node] = PARTS[2]
        piece = []
    for node in nodes[last + 1 :]:
        if node.op_type in (*PRODUCTS, "FusedMatMul"):
            found[node] = PARTS[5 if "lm_head" in found.values() else 4]
        else:
            found[node] = PARTS[6]
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
    columns: dict[int, Counter[str]] = {}
    for size in sizes:
        events = sorted(profiled(bundle, size, steps, threads), key=lambda event: event["ts"])
        columns[size] = Counter({"whole step": min(event["dur"] for event in events if event["name"] == "model_run")})
        durations: dict[Node, list[int]] = defaultdict(list)
        for event in events:
            if (node := Node.of(event)) is not None:
                durations[node].append(event["dur"])
        for node, part in parts_of(list(durations)).items():
            # The fastest run of each node: on a busy machine other nodes are slow in every step.
            columns[size][part] += min(durations[node])
    table = Table("part", *map(str, sizes), box=box.SIMPLE_HEAD)
    for part in (*PARTS, "whole step"):
        table.add_row(part, *(f"{columns[size][part] / 1e3:.2f}" for size in sizes))
    Console().print(table)


if __name__ == "__main__":
    main()
