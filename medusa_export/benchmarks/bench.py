"""Measures decoding speed with a bundle: ``medusa_export.bench``.

Everything runs in turns, on the same prompts, against plain decoding in the same engine.
"""

from __future__ import annotations

import platform
import resource
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from medusa_export.benchmarks.contestants import Contestants, engine_contestant, resident
from medusa_export.benchmarks.peer_weights import bundle_weights
from medusa_export.benchmarks.peers import BenchPeers, llama_cpp_build
from medusa_export.benchmarks.processor import processor
from medusa_export.benchmarks.prompts import BenchPrompt, bench_prompts
from medusa_export.benchmarks.speeds import Speed, by_category, race, speeds
from medusa_export.common import defaults
from medusa_export.common.errors import DatasetError, OptionError
from medusa_export.common.progress import OnProgress, Progress, Task, ignore_progress
from medusa_runtime.backends.base import rows_differ
from medusa_runtime.common.cpus import usable_cpus
from medusa_runtime.engine import MedusaEngine

AUTO = "auto"
_USUAL_SIZES = (2, 4, 6, 8, 10, 12, 16, 32, 64)


@dataclass(frozen=True)
class BenchResult:
    """The result of a bench.

    Attributes:
        speeds: The speed of each contestant, by name. ``auto`` chooses its tree size at each step.
        sizes: The speed at each fixed tree size, by its number of nodes; 1 is plain decoding, the baseline.
        categories: Speedup and tokens per step of ``auto``, by category of prompts.
        rows_differ: True if the backend says that tokens may depend on the tree size (see ``DiffersByRows``).
    """

    speeds: Mapping[str, Speed]
    sizes: Mapping[int, Speed]
    categories: Mapping[str, Mapping[str, float]]
    rows_differ: bool = False

    @property
    def auto(self) -> Speed:
        """The speed with the tree size that the engine chooses by itself."""
        return self.speeds[AUTO]

    def figures(self) -> dict[str, Any]:
        """Returns all figures for JSON. Those of ``auto`` are at the top; its tree size is a mean over steps."""
        return {
            "speedup": self.auto.speedup,
            "tokens_per_step": self.auto.tokens_per_step,
            "overhead": self.auto.overhead,
            "tree_size": self.auto.nodes_per_step,
            "rows_differ": self.rows_differ,
            # Tokens of peers with weights of their own prove nothing.
            "identical": all(speed.identical for speed in self.speeds.values() if speed.comparable),
            "contestants": {name: asdict(speed) for name, speed in self.speeds.items()},
            "categories": {name: dict(figures) for name, figures in self.categories.items()},
            "environment": environment(),
        }


def bench(
    bundle: str | PathLike[str],
    *,
    tree_sizes: Sequence[int] | None = None,
    prompts: Sequence[BenchPrompt] | None = None,
    max_new_tokens: int = defaults.BENCH_TOKENS,
    repeats: int = defaults.BENCH_REPEATS,
    threads: int | None = None,
    peers: BenchPeers = BenchPeers(),
    on_progress: OnProgress = ignore_progress,
) -> BenchResult:
    """Measures tokens per second, tokens per step and the cost of a step with a bundle.

    All contestants generate as many tokens per prompt as plain decoding of the bundle does.

    Args:
        bundle: The folder of the bundle.
        tree_sizes: Tree sizes to measure, in nodes; a few if None. Plain decoding and ``auto`` are always measured.
        prompts: Prompts to answer; the fixed ones that come with the package if None.
        max_new_tokens: Tokens to generate per prompt, 2 or more.
        repeats: Number of times that each prompt is answered.
        threads: CPU threads of each contestant; all that this process may use if None.
        peers: Other programs to measure, too.
        on_progress: Receives reports.

    Returns:
        The speeds.

    Raises:
        OptionError: A tree size is larger than the bundle's tree.
        BundleError: A bundle can't be read.
        CheckpointError: A peer's model can't be loaded.
        DatasetError: The bundle has no tokenizer.
        MissingExtraError: A peer's package is not installed.
    """
    threads = threads or usable_cpus()  # for all contestants, because some take one per physical core by themselves
    asked = bench_prompts() if prompts is None else prompts
    on_progress(Progress(f"loading {fspath(bundle)}"))
    empty = resident()
    engine = MedusaEngine.load(Path(bundle), threads=threads)
    ids = _encoded(engine, asked)
    names = {size: f"tree size {size}" for size in _measured_sizes(engine, tree_sizes)}
    contestants, weights = Contestants(ids[0], max_new_tokens), bundle_weights(engine.bundle)
    for size, name in names.items():
        contestants.add(name, partial(engine_contestant, engine, size), weights, since=empty)
    contestants.add(AUTO, partial(engine_contestant, engine, "auto"), weights, since=empty)
    if engine.bundle.tree.size > 1:
        without = partial(engine_contestant, engine, "auto", lookup=False)
        contestants.add(f"{AUTO}, no lookup", without, weights, since=empty)
    peers.add_to(contestants, engine.bundle, threads)
    task = Task("answering", len(ids) * repeats, on_progress)
    answers = race(
        contestants.by_name,
        names[1],
        ids,
        max_new_tokens=max_new_tokens,
        repeats=repeats,
        on_prompt=task.finish_piece,
    )
    measured = speeds(answers, names[1], contestants.memory, contestants.weights)
    categories = by_category(answers, [prompt.category for prompt in asked], AUTO, names[1])
    sizes = {size: measured[name] for size, name in names.items()}
    return BenchResult(measured, sizes, categories, rows_differ(engine.backend))


def _encoded(engine: MedusaEngine, prompts: Sequence[BenchPrompt]) -> list[list[int]]:
    if engine.tokenizer is None:
        raise DatasetError(f"{engine.bundle.folder} has no tokenizer to read prompts with.")
    return [engine.tokenizer.encode_chat([{"role": "user", "content": prompt.prompt}]) for prompt in prompts]


def _measured_sizes(engine: MedusaEngine, asked: Sequence[int] | None) -> list[int]:
    """Returns tree sizes in ascending order, plain decoding among them."""
    largest = engine.bundle.tree.size
    sizes = sorted({1, *(asked or (size for size in _USUAL_SIZES if size <= largest))})
    if sizes[-1] > largest:
        raise OptionError(f"The tree size {sizes[-1]} is too large: the tree of this bundle has {largest} nodes.")
    return sizes


def environment() -> dict[str, Any]:
    """Returns facts about this machine and its packages, for JSON."""
    found = {}
    for package in ("medusa-export", "onnxruntime", "onnxruntime-genai", "llama-cpp-python", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "platform": platform.platform(),
        "processor": asdict(processor()),
        "versions": found,
        "llama.cpp": llama_cpp_build(),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
