"""A backend that runs ``MedusaStep`` in PyTorch: the reference that compiled graphs are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medusa_export.step.sampling import SamplingInputs
from medusa_export.step.step import MedusaStep, StepInputs, StepOutput
from medusa_runtime.backends.base import StepResult
from medusa_runtime.bundles.contract import fixed_shape, sampling_inputs
from medusa_runtime.bundles.slots import SlotLayout
from medusa_runtime.sampling import Draws, SamplingRows


class EagerBackend:
    """Runs steps in PyTorch, as a ``medusa_runtime`` backend.

    Args:
        step: The step to run.
        rows: The number of rows.

    Attributes:
        output: The whole output of the last step; None before the first step.
    """

    def __init__(self, step: MedusaStep, *, rows: int = 1) -> None:
        self._step = step
        self._shape = step.cache_shape
        self._slots = SlotLayout(step.tree.max_depth)
        self._rows = rows
        self._lengths = torch.zeros(rows, dtype=torch.int64)
        self._caches: list[Tensor] = []
        self._drafts = np.zeros((rows, step.tree.size), np.int64)
        self._sampling = SamplingRows(rows)
        self._pending: Tensor | None = None
        if margin := step.tree.max_depth:
            heads = self._shape.num_caches * self._shape.num_key_value_heads
            self._pending = torch.zeros(rows, heads, margin, self._shape.head_dim, dtype=step.model.dtype)
        self.output: StepOutput | None = None

    @property
    def name(self) -> str:
        return f"torch {torch.__version__}, CPU"

    @property
    def rows(self) -> int:
        return self._rows

    @property
    def capacity(self) -> int:
        return self._caches[0].shape[2] if self._caches else 0

    @property
    def max_tokens(self) -> int | None:
        return None

    @property
    def lengths(self) -> NDArray[np.int64]:
        return self._lengths.numpy()

    @property
    def drafts(self) -> NDArray[np.int64]:
        return self._drafts

    def reserve(self, capacity: int) -> None:
        if capacity <= self.capacity:
            return
        shape = (self._rows, self._shape.num_key_value_heads, capacity, self._shape.head_dim)
        grown = [torch.zeros(shape, dtype=self._step.model.dtype) for _ in range(self._shape.num_caches)]
        for new, old in zip(grown, self._caches, strict=False):
            new[:, :, : old.shape[2]] = old
        self._caches = grown

    def reset(self, row: int) -> None:
        self._lengths[row] = 0

    def truncate(self, row: int, length: int) -> None:
        if self._pending is not None and length:
            newest = int(self._lengths[row])
            for cache, pending in zip(self._caches, self._pending.chunk(len(self._caches), dim=1), strict=True):
                cache[row, :, self._slots.pending(newest)] = pending[row]
                pending[row] = cache[row, :, self._slots.pending(length)]
        self._lengths[row] = length

    def scrub(self, row: int) -> None:
        length = int(self._lengths[row])
        for cache in self._caches:
            cache[row, :, : self._slots.slot(0)] = 0
            cache[row, :, self._slots.slot(length) :] = 0
        if self._pending is not None:
            self._pending[row, :, : self._slots.before_first(length)] = 0

    def assign(self, row: int, draws: Draws | None) -> None:
        self._sampling.assign(row, draws)

    def step(
        self, size: int, prompts: Mapping[int, Sequence[int]] | None = None, rows: Sequence[int] | None = None
    ) -> StepResult:
        idle = [] if rows is None else [row for row in range(self._rows) if row not in rows]
        prompts = {**(prompts or {}), **dict.fromkeys(idle, ())}  # an idle row takes in a chunk of no tokens
        ids = torch.zeros(self._rows, size, dtype=torch.int64)
        num_tokens = torch.full((self._rows,), size)
        for row in range(self._rows):
            given = prompts.get(row, self._drafts[row, :size])
            ids[row, : len(given)] = torch.as_tensor(np.asarray(given))
            if row in prompts:
                num_tokens[row] = len(given)
        is_prefill = torch.tensor([row in prompts for row in range(self._rows)])
        sampling = self._sampling_inputs(size, prompts) if self._step.sampling else None
        with torch.no_grad():
            pending = () if self._pending is None else self._pending.chunk(len(self._caches), dim=1)
            output = self._step(
                StepInputs(
                    input_ids=ids,
                    num_tokens=num_tokens,
                    is_prefill=is_prefill,
                    cache_lengths=self._lengths,
                    past=self._caches,
                    pending=pending,
                    sampling=sampling,
                )
            )
        self._caches, self._pending = output.present, output.next_pending_kv
        self._lengths = output.next_cache_lengths
        taking_part = [row for row in range(self._rows) if row not in idle]
        self._drafts[taking_part] = output.next_input_ids.numpy()[taking_part]
        self.output = output
        logprobs = None if output.logprobs is None else output.logprobs.numpy()
        return StepResult(output.tokens.numpy(), output.count.numpy(), logprobs)

    def _sampling_inputs(self, size: int, prompts: Mapping[int, Sequence[int]]) -> SamplingInputs:
        width = self._sampling.width(size, prompts, range(self._rows))
        shape = fixed_shape(sampling_inputs(self._step.vocab_size)[0], {"batch": self._rows, "draws": width})
        exponentials = np.ones(shape, np.float32)
        self._sampling.write(exponentials, self._lengths.numpy(), prompts)
        inputs = {name: torch.from_numpy(array.copy()) for name, array in self._sampling.inputs.items()}
        return SamplingInputs(exponentials=torch.from_numpy(exponentials), **inputs)

    def close(self) -> None:
        self._caches = []
