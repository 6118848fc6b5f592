"""Decodes token ids to text as they come. It returns only text that later tokens can't change, up to a stop string.

The law of a ``TextStream``: the returned pieces, joined, are ``Tokenizer.decode`` of all its ids, no matter how the ids
are divided into pushes. With stop strings, it is that text up to the first stop string. The first is the one that ends
first; of several that end at the same place, the longest. To keep the law, text is held back

- while a UTF-8 character is unfinished;
- during a run of byte tokens (``<0xE2>``), as in Llama 2. They decode together: one invalid byte changes the text of
  the whole run, so that the text is final only when another token follows the run;
- while it may be the start of a stop string, or of spaces that the tokenizer's clean-up removes.

A stop string that holds special tokens is searched for in the text with these tokens in their places. The place of a
special token is behind the text that the tokens before it would give if no more tokens came.

The law holds for byte-level decoders. It also holds for decoders whose steps, except ByteFallback, Fuse and Strip, look
at one token at a time. These are all tokenizers of causal models that we know. The cost per token does not depend on
the length of the text.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from itertools import takewhile
from typing import Protocol

from medusa_runtime.text.stop_strings import StopFinder, check_stop
from medusa_runtime.text.tokenizer import Tokenizer, clean_up_spaces

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Decodes tokens as they come, and ends at a stop string.

    With ``prompt_ids``, the stream is the text that follows the prompt, its first space included. It is
    ``decode(prompt_ids + ids)`` without the first ``len(decode(prompt_ids))`` characters. A character that the prompt
    leaves unfinished belongs to the stream.

    Args:
        tokenizer: The tokenizer.
        stop: A stop string, or several.
        skip_special_tokens: True if special tokens are left out of the text.
        prompt_ids: The tokens before the stream.
        shown_ids: Special tokens that are part of the text, although the others are left out.

    Attributes:
        consumed: Number of tokens that were decoded, the one that completed the stop string included.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: str | Sequence[str] = (),
        skip_special_tokens: bool = True,
        prompt_ids: Sequence[int] = (),
        shown_ids: frozenset[int] = frozenset(),
    ) -> None:
        skipped = tokenizer.special_ids - shown_ids if skip_special_tokens else frozenset[int]()
        kind = _ByteDecoder if tokenizer.decoder_steps == ("ByteLevel",) else _WindowDecoder
        self._decoder: _Decoder = kind(tokenizer, skipped, prompt_ids)
        self._clean_up = _CleanUp() if tokenizer.cleans_up else None
        stops = check_stop(stop)
        unseen = {name: token for name, token in tokenizer.special_tokens.items() if token in skipped} if stops else {}
        self._stops = StopFinder(stops, unseen)
        self._held_tokens = _HeldTokens()
        self._skipped = skipped
        self._emitted: list[str] = []
        self._finished = False
        self.consumed = 0

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended the text; None so far."""
        return self._stops.found

    @property
    def text(self) -> str:
        """All text returned so far."""
        self._emitted = ["".join(self._emitted)]
        return self._emitted[0]

    def push(self, token_ids: Iterable[int]) -> str:
        """Takes tokens, up to the one that completes a stop string. Returns the text that has become final.

        Raises:
            RequestError: An id is negative or exceeds 32 bits.
            RuntimeError: The stream is finished.
        """
        if self._finished:
            raise RuntimeError("This text stream is finished: make a new one.")
        return self._emit(self._advance(token_id) for token_id in token_ids)

    def finish(self) -> str:
        """Ends the stream. Returns the text that was held back; an unfinished character becomes U+FFFD."""
        if self._finished:
            return ""
        self._finished = True
        return self._emit(self._last())

    def _advance(self, token_id: int) -> str:
        if self._stops.found is not None:
            return ""
        text = self._decoder.feed(int(token_id))
        self.consumed += 1
        if self._clean_up:
            text = self._clean_up.feed(text)
        if not self._stops.sees_tokens:
            return self._stops.feed(text)
        settled = self._held_tokens.between(text, self._pending() if self._held_tokens else "")
        before = self._feed(self._stops, settled)
        if token_id not in self._skipped or self.stopped_by is not None:
            return before
        self._held_tokens.add(token_id, len(self._pending()))
        return before + self._look_ahead()

    def _pending(self) -> str:
        """The text that would follow if no more tokens came."""
        text = self._decoder.peek()
        return self._clean_up.peek(text) if self._clean_up else text

    def _look_ahead(self) -> str:
        """Returns the text that was held back, if the special token behind it completes a stop string."""
        pending = self._pending()
        if not pending:
            return self._feed(self._stops, self._held_tokens.between("", ""))
        ahead = copy(self._stops)
        *before, last = list(copy(self._held_tokens).between(pending, ""))
        text = self._feed(ahead, before)
        early = ahead.found  # found in text that later tokens may still change, so it does not count yet
        text += self._feed(ahead, [last])
        if early is not None or ahead.found is None:
            return ""
        self._stops = ahead
        return text

    def _last(self) -> Iterable[str]:
        text = self._decoder.finish()
        if self._clean_up:
            text = self._clean_up.feed(text) + self._clean_up.finish()
        yield self._feed(self._stops, self._held_tokens.between(text, ""))
        yield self._stops.finish()

    @staticmethod
    def _feed(stops: StopFinder, pieces: Iterable[str | int]) -> str:
        return "".join(stops.feed(piece) if isinstance(piece, str) else stops.feed_token(piece) for piece in pieces)

    def _emit(self, texts: Iterable[str]) -> str:
        text = "".join(texts)
        self._emitted.append(text)
        return text


class _HeldTokens:
    """Special tokens that came while text was held back, and the place of each in the text to come."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, int]] = []  # (place, token id)

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def __copy__(self) -> _HeldTokens:
        other = _HeldTokens()
        other._waiting = list(self._waiting)
        return other

    def add(self, token_id: int, place: int) -> None:
        """Adds a token whose place is behind the next ``place`` characters."""
        self._waiting.append((place, token_id))

    def between(self, text: str, pending: str) -> Iterator[str | int]:
        """Pieces of text that has become final, with the tokens whose places it reaches between them.

        Args:
            text: The text that has become final.
            pending: The text that is still held back. Tokens behind it stay held.
        """
        taken = 0
        while self._waiting and (not pending or self._waiting[0][0] <= len(text)):
            place, token_id = self._waiting.pop(0)
            place = min(max(place, taken), len(text))
            if place > taken:
                yield text[taken:place]
            yield token_id
            taken = place
        self._waiting = [(place - len(text), token_id) for place, token_id in self._waiting]
        if taken < len(text):
            yield text[taken:]


class _Decoder(Protocol):
    def feed(self, token_id: int) -> str:
        """Takes a token. Returns the text that has become final."""

    def peek(self) -> str:
        """The text that ``finish`` would return. More tokens may follow."""

    def finish(self) -> str:
        """Returns the text that was held back."""


class _ByteDecoder:
    """Decodes tokens of byte-level tokenizers: each token stands for bytes of UTF-8 text."""

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

    def peek(self) -> str:
        return self._utf8.getstate()[0].decode(errors="replace")

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)

    def _bytes(self, token_id: int) -> bytes:
        return b"" if token_id in self._skipped else self._tokenizer.token_bytes(token_id)


class _WindowDecoder:
    """Decodes tokens of all other tokenizers: decodes a few settled tokens and the new ones, returns the added text.

    The settled tokens stand in for all earlier tokens. Without them, the decoder would treat the new tokens as the
    start of a text.
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

    def peek(self) -> str:
        return self._decode(self._ids)[len(self._shown) :]

    def finish(self) -> str:
        return self.peek()

    def _hold_torn_end(self) -> bool:
        """True if the prompt may end within a character. Its bytes then count as text of the stream."""
        run = sum(1 for _ in takewhile(self._is_byte, reversed(self._ids)))
        if run and self._decode(self._ids[-run:]) == _REPLACEMENT * run:
            self._shown = self._shown[:-run]
        unfinished = self._is_unfinished(self._shown)
        if unfinished:
            self._shown = self._shown[:-1]
        return run > 0 or unfinished

    def _slide(self, text: str) -> None:
        """Keeps as few last tokens as have any text: one, or two if the decoder drops the first."""
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
        """Delays the next decoding in proportion to the window's size, so a window that can't slide stays cheap."""
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
    """Applies ``clean_up_spaces`` to a text that comes in pieces."""

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

    def peek(self, text: str) -> str:
        """The text that would be returned if ``text`` were the last piece."""
        return clean_up_spaces(self._held + text)

    def finish(self) -> str:
        cleaned = clean_up_spaces(self._held)
        self._held = ""
        return cleaned

    def _is_safe(self, cut: int) -> bool:
        """True if no clean-up reaches across a cut.

        Clean-ups begin with a space and touch at most three more characters.
        """
        before, behind = self._held[cut - 1], self._held[cut + 1]
        if self._held[cut] != " ":
            return cut >= 3 and " " not in self._held[cut - 3 : cut]
        if before == " ":
            return behind == " "
        return before != "'" and behind != "'"
