"""The memory that a compiled engine takes on a GPU, computed from its description before any is allocated."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from medusa_runtime.bundles.bundle import Bundle
from medusa_runtime.bundles.compiled import CompiledEngine, EngineLimits
from medusa_runtime.bundles.contract import MAX_EDITS, TensorSpec, fixed_shape
from medusa_runtime.errors import OutOfDeviceMemoryError, RequestError
from medusa_runtime.sampling import draws_ahead

MIB = 2**20


def largest_shape(spec: TensorSpec, bundle: Bundle, limits: EngineLimits, rows: int) -> tuple[int, ...]:
    """The largest shape of an input or output of an engine with a number of rows."""
    sizes = {
        "batch": rows,
        "capacity": limits.capacity,
        "sequence": limits.max_prefill,
        "draws": draws_ahead(bundle.tree),
        "edits": MAX_EDITS,
        "masks": bundle.tree.size,
        "ranked": bundle.slots.most_committed,
    }
    return fixed_shape(spec, sizes)


def tensor_bytes(spec: TensorSpec, bundle: Bundle, limits: EngineLimits, rows: int) -> int:
    """Bytes of an input or output of an engine with a number of rows."""
    itemsize = 2 if spec.dtype == "bfloat16" else np.dtype(spec.dtype).itemsize
    return math.prod(largest_shape(spec, bundle, limits, rows)) * itemsize


@dataclass(frozen=True)
class DeviceMemory:
    """Device memory of an engine, in bytes.

    Attributes:
        weights: Bytes of the engine's file: its weights and kernels.
        caches: Bytes of the caches of one row, at full capacity.
        buffers: Bytes of all else that there is for each row: pending entries, random numbers, token ids, results.
        scratch: Bytes of scratch memory, which all rows share; 0 where only the loaded engine knows it.
    """

    weights: int
    caches: int
    buffers: int
    scratch: int = 0

    @classmethod
    def of(cls, bundle: Bundle, engine: CompiledEngine, scratch: int = 0) -> DeviceMemory:
        """Computes the memory of an engine.

        Args:
            bundle: The bundle that the engine was built from.
            engine: The engine's description.
            scratch: Bytes of scratch memory.
        """
        # ``present_*`` is the memory of ``past_*``.
        present, past = ({getattr(state, kind) for state in bundle.states} for kind in ("present", "past"))
        sizes = {
            spec.name: tensor_bytes(spec, bundle, engine.limits, 1)
            for spec in (*bundle.inputs, *bundle.outputs)
            if spec.name not in present
        }
        caches = sum(size for name, size in sizes.items() if name in past)
        drafts_copy = sizes["next_input_ids"]
        return cls(engine.engine.stat().st_size, caches, sum(sizes.values()) - caches + drafts_copy, scratch)

    @property
    def row(self) -> int:
        """Bytes of one row."""
        return self.caches + self.buffers

    def total(self, rows: int) -> int:
        """Bytes of an engine with a number of rows."""
        return self.weights + self.scratch + rows * self.row

    def words(self, rows: int) -> str:
        """The memory with a number of rows, in words."""
        scratch = f", {self.scratch / MIB:,.0f} of scratch" if self.scratch else ""
        return (
            f"{self.total(rows) / MIB:,.0f} MiB: {self.weights / MIB:,.0f} of weights and kernels, "
            f"{rows} times {self.row / MIB:,.1f} of rows{scratch}"
        )

    def rows_within(self, budget: int, most: int, device: str, total: int) -> int:
        """The most rows that fit into a budget.

        Args:
            budget: Bytes.
            most: The most rows that are wanted.
            device: Name of the GPU, for the message of a failure.
            total: Bytes of the GPU's memory, for the same.

        Raises:
            OutOfDeviceMemoryError: Not even one row fits. The message says how to make a smaller engine.
        """
        rows = min(most, (budget - self.weights - self.scratch) // self.row)
        if rows < 1:
            raise OutOfDeviceMemoryError(
                f"One row takes {self.words(1)}. {device} has {total / MIB:,.0f} MiB, and {budget / MIB:,.0f} may be "
                "used. Take a GPU with more memory, or make a smaller engine: 'medusa-export onnx --weights int4', "
                "'medusa-export trt --max-seq-len' with fewer slots. A model can't be split over several GPUs."
            )
        return rows


def memory_budget(asked: float, total: int) -> int:
    """Bytes of GPU memory that may be used.

    Args:
        asked: A number of bytes above 1, or a fraction of the memory up to 1.
        total: Bytes of the GPU's memory.

    Raises:
        RequestError: It is neither.
    """
    if isinstance(asked, bool) or not isinstance(asked, int | float) or not 0 < asked < math.inf:
        raise RequestError(f"gpu_memory is {asked!r}: give bytes, or a fraction of the GPU's memory such as 0.9.")
    return min(int(asked * total) if asked <= 1 else int(asked), total)
