"""Moving memory to huge pages."""

from __future__ import annotations

import errno
import mmap
import re
import time
from pathlib import Path

import pytest

from medusa_runtime.backends.onnxruntime import huge_pages
from medusa_runtime.backends.onnxruntime.huge_pages import HUGE_PAGE, Region, private_memory, use_huge_pages

PAGES = 4


@pytest.fixture
def before() -> list[Region]:
    """The memory of this process; skips where the system has no huge pages."""
    regions = private_memory()
    if not regions:
        pytest.skip("This system has no huge pages.")
    return regions


def filled_memory() -> mmap.mmap:
    """New memory that holds at least ``PAGES`` whole huge pages, in small pages."""
    memory = mmap.mmap(-1, (PAGES + 1) * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    for start in range(0, len(memory), mmap.PAGESIZE):
        memory[start] = start // mmap.PAGESIZE % 256
    memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def kib_in_huge_pages() -> int:
    found = re.search(r"AnonHugePages:\s*(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    assert found is not None
    return int(found[1])


def test_new_memory_is_moved_and_keeps_its_content(before: list[Region]) -> None:
    memory = filled_memory()
    held = kib_in_huge_pages()
    moved = use_huge_pages(before, patience=60)
    if moved == 0:
        pytest.skip("This system has no huge page to spare, or a kernel before Linux 6.1.")
    assert kib_in_huge_pages() - held >= moved * HUGE_PAGE // 1024 // 2  # the kernel may split some again
    assert all(memory[start] == start // mmap.PAGESIZE % 256 for start in range(0, len(memory), mmap.PAGESIZE))
    memory.close()


def test_memory_of_before_stays_as_it_is(before: list[Region]) -> None:
    memory = filled_memory()
    held = kib_in_huge_pages()
    use_huge_pages(private_memory(), patience=60)
    assert kib_in_huge_pages() - held < HUGE_PAGE // 1024
    memory.close()


def test_without_patience_or_huge_pages_nothing_is_moved(
    before: list[Region], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = filled_memory()
    assert use_huge_pages(before, patience=-1) == 0
    setting = tmp_path / "enabled"
    setting.write_text("always madvise [never]\n")
    monkeypatch.setattr(huge_pages, "_SETTING", setting)
    assert private_memory() == []
    assert use_huge_pages([], patience=60) == 0
    monkeypatch.setattr(huge_pages, "_SETTING", tmp_path / "missing")
    assert private_memory() == []
    memory.close()


def test_a_full_system_ends_it(before: list[Region], monkeypatch: pytest.MonkeyPatch) -> None:
    memory, calls = filled_memory(), []

    def refuse(start: int, length: int, advice: int) -> int:
        calls.append(advice)
        huge_pages.ctypes.set_errno(errno.ENOMEM)
        return -1

    monkeypatch.setattr(huge_pages, "_madvise", lambda: refuse)
    assert use_huge_pages(before, patience=60) == 0
    assert calls.count(25) == 1
    memory.close()


def test_time_in_which_the_thread_waits_does_not_count(before: list[Region], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine a thread waits for a processor most of the time."""
    memory = filled_memory()

    def wait(start: int, length: int, advice: int) -> int:
        time.sleep(0.2 if advice == 25 else 0)
        return 0

    monkeypatch.setattr(huge_pages, "_madvise", lambda: wait)
    assert use_huge_pages(before, patience=0.1) >= PAGES
    memory.close()


def test_whole_pages_of_what_was_added() -> None:
    page = HUGE_PAGE
    before = [Region(2 * page, 3 * page), Region(5 * page + 1, 6 * page)]
    after = [Region(page // 2, 4 * page + 5), Region(5 * page, 9 * page)]
    assert list(huge_pages._added(after, before)) == [
        Region(page, 2 * page),
        Region(3 * page, 4 * page),
        Region(6 * page, 9 * page),
    ]
