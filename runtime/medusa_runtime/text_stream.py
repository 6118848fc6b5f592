"""Token ids to text, as they come: only text that later tokens can't change, cut before a stop string.

The law of a ``TextStream``: what it returns, joined, is ``Tokenizer.decode`` of all its ids, however they
are cut into pushes; with stop strings, that text cut before the first of them. The first is the one that
ends first, the longest of those that end together. To keep the law, text is held back

- while a UTF-8 character is unfinished;
- during a run of byte tokens (``<0xE2>``) as in Llama 2: they decode together, so that one wrong byte spoils
  the run, and the token behind it settles it;
- while it may be the start of a stop string, or of spaces that the tokenizer's clean-up removes.

It holds for byte-level decoders, and for those whose steps look at one token at a time but for ByteFallback,
Fuse and Strip: all tokenizers of causal models known to us. A token costs the same however long the text.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Protocol

from medusa_runtime.errors import RequestError
from medusa_runtime.tokenizer import Tokenizer, clean_up_spaces

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def check_stop(stop: str | Sequence[str]) -> tuple[str, ...]:
    """The stop strings of a request, each once; a single string is one stop string.

    Raises:
        RequestError: A stop string is empty or not a string.
    """
    stops = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, Sequence):
        raise RequestError(f"The stop strings must be a list of strings, but got {type(stop).__name__}.")
    for entry in stops:
        if not isinstance(entry, str):
            raise RequestError(f"A stop string must be a string, but got {entry!r}.")
        if not entry:
            raise RequestError("A stop string is empty and would end every text at once: leave it out.")
    return tuple(dict.fromkeys(stops))


class TextStream:
    """Decodes tokens as they come and ends at a stop string.

    With ``prompt_ids`` the stream is what follows the prompt, first space included: ``decode(prompt_ids + ids)``
    behind as many characters as ``decode(prompt_ids)`` has; a character that the prompt leaves unfinished belongs
    to the stream.

    Attributes:
        consumed: Number of tokens taken, the one that completed the stop string included.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: str | Sequence[str] = (),
        skip_special_tokens: bool = True,
        prompt_ids: Sequence[int] = (),
    ) -> None:
        skipped = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        kind = _ByteDecoder if tokenizer.decoder_steps == ("ByteLevel",) else _WindowDecoder
        self._decoder: _Decoder = kind(tokenizer, skipped, prompt_ids)
        self._clean_up = _CleanUp() if tokenizer.cleans_up else None
        self._stops = _StopFinder(check_stop(stop))
        self._emitted: list[str] = []
        self._finished = False
        self.consumed = 0

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended the text, None so far."""
        return self._stops.found

    @property
    def text(self) -> str:
        """All text returned so far."""
        self._emitted = ["".join(self._emitted)]
        return self._emitted[0]

    def push(self, token_ids: Iterable[int]) -> str:
        """Takes tokens up to the one that completes a stop string, and returns the text that has become final.

        Raises:
            RequestError: An id is negative or beyond 32 bits.
            RuntimeError: The stream was finished before.
        """
        if self._finished:
            raise RuntimeError("This text stream is finished: make a new one.")
        return self._emit(self._advance(token_id) for token_id in token_ids)

    def finish(self) -> str:
        """Returns the text held back; an unfinished character becomes U+FFFD, as in ``decode``."""
        if self._finished:
            return ""
        self._finished = True
        return self._emit(self._last())

    def _advance(self, token_id: int) -> str:
        if self._stops.found is not None:
            return ""
        text = self._decoder.feed(int(token_id))
        self.consumed += 1
        return self._stops.feed(self._clean_up.feed(text) if self._clean_up else text)

    def _last(self) -> Iterable[str]:
        text = self._decoder.finish()
        if self._clean_up:
            text = self._clean_up.feed(text) + self._clean_up.finish()
        yield self._stops.feed(text)
        yield self._stops.finish()

    def _emit(self, texts: Iterable[str]) -> str:
        text = "".join(texts)
        self._emitted.append(text)
        return text


class _Decoder(Protocol):
    def feed(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


class _ByteDecoder:
    """For byte-level tokenizers: a token is bytes, a text their UTF-8."""

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int], prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        tail = b""
        for token_id in reversed(prompt_ids):
            tail = self._bytes(token_id) + tail
            if len(tail) >= 3:  # an unfinished character has at most three bytes
                break
        self._utf8.decode(tail)

    def feed(self, token_id: int) -> str:
        return self._utf8.decode(self._bytes(token_id))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)

    def _bytes(self, token_id: int) -> bytes:
        return b"" if token_id in self._skipped else self._tokenizer.token_bytes(token_id)


class _WindowDecoder:
    """For all others: decodes the newest tokens behind a few settled ones, and returns what the new ones add.

    The settled tokens stand for all that went before: they absorb what a decoder does at the start of a text.
    """

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int], prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._byte_fallback = "ByteFallback" in tokenizer.decoder_steps
        self._byte_level = "ByteLevel" in tokenizer.decoder_steps
        self._ids = [token_id for token_id in prompt_ids if self._counts(token_id)]
        self._shown = self._decode(self._ids)
        self._due = 0
        if self._ids and not self._hold_torn_end():
            self._slide(self._shown)

    def feed(self, token_id: int) -> str:
        if not self._counts(token_id):
            return ""
        self._ids.append(token_id)
        if self._is_byte(token_id) or len(self._ids) < self._due:
            return ""
        text = self._decode(self._ids)
        if self._is_unfinished(text) or not text.startswith(self._shown):
            self._wait()
            return ""
        added = text[len(self._shown) :]
        self._slide(text)
        return added

    def finish(self) -> str:
        return self._decode(self._ids)[len(self._shown) :]

    def _hold_torn_end(self) -> bool:
        """Whether the prompt ends in bytes that the stream may go on with; those of a torn character are not shown."""
        run = sum(1 for _ in takewhile(self._is_byte, reversed(self._ids)))
        if run and self._decode(self._ids[-run:]) == _REPLACEMENT * run:
            self._shown = self._shown[:-run]
        unfinished = self._is_unfinished(self._shown)
        if unfinished:
            self._shown = self._shown[:-1]
        return run > 0 or unfinished

    def _slide(self, text: str) -> None:
        """Keeps the fewest last tokens that have a text of their own: one, or two where the first is swallowed."""
        for count in (1, 2):
            shown = self._decode(self._ids[-count:])
            if shown:
                self._ids = self._ids[-count:]
                self._shown = shown
                self._due = 0
                return
        self._shown = text
        self._wait()

    def _wait(self) -> None:
        """Puts off the next decoding in proportion to the window: a window that can't slide stays affordable."""
        self._due = len(self._ids) + 1 + len(self._ids) // 8

    def _counts(self, token_id: int) -> bool:
        return token_id not in self._skipped and self._tokenizer.token(token_id) is not None

    def _is_byte(self, token_id: int) -> bool:
        token = self._tokenizer.token(token_id) or ""
        return self._byte_fallback and token.startswith("<0x") and token.endswith(">")

    def _is_unfinished(self, text: str) -> bool:
        return self._byte_level and text.endswith(_REPLACEMENT)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up=False) if ids else ""


class _CleanUp:
    """``clean_up_spaces`` over a text that comes in pieces."""

    def __init__(self) -> None:
        self._held = ""
        self._searched = 1

    def feed(self, text: str) -> str:
        self._held += text
        for cut in range(len(self._held) - 2, self._searched - 1, -1):
            if self._is_safe(cut):
                cleaned = clean_up_spaces(self._held[:cut])
                self._held = self._held[cut:]
                self._searched = 1
                return cleaned
        self._searched = max(1, len(self._held) - 1)
        return ""

    def finish(self) -> str:
        cleaned = clean_up_spaces(self._held)
        self._held = ""
        return cleaned

    def _is_safe(self, cut: int) -> bool:
        """Whether no clean-up reaches across: before a space, or behind the three letters that one may touch."""
        before, behind = self._held[cut - 1], self._held[cut + 1]
        if self._held[cut] != " ":
            return cut >= 3 and " " not in self._held[cut - 3 : cut]
        if before == " ":
            return behind == " "
        return before != "'" and behind != "'"


class _StopFinder:
    """Finds the stop string that ends first in a text that comes in pieces (Aho and Corasick, 1975)."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.found: str | None = None
        self._held = ""
        self._state = 0
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._fallback = [0]
        self._ends: list[str | None] = [None]
        for stop in stops:
            self._add(stop)
        self._link()

    def feed(self, text: str) -> str:
        """The text that is certain to stand before any stop string."""
        if self.found is not None or len(self._next) == 1:
            return "" if self.found is not None else text
        held = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            self._state = self._step(self._state, character)
            self.found = self._ends[self._state]
            if self.found is not None:
                return held[: end - len(self.found)]
        certain = len(held) - self._depth[self._state]
        self._held = held[certain:]
        return held[:certain]

    def finish(self) -> str:
        """The text that was held back and begins no stop string after all."""
        return "" if self.found is not None else self._held

    def _add(self, stop: str) -> None:
        state = 0
        for character in stop:
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._fallback.append(0)
                self._ends.append(None)
            state = self._next[state][character]
        self._ends[state] = stop

    def _link(self) -> None:
        """Gives each state the longest other one that ends alike, shallow states first."""
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            if self._ends[state] is None:
                self._ends[state] = self._ends[self._fallback[state]]
            for character, child in self._next[state].items():
                self._fallback[child] = self._step(self._fallback[state], character)
                queue.append(child)

    def _step(self, state: int, character: str) -> int:
        while state and character not in self._next[state]:
            state = self._fallback[state]
        return self._next[state].get(character, 0)
