"""How long a step takes on this machine, by tree size: what ``tree_size="auto"`` chooses by."""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from medusa_runtime.backends.base import Backend, BatchBackend
from medusa_runtime.bundles.bundle import DESCRIPTION, Bundle
from medusa_runtime.bundles.json_file import Name, parse_json
from medusa_runtime.bundles.listed_folder import FileFacts, read_cache_file, write_cache_file
from medusa_runtime.errors import BundleError

CACHE_FILE = ".medusa-latency.json"
MAX_CACHE_BYTES = 2**20  # thousands of tables
FILL = 64  # entries in the cache while measuring
WARM_UP = 2  # rounds that do not count
FEWEST, MOST = WARM_UP + 3, WARM_UP + 7
PATIENCE = 4.0  # seconds after which the fewest rounds will do
HOPELESS = 0.6  # of the best speed so far: larger trees than one of this are not measured again
MOST_TOKENS = 64  # in a step of several rows: no CPU that we know verifies more of them any faster

# The schema of a table: seconds by size, which JSON has as text.
SizeName = Annotated[str, Meta(pattern=r"^[1-9][0-9]{0,4}$")]
Seconds = Annotated[float, Meta(gt=0, le=3600)]
Table = dict[SizeName, Seconds]


@dataclass(frozen=True)
class LatencyTable:
    """Seconds per step by tree size, ascending."""

    seconds: dict[int, float]

    @classmethod
    def measured(cls, bundle: Bundle, backend: Backend) -> LatencyTable:
        """The table of this machine for one row: from the file beside the bundle, or measured now and kept there."""
        return cls._kept(bundle, backend.name, lambda: _measure(bundle, backend, backend.step, rows=1))

    @classmethod
    def measured_batch(cls, bundle: Bundle, backend: BatchBackend, rows: int) -> LatencyTable:
        """The same for steps of the first ``rows`` rows together."""

        def step(size: int, prompts: Mapping[int, Sequence[int]]) -> None:
            backend.step(size, prompts, range(rows))

        name = f"{backend.name}, {rows} of a batch"
        return cls._kept(bundle, name, lambda: _measure(bundle, backend, step, rows=rows))

    @classmethod
    def _kept(cls, bundle: Bundle, name: str, measure: Callable[[], Table]) -> LatencyTable:
        path = bundle.folder / CACHE_FILE
        key = _key(bundle, name)
        known = _read(path, bundle.tree.size)
        if key not in known:
            known[key] = measure()
            _write(path, known)
        return cls(dict(sorted((int(size), seconds) for size, seconds in known[key].items())))


def candidate_sizes(largest: int) -> list[int]:
    """A few sizes up to the largest, denser where they are small."""
    return [size for size in (1, 2, 4, 6, 8, 10, 12, 16, 24, 32, 48, 64, 96, 128) if size < largest] + [largest]


def _key(bundle: Bundle, name: str) -> str:
    """What a measurement holds for: this machine, these versions, this graph."""
    graph = FileFacts.of(bundle.folder / DESCRIPTION).sha256[:16]
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].partition(":")[2].strip() if models else cpu
    return " | ".join([cpu, f"{os.cpu_count()} cores", name, graph])


def _read(path: Path, largest: int) -> dict[str, Table]:
    """The tables that are kept, of sizes up to the largest; what isn't one is measured again."""
    kept = read_cache_file(path, at_most=MAX_CACHE_BYTES)
    tables: dict[str, Table] = {}
    with contextlib.suppress(BundleError):
        for key, data in parse_json(kept or b"{}", dict[Name, msgspec.Raw], path, remedy="").items():
            with contextlib.suppress(BundleError):
                table = parse_json(bytes(data), Table, path, remedy="")
                if "1" in table and max(map(int, table)) <= largest:
                    tables[key] = table
    return tables


def _write(path: Path, known: dict[str, Table]) -> None:
    """Keeps the tables, if the folder can be written to."""
    write_cache_file(path, msgspec.json.format(msgspec.json.encode(known), indent=1) + b"\n")


def _measure(
    bundle: Bundle,
    backend: Backend,
    step: Callable[[int, Mapping[int, Sequence[int]]], object],
    *,
    rows: int,
) -> dict[str, float]:
    """Seconds of a step, sizes interleaved so that a busy moment hits them all alike.

    What counts is how they compare: so it is the median ratio to a plain step of the same round, times the median of
    those. A machine that slows down for a minute then changes little. Once it has warmed up (a GPU's steps are captured
    in their second run, which takes longer), trees much larger than the best are left out.

    Args:
        bundle: What the backend runs.
        backend: Whose rows are measured; the first ``rows`` are empty afterwards.
        step: Runs a step of these rows.
        rows: How many.
    """
    sizes = [size for size in candidate_sizes(bundle.tree.size) if size == 1 or rows == 1 or size * rows <= MOST_TOKENS]
    depth = bundle.tree.max_depth
    fill = min(FILL, backend.max_tokens or FILL)
    backend.reserve(depth + fill + (len(sizes) + 1) * (depth + 1) + bundle.tree.size)
    prompt = [token % bundle.model.vocab_size for token in range(fill)]

    def seconds(size: int) -> float:
        started = time.perf_counter()
        step(size, {})
        return time.perf_counter() - started

    rounds: list[dict[int, float]] = []
    begun = time.perf_counter()
    while len(rounds) < FEWEST or (len(rounds) < MOST and time.perf_counter() - begun < PATIENCE):
        for row in range(rows):
            backend.reset(row)
        step(max(fill, bundle.tree.size), dict.fromkeys(range(rows), prompt))
        step(1, {})  # the one after a large step takes longer
        taken: dict[int, float] = {}
        best = [0.0, 0.0]  # without and with a guess from the text
        for size in sizes:
            taken[size] = seconds(size)
            rates = [sum(bundle.acceptance.values(hit=kind)[:size]) / taken[size] for kind in (False, True)]
            best = [*map(max, best, rates)]
            if len(rounds) == WARM_UP and all(rate < HOPELESS * most for rate, most in zip(rates, best, strict=True)):
                break
        sizes = list(taken)
        rounds.append(taken)
    for row in range(rows):
        backend.reset(row)
    rounds = rounds[WARM_UP:]
    plain = statistics.median(taken[1] for taken in rounds)
    return {str(size): plain * statistics.median(taken[size] / taken[1] for taken in rounds) for size in sizes}
