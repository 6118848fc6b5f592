"""Compiles a bundle to a TensorRT engine: ``medusa_export.build_engine``."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path

from medusa_export.common import defaults
from medusa_export.common.errors import EngineBuildError, OutputError
from medusa_export.common.files import atomic_folder, check_target, write_bytes
from medusa_export.common.progress import OnProgress, Progress, Task, ignore_progress
from medusa_export.targets.tensorrt.builder import EngineBuilder, current_architecture
from medusa_export.targets.tensorrt.options import BuildOptions, check_targets, check_weights, choose_limits
from medusa_export.targets.tensorrt.versions import check_driver, check_version
from medusa_runtime.backends.tensorrt.library import TensorRTLibrary, import_tensorrt
from medusa_runtime.bundles.bundle import DESCRIPTION, ENGINE_DESCRIPTION, GRAPHS, WEIGHTS, Bundle
from medusa_runtime.bundles.compiled import ENGINE, CompiledEngine, require_bundle
from medusa_runtime.bundles.listed_folder import FileFacts


def build_engine(
    bundle: str | PathLike[str] | Bundle,
    output: str | PathLike[str],
    *,
    flavor: str = defaults.FLAVOR,
    targets: Sequence[str] = (),
    max_batch: int = defaults.MAX_BATCH,
    max_seq_len: int | None = None,
    max_prefill: int | None = None,
    opt_level: int = defaults.OPT_LEVEL,
    timing_cache: str | PathLike[str] | None = None,
    overwrite: bool = False,
    on_progress: OnProgress = ignore_progress,
) -> CompiledEngine:
    """Compiles a bundle to a TensorRT engine, in a folder that the runtime loads like a bundle.

    With ``targets`` it needs no GPU. Weights and caches have the bundle's dtype.

    Args:
        bundle: The bundle, or its folder.
        output: The folder to write. It appears whole or not at all.
        flavor: ``tensorrt``, ``tensorrt-rtx``, or ``auto`` for the one that is installed.
        targets: GPU architectures to build for, such as ``sm86`` and ``sm89``; the GPU of this machine if empty.
        max_batch: Rows: sequences at a time.
        max_seq_len: Slots per row in the caches, for prompt, answer and the tree in flight. If None, as many as the
            model's positions need, at most 4096.
        max_prefill: Tokens of the longest chunk of a prompt; at most 512 if None.
        opt_level: The builder's optimization level, 0 to 5.
        timing_cache: A file that keeps measured kernels for later builds; for ``tensorrt`` only.
        overwrite: Replace an engine that is at ``output``.
        on_progress: Receives reports.

    Returns:
        The engine.

    Raises:
        BackendError: TensorRT is not installed.
        BundleError: The bundle can't be read.
        EngineBuildError: TensorRT or the driver is too old, an architecture lacks the type of the weights, the bundle
            has an 8-bit K/V cache, or TensorRT refuses the graph or the options.
        ExportError: There is something else at ``output``.
        OutputError: The engine can't be written.
    """
    library = import_tensorrt(flavor)
    check_version(library, on_progress)
    architectures = check_targets(library, targets) if targets else ()
    if not isinstance(bundle, Bundle):
        require_bundle(Path(bundle))
        bundle = Bundle.load(Path(bundle))
    _check_kv_cache(bundle)
    check_weights(bundle, architectures or (current_architecture(library),))
    if not architectures:
        check_driver(library)
    if bundle.dtype == "float32":
        on_progress(Progress("weights and caches are fp32, like the bundle's; fp16 would take half of the memory"))
    if "int8" in (bundle.weights.layers, bundle.weights.lm_head, bundle.weights.heads):
        on_progress(Progress(f"matrices of 8-bit integers are {bundle.dtype} in the engine, with the same numbers"))
    limits = choose_limits(bundle, max_batch=max_batch, max_seq_len=max_seq_len, max_prefill=max_prefill)
    cache = None if timing_cache is None else Path(timing_cache)
    options = BuildOptions(limits, architectures, opt_level, cache)
    engine = write_engine(library, bundle, options, Path(output), replace_existing=overwrite, on_progress=on_progress)
    on_progress(Progress(f"wrote {_summary(engine, bundle)}"))
    return engine


def _check_kv_cache(bundle: Bundle) -> None:
    if bundle.kv_cache is not None:
        raise EngineBuildError(
            f"This bundle has a K/V cache in {bundle.kv_cache}, and TensorRT takes only floating-point numbers there.",
            remedy="Export the bundle without `kv_cache`.",
        )


def _summary(engine: CompiledEngine, bundle: Bundle) -> str:
    size, layers = engine.files[ENGINE].size / 2**20, sum(engine.layers.values())
    longest = engine.limits.longest_sequence(bundle.tree)
    return (
        f"{size:,.0f} MiB from {layers:,} layers, for {', '.join(engine.targets)}; up to {engine.limits.max_batch} "
        f"sequences of {longest:,} tokens"
    )


def write_engine(
    library: TensorRTLibrary,
    bundle: Bundle,
    options: BuildOptions,
    target: Path,
    *,
    replace_existing: bool = False,
    on_progress: OnProgress = ignore_progress,
) -> CompiledEngine:
    """Builds an engine, and writes it with all other files that the runtime needs.

    Args:
        library: The TensorRT to build with.
        bundle: The bundle to compile.
        options: Limits of the engine, and settings of the builder.
        target: The folder to write. It appears whole or not at all.
        replace_existing: Replace an engine that is there.
        on_progress: Receives reports.

    Returns:
        The engine.

    Raises:
        EngineBuildError: TensorRT refuses the graph, or can't build an engine with these options.
        ExportError: There is something else at ``target``.
        OutputError: The engine can't be written.
    """
    check_target(target, replace_existing=replace_existing, marker=ENGINE_DESCRIPTION, noun="engine")
    on_progress(Progress(f"building for {', '.join(options.targets) or 'this GPU'}"))
    task = Task(f"{library.flavor} {library.version}", 100, on_progress)
    built = EngineBuilder(library, bundle, options).build(lambda fraction: task.reach(int(100 * fraction)))
    on_progress(Progress(f"writing {target}"))
    engine = CompiledEngine(
        folder=target,
        flavor=library.flavor,
        version=library.version,
        targets=built.targets,
        bundle_sha256=FileFacts.of(bundle.folder / DESCRIPTION).sha256,
        limits=options.limits,
        profiles=built.profiles,
        layers=built.layers,
        rewrites=built.rewrites,
        opt_level=options.opt_level,
        build_seconds=built.seconds,
    )
    try:
        with atomic_folder(target, replace_existing=replace_existing) as folder:
            (folder / ENGINE).write_bytes(built.data)
            carried = [DESCRIPTION, *(name for name in bundle.files if name not in (*GRAPHS, WEIGHTS))]
            for name in carried:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(bundle.folder / name, folder / name)
            engine = replace(engine, files={name: FileFacts.of(folder / name) for name in (ENGINE, *carried)})
            (folder / ENGINE_DESCRIPTION).write_text(engine.to_json(bundle), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"The engine can't be written to {target}: {error}.") from error
    if options.timing_cache is not None and built.timing_cache is not None:
        write_bytes(options.timing_cache, built.timing_cache)
    return engine
