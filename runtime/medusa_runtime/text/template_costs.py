"""Costs of a chat template's operations that are charged before the operation runs, in bytes.

These operations can make results that are much larger than their inputs, for instance by a width, a repetition or a
replacement. All other operations are charged by the size of their results.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sized
from typing import Any

from medusa_runtime.text.template_budget import MAX_BITS, NODE, TooMuchWorkError, render_budget

MAX_NUMBER = 10_000  # a width, an indentation, a count
MAX_PATH = 32  # names in a path of attributes that a filter reads of each element

_SPACES = "\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000"
_SPACES += "".join(map(chr, range(0x2000, 0x200B)))
_LINE_ENDS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
_CONVERSION = re.compile(r"[%)][-#0 +]*(\d*)(?:\.(\d*))?")
_WIDTH_BY_VALUE = re.compile(r"%[-#0 +]*\d*\.?\*")


def checked_number(value: object) -> int:
    """The absolute value of a width or a count.

    Raises:
        TooMuchWorkError: It exceeds ``MAX_NUMBER``.
    """
    if not isinstance(value, int):
        return 0  # the operation refuses the value, or does not use it as a size
    if abs(value) > MAX_NUMBER:
        number = f"{value:,}" if abs(value) < 10**18 else "more than 10^18"
        raise TooMuchWorkError(f"it asks for {number} characters or items at once; {MAX_NUMBER:,} are allowed")
    return abs(value)


# Costs of string methods, by name. Each function takes the string and the arguments.


def _count(text: Any, characters: str) -> int:
    if isinstance(text, bytes):
        return len(text)
    return sum(text.count(character) for character in characters)


def _pieces(text: Any, separator: Any = None, *_: object, **__: object) -> int:
    cuts = _count(text, _SPACES) if separator is None else text.count(separator)
    return (NODE + 16) * (int(cuts) + 1)


def _pieces_from_the_right(text: Any, separator: Any = None, *args: object, **__: object) -> int:
    """Searches from the right take time in proportion to the product of both lengths."""
    return _pieces(text, separator) + _search(text, separator or "")


def _search(text: Any, part: Any = "", *_: object, **__: object) -> int:
    return len(text) * len(part) // 1024


def _replaced(text: Any, old: Any = "", new: Any = "", *_: object, **__: object) -> int:
    return int((text.count(old) + 1) * max(0, len(new) - len(old)) * _width(new))


def _width(text: Any) -> int:
    return 1 if isinstance(text, bytes) or text.isascii() else 4


def _joined(text: Any, parts: Any = (), *_: object, **__: object) -> int:
    if not isinstance(parts, Sized):
        raise TooMuchWorkError("it joins values without a length: make a list of them first")
    return render_budget().written_size(parts) + len(parts) * len(text) * _width(text)


def _padded(text: Any, width: Any = 0, *_: object, **__: object) -> int:
    return 4 * checked_number(width)


def _expanded(text: Any, tabsize: Any = 8, *_: object, **__: object) -> int:
    return 4 * int(text.count(b"\t" if isinstance(text, bytes) else "\t")) * checked_number(tabsize)


def _translated(text: Any, table: Any = None, *_: object, **__: object) -> int:
    longest = max((len(value) for value in table.values() if isinstance(value, str)), default=1)
    return 4 * len(text) * longest


def table_cost(*parts: Any) -> int:
    """The most bytes that ``maketrans`` makes."""
    return sum(2 * NODE * len(part) for part in parts if isinstance(part, Sized))


METHOD_COSTS: dict[str, Callable[..., int]] = {
    "center": _padded,
    "expandtabs": _expanded,
    "join": _joined,
    "ljust": _padded,
    "replace": _replaced,
    "rfind": _search,
    "rindex": _search,
    "rjust": _padded,
    "rpartition": _search,
    "rsplit": _pieces_from_the_right,
    "split": _pieces,
    "splitlines": lambda text, *_, **__: (NODE + 16) * (_count(text, _LINE_ENDS) + 1),
    "striptags": lambda text, *_, **__: len(text) * (text.count("<") + 1) // 64,
    "translate": _translated,
    "zfill": _padded,
}


# Costs of filters, by name. Each function takes the value and the arguments.


def _printed(text: str, args: Any) -> int:
    """The most bytes that ``text % args`` makes."""
    if _WIDTH_BY_VALUE.search(text):
        raise TooMuchWorkError("it takes a width from a value ('%*d'): write the width as a number")
    widths = (width for found in _CONVERSION.finditer(text) for width in found.groups() if width)
    total = sum(checked_number(int(width[:9])) for width in widths)
    by_name = text.count("%(") if isinstance(args, Mapping) else 0
    return 4 * total + (1 + by_name) * render_budget().written_size(args)


def _indented(text: Any, width: Any = 4, *_: object, **__: object) -> int:
    size = len(width) * _width(width) if isinstance(width, str) else checked_number(width)
    return (_count(str(text), _LINE_ENDS) + 2) * (size + 2 * NODE)


def _summed(values: Any, attribute: Any = None, start: Any = 0) -> int:
    """Summing lists copies the sum so far for each list."""
    return 0 if isinstance(start, (int, float)) else len(values) * render_budget().written_size(values)


def _json(
    value: Any, ensure_ascii: Any = False, indent: Any = None, separators: Any = None, sort_keys: Any = False
) -> int:
    checked_number(len(indent) if isinstance(indent, str) else indent)
    checked_number(sum(len(separator) for separator in separators or ()))
    budget = render_budget()
    return 6 * budget.written_size(value) + (NODE if separators is None else budget.written_size(list(separators)))


FILTER_COSTS: dict[str, Callable[..., int]] = {
    "batch": lambda values, count=1, fill=None: NODE * checked_number(count),
    "center": _padded,
    "escape": lambda value: 5 * render_budget().written_size(value),
    "forceescape": lambda value: 5 * render_budget().written_size(value),
    "format": lambda text, *args, **kwargs: _printed(str(text), kwargs or args),
    "indent": _indented,
    "join": lambda values, d="", attribute=None: _joined(str(d), values),
    "pprint": lambda value, *_, **__: 64 * render_budget().written_size(value),
    "replace": lambda text, old="", new="", *_, **__: _replaced(str(text), str(old), str(new)),
    "round": lambda value, precision=0, *_, **__: checked_number(precision),
    "slice": lambda values, slices=1, fill=None: NODE * checked_number(slices),
    "striptags": lambda text: METHOD_COSTS["striptags"](str(text)),
    "sum": _summed,
    "tojson": _json,
    "urlencode": lambda value: 12 * render_budget().written_size(value),
    "urlize": lambda value, *args, **kwargs: 64 * render_budget().written_size((value, args, kwargs)),
    "wordwrap": lambda text, width=79, long=True, wrapstring=None, hyphens=True: (
        len(text) * (NODE + len(wrapstring or ""))
    ),
    "xmlattr": lambda value, *_, **__: 6 * render_budget().written_size(value),
}
FILTER_COSTS["e"] = FILTER_COSTS["escape"]
# Filters that go through all elements of a value (of a string: its characters), or need its length.
OF_ELEMENTS = ("batch", "dictsort", "groupby", "join", "list", "slice", "sort", "sum", "unique")
# Filters that take a path of attributes.
OF_PATHS = ("groupby", "max", "min", "rejectattr", "selectattr", "sort", "sum", "unique")


def check_paths(values: list[Any]) -> None:
    """Refuses long paths of attributes.

    Raises:
        TooMuchWorkError: A path has more than ``MAX_PATH`` names.
    """
    if any(value.count(".") > MAX_PATH for value in values if isinstance(value, str)):
        raise TooMuchWorkError(f"it reads a path of more than {MAX_PATH} attributes for each element")


def _added(left: Any, right: Any) -> int:
    return sum(sys.getsizeof(value) for value in (left, right) if isinstance(value, (str, bytes)))


def _repeated(left: Any, right: Any) -> int:
    for values, times in ((left, right), (right, left)):
        if isinstance(times, int) and isinstance(values, (str, bytes, list, tuple)):
            return max(times, 0) * render_budget().written_size(values)
    _check_bits(left, right, lambda one, other: one + other)
    return 0


def _raised(left: Any, right: Any) -> int:
    if isinstance(left, int) and isinstance(right, int) and abs(left) > 1:
        _check_bits(left, right, lambda one, _: one * abs(right))
    return 0


def _check_bits(left: Any, right: Any, of: Callable[[int, int], int]) -> None:
    if isinstance(left, int) and isinstance(right, int) and of(left.bit_length(), right.bit_length()) > MAX_BITS:
        raise TooMuchWorkError(f"it computes integers of more than {MAX_BITS:,} bits")


OPERATOR_COSTS: dict[str, Callable[[Any, Any], int]] = {
    "+": _added,
    "*": _repeated,
    "**": _raised,
    "%": lambda left, right: _printed(left, right) if isinstance(left, str) else 0,
}
