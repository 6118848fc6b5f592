"""The tokens of a request whose logits may change, and what the graph needs to know of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medusa_runtime.constraints.options import Constraints

_BIAS, _COUNT, _SEEN = range(3)  # the rows of ``Edits.values``


@dataclass(frozen=True)
class Edits:
    """The edited tokens of a row in one step.

    Attributes:
        tokens: [P], the tokens.
        values: [3, P], of each token: its bias, the number of times that it is in the answer, and 1 if it is anywhere
            in the text, else 0.
    """

    tokens: NDArray[np.int64]
    values: NDArray[np.float32]


class EditedTokens:
    """The edited tokens of one request.

    Args:
        constraints: The request's constraints.
        prompt_ids: The tokens of the prompt.
    """

    def __init__(self, constraints: Constraints, prompt_ids: Sequence[int]) -> None:
        self._has_penalties = constraints.has_penalties
        self._place: dict[int, int] = {}  # the place of each token in the arrays
        self._tokens = np.zeros(16, np.int64)
        self._values = np.zeros((3, 16), np.float32)
        biases = {**constraints.logit_bias, **dict.fromkeys(constraints.banned_token_ids, -np.inf)}
        for token, value in biases.items():
            place = self._of(token)
            self._values[_BIAS, place] = value
        if constraints.repetition_penalty != 1:
            for token in set(prompt_ids):
                place = self._of(token)
                self._values[_SEEN, place] = 1

    def most(self, drafted: int) -> int:
        """The most edited tokens that a step can have which verifies ``drafted`` tokens besides the root."""
        return len(self._place) + (drafted if self._has_penalties else 0)

    def extend(self, tokens: Sequence[int]) -> None:
        """Takes note of tokens that the answer grows by."""
        for token in tokens if self._has_penalties else ():
            place = self._of(token)
            self._values[_COUNT, place] += 1
            self._values[_SEEN, place] = 1

    def of_step(self, drafted: Sequence[int]) -> Edits:
        """The edited tokens of a step, at least one.

        Args:
            drafted: The tokens that the step verifies. Penalties may change their logits, too.
        """
        known = len(self._place)
        others = set(drafted) - self._place.keys() if self._has_penalties else set()
        if not known and not others:
            others = {0}  # a token that nothing happens to: a step without edited tokens has no constraints at all
        tokens = np.concatenate([self._tokens[:known], np.fromiter(others, np.int64)])
        return Edits(tokens, np.pad(self._values[:, :known], ((0, 0), (0, len(others)))))

    def _of(self, token: int) -> int:
        """The place of a token in the arrays, which grow as needed."""
        place = self._place.setdefault(int(token), len(self._place))
        if place == len(self._tokens):
            self._tokens = np.pad(self._tokens, (0, place))
            self._values = np.pad(self._values, ((0, 0), (0, place)))
        self._tokens[place] = token
        return place
