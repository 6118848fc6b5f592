"""Numbered parts of a data set. Each is written atomically, so a job that was interrupted can continue."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from medusa_export.common.errors import DatasetError
from medusa_export.common.files import write_bytes

_NAME = re.compile(r"^(\d{6})-([0-9a-f]{16})\.jsonl$")


def to_jsonl(rows: Iterable[object]) -> bytes:
    """The rows as JSON, one per line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


class Parts:
    """The finished parts of a job, as files ``<number>-<digest>.jsonl``.

    Args:
        folder: The folder that holds the parts.

    Raises:
        DatasetError: Two files have the same number.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[int, Path] = {}
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if match := _NAME.match(path.name):
                number = int(match[1])
                if number in self._files:
                    raise DatasetError(
                        f"{path} and {self._files[number]} are the same part: delete both and run again."
                    )
                self._files[number] = path

    def __contains__(self, number: int) -> bool:
        return number in self._files

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._files))

    def __len__(self) -> int:
        return len(self._files)

    @property
    def first_missing(self) -> int:
        """The lowest number without a part."""
        return next(number for number in count() if number not in self._files)

    def path(self, number: int) -> Path:
        """Path of a part."""
        return self._files[number]

    def write(self, number: int, rows: Iterable[object]) -> None:
        """Adds a part.

        Raises:
            OutputError: The part can't be written. Existing parts stay.
        """
        data = to_jsonl(rows)
        path = self._folder / f"{number:06d}-{hashlib.sha256(data).hexdigest()[:16]}.jsonl"
        write_bytes(path, data)
        self._files[number] = path

    def read(self, number: int) -> list[Any]:
        """The rows of a part.

        Raises:
            DatasetError: The file can't be read, or was altered.
        """
        path = self._files[number]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DatasetError(f"{path} can't be read: {error}.") from error
        if hashlib.sha256(data).hexdigest()[:16] != path.stem.partition("-")[2]:
            raise DatasetError(f"{path} is damaged: delete it and run again to make this part again.")
        return [json.loads(line) for line in data.splitlines()]

    def rows(self) -> Iterator[Any]:
        """The rows of all parts, in the order of their numbers."""
        for number in self:
            yield from self.read(number)
