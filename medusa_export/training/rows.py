"""Reads files of prompts or conversations. Rows that can't be used are skipped, each with a reason."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medusa_export.common.errors import DatasetError
from medusa_export.training.conversations import Conversation
from medusa_export.training.row_parsing import TWICE, UnusableError, parsed_row

_LEADING = ("\ufeff", "\u200b")  # invisible characters that editors leave before a text
_NAMED = 5  # skipped rows that a summary names
_KEPT = 100  # skipped rows that a job's description names
# The first bytes of files that are not text.
_BINARY = {
    b"PAR1": "a Parquet file",
    b"\x1f\x8b": "compressed by gzip",
    b"PK": "a zip file",
    b"ARROW1": "an Arrow file",
}


@dataclass(frozen=True)
class Skipped:
    """A row that is not used.

    Attributes:
        source: The row's file and its place there, such as ``data.jsonl line 7``.
        reason: The reason why it can't be used.
    """

    source: str
    reason: str

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"

    @property
    def order(self) -> tuple[str, int]:
        """The sort key of skipped rows: file, and number of the line."""
        name, _, number = self.source.rpartition(" ")
        return name, int(number) if number.isdecimal() else 0


@dataclass(frozen=True)
class Reading:
    """The rows of one or several files.

    Attributes:
        conversations: The rows that can be used.
        skipped: The rows that can't be used.
    """

    conversations: list[Conversation]
    skipped: list[Skipped]

    @property
    def rows(self) -> int:
        """Number of all rows."""
        return len(self.conversations) + len(self.skipped)


def summary(skipped: Sequence[Skipped], rows: int) -> str:
    """A line with the number of skipped rows, and the reasons for the first of them.

    Args:
        skipped: The skipped rows.
        rows: Number of all rows.
    """
    named = "; ".join(map(str, skipped[:_NAMED]))
    more = f"; and {len(skipped) - _NAMED:,} more" if len(skipped) > _NAMED else ""
    return f"skipped {len(skipped):,} of {rows:,} rows: {named}{more}"


def facts(skipped: Sequence[Skipped], rows: int) -> dict[str, Any]:
    """Number and reasons of skipped rows, as JSON values for a job's description.

    Args:
        skipped: The skipped rows.
        rows: Number of all rows.
    """
    return {"rows": {"read": rows, "skipped": len(skipped), "first": [str(row) for row in skipped[:_KEPT]]}}


def check_skipped(skipped: Sequence[Skipped], rows: int, *, strict: bool) -> None:
    """Refuses data if no row can be used, or if ``strict`` is set and a row is skipped.

    Raises:
        DatasetError: The data is refused.
    """
    if skipped and len(skipped) == rows:
        raise DatasetError(f"No row can be used: {summary(skipped, rows)}.")
    if skipped and strict:
        raise DatasetError(f"With `strict=True`, no row is skipped, but this would be: {summary(skipped, rows)}.")


def read_conversations(path: Path) -> Reading:
    """Reads a file of prompts or conversations.

    A text file has a prompt per line. A JSON file has an array of objects, or an object per line. Each object has one
    of these:

    - ``messages`` (role, content);
    - ShareGPT's ``conversations`` (from, value);
    - UltraChat's ``data`` (texts of user and assistant in turn);
    - a prompt as ``prompt``, ``instruction`` (with ``input``), ``question`` or ``text``, and optionally an answer as
      ``completion``, ``response``, ``output`` or ``answer``.

    Files with the suffix .json, .jsonl or .ndjson are JSON. For other files the content decides.

    Raises:
        DatasetError: The file can't be read, or holds nothing that can be used.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{path} can't be read: {error}.") from error
    text = _decoded(path, data)
    found: list[Conversation] = []
    skipped: list[Skipped] = []
    rows = _json_rows(path, text) if _is_json(path, text) else _text_rows(text)
    for place, row in rows:
        source = f"{path.name} {place}"
        try:
            found.append(parsed_row(row, source))
        except UnusableError as error:
            skipped.append(Skipped(source, str(error)))
    if not found and not skipped:
        raise DatasetError(f"{path} holds no prompts: give one per line, or JSON objects with messages.")
    check_skipped(skipped, len(found) + len(skipped), strict=False)
    return Reading(found, skipped)


def _decoded(path: Path, data: bytes) -> str:
    """The text of a file. Bytes that are not UTF-8 become surrogates, so that only their rows are skipped."""
    for start, kind in _BINARY.items():
        if data.startswith(start):
            raise DatasetError(f"{path} is {kind}: give text, with a prompt per line, or JSON lines.")
    for mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        if data.startswith(mark):
            return data.decode("utf-16", errors="replace").removeprefix("\ufeff")
    return data.decode("utf-8", errors="surrogateescape").removeprefix("\ufeff")


def _is_json(path: Path, text: str) -> bool:
    """True if a file is JSON: by its suffix, or because its first line, or its whole text, is an object or array."""
    if path.suffix.lower() in (".json", ".jsonl", ".ndjson"):
        return True
    start = text.lstrip()
    if start[:1] not in ("[", "{"):
        return False
    for part in (start.split("\n", 1)[0], start):
        try:
            first = _loads(part)
        except ValueError:
            continue
        rows = first if isinstance(first, list) else [first]
        return bool(rows) and all(isinstance(row, dict) for row in rows)
    return False


def _text_rows(text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines(): a prompt may hold other line breaks
        if cleaned := _cleaned(line):
            yield f"line {number}", cleaned


def _json_rows(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """The rows of a JSON file, with their places. A row of invalid JSON is an ``UnusableError``."""
    if text.lstrip().startswith("["):
        try:
            rows = _loads(text)
        except ValueError as error:
            raise DatasetError(f"{path} is not valid JSON: {error}. The file is damaged or cut off.") from error
        yield from ((f"entry {number}", row) for number, row in enumerate(rows, 1))
        return
    lines = [(number, cleaned) for number, line in enumerate(text.split("\n"), 1) if (cleaned := _cleaned(line))]
    if len(lines) > 1 and lines[0][1].startswith("{"):
        try:
            _loads(lines[0][1])
        except ValueError:
            try:  # the file may be one object on several lines
                whole = _loads(text)
            except ValueError:
                pass
            else:
                yield "entry 1", whole
                return
    for number, line in lines:
        try:
            row = _loads(line)
        except ValueError as error:
            row = UnusableError(f"it is not valid JSON ({error})")
        yield f"line {number}", row


def _cleaned(line: str) -> str:
    """A line without spaces around it and invisible characters before it."""
    line = line.strip()
    while line.startswith(_LEADING):
        line = line[1:].lstrip()
    return line


def _loads(text: str) -> Any:
    """Parses JSON.

    Raises:
        ValueError: The text is not valid JSON, or is nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[Any, Any]:
    """A JSON object as a dictionary. If a key occurs twice, the entry ``TWICE`` names it."""
    found: dict[Any, Any] = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        found[TWICE] = next(key for key in keys if keys.count(key) > 1)
    return found
