"""Measured step times of this machine by tree size. ``tree_size="auto"`` chooses by them."""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from medusa_runtime.backends.base import Backend, can_move_rows
from medusa_runtime.bundles.bundle import DESCRIPTION, Bundle
from medusa_runtime.bundles.json_file import Name, parse_json
from medusa_runtime.bundles.listed_folder import FileFacts, read_cache_file, write_cache_file
from medusa_runtime.errors import BackendError, BundleError
from medusa_runtime.tuning import FEWEST_ROUNDS, FILL, LEAST_SPEED, MOST_ROUNDS, MOST_TOKENS, PATIENCE, WARM_UP

CACHE_FILE = ".medusa-latency.json"
MAX_CACHE_BYTES = 2**20  # room for thousands of tables

# The schema of a table in JSON: seconds by tree size, which is text there.
SizeName = Annotated[str, Meta(pattern=r"^[1-9][0-9]{0,4}$")]
Seconds = Annotated[float, Meta(gt=0, le=3600)]
Table = dict[SizeName, Seconds]


@dataclass(frozen=True)
class LatencyTable:
    """Seconds per step by tree size, ascending."""

    seconds: dict[int, float]

    @classmethod
    def measured(cls, bundle: Bundle, backend: Backend, rows: int = 1) -> LatencyTable:
        """The table of this machine for steps of the first ``rows`` rows: from the file in the bundle, or measured.

        A table that is measured is kept in that file, if the folder can be written to.

        Raises:
            BackendError: The graph failed, or there is no memory.
        """
        path = bundle.folder / CACHE_FILE
        key = _key(bundle, backend, rows)
        known = _read(path, bundle.tree.size)
        if key not in known:
            known[key] = _measure(bundle, backend, rows=rows)
            _write(path, known)
        return cls(_by_size(known[key]))

    @classmethod
    def kept(cls, bundle: Bundle, backend: Backend, rows: int = 1) -> LatencyTable | None:
        """The table that ``measured`` would find in the file; None if there is none."""
        table = _read(bundle.folder / CACHE_FILE, bundle.tree.size).get(_key(bundle, backend, rows))
        return None if table is None else cls(_by_size(table))


def measured_tables(bundle: Bundle, backend: Backend) -> dict[int, LatencyTable]:
    """The tables of this machine by number of rows, ascending; empty if trees can't be faster than plain decoding.

    Raises:
        BackendError: The graph failed, or there is no memory.
    """
    if bundle.acceptance.drafts_are_useless:
        return {}
    # Where rows don't move, each step runs over all of them.
    fewer = [count for count in (1, 2, 4, 8, 16, 32, 64) if count < backend.rows] if can_move_rows(backend) else []
    return {count: LatencyTable.measured(bundle, backend, count) for count in [*fewer, backend.rows]}


def _by_size(table: Table) -> dict[int, float]:
    return dict(sorted((int(size), seconds) for size, seconds in table.items()))


def candidate_sizes(largest: int) -> list[int]:
    """The tree sizes to measure, up to the largest: small ones are closer together."""
    return [size for size in (1, 2, 3, 4, 6, 8, 10, 12, 16, 24, 32, 48, 64, 96, 128) if size < largest] + [largest]


def _key(bundle: Bundle, backend: Backend, rows: int) -> str:
    """The conditions of a measurement: machine, versions, graph and number of rows."""
    name = backend.name if backend.rows == 1 else f"{backend.name}, {rows} of a batch"
    graph = FileFacts.of(bundle.folder / DESCRIPTION).sha256[:16]
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].partition(":")[2].strip() if models else cpu
    return " | ".join([cpu, f"{os.cpu_count()} cores", name, graph])


def _read(path: Path, largest: int) -> dict[str, Table]:
    """The tables in the file, of sizes up to the largest. Damaged ones are left out, to be measured again."""
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


def _measure(bundle: Bundle, backend: Backend, *, rows: int) -> Table:
    """Measures steps of the first ``rows`` rows, which are empty afterwards.

    Sizes take turns in rounds, so that a busy moment affects all of them. Each step is compared with the plain step of
    its round; a size's time is the median of these ratios, times the median of plain steps. So a machine that slows
    down for a minute changes little. After the warm-up, trees much larger than the best one are left out. (A GPU
    captures the second step of a size, which takes longer.) Rows have different prompts: in a mixture of experts, the
    tokens decide which weights a step reads.

    Returns:
        Seconds of a step by tree size.
    """
    sizes = candidate_sizes(bundle.tree.size)
    if rows > 1 and can_move_rows(backend):  # it runs on a CPU
        sizes = [size for size in sizes if size == 1 or size * rows <= MOST_TOKENS]
    sizes, fill = _make_room(bundle, backend, sizes)
    first_step = max(fill, sizes[-1])
    together = range(rows)
    prompts = {row: [(row * fill + token) % bundle.model.vocab_size for token in range(fill)] for row in together}

    def seconds(size: int) -> float:
        started = time.perf_counter()
        backend.step(size, {}, together)
        return time.perf_counter() - started

    rounds: list[dict[int, float]] = []
    begun = time.perf_counter()
    while len(rounds) < FEWEST_ROUNDS or (len(rounds) < MOST_ROUNDS and time.perf_counter() - begun < PATIENCE):
        for row in together:
            backend.reset(row)
        backend.step(first_step, prompts, together)
        backend.step(1, {}, together)  # the step after a large one takes longer
        taken: dict[int, float] = {}
        best = [0.0, 0.0]  # without and with a lookup hit
        for size in sizes:
            taken[size] = seconds(size)
            rates = [sum(bundle.acceptance.values(hit=hit)[:size]) / taken[size] for hit in (False, True)]
            best = [*map(max, best, rates)]
            if len(rounds) == WARM_UP and all(
                rate < LEAST_SPEED * most for rate, most in zip(rates, best, strict=True)
            ):
                break
        sizes = list(taken)
        rounds.append(taken)
    for row in together:
        backend.reset(row)
    rounds = rounds[WARM_UP:]
    plain = statistics.median(taken[1] for taken in rounds)
    return {str(size): plain * statistics.median(taken[size] / taken[1] for taken in rounds) for size in sizes}


def _make_room(bundle: Bundle, backend: Backend, sizes: list[int]) -> tuple[list[int], int]:
    """Makes room for a round of measurements.

    Returns:
        The sizes that there is room for, and the number of prompt tokens that a round begins with.

    Raises:
        BackendError: There is no room for one step.
    """
    wanted = min(FILL, backend.max_tokens or FILL)
    for count in range(len(sizes), 0, -1):
        for fill in (wanted, 1):
            # Each step commits a whole path at most, and the last one verifies the largest tree.
            length = fill + (count + 1) * bundle.slots.most_committed
            try:
                backend.reserve(bundle.slots.capacity(length, sizes[count - 1]))
            except BackendError as error:
                failure = error
            else:
                return sizes[:count], fill
    raise failure
