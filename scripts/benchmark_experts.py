"""Times one layer of experts, as an export writes it, beside a dense MLP of the size of the chosen experts.

Weights come from memory: layer and MLPs take turns through ``SETS`` sets of experts.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper, numpy_helper

HIDDEN, INNER, EXPERTS, CHOSEN = 1024, 512, 128, 8
SETS, RUNS = 16, 64
NODES = (1, 2, 4, 8, 16, 32, 64)
Floats = NDArray[np.float32]


def session(
    nodes: list[onnx.NodeProto],
    constants: dict[str, NDArray[np.generic]],
    inputs: dict[str, tuple[int, int]],
    path: Path,
) -> ort.InferenceSession:
    """Opens a model with the output ``out``. ``inputs`` maps a name to the type and the number of columns."""
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "layer",
        [info(name, kind, ["rows", columns]) for name, (kind, columns) in inputs.items()],
        [info("out", onnx.TensorProto.FLOAT, ["rows", HIDDEN])],
        [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path, save_as_external_data=True, location=f"{path.stem}.data")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def activation(source: str, gate: str, up: str) -> list[onnx.NodeProto]:
    """The nodes of SiLU(gate) · up."""
    node = helper.make_node
    return [node("Sigmoid", [gate], ["s"]), node("Mul", [gate, "s"], ["silu"]), node("Mul", ["silu", up], [source])]


def experts_layer(inner: Floats, outer: Floats, path: Path) -> ort.InferenceSession:
    """A layer of experts: see ``medusa_export.step.experts`` and ``medusa_export.graph.experts``."""
    node = helper.make_node
    constants: dict[str, NDArray[np.generic]] = {
        "minus_one": np.array([-1]), "zero": np.array([0]), "one": np.array([1]), "start": np.array(0),
        "step": np.array(1), "k": np.array(CHOSEN), "all": np.arange(EXPERTS), "shape": np.array([-1, CHOSEN, HIDDEN]),
    }  # fmt: skip
    for index in range(EXPERTS):
        constants |= {f"inner{index}": inner[index], f"outer{index}": outer[index]}

    def products(source: str, name: str) -> list[onnx.NodeProto]:
        parts, results = ([f"{name}{kind}{index}" for index in range(EXPERTS)] for kind in ("_rows", "_out"))
        return [
            node("Split", [source, "counts"], parts, axis=0),
            *(node("MatMul", [parts[i], f"{name}{i}"], [results[i]]) for i in range(EXPERTS)),
            node("Concat", results, [name], axis=0),
        ]

    nodes = [
        node("Reshape", ["chosen", "minus_one"], ["experts"]),
        node("Shape", ["experts"], ["pairs"]),
        node("TopK", ["experts", "pairs"], ["sorted", "order"], axis=0, largest=0),
        node("Unsqueeze", ["experts", "minus_one"], ["column"]),
        node("Equal", ["column", "all"], ["is_expert"]),
        node("Cast", ["is_expert"], ["ones"], to=onnx.TensorProto.INT64),
        node("ReduceSum", ["ones", "zero"], ["counts"], keepdims=0),
        node("Div", ["order", "k"], ["tokens"]),
        node("Gather", ["x", "tokens"], ["rows"]),
        *products("rows", "inner"),
        node("Split", ["inner"], ["gate", "up"], axis=1, num_outputs=2),
        *activation("active", "gate", "up"),
        *products("active", "outer"),
        node("Squeeze", ["pairs", "zero"], ["count"]),
        node("Range", ["start", "count", "step"], ["places"]),
        node("ScatterElements", ["order", "order", "places"], ["back"]),
        node("Gather", ["outer", "back"], ["by_pair"]),
        node("Reshape", ["by_pair", "shape"], ["by_token"]),
        node("Unsqueeze", ["shares", "minus_one"], ["factors"]),
        node("Mul", ["by_token", "factors"], ["weighted"]),
        node("ReduceSum", ["weighted", "one"], ["out"], keepdims=0),
    ]
    floats, integers = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    return session(
        nodes, constants, {"x": (floats, HIDDEN), "chosen": (integers, CHOSEN), "shares": (floats, CHOSEN)}, path
    )


def dense_layer(inner: Floats, outer: Floats, path: Path) -> ort.InferenceSession:
    """An MLP of the size of some experts together."""
    node = helper.make_node
    gate, up = (np.concatenate(list(part), axis=1) for part in np.split(inner, 2, axis=2))
    nodes = [
        node("MatMul", ["x", "gate_proj"], ["gate"]),
        node("MatMul", ["x", "up_proj"], ["up"]),
        *activation("active", "gate", "up"),
        node("MatMul", ["active", "down_proj"], ["out"]),
    ]
    constants: dict[str, NDArray[np.generic]] = {"gate_proj": gate, "up_proj": up, "down_proj": np.concatenate(outer)}
    return session(nodes, constants, {"x": (onnx.TensorProto.FLOAT, HIDDEN)}, path)


def main() -> None:
    """Prints a table."""
    numbers = np.random.default_rng(0)
    inner = 0.05 * numbers.standard_normal((EXPERTS, HIDDEN, 2 * INNER), np.float32)
    outer = 0.05 * numbers.standard_normal((EXPERTS, INNER, HIDDEN), np.float32)
    groups = numbers.permutation(EXPERTS).reshape(SETS, CHOSEN)
    with tempfile.TemporaryDirectory() as folder:
        layer = experts_layer(inner, outer, Path(folder, "experts.onnx"))
        dense = [dense_layer(inner[group], outer[group], Path(folder, f"{i}.onnx")) for i, group in enumerate(groups)]
    row = numbers.standard_normal((1, HIDDEN), np.float32)
    print("nodes  chosen experts  layer ms  MLP of 8 ms  ratio per chosen expert")
    for count in NODES:
        sets = [np.argsort(numbers.random((count, EXPERTS)), 1)[:, :CHOSEN] for _ in range(SETS)]
        if count == 1:
            sets = [group[None] for group in groups]
        given = {
            "x": numbers.standard_normal((count, HIDDEN), np.float32),
            "shares": numbers.random((count, CHOSEN), np.float32),
        }
        times: list[tuple[float, float]] = []
        for run in range(RUNS + 1):
            began = time.perf_counter()
            layer.run(None, {**given, "chosen": sets[run % SETS]})
            between = time.perf_counter()
            dense[(run + SETS // 2) % SETS].run(None, {"x": row})
            times.append((between - began, time.perf_counter() - between))
        ours, theirs = 1000 * np.percentile(times[1:], 25, axis=0)
        hit = float(np.mean([len(np.unique(chosen)) for chosen in sets]))
        ratio = ours / hit / (theirs / CHOSEN)
        print(f"{count:5}  {hit:14.1f}  {ours:8.2f}  {theirs:11.2f}  {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()
