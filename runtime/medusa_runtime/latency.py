"""How long a step takes on this machine, by tree size: what ``tree_size="auto"`` chooses by."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from medusa_runtime.backends.base import Backend
from medusa_runtime.bundle import DESCRIPTION, Acceptance, Bundle, FileFacts

CACHE_FILE = ".medusa-latency.json"
FILL = 64  # entries in the cache while measuring
WARM_UP, REPEATS = 2, 5


@dataclass(frozen=True)
class LatencyTable:
    """Seconds per step by tree size, ascending."""

    seconds: dict[int, float]

    def best_size(self, acceptance: Acceptance) -> int:
        """The measured size with the most expected tokens per second; the smaller one on a tie."""
        return max(self.seconds, key=lambda size: (acceptance.expected_tokens(size) / self.seconds[size], -size))

    @classmethod
    def measured(cls, bundle: Bundle, backend: Backend) -> LatencyTable:
        """The table of this machine: from the file beside the bundle, or measured now and kept there."""
        path = bundle.folder / CACHE_FILE
        key = _key(bundle, backend)
        known = _read(path)
        if key not in known:
            known[key] = _measure(bundle, backend)
            _write(path, known)
        return cls({int(size): seconds for size, seconds in known[key].items()})


def candidate_sizes(largest: int) -> list[int]:
    """A few sizes up to the largest, denser where they are small."""
    return [size for size in (1, 2, 4, 6, 8, 10, 12, 16, 24, 32, 48, 64, 96, 128) if size < largest] + [largest]


def _key(bundle: Bundle, backend: Backend) -> str:
    """What a measurement holds for: this machine, these versions, this graph."""
    graph = FileFacts.of(bundle.folder / DESCRIPTION).sha256[:16]
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].partition(":")[2].strip() if models else cpu
    return " | ".join([cpu, f"{os.cpu_count()} cores", backend.name, graph])


def _read(path: Path) -> dict[str, dict[str, float]]:
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(known, dict):
            return known
    return {}


def _write(path: Path, known: dict[str, dict[str, float]]) -> None:
    """Keeps the table if the folder can be written to; a service may well mount it read-only."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    with contextlib.suppress(OSError):
        partial.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)


def _measure(bundle: Bundle, backend: Backend) -> dict[str, float]:
    """Median seconds of a step, sizes interleaved so that a busy moment hits them all alike."""
    sizes = candidate_sizes(bundle.tree.size)
    depth = bundle.tree.max_depth
    fill = min(FILL, backend.max_tokens or FILL)
    backend.reserve(depth + fill + len(sizes) * (depth + 1) + bundle.tree.size)
    prompt = [token % bundle.model.vocab_size for token in range(fill)]
    taken: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(WARM_UP + REPEATS):
        backend.reset(0)
        backend.step(max(fill, bundle.tree.size), {0: prompt})
        for size in reversed(sizes):
            started = time.perf_counter()
            backend.step(size)
            taken[size].append(time.perf_counter() - started)
    backend.reset(0)
    return {str(size): statistics.median(times[WARM_UP:]) for size, times in taken.items()}
