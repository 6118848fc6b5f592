"""Checks numbers that callers give: Python's or NumPy's. A boolean is no number."""

from __future__ import annotations

import math
from typing import TypeGuard

import numpy as np


def is_integer(value: object) -> TypeGuard[int]:
    """True for an integer of Python or NumPy."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def integer_of(value: object) -> float:
    """The value, if it is an integer; otherwise NaN, for which every comparison is false."""
    return int(value) if is_integer(value) else math.nan


def number_of(value: object) -> float:
    """The value, if it is a number; otherwise NaN, for which every comparison is false."""
    try:
        return float(value if isinstance(value, float | np.floating) else integer_of(value))
    except OverflowError:
        return math.inf
