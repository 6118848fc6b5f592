"""How often heads are right: measured on held-out text, kept as JSON, and what a tree may expect of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from medusa_export.common.errors import DatasetError
from medusa_export.common.files import write_text
from medusa_runtime.bundles.bundle import Acceptance
from medusa_runtime.bundles.json_file import Count, Name, Share, parse_json
from medusa_runtime.bundles.listed_folder import read_file
from medusa_runtime.bundles.tree import MAX_DEPTH, RankPath, Tree

MAX_BYTES = 2**28
MAX_VALUES = 10_000_000  # a path of four ranks is seven of them
REMEDY = "Make a calibration with 'medusa-export calibrate'."
Accuracies = Annotated[tuple[Share, ...], Meta(min_length=1)]


@dataclass(frozen=True)
class Calibration:
    """What was measured.

    Attributes:
        accuracies: [K][R], the chance that head k's candidate of rank r is right; not cumulative.
        paths: The chance that a whole path of ranks is right in a step, where that was counted. Heads tend to be right
            together, so it is more than the product of accuracies.
        guessed: The same in steps that have a guess from the text, whose tokens count as candidates of rank 0, also
            where there is no head; ``paths`` is of the other steps then.
        guess_share: Of all steps so many have one.
        positions: How many positions were looked at.
        model: The base model's name.
        heads: Where the heads came from.
    """

    accuracies: tuple[tuple[float, ...], ...]
    paths: Mapping[RankPath, float] = field(default_factory=dict)
    guessed: Mapping[RankPath, float] = field(default_factory=dict)
    guess_share: float = 0.0
    positions: int = 0
    model: str = ""
    heads: str = ""

    @property
    def top_k(self) -> int:
        """Ranks that were looked at."""
        return min(map(len, self.accuracies))

    @property
    def max_depth(self) -> int:
        """How deep a tree may be: guesses from the text go on where there is no head."""
        return max(len(self.accuracies), max(map(len, self.guessed), default=0))

    def value(self, path: RankPath, *, guessed: bool | None = None) -> float:
        """The chance that a node is accepted; for paths that were not counted the product of accuracies [2.3.3].

        Args:
            path: The node's.
            guessed: In steps with a guess from the text, or without; over both kinds if None.
        """
        if not path:
            return 1.0
        if guessed is None and self.guessed:
            share = self.guess_share
            return share * self.value(path, guessed=True) + (1 - share) * self.value(path, guessed=False)
        if self.paths or self.guessed:
            return (self.guessed if guessed and self.guessed else self.paths).get(path, 0.0)
        return self.value(path[:-1]) * self.accuracies[len(path) - 1][path[-1]]

    def acceptance(self, tree: Tree) -> Acceptance:
        """The chances of a tree's nodes.

        Raises:
            DatasetError: The tree is deeper or wider than what was measured.
        """
        if tree.max_depth > self.max_depth or tree.top_k > self.top_k:
            raise DatasetError(
                f"This calibration is of {len(self.accuracies)} heads and ranks below {self.top_k}, but the tree is "
                f"{tree.max_depth} deep and uses ranks below {tree.top_k}: calibrate these heads, or use another tree."
            )

        def values(*, guessed: bool) -> tuple[float, ...]:
            return tuple(round(self.value(path, guessed=guessed), 6) for path in ((), *tree.paths))

        with_guess = values(guessed=True) if self.guessed else ()
        return Acceptance("calibrated", values(guessed=False), with_guess, self.guess_share)

    @classmethod
    def count(
        cls,
        places: NDArray[np.int64],
        ranks: int,
        *,
        steps: NDArray[np.int64] | None = None,
        guessed: NDArray[np.bool_] | None = None,
        model: str = "",
        heads: str = "",
    ) -> Calibration:
        """Counts hits.

        Args:
            places: [N, K], the rank of each target among its head's candidates, ``ranks`` or more if it is none
                of them; -1 where there is no target. Such cells are not counted.
            ranks: R.
            steps: [S, D], the same at positions where steps begin, which paths are counted at; as ``places`` if None.
            guessed: [S], in which of these steps a guess from the text stood in front of the heads' candidates.
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
        steps = places if steps is None else steps
        guessed = np.zeros(len(steps), np.bool_) if guessed is None else guessed
        return cls(
            accuracies,
            _paths(steps[~guessed], ranks),
            _paths(steps[guessed], ranks),
            round(float(guessed.mean()), 6),
            len(places),
            model,
            heads,
        )

    def save(self, target: Path) -> None:
        """Writes it as JSON.

        Raises:
            OutputError: It can't be written.
        """
        data = {
            "model": self.model,
            "heads": self.heads,
            "positions": self.positions,
            "accuracies": [[round(value, 6) for value in head] for head in self.accuracies],
            "guess_share": self.guess_share,
            **{
                name: [[list(path), round(value, 6)] for path, value in paths.items()]
                for name, paths in (("paths", self.paths), ("guessed", self.guessed))
            },
        }
        write_text(target, json.dumps(data) + "\n")

    @classmethod
    def load(cls, source: Path) -> Calibration:
        """Reads what ``save`` wrote.

        Raises:
            DatasetError: It can't be read.
        """
        data = read_file(source, at_most=MAX_BYTES, error=DatasetError)
        found = parse_json(data, _File, source, remedy=REMEDY, error=DatasetError, max_values=MAX_VALUES)
        return cls(
            found.accuracies,
            dict(found.paths),
            dict(found.guessed),
            found.guess_share,
            found.positions,
            found.model,
            found.heads,
        )


class _File(msgspec.Struct):
    """The schema of a calibration."""

    accuracies: Annotated[tuple[Accuracies, ...], Meta(min_length=1, max_length=MAX_DEPTH)]
    paths: tuple[tuple[RankPath, Share], ...] = ()
    guessed: tuple[tuple[RankPath, Share], ...] = ()
    guess_share: Share = 0.0
    positions: Count = 0
    model: Name = ""
    heads: Name = ""


def _paths(places: NDArray[np.int64], ranks: int) -> dict[RankPath, float]:
    counted: Counter[RankPath] = Counter()
    for row in places.tolist():
        path: RankPath = ()
        for place in row:
            if not 0 <= place < ranks:
                break
            path = (*path, place)
            counted[path] += 1
    ended = (places >= 0).sum(0)
    return {path: times / int(ended[len(path) - 1]) for path, times in sorted(counted.items())}
