"""Calibrations: how often the candidates of heads are right, measured on held-out text and kept as JSON."""

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
from medusa_runtime.bundles.facts import Acceptance
from medusa_runtime.bundles.json_file import Count, Name, Share, parse_json
from medusa_runtime.bundles.listed_folder import read_file
from medusa_runtime.bundles.tree import MAX_DEPTH, RankPath, Tree

MAX_BYTES = 2**28
MAX_VALUES = 10_000_000  # JSON values; a path of four ranks takes seven
REMEDY = "Make a calibration with 'medusa-export calibrate'."
Accuracies = Annotated[tuple[Share, ...], Meta(min_length=1)]


@dataclass(frozen=True)
class Calibration:
    """Measured frequencies with which heads' candidates, and whole paths of them, are right.

    Attributes:
        accuracies: By head k and rank r, the probability that this candidate is right; not cumulative.
        paths: The probability that a whole path of ranks is right in a step, by path; empty if paths were not counted.
            Heads tend to be right together, so this is more than the product of accuracies.
        hit_paths: The same for steps with a lookup hit, whose tokens count as candidates of rank 0, also below the
            deepest head. If it is not empty, ``paths`` holds for steps without a lookup hit.
        hit_share: Share of the steps that have a lookup hit.
        positions: Number of measured positions.
        model: Name of the base model.
        heads: Source of the heads.
    """

    accuracies: tuple[tuple[float, ...], ...]
    paths: Mapping[RankPath, float] = field(default_factory=dict)
    hit_paths: Mapping[RankPath, float] = field(default_factory=dict)
    hit_share: float = 0.0
    positions: int = 0
    model: str = ""
    heads: str = ""

    @property
    def top_k(self) -> int:
        """Number of measured ranks, R."""
        return min(map(len, self.accuracies))

    @property
    def max_depth(self) -> int:
        """Depth of the deepest tree that can be searched. Lookup hits reach below the deepest head."""
        return max(len(self.accuracies), max(map(len, self.hit_paths), default=0))

    def value(self, path: RankPath, *, hit: bool | None = None) -> float:
        """The probability that a node is accepted.

        If paths were not counted, it is the product of the accuracies along the path [2.3.3].

        Args:
            path: The node's rank path.
            hit: True for steps with a lookup hit, False for steps without, None for the average over all steps.
        """
        if not path:
            return 1.0
        if hit is None and self.hit_paths:
            share = self.hit_share
            return share * self.value(path, hit=True) + (1 - share) * self.value(path, hit=False)
        if self.paths or self.hit_paths:
            return (self.hit_paths if hit and self.hit_paths else self.paths).get(path, 0.0)
        return self.value(path[:-1]) * self.accuracies[len(path) - 1][path[-1]]

    def acceptance(self, tree: Tree) -> Acceptance:
        """The acceptance estimates of a tree's nodes.

        Raises:
            DatasetError: The tree is deeper than this calibration, or uses ranks that were not measured.
        """
        if tree.max_depth > self.max_depth or tree.top_k > self.top_k:
            raise DatasetError(
                f"This calibration measured {len(self.accuracies)} heads and ranks below {self.top_k}, but the tree is "
                f"{tree.max_depth} deep and uses ranks below {tree.top_k}: calibrate these heads, or use another tree."
            )

        def values(*, hit: bool) -> tuple[float, ...]:
            return tuple(round(self.value(path, hit=hit), 6) for path in ((), *tree.paths))

        with_hit = values(hit=True) if self.hit_paths else ()
        return Acceptance("calibrated", values(hit=False), with_hit, self.hit_share)

    @classmethod
    def count(
        cls,
        places: NDArray[np.int64],
        ranks: int,
        *,
        steps: NDArray[np.int64] | None = None,
        hits: NDArray[np.bool_] | None = None,
        model: str = "",
        heads: str = "",
    ) -> Calibration:
        """Counts how often candidates and paths are right.

        Args:
            places: [N, K], the rank of each target among its head's candidates. A value of ``ranks`` or more means
                that the target is not among them. -1 means that there is no target; such cells are not counted.
            ranks: The number of ranks to measure, R.
            steps: [S, D], the same for the positions where steps begin: paths are counted there. ``places`` if None.
            hits: [S], True for the steps in which a lookup hit stands before the heads' candidates; none if None.
            model: Name of the base model.
            heads: Source of the heads.

        Raises:
            DatasetError: A head has no target.
        """
        there = (places >= 0).sum(0)
        if not there.all():
            raise DatasetError(f"The held-out answers are too short for {places.shape[1]} heads: give longer ones.")
        accuracies = tuple(
            tuple(float((places[:, k] == rank).sum() / there[k]) for rank in range(ranks))
            for k in range(places.shape[1])
        )
        steps = places if steps is None else steps
        hits = np.zeros(len(steps), np.bool_) if hits is None else hits
        return cls(
            accuracies,
            _paths(steps[~hits], ranks),
            _paths(steps[hits], ranks),
            round(float(hits.mean()), 6),
            len(places),
            model,
            heads,
        )

    def save(self, target: Path) -> None:
        """Writes the calibration as JSON.

        Raises:
            OutputError: The file can't be written.
        """
        data = {
            "model": self.model,
            "heads": self.heads,
            "positions": self.positions,
            "accuracies": [[round(value, 6) for value in head] for head in self.accuracies],
            "guess_share": self.hit_share,
            **{
                name: [[list(path), round(value, 6)] for path, value in paths.items()]
                for name, paths in (("paths", self.paths), ("guessed", self.hit_paths))
            },
        }
        write_text(target, json.dumps(data) + "\n")

    @classmethod
    def load(cls, source: Path) -> Calibration:
        """Reads a file that ``save`` wrote.

        Raises:
            DatasetError: The file can't be read, or is damaged.
        """
        data = read_file(source, at_most=MAX_BYTES, error=DatasetError)
        found = parse_json(data, _File, source, remedy=REMEDY, error=DatasetError, max_values=MAX_VALUES)
        return cls(
            found.accuracies,
            dict(found.paths),
            dict(found.hit_paths),
            found.hit_share,
            found.positions,
            found.model,
            found.heads,
        )


class _File(msgspec.Struct):
    """The schema of a calibration's file."""

    accuracies: Annotated[tuple[Accuracies, ...], Meta(min_length=1, max_length=MAX_DEPTH)]
    paths: tuple[tuple[RankPath, Share], ...] = ()
    hit_paths: tuple[tuple[RankPath, Share], ...] = msgspec.field(default=(), name="guessed")
    hit_share: Share = msgspec.field(default=0.0, name="guess_share")
    positions: Count = 0
    model: Name = ""
    heads: Name = ""


def _paths(places: NDArray[np.int64], ranks: int) -> dict[RankPath, float]:
    """The share of steps in which a path is right, by path. Steps whose text ends above the path don't count."""
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
