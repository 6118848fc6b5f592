"""Random trees for hypothesis."""

from __future__ import annotations

import itertools

from hypothesis import strategies as st

ALL = [path for depth in (1, 2, 3) for path in itertools.product(range(3), repeat=depth)]


@st.composite
def rank_paths(draw: st.DrawFn) -> list[tuple[int, ...]]:
    """The rank paths of a random tree, in random order."""
    chosen = draw(st.lists(st.sampled_from(ALL), min_size=1, max_size=14, unique=True))
    closed = {path[:depth] for path in chosen for depth in range(1, len(path) + 1)}
    return draw(st.permutations(sorted(closed)))
