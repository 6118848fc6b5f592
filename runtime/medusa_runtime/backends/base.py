"""What the engine asks of whatever runs the graph.

A backend holds the state of ``rows`` sequences: caches, pending entries, the drafted trees. The host
sees of a step only the emitted tokens and how many they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeGuard

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.sampling import Draws


@dataclass(frozen=True)
class StepResult:
    """What one step emitted.

    Attributes:
        tokens: [rows, M + 1]; row b holds ``count[b]`` valid ones. The views are valid until the next step.
        count: [rows]. A row whose logits are not finite has 0: it emits nothing and keeps the state that it had.
        logprobs: [rows, M + 1], log p of these tokens by the base model's own distribution, for rows that were
            assigned ``Draws``; None if the bundle is greedy only.
    """

    tokens: NDArray[np.int64]
    count: NDArray[np.int64]
    logprobs: NDArray[np.float32] | None = None

    def emitted(self, row: int) -> tuple[list[int], list[float] | None]:
        """The tokens that a row emits, and their log probabilities."""
        count = int(self.count[row])
        logprobs = None if self.logprobs is None else self.logprobs[row, :count].tolist()
        return self.tokens[row, :count].tolist(), logprobs


class Backend(Protocol):
    """Runs steps of one bundle over a fixed number of rows."""

    @property
    def name(self) -> str:
        """What runs the graph, for people and for the key of measured latencies."""
        ...

    @property
    def rows(self) -> int:
        """How many sequences it holds (B)."""
        ...

    @property
    def capacity(self) -> int:
        """Slots per row of the caches (C)."""
        ...

    @property
    def max_tokens(self) -> int | None:
        """The most tokens of a prompt that a step takes (S); None for any number."""
        ...

    @property
    def drafts(self) -> NDArray[np.int64]:
        """The tree that each row verifies next, [rows, T]; whoever knows better may write other guesses here."""
        ...

    def reserve(self, capacity: int) -> None:
        """Makes the caches at least so large, keeping what is in them.

        Raises:
            BackendError: There is no memory for it, or the capacity is fixed and smaller.
        """
        ...

    def reset(self, row: int) -> None:
        """Empties a row."""
        ...

    def scrub(self, row: int) -> None:
        """Overwrites with zeros what a row holds besides its committed entries.

        Attention reads slots that hold no committed entry with weight 0, and 0 · NaN is NaN. So a value that is not
        finite, of a rejected draft or of an earlier request, would reach the next step.

        Entry i of a row lies in slot M + i. With L committed entries, slots from M + L on and the first M are zeroed,
        and pending entries from before the row's first.
        """
        ...

    def assign(self, row: int, draws: Draws | None) -> None:
        """How a row draws its tokens from its next step on; None if it is greedy, as it is at first.

        Raises:
            BackendError: The bundle is greedy only.
        """
        ...

    def step(self, size: int, prompts: Mapping[int, Sequence[int]] | None = None) -> StepResult:
        """Runs one step.

        Args:
            size: S: rows in ``prompts`` prefill up to S tokens, all others verify the first S nodes of
                the tree that they drafted (at most T).
            prompts: Chunks of prompt by row, each of at most S tokens.

        Raises:
            BackendError: The graph failed.
        """
        ...

    def close(self) -> None:
        """Gives all memory back."""
        ...


class AheadBackend(Backend, Protocol):
    """A backend whose next step can be put into the device's queue before the last one has been looked at.

    ``step`` and ``reset`` wait for what is under way, and discard what it emits.
    """

    def submit(self, size: int, prompts: Mapping[int, Sequence[int]] | None = None) -> None:
        """The first half of ``step``: puts a step behind those under way, without waiting for any.

        Two steps may be under way.

        Raises:
            BackendError: The step doesn't fit, there are two already, or it can't be launched.
        """
        ...

    def collect(self) -> StepResult:
        """The other half: waits for the oldest step under way, and gives what it emitted, until two more are submitted.

        Raises:
            BackendError: None is under way, or the device failed.
        """
        ...


def can_step_ahead(backend: Backend) -> TypeGuard[AheadBackend]:
    """Whether a backend has ``submit`` and ``collect``."""
    return hasattr(backend, "submit")


class BatchBackend(Backend, Protocol):
    """A backend that runs some of its rows while others wait: what a service needs.

    A step that fails leaves all rows as they were.
    """

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Committed entries per row, [rows]."""
        ...

    def arrange(self, rows: Sequence[int], capacity: int) -> int:
        """Prepares for steps of these rows together, with room for so many slots in each; no row loses anything.

        It may move rows, and give back what none needs any more.

        Returns:
            How many entries were moved for it.

        Raises:
            BackendError: There is no memory for it; nothing has changed.
        """
        ...

    def approach(self, rows: Sequence[int], capacity: int, at_most: int) -> bool:
        """Does some of what ``arrange`` would take long for, about as long as it takes to move so many entries.

        Rows may go on meanwhile, each where it is.

        Returns:
            Whether ``arrange`` would be done soon; else it takes more such calls.

        Raises:
            BackendError: There is no memory for it; nothing has changed.
        """
        ...

    def step(
        self, size: int, prompts: Mapping[int, Sequence[int]] | None = None, rows: Sequence[int] | None = None
    ) -> StepResult:
        """Runs one step of some rows; the others keep their state, and their place in the result means nothing.

        Args:
            size: As for ``Backend``.
            prompts: As for ``Backend``; of rows that take part.
            rows: Rows that take part, all if None; ``arrange`` was called for them.

        Raises:
            BackendError: The graph failed.
        """
        ...

    def copy(self, source: int, target: int, length: int) -> None:
        """Makes the first ``length`` entries of one row those of another, where they have room; it has to prefill next.

        Both may be the same row, which then keeps no more than these.
        """
        ...
