"""Moves memory to huge pages of Linux, in which a processor finds an address faster.

A step reads all weights once. They lie in thousands of pages of 4 KiB, and a processor remembers the addresses of fewer
pages than that. A huge page has 2 MiB.
"""

from __future__ import annotations

import ctypes
import errno
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

HUGE_PAGE = 2**21
_MAPS = Path("/proc/self/maps")
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_ADVISE, _COLLAPSE = 14, 25  # MADV_HUGEPAGE, MADV_COLLAPSE


class Region(NamedTuple):
    """Addresses of memory, from ``start`` up to ``end``."""

    start: int
    end: int


def private_memory() -> list[Region]:
    """The writable memory of this process that no file is behind, by address. Empty if it has no huge pages."""
    if sys.platform != "linux" or not _has_huge_pages():
        return []
    regions = []
    for line in _MAPS.read_text().splitlines():
        addresses, access, _, _, inode, *name = line.split(maxsplit=5)
        if access == "rw-p" and inode == "0" and (not name or name[0] == "[heap]"):
            start, end = (int(address, 16) for address in addresses.split("-"))
            regions.append(Region(start, end))
    return regions


def use_huge_pages(before: Sequence[Region], patience: float) -> int:
    """Moves the private memory that the process has got since ``before`` to huge pages, as far as there are any.

    The content stays as it is. A system may have no huge pages left, and kernels before Linux 6.1 move memory later, in
    the background.

    Args:
        before: ``private_memory`` at an earlier time.
        patience: Seconds of this thread's processor time after which the rest is left to the kernel.

    Returns:
        The number of huge pages.
    """
    regions = list(_added(private_memory(), before))
    madvise = _madvise() if regions else None
    if madvise is None:
        return 0
    count, deadline = 0, time.thread_time() + patience
    for start, end in regions:
        madvise(start, end - start, _ADVISE)
    for start, end in regions:
        for page in range(start, end, HUGE_PAGE):
            if time.thread_time() > deadline:
                return count
            if madvise(page, HUGE_PAGE, _COLLAPSE) == 0:
                count += 1
            elif ctypes.get_errno() == errno.ENOMEM:
                return count
    return count


def _has_huge_pages() -> bool:
    """True if the system gives huge pages to processes that ask for them."""
    try:
        return "[never]" not in _SETTING.read_text()
    except OSError:
        return False


def _added(regions: Sequence[Region], before: Sequence[Region]) -> Iterator[Region]:
    """The whole huge pages in the parts of ``regions`` that are not in ``before``."""
    for start, end in regions:
        position = start
        for known in before:
            if known.end <= position or known.start >= end:
                continue
            yield from _whole_pages(position, known.start)
            position = known.end
        yield from _whole_pages(position, end)


def _whole_pages(start: int, end: int) -> Iterator[Region]:
    first, last = -(-start // HUGE_PAGE) * HUGE_PAGE, end // HUGE_PAGE * HUGE_PAGE
    if first < last:
        yield Region(first, last)


def _madvise() -> Callable[[int, int, int], int] | None:
    """``madvise`` of the C library; None if the library has none."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "madvise", None)
    if function is not None:
        function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
