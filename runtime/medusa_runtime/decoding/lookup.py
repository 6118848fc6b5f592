"""Lookup: proposes the tokens that followed when the text had the same last tokens before.

Answers quote their prompt and repeat themselves, above all names and code. There, lookup is right more often than any
head (prompt lookup decoding; LLMA, arXiv 2304.04487). It costs one dictionary. A lookup hit takes the place of the
heads' first candidates, which move up by one rank.
"""

from __future__ import annotations

from collections.abc import Iterable

from medusa_runtime.tuning import LONGEST_MATCH, PLACES, SHORTEST_MATCH


class TokenLookup:
    """A text as tokens, with the last place of each pair of tokens.

    Args:
        tokens: The first tokens of the text.
    """

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._tokens: list[int] = []
        self._last: dict[tuple[int, int], int] = {}
        # For each place: the place before it at which the same pair of tokens ended; -1 if there is none.
        self._before: list[int] = []
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Appends tokens."""
        for token in tokens:
            place = len(self._tokens)
            self._tokens.append(token)
            before = -1
            if place:
                pair = (self._tokens[place - 1], token)
                before = self._last.get(pair, -1)
                self._last[pair] = place
            self._before.append(before)

    def find(self, count: int) -> list[int]:
        """The ``count`` tokens that followed the last tokens of the text before; an empty list if they are new.

        If fewer tokens follow that place, they are repeated as often as needed.
        """
        tokens, end = self._tokens, len(self._tokens) - 1
        place = self._before[end] if tokens and count > 0 else -1
        best, longest = -1, 0
        for _ in range(PLACES):
            if place < 0:
                break
            match = SHORTEST_MATCH
            while match < min(LONGEST_MATCH, place + 1) and tokens[place - match] == tokens[end - match]:
                match += 1
            if match > longest:
                best, longest = place, match
            if longest == LONGEST_MATCH:
                break
            place = self._before[place]
        return [tokens[best + 1 + i % (end - best)] for i in range(count)] if best >= 0 else []
