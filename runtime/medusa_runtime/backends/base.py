"""The interface of backends. A backend runs the graph of a bundle.

A backend holds the state of a fixed number of rows: their caches, pending entries and drafted trees. The host sees the
tokens that a step emits, and how many entries each row has committed.

``Backend`` has the methods of every backend. Each capability is a protocol of its own, with a function that checks
whether a backend has it:

=================  =====================  ==============================================================
``StepsAhead``     ``can_step_ahead``     A step can be submitted before the previous one has ended.
``MovesRows``      ``can_move_rows``      Rows of a step become neighbours in memory; other rows cost nothing.
``CopiesRows``     ``can_copy_rows``      A row takes over the first entries of another one.
``GivesOutputs``   ``can_give_outputs``   Values inside the graph can be read after a step.
``FixedCapacity``  ``has_fixed_capacity`` A request that is too long is refused before it waits for a row.
``LongRows``       ``can_set_long``       Rows of long requests take rotary frequencies of their own.
``LimitsEdits``    ``limits_edits``       A request whose constraints name too many tokens ends alone.
=================  =====================  ==============================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeGuard

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.sampling import Draws


class Ranked(NamedTuple):
    """The most likely tokens at some places, in descending order.

    Attributes:
        tokens: [places, 20], or all tokens of a smaller vocabulary.
        logprobs: As ``tokens``, their log probabilities in the base model's own distribution.
    """

    tokens: NDArray[np.int64]
    logprobs: NDArray[np.float32]


class Emitted(NamedTuple):
    """The tokens that one row emits in a step, with their log probabilities.

    Attributes:
        tokens: The tokens.
        logprobs: Their log probabilities; None if the bundle is greedy only.
        ranked: The most likely tokens at these places; None if the step gave none. The next step overwrites them.
    """

    tokens: list[int]
    logprobs: list[float] | None = None
    ranked: Ranked | None = None


@dataclass(frozen=True)
class StepResult:
    """The tokens that one step emitted.

    Attributes:
        tokens: [rows, M + 1]; the first ``count[b]`` of row b are valid. The arrays are overwritten by the next step.
        count: [rows]. It is 0 for a row whose logits are not finite: that row emits nothing and keeps its state.
        logprobs: [rows, M + 1], log probabilities of these tokens in the base model's own distribution, for rows that
            were assigned ``Draws``; None if the bundle is greedy only.
        top_tokens: [rows, Q, 20], the most likely tokens at the first Q of these places, for rows whose ``Draws`` ask
            for them; undefined or None for others. A vocabulary of fewer tokens has all of them here.
        top_logprobs: As ``top_tokens``, their log probabilities in the base model's own distribution.
    """

    tokens: NDArray[np.int64]
    count: NDArray[np.int64]
    logprobs: NDArray[np.float32] | None = None
    top_tokens: NDArray[np.int64] | None = None
    top_logprobs: NDArray[np.float32] | None = None

    def emitted(self, row: int) -> Emitted:
        """Returns the valid tokens of a row."""
        count = int(self.count[row])
        logprobs = None if self.logprobs is None else self.logprobs[row, :count].tolist()
        ranked = None
        if self.top_tokens is not None and self.top_logprobs is not None:
            ranked = Ranked(self.top_tokens[row, :count], self.top_logprobs[row, :count])
        return Emitted(self.tokens[row, :count].tolist(), logprobs, ranked)


class Backend(Protocol):
    """Runs steps of one bundle over a fixed number of rows.

    **Room.** A step of S tokens needs M + L + S slots in every row that it writes to, L being the row's length
    (``SlotLayout.capacity``). Many backends compute all rows in every step and write S values behind the committed
    entries of rows that don't take part, too. So the caller reserves room for the longest of *all* rows before a step,
    unless the backend moves rows (``can_move_rows``): then for the longest row that takes part.
    """

    @property
    def name(self) -> str:
        """Library, version and device, for people and as the key of measured step times."""
        ...

    @property
    def rows(self) -> int:
        """The number of sequences that the backend holds (B)."""
        ...

    @property
    def capacity(self) -> int:
        """Slots per row of the caches (C)."""
        ...

    @property
    def max_tokens(self) -> int | None:
        """The most tokens of a prompt that one step takes in (S); None if there is no limit."""
        ...

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Committed entries of each row, [rows], in host memory; only to be read.

        While no step is in flight, this is always the same array, and later changes show in it.
        """
        ...

    @property
    def drafts(self) -> NDArray[np.int64]:
        """The tree that each row verifies next, [rows, T]; the caller may write other tokens to all nodes."""
        ...

    def reserve(self, capacity: int) -> None:
        """Makes sure that every row has at least ``capacity`` slots; all rows keep their entries.

        Raises:
            BackendError: There is no memory for it, or the capacity is fixed and smaller.
        """
        ...

    def reset(self, row: int) -> None:
        """Empties a row."""
        ...

    def truncate(self, row: int, length: int) -> None:
        """Cuts a row to its first ``length`` entries. Its next step has to be a prefill, as its draft is lost.

        Args:
            row: The row.
            length: Entries to keep, at most as many as the row has.

        Raises:
            BackendError: The device failed.
        """
        ...

    def scrub(self, row: int) -> None:
        """Overwrites everything that a row holds besides its committed entries with zeros.

        Attention reads slots that hold no committed entry with weight 0, and 0 · NaN is NaN. So a value that is not
        finite, from a rejected draft or an earlier request, would spoil the next step.

        With L committed entries these are the first M slots, all slots from M + L on, and the pending entries from
        before entry 0.
        """
        ...

    def assign(self, row: int, draws: Draws | None) -> None:
        """Sets how a row draws its tokens from its next step on. None stands for greedy, as rows are at first.

        Raises:
            BackendError: The bundle is greedy only.
        """
        ...

    def step(
        self, size: int, prompts: Mapping[int, Sequence[int]] | None = None, rows: Sequence[int] | None = None
    ) -> StepResult:
        """Runs one step.

        Args:
            size: Tokens per row (S). Rows in ``prompts`` take in up to S tokens; all other rows that take part verify
                the first S nodes of the tree that they drafted, at most T.
            prompts: Chunks of prompts by row, each of at most S tokens; only of rows that take part.
            rows: The rows that take part, all if None. The other rows keep their length, entries, pending entries and
                drafts; their places in the result are undefined.

        Raises:
            BackendError: A row has no room for the step, or the graph failed. Unless the device itself has failed, all
                rows are as they were before the step.
        """
        ...

    def close(self) -> None:
        """Gives all memory back."""
        ...


class StepsAhead(Backend, Protocol):
    """A backend that queues the next step on the device before the host has read the result of the last one.

    Two steps may be in flight. ``step``, ``reset``, ``truncate`` and ``copy`` wait for them and discard their tokens.
    """

    def submit(
        self, size: int, prompts: Mapping[int, Sequence[int]] | None = None, rows: Sequence[int] | None = None
    ) -> None:
        """The first half of ``step``: puts a step behind those in flight, without waiting for any.

        Raises:
            BackendError: The step has no room, there are two in flight already, or it can't be launched.
        """
        ...

    def collect(self) -> StepResult:
        """The second half of ``step``: waits for the oldest step in flight.

        Returns:
            The tokens that it emitted; valid until two more steps have been submitted.

        Raises:
            BackendError: No step is in flight, or the device failed.
        """
        ...


class MovesRows(Backend, Protocol):
    """A backend that makes the rows of a step neighbours in memory, so that the other rows cost nothing.

    ``step`` moves rows by itself where it has to. These methods let the caller choose when, and how much at a time.
    """

    def arrange(self, rows: Sequence[int], capacity: int) -> int:
        """Brings rows together, with room for at least ``capacity`` slots in each; all rows keep their entries.

        It may move other rows too, and give back memory that no row needs any more.

        Returns:
            The number of entries that were moved.

        Raises:
            BackendError: There is no memory for it; nothing has changed.
        """
        ...

    def prepare_arrange(self, rows: Sequence[int], capacity: int, at_most: int) -> bool:
        """Does a part of a long ``arrange`` ahead. It takes about as long as moving ``at_most`` entries.

        Rows may take steps between these calls, each where it is.

        Returns:
            True if ``arrange`` would take little time now; False if ``prepare_arrange`` has to be called again first.

        Raises:
            BackendError: There is no memory for it; nothing has changed.
        """
        ...


class CopiesRows(Backend, Protocol):
    """A backend that copies entries from one row to another."""

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies the first ``length`` entries of a row to another one. The next step of ``target`` must be a prefill.

        Args:
            source: A row with at least ``length`` entries; it keeps its state.
            target: A row with room for them; its own entries are lost. If it is ``source`` itself, it is truncated.
            length: Entries to copy; 0 empties ``target``.

        Raises:
            BackendError: The device failed.
        """
        ...


class LongRows(Backend, Protocol):
    """A backend that runs bundles whose model has other rotary frequencies for long requests."""

    def set_long(self, row: int, is_long: bool) -> None:
        """Sets the rotary frequencies of a row from its next step on: those of long requests, or else the usual ones.

        The entries that the row keeps must be of the same kind.

        Raises:
            BackendError: The device failed.
        """
        ...


class GivesOutputs(Backend, Protocol):
    """A backend that was opened with names of further outputs of its graph, and keeps their values after a step."""

    def extra_output(self, name: str) -> NDArray[Any]:
        """The value of one further output in the last step, [rows, …]; only after a step of all rows."""
        ...


class FixedCapacity(Backend, Protocol):
    """A backend whose caches never grow."""

    def check_capacity(self, capacity: int) -> None:
        """Refuses more slots per row than the caches have. Any thread may call it at any time.

        Raises:
            RequestError: The caches have fewer than ``capacity`` slots per row.
        """
        ...


class LimitsEdits(Backend, Protocol):
    """A backend whose steps take a limited number of edited tokens per row."""

    @property
    def max_edits(self) -> int:
        """The most tokens per row whose logits constraints may change (P). It never changes."""
        ...


class DiffersByRows(Backend, Protocol):
    """A backend that knows if its bundle's answers may depend on the tree size."""

    @property
    def rows_differ(self) -> bool:
        """True if weights are integers, and the bits of a token's logits depend on the tokens beside it in a step."""
        ...


def can_step_ahead(backend: Backend) -> TypeGuard[StepsAhead]:
    """True if a backend has ``submit`` and ``collect``."""
    return hasattr(backend, "submit")


def can_move_rows(backend: Backend) -> TypeGuard[MovesRows]:
    """True if a backend has ``arrange`` and ``prepare_arrange``."""
    return hasattr(backend, "arrange")


def can_copy_rows(backend: Backend) -> TypeGuard[CopiesRows]:
    """True if a backend has ``copy``."""
    return hasattr(backend, "copy")


def can_set_long(backend: Backend) -> TypeGuard[LongRows]:
    """True if a backend has ``set_long``."""
    return hasattr(backend, "set_long")


def can_give_outputs(backend: Backend) -> TypeGuard[GivesOutputs]:
    """True if a backend has ``extra_output``."""
    return hasattr(backend, "extra_output")


def has_fixed_capacity(backend: Backend) -> TypeGuard[FixedCapacity]:
    """True if a backend has ``check_capacity``."""
    return hasattr(backend, "check_capacity")


def limits_edits(backend: Backend) -> TypeGuard[LimitsEdits]:
    """True if a backend has ``max_edits``."""
    return hasattr(backend, "max_edits")


def rows_differ(backend: Backend) -> bool:
    """True if a backend says so (see ``DiffersByRows``)."""
    return getattr(backend, "rows_differ", False)
