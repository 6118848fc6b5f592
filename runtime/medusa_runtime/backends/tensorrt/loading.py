"""Opens a compiled engine, and reports everything that can be wrong with it before the first step."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medusa_runtime.backends.tensorrt.cuda import Cuda, Device
from medusa_runtime.backends.tensorrt.library import TensorRTLibrary, error_log
from medusa_runtime.backends.tensorrt.memory import DeviceMemory
from medusa_runtime.bundles.bundle import Bundle
from medusa_runtime.bundles.compiled import REBUILD, CompiledEngine
from medusa_runtime.bundles.contract import fixed_shape
from medusa_runtime.bundles.listed_folder import read_cache_file, write_cache_file
from medusa_runtime.common.collection import collection_paused
from medusa_runtime.errors import BackendError, OutOfDeviceMemoryError

MAX_KERNELS_BYTES = 2**30


class KernelCache:
    """A file with the kernels that TensorRT-RTX has compiled for this GPU.

    Args:
        path: The file, beside the engine. It is made again if it can't be read, or is of another GPU or version.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._cache: Any = None

    def attach(self, config: Any) -> None:
        """Makes contexts of a runtime configuration take their kernels from here, and add new ones."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            kept = read_cache_file(self._path, at_most=MAX_KERNELS_BYTES)
            if kept is not None:
                with contextlib.suppress(RuntimeError):  # kernels that it can't read are compiled again
                    self._cache.deserialize(kept)
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Writes the file if the folder can be written to. A service may mount it read-only."""
        if self._cache is None:
            return
        data = None
        with contextlib.suppress(RuntimeError):  # without the file, kernels are compiled again
            data = self._cache.serialize()
        if data is not None:
            write_cache_file(self._path, memoryview(data))


@dataclass(frozen=True)
class LoadedEngine:
    """An engine on the device.

    Attributes:
        description: The engine's description, from ``engine.json``.
        library: The TensorRT that runs it.
        device: The GPU.
        engine: TensorRT's ``ICudaEngine``.
        log: TensorRT's logger, which keeps errors.
        kernels: The kernels that were compiled for this GPU so far, if the flavor compiles at run time.
    """

    description: CompiledEngine
    library: TensorRTLibrary
    device: Device
    engine: Any
    log: Any
    kernels: KernelCache

    @property
    def scratch_size(self) -> int:
        """Bytes of scratch memory that are enough for a step of any profile."""
        profiles = range(self.engine.num_optimization_profiles)
        return max(int(self.engine.get_device_memory_size_for_profile_v2(index)) for index in profiles)

    def new_context(self, *, eager: bool) -> Any:
        """An execution context without scratch memory of its own.

        Args:
            eager: Compile the kernels for its shapes at once, if the flavor compiles at run time. Otherwise they are
                compiled beside the steps, which suits shapes that come once.
        """
        context = _attempt(self.log, self._make_context, eager)
        if context is None:
            words = self.words()
            kind = OutOfDeviceMemoryError if _is_out_of_memory(words) else BackendError
            raise kind(f"TensorRT made no execution context: {words}")
        return context

    def _make_context(self, eager: bool) -> Any:
        trt = self.library.trt
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        kinds = getattr(trt, "DynamicShapesKernelSpecializationStrategy", None)
        if kinds is None:
            return self.engine.create_execution_context(strategy)
        config = self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        config.dynamic_shapes_kernel_specialization_strategy = kinds.EAGER if eager else kinds.LAZY
        self.kernels.attach(config)
        return self.engine.create_execution_context(config)

    def words(self) -> str:
        """TensorRT's last error messages, which are forgotten then."""
        text = " ".join(self.log.errors[-3:]) or "it gave no reason."
        self.log.errors.clear()
        return text


def load_engine(bundle: Bundle, description: CompiledEngine, library: TensorRTLibrary, cuda: Cuda) -> LoadedEngine:
    """Deserializes an engine and compares it with the contract.

    Args:
        bundle: The bundle that the engine was built from.
        description: The engine's description.
        library: The TensorRT to run it.
        cuda: The CUDA runtime.

    Raises:
        OutOfDeviceMemoryError: The GPU has no memory for the engine's weights.
        BackendError: The engine is of another version or GPU, can't be read, or has other inputs and outputs.
    """
    if library.version != description.version:
        raise BackendError(
            f"The engine in {description.folder} was built by {description.flavor} {description.version}, but "
            f"{library.version} is installed. {REBUILD}"
        )
    device = cuda.device
    if device.architecture not in description.targets:
        raise BackendError(
            f"This GPU, {device.name}, is {device.architecture}; the engine in {description.folder} was built for "
            f"{', '.join(description.targets)}. Build it again here, or with "
            f"'medusa-export trt --target {device.architecture}'."
        )
    _check_memory(bundle, description, cuda)
    log = error_log(library.trt)
    # A builder calls the log with a lock held that a collected one takes, too. So may a runtime.
    with collection_paused():
        runtime = library.trt.Runtime(log)
    data = description.engine.read_bytes()
    _check_validity(library.trt, runtime, data, description)
    engine = _attempt(log, runtime.deserialize_cuda_engine, data)
    kernels = KernelCache(description.folder / f".kernels.{device.architecture}.cache")
    loaded = LoadedEngine(description, library, device, engine, log, kernels)
    if engine is None:
        words = loaded.words()
        if _is_out_of_memory(words):
            raise OutOfDeviceMemoryError(
                f"{device.name} has no memory for the weights in {description.engine} ({len(data) / 2**20:,.0f} MiB): "
                f"{words} End what else uses the GPU, or take one with more memory."
            )
        raise BackendError(
            f"{description.flavor} {library.version} can't load {description.engine} on {device.name}: {words} "
            f"{REBUILD}"
        )
    _check_tensors(loaded, bundle)
    return loaded


def _attempt(log: Any, call: Callable[..., Any], *arguments: Any) -> Any:
    """Calls TensorRT. Returns None if that fails. Where the C++ interface gives no object, its bindings may raise."""
    try:
        return call(*arguments)
    except RuntimeError as error:
        log.errors.append(str(error))
        return None


def _check_memory(bundle: Bundle, description: CompiledEngine, cuda: Cuda) -> None:
    """Refuses an engine of which not even one row fits, before anything is loaded."""
    free, total = cuda.memory
    DeviceMemory.of(bundle, description).rows_within(free, 1, cuda.device.name, total)


def _is_out_of_memory(words: str) -> bool:
    return re.search(r"out ?of ?memory", words, re.IGNORECASE) is not None


def _check_validity(trt: Any, runtime: Any, data: bytes, description: CompiledEngine) -> None:
    """Asks TensorRT-RTX if an engine can run here, which it knows before it loads the engine."""
    if not hasattr(runtime, "get_engine_validity"):
        return
    validity, diagnostics = runtime.get_engine_validity(data)
    if validity != trt.EngineValidity.INVALID:
        return
    reasons = trt.EngineInvalidityDiagnostics.__members__.items()
    names = [name for name, reason in reasons if int(diagnostics) & int(reason)]
    raise BackendError(
        f"{description.flavor} says that {description.engine} can't run here: {', '.join(names) or 'no reason given'}. "
        f"{REBUILD}"
    )


def _check_tensors(loaded: LoadedEngine, bundle: Bundle) -> None:
    trt, engine = loaded.library.trt, loaded.engine
    capacity = loaded.description.limits.capacity
    names = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
    for specs, mode in ((bundle.inputs, trt.TensorIOMode.INPUT), (bundle.outputs, trt.TensorIOMode.OUTPUT)):
        for spec in specs:
            expected = fixed_shape(spec, {"capacity": capacity})
            if spec.name not in names or not (
                engine.get_tensor_mode(spec.name) == mode
                and engine.get_tensor_dtype(spec.name) == getattr(trt, spec.dtype)
                and _fits(tuple(engine.get_tensor_shape(spec.name)), expected)
            ):
                raise BackendError(
                    f"The engine in {loaded.description.folder} is not what its description says: {spec.name} should "
                    f"be {spec.dtype} {list(expected)}. {REBUILD}"
                )
    for state in bundle.states:
        if engine.get_aliased_input_tensor(state.present) != state.past:
            raise BackendError(
                f"The engine in {loaded.description.folder} doesn't update {state.past} in place. {REBUILD}"
            )


def _fits(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """True if a shape is as expected. -1 stands for any size: a size that all profiles share may be given instead."""
    return len(shape) == len(expected) and all(ours in (-1, size) for size, ours in zip(shape, expected, strict=True))
