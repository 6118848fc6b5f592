"""ONNX Runtime's own CUDA provider, without a GPU: where nodes run, what a step copies, and what it launches.

The provider is the real one of ``onnxruntime-gpu``; the CUDA below it is stubs, which compute nothing (see
``support.stub_cuda``). It is run only if ``scripts/onnxruntime_gpu.sh`` has unpacked the provider, which takes 250 MB.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import medusa_export
from support.stock import Stock
from support.stub_cuda.stubs import build_stubs
from support.tiny_models import tiny_model

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]
VERSION = next(
    line.partition("==")[2]
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line.startswith("onnxruntime-gpu==")
)
PROVIDER = ROOT / ".cache/onnxruntime-gpu" / VERSION
# Arithmetic of sizes. ONNX Runtime computes it on the CPU, and copies some results to the GPU.
OF_SIZES = {
    "Memcpy", "Shape", "Squeeze", "Unsqueeze", "Min", "Max", "Concat", "Expand", "Clip", "Mul", "Reshape", "Sub", "Add",
    "Gather", "Slice", "Cast", "Range", "Where", "Equal", "ConstantOfShape",
}  # fmt: skip


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    tools = [tool for tool in ("nm", "strings") if shutil.which(tool) is None]
    if compiler is None or tools:
        pytest.skip(f"no {'C compiler' if compiler is None else tools[0]} here to make stubs of CUDA with")
    if not (PROVIDER / "onnxruntime").exists():
        pytest.skip("onnxruntime-gpu is not unpacked: run scripts/onnxruntime_gpu.sh")
    folder: Path = tmp_path_factory.mktemp("stubs")
    build_stubs(PROVIDER / "onnxruntime/capi/libonnxruntime_providers_cuda.so", folder, compiler)
    return folder


def measured(bundle: Path, stubs: Path, rows: int) -> dict[str, Any]:
    """The figures that ``support.stub_cuda.measure`` prints."""
    places = [PROVIDER, ROOT, ROOT / "runtime", ROOT / "tests"]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(stubs), "PYTHONPATH": os.pathsep.join(map(str, places))}
    command = [sys.executable, "-m", "support.stub_cuda.measure", str(bundle), str(rows)]
    outcome = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    return json.loads(outcome.stdout)


@pytest.mark.parametrize(
    ("family", "dtype", "sampling", "rows"),
    [("llama", "float16", True, 1), ("llama", "float16", False, 1), ("gemma2", "float32", True, 2)],
)
def test_steps_of_the_cuda_provider(
    family: str, dtype: str, sampling: bool, rows: int, stock: Stock, stubs: Path
) -> None:
    bundle = stock.export(family, dtype=dtype, sampling=sampling).bundle
    found = measured(bundle.folder, stubs, rows)
    assert found["version"] == VERSION
    assert set(found["elsewhere"]) <= OF_SIZES  # nothing that computes with values
    assert sum(found["elsewhere"].values()) <= 45
    cache = 1024 * bundle.entry_bytes
    for step in found["steps"]:
        assert "empty_launches" not in step, step  # CUDA refuses a kernel over nothing
        assert step["synchronizations"] <= 2, step
        # Token ids, lengths, drafts and random numbers are copied; neither caches nor pending entries are.
        assert step["bytes_to_host"] < 1000 and step["bytes_to_device"] < 70_000, step
        assert step["bytes_on_device"] < cache // 20, step
    greedy = [step["launches"] for step in found["steps"] if not step["draws"]]
    assert max(greedy) <= 330
    assert max(greedy) - min(greedy) <= 30  # a tree takes hardly more kernels than one node
    assert found["captured"] == {"captures": 1, "replays": 5, "synchronizations": found["captured"]["synchronizations"]}


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_weights_in_integers_are_multiplied_as_they_are(weights: str, stubs: Path, tmp_path: Path) -> None:
    model = tiny_model("llama").half()
    bundle = medusa_export.export(model, tmp_path / "bundle", init_heads=2, top_k=2, weights=weights, sampling=False)
    found = measured(bundle.folder, stubs, rows=1)
    plain = next(step for step in found["steps"] if step["size"] == 1)
    assert not [kernel for kernel in plain["kernels"] if "DequantizeLinear" in kernel]
    assert sum(times for kernel, times in plain["kernels"].items() if "MatMulFloat" in kernel) >= 4
