"""Numbered parts of a data set, each on disk whole or not at all: what lets a long job stop and go on."""

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


def to_jsonl(rows: Iterable[Any]) -> bytes:
    """A JSON object per line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


class Parts:
    """The finished parts of a job, as files ``<number>-<digest>.jsonl``.

    Args:
        folder: Where they lie.

    Raises:
        DatasetError: There are two of one number.
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
        """The lowest number that no part has."""
        return next(number for number in count() if number not in self._files)

    def path(self, number: int) -> Path:
        """Where a part lies."""
        return self._files[number]

    def write(self, number: int, rows: Iterable[Any]) -> None:
        """Adds a part.

        Raises:
            OutputError: It can't be written. Parts that are there already stay.
        """
        data = to_jsonl(rows)
        path = self._folder / f"{number:06d}-{hashlib.sha256(data).hexdigest()[:16]}.jsonl"
        write_bytes(path, data)
        self._files[number] = path

    def read(self, number: int) -> list[Any]:
        """The rows of a part.

        Raises:
            DatasetError: Its content is not what was written.
        """
        path = self._files[number]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DatasetError(f"{path} can't be read: {error}.") from error
        if hashlib.sha256(data).hexdigest()[:16] != path.stem.partition("-")[2]:
            raise DatasetError(f"{path} is damaged: delete it and run again to make this part anew.")
        return [json.loads(line) for line in data.splitlines()]

    def rows(self) -> Iterator[Any]:
        """All rows, by number."""
        for number in self:
            yield from self.read(number)
