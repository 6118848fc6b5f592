"""Guesses from the text itself: what followed the last tokens when they stood there before.

Answers quote their prompt and repeat themselves, names and code above all, and there a look at the text is right more
often than any head (prompt lookup decoding; LLMA, arXiv 2304.04487). It costs a dictionary, and the tree has
room for it: a guess takes the place of the heads' first candidates, which move up one place.
"""

from __future__ import annotations

from collections.abc import Iterable

# The end of the text has to have stood there before with at least so many tokens: single ones promise too little.
SHORTEST_MATCH = 2
# Of two places the one that has more in common with the end of the text counts, up to so many tokens.
LONGEST_MATCH = 8
# How far trees go down for guesses where heads have ended. Further down little is left, and a step costs more.
DEEPEST_GUESS = 8
# So many places are looked at, the latest first.
PLACES = 16


class TokenLookup:
    """A text, token by token, and where each pair of tokens in it stood last.

    Args:
        tokens: How it begins.
    """

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._tokens: list[int] = []
        self._last: dict[tuple[int, int], int] = {}
        self._before: list[int] = []  # where the pair that ends at a place ended the time before; -1 if nowhere
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Adds tokens at the end."""
        for token in tokens:
            place = len(self._tokens)
            self._tokens.append(token)
            before = -1
            if place:
                pair = (self._tokens[place - 1], token)
                before = self._last.get(pair, -1)
                self._last[pair] = place
            self._before.append(before)

    def guess(self, count: int) -> list[int]:
        """The next ``count`` tokens, if they are what followed before; none if the text's end is new.

        Where that place is so near that not enough follows, the text is taken to go round.
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
