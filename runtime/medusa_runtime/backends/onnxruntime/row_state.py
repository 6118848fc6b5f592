"""The state of rows besides their caches, in host memory: lengths, drafts, pending entries and sampling parameters.

A step writes the next state to arrays of its own, which become the state once the step has succeeded. So a step that
fails leaves the rows as they were: what it wrote to their caches is behind their committed entries.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.backends.base import StepResult
from medusa_runtime.backends.onnxruntime.binding import Bound
from medusa_runtime.bundles.bundle import Bundle
from medusa_runtime.bundles.contract import IS_LONG, RANKED_PLACES, fixed_shape, pending_specs, ranking_outputs
from medusa_runtime.errors import BackendError
from medusa_runtime.sampling import Draws, SamplingRows


class RowState:
    """Arrays of all rows that are inputs or outputs of a session.

    Args:
        bundle: The bundle.
        rows: The number of rows (B).
        inputs: Names of the session's inputs.
        outputs: Names of the session's outputs.
        pending: True if pending entries are kept here, where the session has them; False if a device keeps them.

    Attributes:
        bound: The memory to bind the session to.
        lengths: Committed entries, [B].
        drafts: The trees to verify next, [B, T].
        result: The result of the last step.
        pending: Pending entries of each group of states, [B, n·N, M, d]; empty if they aren't kept here.
        path: The nodes that the last step accepted, [B, M + 1]; None if the graph keeps them to itself.
        is_prefill: The rows that took in a chunk in the last step, [B].
        is_long: The rows of long requests, [B].
    """

    def __init__(
        self, bundle: Bundle, rows: int, inputs: Collection[str], outputs: Collection[str], *, pending: bool
    ) -> None:
        self._bundle, self._rows = bundle, rows
        self._next: list[
            tuple[NDArray[Any], NDArray[Any]]
        ] = []  # the state that a step reads, and the one that it writes
        self.bound: list[Bound] = []
        tokens = (rows, bundle.slots.most_committed)
        self.is_prefill = self._bind(np.zeros(rows, np.bool_), input_name="is_prefill")
        self._num_tokens = self._bind(np.zeros(rows, np.int64), input_name="num_tokens")
        self.is_long = np.zeros(rows, np.bool_)
        if bundle.model.short_positions is not None:
            self._bind(self.is_long, input_name=IS_LONG.name)
        self.lengths = self._bind_state(np.zeros(rows, np.int64), "cache_lengths", "next_cache_lengths")
        self.drafts = self._bind_state(np.zeros((rows, bundle.tree.size), np.int64), None, "next_input_ids")
        self.pending: list[NDArray[Any]] = []
        for spec in pending_specs(bundle.states, bundle.dtype):
            if pending and spec.name in inputs:
                entries = np.zeros(fixed_shape(spec, {"batch": rows}), spec.dtype)
                self.pending.append(self._bind_state(entries, spec.name, f"next_{spec.name}"))
        self.path: NDArray[np.int64] | None = None
        if "accepted_path" in outputs:
            self.path = self._bind(np.zeros(tokens, np.int64), output="accepted_path")
        self._sampling = SamplingRows.of(bundle, rows) if bundle.sampling else None
        logprobs = None
        if self._sampling is not None:
            logprobs = self._bind(np.zeros(tokens, np.float32), output="logprobs")
            for name, array in self._sampling.inputs.items():
                self._bind(array, input_name=name)
        emitted = self._bind(np.zeros(tokens, np.int64), output="tokens")
        self.result = StepResult(emitted, self._bind(np.zeros(rows, np.int64), output="count"), logprobs)
        self._varying = {spec.name: spec for spec in bundle.inputs if spec.name in ("input_ids", "exponentials")}
        self._by_width: dict[tuple[str, int], NDArray[Any]] = {}
        self._rankings = ranking_outputs(bundle.model.vocab_size) if bundle.top_logprobs else ()
        self._none_ranked = [self._rankings_of(count, 0) for count in range(rows + 1)]
        self._ranked = 0  # places of the step that is prepared (Q)

    def _bind(self, array: NDArray[Any], *, input_name: str | None = None, output: str | None = None) -> NDArray[Any]:
        self.bound.append(Bound(input_name, output, array))
        return array

    def _bind_state(self, array: NDArray[Any], input_name: str | None, output: str) -> NDArray[Any]:
        """Binds the array of a state that a step reads, and a second array for the state that the step writes."""
        if input_name is not None:
            self._bind(array, input_name=input_name)
        self._next.append((array, self._bind(np.zeros_like(array), output=output)))
        return array

    def assign(self, row: int, draws: Draws | None) -> None:
        """Gives a row to a request, for ``Backend.assign``."""
        if self._sampling is not None:
            self._sampling.assign(row, draws)
        elif draws is not None:
            raise BackendError("This bundle is greedy only: it can't sample.")

    def write_inputs(
        self, size: int, prompts: Mapping[int, Sequence[int]], rows: Sequence[int]
    ) -> dict[str, NDArray[Any]]:
        """Writes the inputs of a step of some rows.

        Returns:
            The inputs that have another width in each step, [B, width, …], by name. All others are in ``bound``.
        """
        # First of all, as a grammar may replace drafts.
        drawn = {} if self._sampling is None else self._write_sampling(self._sampling, size, prompts, rows)
        ids = self._of_width("input_ids", size, np.int64)
        for row in rows:
            prompt = prompts.get(row)
            if prompt is None:
                drafted = self.drafts[row, :size]
                ids[row, : len(drafted)] = drafted
            else:
                ids[row, : len(prompt)] = prompt
                ids[row, len(prompt) :] = 0
            self.is_prefill[row] = prompt is not None
            self._num_tokens[row] = size if prompt is None else len(prompt)
        return {"input_ids": ids, **drawn}

    def _write_sampling(
        self, sampling: SamplingRows, size: int, prompts: Mapping[int, Sequence[int]], rows: Sequence[int]
    ) -> dict[str, NDArray[Any]]:
        """Writes random numbers and constraints; gives the inputs that have another width in each step."""
        width = sampling.width(size, prompts, rows)
        exponentials = self._of_width("exponentials", width, np.float32)
        if width:
            sampling.write(exponentials, self.lengths, prompts)
        places = sampling.ranked_places(size, prompts, rows)
        self._ranked = places[RANKED_PLACES.name].shape[1] if places else 0
        inputs = {"exponentials": exponentials, **places}
        if sampling.constraints is not None:
            inputs |= sampling.constraints.of_step(size, width, prompts, rows, lambda: self.drafts)
        return inputs

    def _of_width(self, name: str, width: int, dtype: type[np.generic]) -> NDArray[Any]:
        """An array for one width: the same one each time for the widths of trees, a new one for chunks of a prompt."""
        array = self._by_width.get((name, width))
        if array is None:
            free = {"batch": self._rows, "sequence": width, "draws": width}
            array = np.zeros(fixed_shape(self._varying[name], free), dtype)
            if width <= self._bundle.tree.size:
                self._by_width[name, width] = array
        return array

    def new_rankings(self, count: int) -> dict[str, NDArray[Any]]:
        """Arrays for the most likely tokens that the next step of ``count`` rows gives, by output.

        In a step in which no row asks for them, the arrays are empty, and the same ones each time.
        """
        return self._rankings_of(count, self._ranked) if self._ranked else self._none_ranked[count]

    def _rankings_of(self, count: int, ranked: int) -> dict[str, NDArray[Any]]:
        sizes = {"batch": count, "ranked": ranked}
        return {spec.name: np.zeros(fixed_shape(spec, sizes), spec.dtype) for spec in self._rankings}

    def take_rankings(self, rankings: Mapping[str, NDArray[Any]], rows: list[int]) -> None:
        """Makes the most likely tokens that a step gave for these rows a part of ``result``."""
        if not self._ranked and self.result.top_tokens is None:
            return
        given = {}
        for name, array in rankings.items():
            if array.size:
                given[name] = np.zeros((self._rows, *array.shape[1:]), array.dtype)
                given[name][rows] = array
        self.result = replace(self.result, top_tokens=given.get("top_tokens"), top_logprobs=given.get("top_logprobs"))

    def commit(self, rows: list[int] | None) -> None:
        """Makes the state that a step wrote the state of these rows; all rows if None. Other rows keep theirs."""
        for array, following in self._next:
            if rows is None:
                np.copyto(array, following)
            else:
                array[rows] = following[rows]

    def scrub(self, row: int) -> None:
        """Sets the pending entries from before a row's entry 0 to zero."""
        for entries in self.pending:
            entries[row, :, : self._bundle.slots.before_first(int(self.lengths[row]))] = 0


class StagedRows:
    """Copies of a state's arrays for steps of some rows: these come first, in the order in which their caches are.

    Args:
        bound: The arrays of all rows.
    """

    def __init__(self, bound: Sequence[Bound]) -> None:
        self._pairs = [(item, item.array, np.zeros_like(item.array)) for item in bound if item.array is not None]

    def bound(self, count: int) -> list[Bound]:
        """The memory to bind the session to for steps of ``count`` rows."""
        return [Bound(item.input, item.output, staged[:count]) for item, _, staged in self._pairs]

    def gather(self, rows: list[int]) -> None:
        """Copies the inputs of these rows here."""
        for item, array, staged in self._pairs:
            if item.input is not None:
                staged[: len(rows)] = array[rows]

    def scatter(self, rows: list[int]) -> None:
        """Copies the outputs of these rows back."""
        for item, array, staged in self._pairs:
            if item.output is not None:
                array[rows] = staged[: len(rows)]
