"""Loading of engines, on a stand-in for the GPU: kept kernels, and engines that can't run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from medusa_runtime import BackendError, Bundle, MedusaEngine
from medusa_runtime.backends.tensorrt import cuda as cuda_module
from medusa_runtime.backends.tensorrt.memory import DeviceMemory
from medusa_runtime.bundles.compiled import CompiledEngine
from medusa_runtime.errors import OutOfDeviceMemoryError
from support.machine import PROMPTS, Machine
from support.stand_in_cuda import StandInCuda, cudaError_t
from support.stand_in_tensorrt import EngineInvalidityDiagnostics, RuntimeConfig


def test_kernels_compiled_at_run_time_are_kept(
    tiny_bundle: Bundle, tiny_engine: CompiledEngine, tmp_path: Path
) -> None:
    """TensorRT-RTX compiles kernels of decoding steps at once, and those of chunks meanwhile. Both are kept."""
    folder = shutil.copytree(tiny_engine.folder, tmp_path / "engine")
    for known in (b"", b"kernels"):
        machine = Machine(tiny_bundle, replace(tiny_engine, folder=folder))
        machine.trt.compile_at_run_time()
        backend = machine.backend()
        backend.step(13, {0: PROMPTS[0]})
        backend.step(9)
        backend.close()
        assert [config.cache.loaded for config in machine.trt.configs] == [known, known]
        strategies = [config.dynamic_shapes_kernel_specialization_strategy.name for config in machine.trt.configs]
        assert strategies == ["LAZY", "EAGER"]
    assert (folder / ".kernels.sm89.cache").read_bytes() == b"kernels"
    CompiledEngine.load(folder)
    machine.trt.invalid = EngineInvalidityDiagnostics.OLD_CUDA_DRIVER
    with pytest.raises(BackendError, match=r"can't run here: OLD_CUDA_DRIVER\. Build it again"):
        machine.backend()


def test_kernels_that_can_not_be_read_or_kept_are_compiled_again(
    tiny_bundle: Bundle, tiny_engine: CompiledEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the cache is of another driver")

    folder = shutil.copytree(tiny_engine.folder, tmp_path / "engine")
    kept = folder / ".kernels.sm89.cache"
    kept.write_bytes(b"of another driver")
    machine = Machine(tiny_bundle, replace(tiny_engine, folder=folder))
    machine.trt.compile_at_run_time()
    cache = SimpleNamespace(deserialize=fail, serialize=fail)
    monkeypatch.setattr(RuntimeConfig, "create_runtime_cache", lambda _: cache)
    backend = machine.backend()
    backend.step(13, {0: PROMPTS[0]})
    backend.close()
    assert kept.read_bytes() == b"of another driver"
    assert not machine.left


Break = Callable[[Machine], None]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda m: setattr(m.cuda, "architecture", (9, 0)), "is sm90; .* was built for sm89.*--target sm90"),
        (lambda m: setattr(m.trt, "__version__", "2.0"), "was built by tensorrt-rtx .*, but 2.0 is installed"),
        (lambda m: m.cuda.fail.update(cudaSetDevice=cudaError_t.cudaErrorInsufficientDriver), "NVIDIA driver"),
        (lambda m: setattr(m.trt, "capacity", 64), "past_key_0 should be float32 .*128"),
    ],
)  # fmt: skip
def test_engines_that_are_not_for_this_machine(machine: Machine, spoil: Break, words: str) -> None:
    spoil(machine)
    with pytest.raises(BackendError, match=words):
        machine.backend()


@pytest.mark.parametrize("raises", [False, True])
def test_an_engine_that_can_not_be_loaded(machine: Machine, raises: bool) -> None:
    """TensorRT refuses the file, although its digest is right; or the GPU has too little memory."""
    machine.trt.raises = raises
    machine.trt.unloadable = "Magic tag does not match"
    with pytest.raises(BackendError, match=r"can't load .*model\.engine on a stand-in: Magic tag .* Build it again"):
        machine.backend()
    machine.trt.unloadable = "Requested amount of GPU memory could not be allocated: out of memory"
    with pytest.raises(OutOfDeviceMemoryError, match=r"no memory for the weights .* MiB\).* one with more memory"):
        machine.backend()
    assert not machine.cuda.blocks


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (cudaError_t.cudaErrorInsufficientDriver, "Install an NVIDIA driver, or a newer one"),
        (cudaError_t.cudaErrorNoDevice, "check nvidia-smi and CUDA_VISIBLE_DEVICES"),
    ],
)
def test_a_driver_that_is_missing_or_too_old(
    tiny_engine: CompiledEngine, monkeypatch: pytest.MonkeyPatch, code: cudaError_t, words: str
) -> None:
    cuda = StandInCuda()
    monkeypatch.setattr(cuda_module, "import_cudart", lambda: cuda)
    cuda.fail["cudaGetDeviceCount"] = code
    with pytest.raises(BackendError, match=f"looking for a GPU: cudaGetDeviceCount gave {code.name} .*{words}"):
        MedusaEngine.load(tiny_engine.folder)


def test_no_memory(tiny_bundle: Bundle, tiny_engine: CompiledEngine) -> None:
    machine = Machine(tiny_bundle, tiny_engine)
    machine.cuda.memory_limit = DeviceMemory.of(tiny_bundle, tiny_engine).total(1) + 2**14
    with pytest.raises(
        OutOfDeviceMemoryError, match=r"3 sequences of 128 tokens .* smaller 'medusa-export trt --max-seq-len'"
    ) as raised:
        machine.backend(3)
    assert "cudaMalloc gave cudaErrorMemoryAllocation" in str(raised.value)
    machine = Machine(tiny_bundle, tiny_engine)
    machine.cuda.fail["cudaMemsetAsync"] = cudaError_t.cudaErrorInvalidValue
    with pytest.raises(BackendError, match="for input_ids"):
        machine.backend()
    assert not machine.cuda.blocks
    assert not machine.cuda.pinned
