"""How often heads are right: measured on held-out text, kept as JSON, and what a tree may expect of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medusa_export.errors import DatasetError
from medusa_export.files import write_text
from medusa_runtime.bundle import Acceptance
from medusa_runtime.tree import RankPath, Tree


@dataclass(frozen=True)
class Calibration:
    """What was measured.

    Attributes:
        accuracies: [K][R], the chance that head k's candidate of rank r is right; not cumulative.
        paths: The chance that a whole path of ranks is right in a step, where that was counted. Heads tend to be right
            together, so it is more than the product of accuracies; and guesses from the text count as candidates of
            rank 0, if ``lookup`` says so.
        positions: How many positions were looked at.
        model: The base model's name.
        heads: Where the heads came from.
        lookup: Whether paths were counted with guesses from the text in front of the heads'.
    """

    accuracies: tuple[tuple[float, ...], ...]
    paths: Mapping[RankPath, float] = field(default_factory=dict)
    positions: int = 0
    model: str = ""
    heads: str = ""
    lookup: bool = False

    @property
    def top_k(self) -> int:
        """Ranks that were looked at."""
        return min(map(len, self.accuracies))

    def value(self, path: RankPath) -> float:
        """The chance that a node is accepted; for paths that were not counted the product of accuracies [2.3.3]."""
        if not path:
            return 1.0
        if self.paths:
            return self.paths.get(path, 0.0)
        return self.value(path[:-1]) * self.accuracies[len(path) - 1][path[-1]]

    def acceptance(self, tree: Tree) -> Acceptance:
        """The chances of a tree's nodes.

        Raises:
            DatasetError: The tree is deeper or wider than what was measured.
        """
        if tree.max_depth > len(self.accuracies) or tree.top_k > self.top_k:
            raise DatasetError(
                f"This calibration is of {len(self.accuracies)} heads and ranks below {self.top_k}, but the tree is "
                f"{tree.max_depth} deep and uses ranks below {tree.top_k}: calibrate these heads, or use another tree."
            )
        values = [self.value(path) for path in ((), *tree.paths)]
        return Acceptance("calibrated", tuple(round(value, 6) for value in values))

    @classmethod
    def count(
        cls,
        places: NDArray[np.int64],
        ranks: int,
        *,
        steps: NDArray[np.int64] | None = None,
        lookup: bool = False,
        model: str = "",
        heads: str = "",
    ) -> Calibration:
        """Counts hits.

        Args:
            places: [N, K], the rank of each target among its head's candidates, ``ranks`` or more if it is none
                of them; -1 where there is no target. Such cells are not counted.
            ranks: R.
            steps: The same at positions where steps begin, which paths are counted at; as ``places`` if None.
            lookup: Whether guesses from the text stood in front of the heads' candidates there.
            model: The base model's name.
            heads: Where the heads came from.

        Raises:
            DatasetError: A head has no target at all.
        """
        there = (places >= 0).sum(0)
        if not there.all():
            raise DatasetError(f"The held-out answers are too short for {places.shape[1]} heads: give longer ones.")
        accuracies = tuple(
            tuple(float((places[:, k] == rank).sum() / there[k]) for rank in range(ranks))
            for k in range(places.shape[1])
        )
        counted: Counter[RankPath] = Counter()
        steps = places if steps is None else steps
        for row in steps.tolist():
            path: RankPath = ()
            for place in row:
                if not 0 <= place < ranks:
                    break
                path = (*path, place)
                counted[path] += 1
        ended = (steps >= 0).sum(0)
        paths = {path: times / int(ended[len(path) - 1]) for path, times in sorted(counted.items())}
        return cls(accuracies, paths, len(places), model, heads, lookup)

    def save(self, target: Path) -> None:
        """Writes it as JSON.

        Raises:
            OutputError: It can't be written.
        """
        data = {
            "model": self.model,
            "heads": self.heads,
            "positions": self.positions,
            "lookup": self.lookup,
            "accuracies": [[round(value, 6) for value in head] for head in self.accuracies],
            "paths": [[list(path), round(value, 6)] for path, value in self.paths.items()],
        }
        write_text(target, json.dumps(data) + "\n")

    @classmethod
    def load(cls, source: Path) -> Calibration:
        """Reads what ``save`` wrote.

        Raises:
            DatasetError: It can't be read.
        """
        try:
            data: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
            return cls(
                tuple(tuple(map(float, head)) for head in data["accuracies"]),
                {tuple(map(int, path)): float(value) for path, value in data.get("paths", [])},
                int(data.get("positions", 0)),
                str(data.get("model", "")),
                str(data.get("heads", "")),
                bool(data.get("lookup", False)),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DatasetError(
                f"{source} is no calibration ({error!r}): make one with 'medusa-export calibrate'."
            ) from error
