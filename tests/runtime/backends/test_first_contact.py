"""The calls of CUDA and TensorRT that the stand-in has, compared with the real bindings, which need no GPU."""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from medusa_runtime.backends.tensorrt import buffers, cuda, loading, steps
from support.script import load_script
from support.stand_in_cuda import StandInCuda, cudaError_t
from support.stand_in_tensorrt import StandInContext, StandInEngine

ROOT = Path(__file__).parents[3]
tensorrt_api: Any = load_script("tensorrt_api")
FUNCTIONS = sorted(
    name for name, value in vars(StandInCuda).items() if inspect.isfunction(value) and re.match("cuda[A-Z]", name)
)


@pytest.fixture(scope="module")
def runtime() -> ModuleType:
    return pytest.importorskip("cuda.bindings.runtime")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_of_cuda_takes_as_many_arguments(runtime: ModuleType, name: str) -> None:
    """The bindings' functions have no signature. Their documentation begins with one."""
    first = (getattr(runtime, name).__doc__ or "").splitlines()[0]
    match = re.fullmatch(rf"{name}\((.*)\)", first)
    assert match is not None
    count = len([part for part in match[1].split(",") if part.strip()])
    assert len(inspect.signature(getattr(StandInCuda, name)).parameters) - 1 == count


def test_the_backend_calls_no_other_function_of_cuda() -> None:
    called = set()
    for module in (buffers, cuda, loading, steps):
        called |= set(re.findall(r'"(cuda[A-Z]\w+)"', inspect.getsource(module)))
    called -= {name for name in called if name.startswith("cudaError")}
    constants = {"cudaStreamNonBlocking", "cudaEventDisableTiming", "cudaMemcpyKind", "cudaStreamCaptureMode"}
    assert called - constants == set(FUNCTIONS)


def test_constants_and_errors_of_cuda(runtime: ModuleType) -> None:
    for name in ("cudaStreamNonBlocking", "cudaEventDisableTiming"):
        assert getattr(runtime, name) == getattr(StandInCuda, name)
    assert runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal == 1
    for kind in StandInCuda.cudaMemcpyKind:
        assert getattr(runtime.cudaMemcpyKind, kind.name) == kind
    for code in cudaError_t:
        assert getattr(runtime.cudaError_t, code.name) == code
    for name in (*cuda._LOST, *cuda._REMEDIES):
        assert name in runtime.cudaError_t.__members__


def test_handles_and_properties_of_cuda(runtime: ModuleType) -> None:
    """Handles become integers, a name is bytes, and a failed call gives None in place of each result."""
    assert int(runtime.cudaStream_t(5)) == 5 and int(runtime.cudaGraph_t(6)) == 6
    assert isinstance(runtime.cudaDeviceProp().name, bytes)
    code, *results = runtime.cudaMemGetInfo()
    assert len(results) == 2 and (int(code) == 0 or results == [None, None])


def members(kind: type) -> set[str]:
    return {name for name, value in vars(kind).items() if inspect.isfunction(value) and not name.startswith("_")}


def test_members_of_tensorrt() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    assert members(StandInEngine) <= set(dir(trt.ICudaEngine))
    assert {"num_optimization_profiles", "num_io_tensors"} <= set(dir(trt.ICudaEngine))
    assert members(StandInContext) | {"is_stream_capturable"} <= set(dir(trt.IExecutionContext))
    assert {"deserialize_cuda_engine", "get_engine_validity"} <= set(dir(trt.Runtime))
    assert {"create_runtime_cache", "set_runtime_cache", "set_execution_context_allocation_strategy",
            "dynamic_shapes_kernel_specialization_strategy"} <= set(dir(trt.IRuntimeConfig))  # fmt: skip
    assert trt.ExecutionContextAllocationStrategy.USER_MANAGED is not None
    assert {"LAZY", "EAGER"} <= set(trt.DynamicShapesKernelSpecializationStrategy.__members__)
    assert trt.ILogger.ERROR is not None and trt.ILogger.INTERNAL_ERROR is not None


def test_signatures_of_tensorrt() -> None:
    """The documentation of a function of the bindings begins with its signature, or with one per overload."""
    trt = pytest.importorskip("tensorrt_rtx")
    for kind, stand_in in ((trt.ICudaEngine, StandInEngine), (trt.IExecutionContext, StandInContext)):
        for name in members(stand_in):
            text = textwrap.dedent(getattr(kind, name).__doc__ or "")
            counts = {len(re.findall(r"\w+: ", found)) for found in re.findall(rf"{name}\((self: [^)]*)\)", text)}
            assert len(inspect.signature(getattr(stand_in, name)).parameters) in counts, (name, counts, text[:200])


PAGE = (ROOT / "docs/gpu-first-contact.md").read_text(encoding="utf-8")
# Each word in backquotes: names of calls, properties, classes and constants.
LISTED = {word for quoted in re.findall(r"`([^`]+)`", PAGE) for word in re.findall(r"\w+", quoted)}
# Names of TensorRT that only other objects have in the code: arrays, our own builder, ONNX graphs.
NOT_OF_TENSORRT = {"engine", "itemsize", "metadata", "nbytes", "parse", "reset"}
ONNXRUNTIME_SOURCES = [
    *(ROOT / "runtime/medusa_runtime/backends/onnxruntime").glob("*.py"),
    ROOT / "medusa_export/benchmarks/captured_steps.py",
    ROOT / "medusa_export/benchmarks/placement.py",
]


def test_all_calls_of_cuda_are_listed() -> None:
    paths = [path for folder in tensorrt_api.SOURCES for path in folder.glob("*.py")]
    called = {name for path in paths for name in re.findall(r'"(cuda[A-Z]\w+)"', path.read_text(encoding="utf-8"))}
    errors = {name for name in called if name.startswith("cudaError")}
    assert len(called - errors) > 25
    assert not called - errors - LISTED


def test_all_that_is_used_of_tensorrt_is_listed() -> None:
    record = json.loads(tensorrt_api.RECORD.read_text(encoding="utf-8"))
    used = tensorrt_api.used_names() & {member.split(".")[-1] for member in record}
    assert len(used) > 60
    assert not used - LISTED - NOT_OF_TENSORRT


def test_all_that_is_used_of_onnxruntime_is_listed() -> None:
    """``Binding`` and sessions are the same for a CPU, whose backends call nothing else of ONNX Runtime."""
    ort = pytest.importorskip("onnxruntime")
    names = {
        node.attr
        for path in ONNXRUNTIME_SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and not node.attr.startswith("_")
    }
    kinds = (ort, ort.OrtValue, ort.IOBinding, ort.InferenceSession, ort.SessionOptions)
    used = {name for name in names if any(name in dir(kind) for kind in kinds)}
    assert {"ortvalue_from_numpy", "run_with_iobinding", "update_inplace", "preload_dlls"} <= used
    assert not used - LISTED - {"run"}  # ``run`` is our own


@pytest.mark.parametrize("name", sorted({word for word in LISTED if word.startswith("test_")}))
def test_a_test_that_the_page_names_exists(name: str) -> None:
    """A name that begins with ``test_`` may be that of a file, too."""
    texts = (path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert list((ROOT / "tests").rglob(f"{name}.py")) or any(f"def {name}(" in text for text in texts)
