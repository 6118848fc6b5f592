"""Prompts of a bench."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from medusa_export.common.errors import DatasetError


@dataclass(frozen=True)
class BenchPrompt:
    """A prompt and its kind.

    Attributes:
        category: The kind of request, such as ``code``.
        prompt: The user's message.
    """

    category: str
    prompt: str


def bench_prompts(path: Path | None = None) -> list[BenchPrompt]:
    """Reads prompts from JSON lines of ``category`` and ``prompt``.

    Args:
        path: The file. If None, the fixed prompts that come with the package.

    Raises:
        DatasetError: The file can't be read, or holds no prompts.
    """
    source: Path | Traversable = path if path is not None else files("medusa_export") / "data" / "bench_prompts.jsonl"
    try:
        rows = [json.loads(line) for line in source.read_text(encoding="utf-8").split("\n") if line.strip()]
        found = [BenchPrompt(str(row.get("category", "")), str(row["prompt"])) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DatasetError(f"{source} can't be read as JSON lines of category and prompt ({error!r}).") from error
    if not found:
        raise DatasetError(f"{source} holds no prompts.")
    return found
