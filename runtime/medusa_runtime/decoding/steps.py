"""Decoding steps of one row: what each verifies, and when it is submitted."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from medusa_runtime.backends.base import Backend, StepResult, can_step_ahead
from medusa_runtime.bundles.tree import Tree
from medusa_runtime.decoding.tree_choice import TreeChoice


class Step(NamedTuple):
    """A decoding step: the nodes that it verified, whether there was a guess from the text, and what came of it."""

    size: int
    guessed: bool
    result: StepResult


def decoding_steps(
    backend: Backend, choice: TreeChoice, is_sure: Callable[[], bool], retry: Callable[[], StepResult]
) -> Iterator[Step]:
    """Decoding steps without end; where the backend can, each is submitted before the one before it is looked at.

    So the device never waits for the host. A step that turns out to come after a stop is in vain, and discarded when
    the row is reset.

    Args:
        backend: What runs them.
        choice: How many nodes each verifies.
        is_sure: Whether one more step will be needed after the one under way, whatever that emits, unless the text
            stops: a step ahead never goes past the tokens asked for, nor past the caches' end.
        retry: Runs a plain step after steps that emitted nothing.
    """
    if not can_step_ahead(backend):
        while True:
            yield _emitting(choice.size([0]), backend.step, retry)
    submitted: deque[int] = deque()
    while True:
        wanted = 1 + is_sure()
        while len(submitted) < wanted:
            submitted.append(choice.size([0]))
            backend.submit(submitted[-1])
        step = Step(submitted.popleft(), guessed=False, result=backend.collect())
        while not step.result.count[0] and submitted:  # the state is as it was, so the one behind it may emit
            step = Step(submitted.popleft(), guessed=False, result=backend.collect())
        yield step if step.result.count[0] else Step(1, guessed=False, result=retry())


def guided_steps(
    backend: Backend,
    choice: TreeChoice,
    guess: Callable[[], Sequence[int]],
    tree: Tree,
    retry: Callable[[], StepResult],
) -> Iterator[Step]:
    """Decoding steps without end, each of which verifies a guess first if there is one.

    It takes the tokens of the last step to guess, so none is submitted ahead.

    Args:
        backend: What runs them.
        choice: How many nodes each verifies.
        guess: Guesses the next tokens.
        tree: The bundle's.
        retry: Runs a plain step after one that emitted nothing.
    """
    while True:
        guesses = guess()
        size = choice.size([0], [0] if guesses else [])
        tree.insert(guesses, backend.drafts[0], size)
        yield _emitting(size, backend.step, retry, guessed=bool(guesses))


def _emitting(
    size: int, run: Callable[[int], StepResult], retry: Callable[[], StepResult], *, guessed: bool = False
) -> Step:
    """A step of ``size`` nodes, or a plain one if that emits nothing."""
    result = run(size)
    return Step(size, guessed, result) if result.count[0] else Step(1, guessed=False, result=retry())
