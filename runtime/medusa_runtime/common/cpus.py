"""Number of CPUs that this process may keep busy.

It is the smallest of these limits:

1. the affinity mask (``taskset``, cpusets);
2. the CPU quota of the process's control group and of every group above it, cgroup v2 and v1
   (``docker run --cpus``, limits of Kubernetes);
3. ``OMP_NUM_THREADS``, if it holds a number.

A quota is rounded down, but never below one. The threads of a step wait for each other after every operator. If there
are more threads than the quota allows CPUs, the kernel stops all of them for the rest of each period, so that every
step takes longer.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path


def usable_cpus(root: Path = Path("/"), environment: Mapping[str, str] = os.environ) -> int:
    """Number of CPUs that this process may keep busy, at least one.

    Args:
        root: Root of the file system: it holds ``proc`` and the mounted control groups.
        environment: Environment variables by name.
    """
    limits = [_affinity(), _openmp_threads(environment)]
    quota = cpu_quota(root)
    if quota is not None:
        limits.append(math.floor(quota))
    return max(1, min(limit for limit in limits if limit is not None))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """The CPU time that control groups grant this process, in CPUs; None if they set no limit."""
    found = [quota for folder in _groups(root) if (quota := _quota_of(folder)) is not None]
    return min(found, default=None)


def limit_openmp_threads(environment: MutableMapping[str, str], root: Path = Path("/")) -> None:
    """Sets ``OMP_NUM_THREADS`` if a quota allows fewer CPUs than the affinity mask, unless it is already set.

    PyTorch and NumPy read the variable once, when they are imported. They don't read quotas themselves.
    """
    if usable_cpus(root, environment) < _affinity():
        environment.setdefault("OMP_NUM_THREADS", str(usable_cpus(root, environment)))


def _affinity() -> int:
    """CPUs in this process's affinity mask; all CPUs of the machine if the system has no such mask."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _openmp_threads(environment: Mapping[str, str]) -> int | None:
    """The number in ``OMP_NUM_THREADS``, or the first of a list of numbers; None if it holds no number."""
    first = environment.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if re.fullmatch(r"0*[1-9][0-9]{0,5}", first, re.ASCII) else None


@dataclass(frozen=True)
class _Mount:
    """A mounted hierarchy of control groups.

    Attributes:
        root: The group that appears at the mount point.
        point: The mount point.
        controllers: Names of the controllers of a v1 hierarchy; None for v2.
    """

    root: str
    point: str
    controllers: frozenset[str] | None


def _groups(root: Path) -> Iterator[Path]:
    """Folders of the control groups that may limit this process's CPU time: its own group and those above."""
    mounts = [mount for line in _lines(root / "proc/self/mountinfo") if (mount := _mount(line)) is not None]
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for mount in mounts:
            is_v2 = mount.controllers is None and number == "0" and not controllers
            if is_v2 or ("cpu" in controllers.split(",") and "cpu" in (mount.controllers or ())):
                top = root / mount.point.lstrip("/")
                below = _below(path, mount.root)
                yield from (top.joinpath(*below[:depth]) for depth in range(len(below), -1, -1))


def _mount(line: str) -> _Mount | None:
    """The mount that a line of ``mountinfo`` describes; None if it is not of control groups."""
    before, _, after = line.partition(" - ")
    fields, kind = before.split(" "), after.split(" ")
    if len(fields) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
        return None
    controllers = None if kind[0] == "cgroup2" else frozenset(kind[2].split(","))
    return _Mount(_unescaped(fields[3]), _unescaped(fields[4]), controllers)


def _unescaped(path: str) -> str:
    """A path from ``mountinfo``, with its octal escapes replaced: they stand for spaces and backslashes."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)


def _below(path: str, root: str) -> list[str]:
    """Folder names that lead from the mounted group to the process's group; empty if it is not below the mount."""
    parts, above = ([part for part in full.split("/") if part] for full in (path, root))
    if ".." in (*parts, *above) or parts[: len(above)] != above:
        return []
    return parts[len(above) :]


def _quota_of(folder: Path) -> float | None:
    """CPU time that one group grants, in CPUs; None if it sets no limit."""
    quota, *rest = " ".join(_lines(folder / "cpu.max")).split() or [""]  # cgroup v2: "150000 100000", or "max 100000"
    period = rest[0] if rest else "100000"
    if not quota:
        quota = "".join(_lines(folder / "cpu.cfs_quota_us"))  # v1; -1 means no limit
        period = "".join(_lines(folder / "cpu.cfs_period_us"))
    with contextlib.suppress(ValueError, ArithmeticError):
        if int(quota) > 0 and int(period) > 0:
            return int(quota) / int(period)
    return None


def _lines(path: Path) -> list[str]:
    """The lines of a file; empty if it can't be read."""
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    return []
