"""A prompt for tests: tokens of a vocabulary of 101, without repetition that lookup would find."""

from __future__ import annotations

PROMPT = [(7 * i * i + 3) % 101 for i in range(13)]
