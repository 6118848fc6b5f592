"""Greedy decoding in PyTorch whose state stays on the device: a step of each tree size is one CUDA graph.

``EagerBackend``, the reference, copies state between host and device in each step. Speed on a GPU is measured with this
module instead: a step is one launch, and the host reads nothing but the emitted tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medusa_export.step.eager import empty_caches
from medusa_export.step.sampling import SamplingInputs
from medusa_export.step.states import pending_by_state
from medusa_export.step.step import MedusaStep, StepInputs
from medusa_runtime.bundles.contract import constraint_inputs, fixed_shape, pending_specs, sampling_inputs

# Steps that run before one is captured: libraries take their memory and choose their kernels in them.
_WARM_UP = 2


class ReplayedSteps:
    """Runs greedy steps of one row, and replays them as CUDA graphs where the model is on a GPU.

    Args:
        step: The step. Its kernels must write to caches in place (``step.fused.FUSED``).
        capacity: C, slots of the row.
        capture: Replay steps as CUDA graphs; if not, their kernels are launched one by one.

    Attributes:
        device: The device of the model.
        lengths: [1], the number of committed entries.
    """

    def __init__(self, step: MedusaStep, capacity: int, *, capture: bool = True) -> None:
        self.device = step.model.device
        self._step = step
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pinned = self.device.type == "cuda"
        self._captures = capture and self._pinned
        self._pool = torch.cuda.graph_pool_handle() if self._captures else None
        with self.device:
            self.lengths = torch.zeros(1, dtype=torch.int64)
            self._is_long = torch.zeros(1, dtype=torch.bool)
            self._drafts = torch.zeros(1, step.tree.size, dtype=torch.int64)
            self._caches = empty_caches(step, 1, capacity)
            self._pending = [
                torch.zeros(fixed_shape(spec, {"batch": 1}), dtype=getattr(torch, spec.dtype))
                for spec in pending_specs(step.states, str(step.model.dtype).removeprefix("torch."))
            ]
            self._emitted = torch.zeros(1, step.tree.max_depth + 2, dtype=torch.int64)
        # The tokens that the host reads. The host need not wait for the copy to them if the memory is pinned.
        self._read = torch.zeros(self._emitted.shape, dtype=torch.int64, pin_memory=self._pinned)

    @torch.no_grad()
    def prefill(self, prompt: Sequence[int], *, chunk: int = 512) -> list[int]:
        """Takes in a prompt from the start of the row, and returns the first token of the answer."""
        self.lengths.zero_()
        self._is_long.fill_(len(prompt) > (self._step.short_positions or len(prompt)))
        for first in range(0, len(prompt), chunk):
            ids = torch.tensor([list(prompt[first : first + chunk])], device=self.device)
            self._advance(ids, prefill=True)
        self._copy_to_host()
        return self.read()

    def run(self, size: int) -> None:
        """Enqueues a step of ``size`` nodes, and returns without waiting for it."""
        if not self._captures:
            with torch.no_grad():
                self._advance(self._drafts[:, :size], prefill=False)
        else:
            if size not in self._graphs:
                self._graphs[size] = self._captured(size)
            self._graphs[size].replay()
        self._copy_to_host()

    def read(self) -> list[int]:
        """Waits for the last step, and returns the tokens that it emitted."""
        self.wait()
        count, *tokens = self._read[0].tolist()
        return [int(token) for token in tokens[:count]]

    def wait(self) -> None:
        """Waits for all steps."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def draft(self, tokens: Sequence[int]) -> None:
        """Replaces the draft: the token of each node, the root first."""
        self._drafts.copy_(torch.tensor([list(tokens)]))

    def _captured(self, size: int) -> torch.cuda.CUDAGraph:
        """Captures a step. It runs a few times before, so the state is put back afterwards.

        Entries that these runs write lie behind the row's end, and the next step overwrites them.
        """
        state = [self.lengths, self._drafts, *self._pending]
        kept = [tensor.clone() for tensor in state]
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream), torch.no_grad():
            for _ in range(_WARM_UP):
                self._advance(self._drafts[:, :size], prefill=False)
                for tensor, before in zip(state, kept, strict=True):
                    tensor.copy_(before)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()  # all graphs share the memory of values that last one step
        with torch.no_grad(), torch.cuda.graph(graph, pool=self._pool):
            self._advance(self._drafts[:, :size], prefill=False)
        return graph

    def _advance(self, ids: Tensor, *, prefill: bool) -> None:
        """Runs a step, and copies its state to the inputs of the next step."""
        with self.device:
            output = self._step(
                StepInputs(
                    input_ids=ids,
                    num_tokens=torch.full((1,), ids.shape[1], dtype=torch.int64),
                    is_prefill=torch.full((1,), prefill, dtype=torch.bool),
                    cache_lengths=self.lengths,
                    is_long=None if self._step.short_positions is None else self._is_long,
                    past=self._caches,
                    pending=pending_by_state(self._step.states, self._pending),
                    sampling=self._no_draws() if self._step.sampling else None,
                )
            )
        self._drafts.copy_(output.next_input_ids)
        self.lengths.copy_(output.next_cache_lengths)
        for pending, following in zip(self._pending, output.next_pending, strict=True):
            pending.copy_(following)
        self._emitted.copy_(torch.cat([output.count.unsqueeze(1), output.tokens], dim=1))

    def _copy_to_host(self) -> None:
        self._read.copy_(self._emitted, non_blocking=self._pinned)

    def _no_draws(self) -> SamplingInputs:
        """The sampling inputs of a greedy row."""
        vocab_size, sizes = self._step.vocab_size, {"batch": 1, "draws": 0, "edits": 0, "masks": 0}
        given = {
            spec.name: torch.zeros(fixed_shape(spec, sizes), dtype=getattr(torch, spec.dtype))
            for spec in (*sampling_inputs(vocab_size), *constraint_inputs(vocab_size))
        }
        given["top_p"] += 1
        given["repetition_penalty"] += 1
        return SamplingInputs.of(list(given.values()))
