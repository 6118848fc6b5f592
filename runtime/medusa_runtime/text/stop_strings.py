"""Checks stop strings, and finds them in a text that comes in pieces.

A stop string may hold special tokens, which are not part of the text: ``<|im_end|>``, or ``</s><|user|>``. Each of
these tokens is then one symbol, which only that token matches. All other stop strings are searched for in the text
alone.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from medusa_runtime.errors import RequestError
from medusa_runtime.text.limits import MAX_STOP_CHARACTERS, MAX_STOP_STRINGS, shown

# A character of the text, or the id of a special token.
Symbol = str | int


def check_stop(stop: str | Sequence[str]) -> tuple[str, ...]:
    """The stop strings of a request, without duplicates. A single string is one stop string.

    Raises:
        RequestError: A stop string is empty or not a string, or there are too many or too long stop strings.
    """
    stops = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, Sequence) or isinstance(stops, (bytes, bytearray, memoryview)):
        raise RequestError(f"The stop strings must be a list of strings, but got {type(stop).__name__}.")
    if len(stops) > MAX_STOP_STRINGS:
        raise RequestError(f"There are {len(stops):,} stop strings: give {MAX_STOP_STRINGS} at most.")
    for entry in stops:
        if not isinstance(entry, str):
            raise RequestError(f"A stop string must be a string, but got {shown(entry)}.")
        if not entry:
            raise RequestError("A stop string is empty and would end every text at once: leave it out.")
    characters = sum(map(len, stops))
    if characters > MAX_STOP_CHARACTERS:
        raise RequestError(
            f"The stop strings have {characters:,} characters together: give {MAX_STOP_CHARACTERS:,} at most."
        )
    return tuple(dict.fromkeys(stops))


def symbols_of(stops: Sequence[str], special_tokens: Mapping[str, int]) -> dict[str, list[Symbol]]:
    """The stop strings that hold special tokens, as sequences of symbols, by stop string.

    If several special tokens match at one position, the longest is taken.

    Args:
        stops: The stop strings.
        special_tokens: Ids of the special tokens, by their text.
    """
    longest_first = sorted(filter(None, special_tokens), key=len, reverse=True)
    if not stops or not longest_first:
        return {}
    pattern = re.compile("|".join(map(re.escape, longest_first)))
    found = {}
    for stop in stops:
        symbols: list[Symbol] = []
        end = 0
        for match in pattern.finditer(stop):
            symbols += [*stop[end : match.start()], special_tokens[match.group()]]
            end = match.end()
        if end:
            found[stop] = [*symbols, *stop[end:]]
    return found


@dataclass(frozen=True)
class _Match:
    """A stop string that was found, and the number of its characters that are part of the text."""

    stop: str
    characters: int


class _Automaton:
    """Finds the first of several sequences of symbols in a text (Aho and Corasick, 1975). Searching does not change it.

    Attributes:
        characters: Per state, the number of last characters of the text that may begin a stop string.
        matches: Per state, the longest stop string that ends there; None if none does.
    """

    def __init__(self, stops: Mapping[str, Sequence[Symbol]]) -> None:
        self.characters = [0]
        self.matches: list[_Match | None] = [None]
        self._next: list[dict[Symbol, int]] = [{}]
        self._fallback = [0]
        for stop, symbols in stops.items():
            self._add(stop, symbols)
        self._link()

    def step(self, state: int, symbol: Symbol) -> int:
        """The state after one more symbol."""
        while state and symbol not in self._next[state]:
            state = self._fallback[state]
        return self._next[state].get(symbol, 0)

    def _add(self, stop: str, symbols: Sequence[Symbol]) -> None:
        state = 0
        for symbol in symbols:
            if symbol not in self._next[state]:
                self._next[state][symbol] = len(self._next)
                self._next.append({})
                self.characters.append(self.characters[state] + isinstance(symbol, str))
                self._fallback.append(0)
                self.matches.append(None)
            state = self._next[state][symbol]
        self.matches[state] = _Match(stop, self.characters[state])

    def _link(self) -> None:
        """Sets the fallback of each state: the longest other state that is a suffix of it. Shallow states go first."""
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            if self.matches[state] is None:
                self.matches[state] = self.matches[self._fallback[state]]
            for symbol, child in self._next[state].items():
                self._fallback[child] = self.step(self._fallback[state], symbol)
                queue.append(child)


class StopFinder:
    """Finds the stop string that ends first, in a text that comes in pieces with special tokens between them.

    If several stop strings end at the same place, the one with the most characters is found.

    Args:
        stops: The stop strings, checked.
        special_tokens: Ids of the special tokens that are not part of the text, by name.

    Attributes:
        found: The stop string that ended the text; None so far.
        sees_tokens: True if a stop string holds a special token. Then every special token must be given to
            ``feed_token``.
    """

    def __init__(self, stops: Sequence[str], special_tokens: Mapping[str, int] | None = None) -> None:
        with_tokens = symbols_of(stops, special_tokens or {})
        # Ordinary tokens may spell out a special token's name, so all stop strings are searched for in the text, too.
        self._text = _Automaton({stop: stop for stop in stops}) if stops else None
        self._tokens = _Automaton(with_tokens) if with_tokens else None
        self._text_state = self._tokens_state = 0
        self._held = ""
        self.found: str | None = None
        self.sees_tokens = bool(with_tokens)

    def feed(self, text: str) -> str:
        """Takes the next text. Returns the text that is certain to be before any stop string."""
        if self._text is None or self.found is not None:
            return text if self._text is None else ""
        held = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            self._text_state = self._text.step(self._text_state, character)
            match = self._text.matches[self._text_state]
            if self._tokens is not None:
                self._tokens_state = self._tokens.step(self._tokens_state, character)
                other = self._tokens.matches[self._tokens_state]
                if other is not None and (match is None or other.characters > match.characters):
                    match = other
            if match is not None:
                return self._cut(held[:end], match)
        return self._certain(held)

    def feed_token(self, token_id: int) -> str:
        """Takes a special token that follows all text so far. Returns text like ``feed``."""
        if self._tokens is None or self.found is not None:
            return ""
        self._tokens_state = self._tokens.step(self._tokens_state, token_id)
        match = self._tokens.matches[self._tokens_state]
        return self._certain(self._held) if match is None else self._cut(self._held, match)

    def finish(self) -> str:
        """The text that was held back, if the text ends here: it does not begin a stop string after all."""
        return "" if self.found is not None else self._held

    def _cut(self, text: str, match: _Match) -> str:
        self.found = match.stop
        return text[: len(text) - match.characters]

    def _certain(self, text: str) -> str:
        assert self._text is not None
        held = self._text.characters[self._text_state]
        if self._tokens is not None:
            held = max(held, self._tokens.characters[self._tokens_state])
        certain = len(text) - held
        self._held = text[certain:]
        return text[:certain]
