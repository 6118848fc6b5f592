"""A backend that runs ``MedusaStep`` in PyTorch: the reference that compiled graphs are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medusa_export.step.sampling import SamplingInputs
from medusa_export.step.states import pending_by_state
from medusa_export.step.step import MedusaStep, StepInputs, StepOutput
from medusa_runtime.backends.base import StepResult
from medusa_runtime.bundles.contract import (
    RANKED_PLACES,
    constraint_inputs,
    fixed_shape,
    pending_specs,
    sampling_inputs,
)
from medusa_runtime.bundles.slots import SlotLayout
from medusa_runtime.constraints.rows import ConstraintRows
from medusa_runtime.sampling import Draws, SamplingRows


def empty_caches(step: MedusaStep, rows: int, capacity: int) -> list[Tensor]:
    """The caches of a step without entries, [rows, N, capacity, d] each, on the device of the model."""
    model = step.model
    return [
        torch.zeros(
            rows,
            state.shape[0],
            capacity,
            state.shape[1],
            dtype=model.dtype if state.dtype is None else getattr(torch, state.dtype),
            device=model.device,
        )
        for state in step.states
    ]


class EagerBackend:
    """Runs steps in PyTorch, as a ``medusa_runtime`` backend. Caches are on the device of the model.

    Args:
        step: The step to run.
        rows: The number of rows.

    Attributes:
        output: The whole output of the last step; None before the first step.
    """

    def __init__(self, step: MedusaStep, *, rows: int = 1) -> None:
        self._step = step
        self._slots = SlotLayout(step.tree.max_depth)
        self._rows = rows
        self._device = step.model.device
        self._lengths = torch.zeros(rows, dtype=torch.int64)
        self._caches: list[Tensor] = []
        self._drafts = np.zeros((rows, step.tree.size), np.int64)
        self._is_long = torch.zeros(rows, dtype=torch.bool)
        constraints = ConstraintRows(rows, step.vocab_size, step.tree.size) if step.sampling else None
        self._sampling = SamplingRows(rows, constraints, most_ranked=self._slots.most_committed * step.sampling)
        dtype = str(step.model.dtype).removeprefix("torch.")
        self._pending = [
            torch.zeros(fixed_shape(spec, {"batch": rows}), dtype=getattr(torch, spec.dtype), device=self._device)
            for spec in pending_specs(step.states, dtype)
        ]
        self.output: StepOutput | None = None

    @property
    def name(self) -> str:
        return f"torch {torch.__version__}, {self._device.type.upper()}"

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
        grown = empty_caches(self._step, self._rows, capacity)
        for new, old in zip(grown, self._caches, strict=False):
            new[:, :, : old.shape[2]] = old
        self._caches = grown

    def reset(self, row: int) -> None:
        self._lengths[row] = 0

    def truncate(self, row: int, length: int) -> None:
        if self._pending and length:
            newest = int(self._lengths[row])
            for cache, pending in zip(self._caches, pending_by_state(self._step.states, self._pending), strict=True):
                cache[row, :, self._slots.pending(newest)] = pending[row]
                pending[row] = cache[row, :, self._slots.pending(length)]
        self._lengths[row] = length

    def scrub(self, row: int) -> None:
        length = int(self._lengths[row])
        for cache in self._caches:
            cache[row, :, : self._slots.slot(0)] = 0
            cache[row, :, self._slots.slot(length) :] = 0
        for pending in self._pending:
            pending[row, :, : self._slots.before_first(length)] = 0

    def assign(self, row: int, draws: Draws | None) -> None:
        self._sampling.assign(row, draws)

    def set_long(self, row: int, is_long: bool) -> None:
        self._is_long[row] = is_long

    def step(
        self, size: int, prompts: Mapping[int, Sequence[int]] | None = None, rows: Sequence[int] | None = None
    ) -> StepResult:
        idle = [] if rows is None else [row for row in range(self._rows) if row not in rows]
        prompts = {**(prompts or {}), **dict.fromkeys(idle, ())}  # an idle row takes in a chunk of no tokens
        sampling = self._sampling_inputs(size, prompts) if self._step.sampling else None
        places = self._sampling.ranked_places(size, prompts, range(self._rows)).get(RANKED_PLACES.name)
        ids = torch.zeros(self._rows, size, dtype=torch.int64)
        num_tokens = torch.full((self._rows,), size)
        for row in range(self._rows):
            given = prompts.get(row, self._drafts[row, :size])
            ids[row, : len(given)] = torch.as_tensor(np.asarray(given))
            if row in prompts:
                num_tokens[row] = len(given)
        is_prefill = torch.tensor([row in prompts for row in range(self._rows)])
        # A device as a context costs more than a small operation does.
        device = nullcontext() if self._device == torch.get_default_device() else self._device
        with torch.no_grad(), device:
            output = self._step(
                StepInputs(
                    input_ids=ids.to(self._device),
                    num_tokens=num_tokens.to(self._device),
                    is_prefill=is_prefill.to(self._device),
                    cache_lengths=self._lengths.to(self._device),
                    is_long=None if self._step.short_positions is None else self._is_long.to(self._device),
                    past=self._caches,
                    pending=pending_by_state(self._step.states, self._pending),
                    sampling=sampling,
                    ranked_places=None if places is None else torch.from_numpy(places).to(self._device),
                )
            )
        self._caches, self._pending = output.present, output.next_pending
        self._lengths.copy_(output.next_cache_lengths)  # in place, as a caller may hold the array
        taking_part = [row for row in range(self._rows) if row not in idle]
        self._drafts[taking_part] = output.next_input_ids.cpu().numpy()[taking_part]
        self.output = output
        return StepResult(
            output.tokens.cpu().numpy(),
            output.count.cpu().numpy(),
            *(
                None if values is None else values.cpu().numpy()
                for values in (output.logprobs, output.top_tokens, output.top_logprobs)
            ),
        )

    def _sampling_inputs(self, size: int, prompts: Mapping[int, Sequence[int]]) -> SamplingInputs:
        width = self._sampling.width(size, prompts, range(self._rows))
        shape = fixed_shape(sampling_inputs(self._step.vocab_size)[0], {"batch": self._rows, "draws": width})
        exponentials = np.ones(shape, np.float32)
        self._sampling.write(exponentials, self._lengths.numpy(), prompts)
        assert self._sampling.constraints is not None
        constrained = self._sampling.constraints.of_step(size, width, prompts, range(self._rows), lambda: self._drafts)
        arrays = {"exponentials": exponentials, **self._sampling.inputs, **constrained}
        specs = (*sampling_inputs(self._step.vocab_size), *constraint_inputs(self._step.vocab_size))
        return SamplingInputs.of([torch.from_numpy(arrays[spec.name].copy()).to(self._device) for spec in specs])

    def close(self) -> None:
        self._caches = []
