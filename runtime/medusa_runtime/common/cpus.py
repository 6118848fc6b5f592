"""How many CPUs this process may keep busy.

The answer is the least of what these allow:

1. the affinity mask (``taskset``, cpusets);
2. the CPU quota of the process's control group and of every group above it, cgroup v2 and v1
   (``docker run --cpus``, limits of Kubernetes);
3. ``OMP_NUM_THREADS``, where it holds a number.

A quota is rounded down, but never below one. The threads of a step wait for each other after every operator. With more
threads than the quota has CPUs, the kernel stops all of them for the rest of each period, and every step with them.
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
    """CPUs that this process may keep busy, at least one.

    Args:
        root: Folder with ``proc`` and, below the mount points named there, the control groups' files.
        environment: Variables by name.
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
    """Sets ``OMP_NUM_THREADS`` where a quota leaves less than the affinity mask, unless it is set.

    PyTorch and NumPy read it once, when they are imported, and know no quotas themselves.
    """
    if usable_cpus(root, environment) < _affinity():
        environment.setdefault("OMP_NUM_THREADS", str(usable_cpus(root, environment)))


def _affinity() -> int:
    """CPUs that the scheduler may put this process on; all of the machine where the system doesn't say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _openmp_threads(environment: Mapping[str, str]) -> int | None:
    """The number in ``OMP_NUM_THREADS``, the first one of a list; None if there is none."""
    first = environment.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if re.fullmatch(r"0*[1-9][0-9]{0,5}", first, re.ASCII) else None


@dataclass(frozen=True)
class _Mount:
    """A mounted hierarchy of control groups.

    Attributes:
        root: The group that appears at the mount point.
        point: The mount point.
        controllers: The controllers of a v1 hierarchy; None for v2.
    """

    root: str
    point: str
    controllers: frozenset[str] | None


def _groups(root: Path) -> Iterator[Path]:
    """Folders of the groups that may limit this process's CPU time: its own, and those above it."""
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
    """What a line of ``mountinfo`` says, if it is about control groups."""
    before, _, after = line.partition(" - ")
    fields, kind = before.split(" "), after.split(" ")
    if len(fields) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
        return None
    controllers = None if kind[0] == "cgroup2" else frozenset(kind[2].split(","))
    return _Mount(_unescaped(fields[3]), _unescaped(fields[4]), controllers)


def _unescaped(path: str) -> str:
    """A path of ``mountinfo``, which has octal numbers in the place of spaces and backslashes."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)


def _below(path: str, root: str) -> list[str]:
    """The names that lead from the mounted group to the process's; none if it lies elsewhere, as seen from here."""
    parts, above = ([part for part in full.split("/") if part] for full in (path, root))
    if ".." in (*parts, *above) or parts[: len(above)] != above:
        return []
    return parts[len(above) :]


def _quota_of(folder: Path) -> float | None:
    """CPUs that one group may use at a time; None if it sets no limit."""
    quota, *rest = " ".join(_lines(folder / "cpu.max")).split() or [""]  # cgroup v2: "150000 100000", or "max 100000"
    period = rest[0] if rest else "100000"
    if not quota:
        quota = "".join(_lines(folder / "cpu.cfs_quota_us"))  # v1; -1 is no limit
        period = "".join(_lines(folder / "cpu.cfs_period_us"))
    with contextlib.suppress(ValueError, ArithmeticError):
        if int(quota) > 0 and int(period) > 0:
            return int(quota) / int(period)
    return None


def _lines(path: Path) -> list[str]:
    """The lines of a file; none if it can't be read."""
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    return []
