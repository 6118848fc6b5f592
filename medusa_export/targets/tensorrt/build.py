"""Compile a bundle to a TensorRT engine: one engine, one copy of the weights, two profiles.

The network is strongly typed: it computes in the types of the graph. Its caches are updated in place. One profile
is for decoding, whose steps have at most as many tokens as the tree has nodes, the other for chunks of a prompt.
"""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from medusa_export.common.errors import EngineBuildError, OutputError
from medusa_export.common.files import atomic_folder, check_target, write_bytes
from medusa_export.targets.tensorrt.messages import NO_DRIVER, build_error, parser_error
from medusa_export.targets.tensorrt.rewrites.pipeline import graph_for_tensorrt
from medusa_runtime.backends.tensorrt.cuda import Cuda
from medusa_runtime.backends.tensorrt.library import TensorRTLibrary, error_log
from medusa_runtime.bundles.bundle import DESCRIPTION, ENGINE_DESCRIPTION, GRAPHS, WEIGHTS, Bundle
from medusa_runtime.bundles.compiled import ENGINE, CompiledEngine, EngineLimits, Profile
from medusa_runtime.bundles.contract import TensorSpec, cache_name, fixed_shape
from medusa_runtime.bundles.listed_folder import FileFacts
from medusa_runtime.errors import BackendError
from medusa_runtime.sampling import draws_ahead

DEFAULT_SEQUENCE, DEFAULT_PREFILL = 4096, 512
USUAL_TREE = 16  # nodes of the tree that kernels for decoding are chosen for
_ARCHITECTURE = re.compile(r"sm_?(\d{2,3})", re.IGNORECASE)

Progress = Callable[[str], None]
# Told how far a build is, from 0 to 1.
Fraction = Callable[[float], None]


@dataclass(frozen=True)
class BuildOptions:
    """What an engine is to hold, and how it is built.

    Attributes:
        limits: Rows, slots and tokens per step.
        targets: Architectures such as ``sm89``; none for the GPU of this machine.
        opt_level: The builder's optimisation level, 0 to 5.
        timing_cache: A file of measured kernels to read and to write, for a flavor that measures.
    """

    limits: EngineLimits
    targets: tuple[str, ...] = ()
    opt_level: int = 3
    timing_cache: Path | None = None


@dataclass
class BuiltEngine:
    """What the builder gave.

    Attributes:
        data: The serialised engine.
        targets: What it runs on.
        profiles: Its profiles, in order.
        layers: Layers of the parsed network by type.
        seconds: How long parsing and building took.
        timing_cache: What it measured, if it was asked to keep that.
    """

    data: memoryview
    targets: tuple[str, ...]
    profiles: tuple[Profile, ...]
    layers: dict[str, int]
    seconds: float
    timing_cache: bytes | None = None


def choose_limits(
    bundle: Bundle, *, max_batch: int, max_seq_len: int | None = None, max_prefill: int | None = None
) -> EngineLimits:
    """Checks what an engine is asked to hold against the bundle's contract, and chooses what is left open.

    Args:
        bundle: The bundle.
        max_batch: Rows.
        max_seq_len: Slots per row: prompt, answer, and M + T - 2 for the tree in flight. If None, what the model's
            positions need, at most 4096.
        max_prefill: Tokens of the longest chunk; 512 or what the slots allow if None.

    Raises:
        EngineBuildError: They don't go together; the message says what would.
    """
    tree, margin = bundle.tree.size, bundle.tree.max_depth
    capacity = max_seq_len or min(bundle.model.max_positions + margin + tree - 2, DEFAULT_SEQUENCE)
    smallest = margin + tree
    if capacity < smallest:
        raise EngineBuildError(
            f"--max-seq-len {capacity} is smaller than a step: the tree has {tree} nodes and its depth takes {margin} "
            f"slots more. Give at least {smallest}, and room for prompt and answer."
        )
    prefill = max_prefill if max_prefill is not None else max(min(DEFAULT_PREFILL, capacity - margin), tree)
    if prefill < tree:
        raise EngineBuildError(
            f"--max-prefill {prefill} is smaller than the tree of {tree} nodes, to which the last chunk of a prompt is "
            f"padded. Give at least {tree}."
        )
    if prefill + margin > capacity:
        raise EngineBuildError(
            f"--max-prefill {prefill} doesn't fit into --max-seq-len {capacity}, of which {margin} slots lie in front. "
            f"Give at most {capacity - margin}."
        )
    return EngineLimits(max_batch=max_batch, capacity=capacity, max_prefill=prefill)


def profiles_for(bundle: Bundle, limits: EngineLimits) -> tuple[Profile, Profile]:
    """The ranges of B, S and W that the engine is optimised for.

    The optimum has no draws, as most steps have none. With an optimum of any draws TensorRT-RTX 1.7.1 did not finish
    within 25 minutes. With 10 of the 26 halvings of the search for the end of a nucleus it takes seconds.
    """
    batch = (1, 1, limits.max_batch)
    tree = bundle.tree.size
    draws = (0, 0, draws_ahead(bundle.tree))
    return (
        Profile("decode", batch, (1, min(tree, USUAL_TREE), tree), draws),
        Profile("prefill", batch, (1, max(limits.max_prefill // 2, 1), limits.max_prefill), draws),
    )


def known_targets(library: TensorRTLibrary) -> tuple[str, ...]:
    """Architectures that a flavor builds for ahead of time; none if it builds for the GPU at hand only."""
    kinds = getattr(library.trt, "ComputeCapability", None)
    names = getattr(kinds, "__members__", {}) if hasattr(library.trt.IBuilderConfig, "set_compute_capability") else {}
    return tuple(name.lower() for name in names if name.startswith("SM"))


def parse_targets(library: TensorRTLibrary, text: str) -> tuple[str, ...]:
    """``sm80,sm89`` as a tuple.

    Raises:
        EngineBuildError: This flavor can't build for one of them.
    """
    known = known_targets(library)
    if not known:
        raise EngineBuildError(
            f"{library.flavor} builds for the GPU at hand only: drop --target and run this on a machine with that GPU, "
            "or use --flavor tensorrt-rtx."
        )
    targets = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = _ARCHITECTURE.fullmatch(part)
        if match is None or f"sm{match[1]}" not in known:
            raise EngineBuildError(
                f"{library.flavor} {library.version} can't build for {part!r}: it knows {', '.join(known)}."
            )
        targets.append(f"sm{match[1]}")
    if not targets:
        raise EngineBuildError(f"--target names no architecture: give some of {', '.join(known)}.")
    return tuple(dict.fromkeys(targets))


@dataclass
class EngineBuilder:
    """Parses a bundle's graph and builds an engine of it.

    Args:
        library: The TensorRT to build with.
        bundle: What to build.
        options: How.

    Raises:
        EngineBuildError: A timing cache was given, and the flavor has no use for one.

    Attributes:
        log: What TensorRT complained of.
        network: The parsed network, once there is one.
    """

    library: TensorRTLibrary
    bundle: Bundle
    options: BuildOptions
    log: Any = field(init=False)
    network: Any = field(init=False, default=None)

    def __post_init__(self) -> None:
        trt = self.library.trt
        if self.options.timing_cache is not None and self.library.flavor == "tensorrt-rtx":
            raise EngineBuildError(
                "tensorrt-rtx does nothing with a timing cache: it measures no kernels when it builds.",
                remedy="Drop --timing-cache. What it compiles when an engine runs is kept beside the engine.",
            )
        self.log = error_log(trt, ignore=NO_DRIVER if self.options.targets else None)
        self._builder = trt.Builder(self.log)

    def parse(self) -> None:
        """Reads the graph, with fixed caches and TensorRT's rewrites.

        Raises:
            EngineBuildError: The parser refused it, or made something else of it than the contract says.
        """
        trt = self.library.trt
        flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        self.network = self._builder.create_network(1 << int(flag) if flag is not None else 0)
        self._parser = trt.OnnxParser(self.network, self.log)
        graph = graph_for_tensorrt(self.bundle, self.options.limits.capacity)
        if not self._parser.parse(graph.data, str(self.bundle.graph.resolve())):
            raise parser_error(self._parser, self.log)
        check_network(trt, self.network, self.bundle, self.options.limits.capacity)
        self._allow_decomposed_attention()

    def _allow_decomposed_attention(self) -> None:
        """Where there is no kernel for an attention (fp32, odd head sizes), TensorRT may compute it in parts."""
        trt = self.library.trt
        for layer in _layers(self.network):
            if layer.type == trt.LayerType.ATTENTION_INPUT:
                layer.__class__ = trt.IAttentionInputLayer  # the bindings give the base class
                layer.attention.decomposable = True

    def layer_counts(self) -> dict[str, int]:
        """Layers of the parsed network by type, most frequent first."""
        return dict(Counter(layer.type.name for layer in _layers(self.network)).most_common())

    def build(self, fraction: Fraction = lambda _: None) -> BuiltEngine:
        """Builds the engine, in a thread: an interrupt cancels it.

        Raises:
            EngineBuildError: The builder failed.
            KeyboardInterrupt: It was interrupted; the builder has stopped.
        """
        started = time.monotonic()
        targets = self.options.targets or (current_architecture(self.library),)
        self.parse()
        config, profiles = self._config(), profiles_for(self.bundle, self.options.limits)
        for profile in profiles:
            self._add_profile(config, profile)
        monitor = _monitor(self.library.trt, fraction)
        config.progress_monitor = monitor
        data = _in_thread(lambda: self._builder.build_serialized_network(self.network, config), monitor.cancel)
        if data is None:
            raise build_error(self.log.errors, self._layer_names())
        fraction(1.0)  # the last steps are not always told
        kept = bytes(config.get_timing_cache().serialize()) if self.options.timing_cache is not None else None
        return BuiltEngine(memoryview(data), targets, profiles, self.layer_counts(), time.monotonic() - started, kept)

    def _layer_names(self) -> list[str]:
        return [layer.name for layer in _layers(self.network)]

    def _config(self) -> Any:
        trt, options = self.library.trt, self.options
        config = self._builder.create_builder_config()
        config.builder_optimization_level = options.opt_level
        config.clear_flag(trt.BuilderFlag.TF32)  # fp32 is fp32
        user_allocation = getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)
        if user_allocation is not None:  # what steps must have to be captured as CUDA graphs
            config.set_flag(user_allocation)
        if options.targets:
            config.num_compute_capabilities = len(options.targets)
            for index, target in enumerate(options.targets):
                if not config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), index):
                    raise build_error(self.log.errors, ())
        if options.timing_cache is not None:
            self._use_timing_cache(config, options.timing_cache)
        return config

    def _use_timing_cache(self, config: Any, path: Path) -> None:
        try:
            known = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise EngineBuildError(f"The timing cache {path} can't be read: {error}.") from error
        cache = config.create_timing_cache(known)
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
            raise EngineBuildError(
                f"The timing cache {path} can't be used: {' '.join(self.log.errors)}",
                remedy="If it is of another TensorRT or GPU, or altered, delete it, or give another file.",
            )

    def _add_profile(self, config: Any, profile: Profile) -> None:
        shapes = self._builder.create_optimization_profile()
        for spec in self.bundle.inputs:
            ends = []
            for batch, sequence, draws in zip(profile.batch, profile.sequence, profile.draws, strict=True):
                sizes = {"batch": batch, "sequence": sequence, "draws": draws, "capacity": self.options.limits.capacity}
                ends.append(fixed_shape(spec, sizes))
            shapes.set_shape(spec.name, *ends)
        if config.add_optimization_profile(shapes) < 0:
            raise build_error(self.log.errors, ())


def _layers(network: Any) -> Iterator[Any]:
    return (network.get_layer(index) for index in range(network.num_layers))


def check_network(trt: Any, network: Any, bundle: Bundle, capacity: int) -> None:
    """Holds a parsed network against the contract: names, types and shapes, and which outputs are updated inputs.

    Raises:
        EngineBuildError: Something differs.
    """
    ours = [*bundle.inputs, *bundle.outputs]
    theirs = [network.get_input(i) for i in range(network.num_inputs)]
    theirs += [network.get_output(i) for i in range(network.num_outputs)]
    expected = [_as_network_tensor(trt, spec, capacity) for spec in ours]
    found = [(value.name, value.dtype, tuple(value.shape)) for value in theirs]
    if sorted(map(str, expected)) != sorted(map(str, found)):
        wrong = sorted(set(map(str, found)) ^ set(map(str, expected)))
        raise EngineBuildError(
            f"The network that TensorRT parsed is not what {DESCRIPTION} says: {wrong[0]} differs.",
            remedy="Export the bundle again.",
        )
    pairs = {cache_name("present", i): cache_name("past", i) for i in range(2 * bundle.model.num_layers)}
    if updated_in_place(trt, network) != pairs:
        raise EngineBuildError(
            "TensorRT doesn't update every cache in place.", remedy="Export the bundle again, or update TensorRT."
        )


def _as_network_tensor(trt: Any, spec: TensorSpec, capacity: int) -> tuple[str, Any, tuple[int, ...]]:
    kinds = {
        "int64": trt.int64, "bool": trt.bool, "float32": trt.float32, "float16": trt.float16,
        "bfloat16": trt.bfloat16,
    }  # fmt: skip
    shape = tuple(size if isinstance(size, int) else capacity if size == "capacity" else -1 for size in spec.shape)
    return spec.name, kinds[spec.dtype], shape


def updated_in_place(trt: Any, network: Any) -> dict[str, str]:
    """Outputs that share memory with an input: those of the cache updates, by name."""
    return {
        layer.get_output(0).name: layer.get_input(0).name
        for layer in _layers(network)
        if layer.type == trt.LayerType.KV_CACHE_UPDATE
    }


def current_architecture(library: TensorRTLibrary) -> str:
    """The architecture of this machine's GPU, such as sm89.

    Raises:
        EngineBuildError: There is none that CUDA can use.
    """
    try:
        return Cuda.open().device.architecture
    except BackendError as error:
        known = known_targets(library)
        remedy = f"To build without a GPU, name the architectures with --target: {', '.join(known)}." if known else None
        raise EngineBuildError(str(error), remedy=remedy) from error


def _monitor(trt: Any, fraction: Fraction) -> Any:
    """A progress monitor that tells how far the build is, and stops it once ``cancel()`` was called."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # its base is known at run time only
        def __init__(self) -> None:
            super().__init__()
            self._phases: dict[str, list[int]] = {}  # steps and finished steps, the outermost first
            self._cancelled = False
            self._reached = 0.0

        def cancel(self) -> None:
            self._cancelled = True

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._phases[phase_name] = [max(num_steps, 1), 0]

        def phase_finish(self, phase_name: str) -> None:
            self._phases.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._phases:
                self._phases[phase_name][1] = step + 1
            done, share = 0.0, 1.0
            for steps, finished in self._phases.values():
                done += share * min(finished / steps, 1.0)
                share /= steps
            self._reached = max(self._reached, min(done, 1.0))
            fraction(self._reached)
            return not self._cancelled

    return Monitor()


def _in_thread(work: Callable[[], Any], cancel: Callable[[], None]) -> Any:
    """Runs ``work`` where an interrupt can reach this thread, and waits for its end even then."""
    outcome: list[Any] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:  # noqa: BLE001  # raised again below
            failure.append(error)

    thread = threading.Thread(target=run, name="tensorrt-builder")
    thread.start()
    interrupted: KeyboardInterrupt | None = None
    while thread.is_alive():
        try:
            thread.join(0.2)
        except KeyboardInterrupt as error:
            cancel()
            interrupted = error
    if interrupted is not None:
        raise interrupted
    if failure:
        raise failure[0]
    return outcome[0]


def write_engine(
    library: TensorRTLibrary,
    bundle: Bundle,
    options: BuildOptions,
    target: Path,
    *,
    replace_existing: bool = False,
    progress: Progress = lambda _: None,
    fraction: Fraction = lambda _: None,
) -> CompiledEngine:
    """Builds an engine and writes it with all that the runtime needs; the folder appears whole or not at all.

    Args:
        library: The TensorRT to build with.
        bundle: What to build.
        options: How.
        target: The folder to write.
        replace_existing: Replace an engine that is there.
        progress: Told what is being done.
        fraction: Told how far the builder is.

    Raises:
        EngineBuildError: TensorRT refused the graph or what was asked.
        ExportError: The folder holds something else.
        OutputError: It can't be written.
    """
    check_target(target, replace_existing=replace_existing, marker=ENGINE_DESCRIPTION, noun="engine")
    progress(f"building for {', '.join(options.targets) or 'this GPU'}")
    built = EngineBuilder(library, bundle, options).build(fraction)
    progress(f"writing {target}")
    engine = CompiledEngine(
        folder=target,
        flavor=library.flavor,
        version=library.version,
        targets=built.targets,
        bundle_sha256=FileFacts.of(bundle.folder / DESCRIPTION).sha256,
        limits=options.limits,
        profiles=built.profiles,
        layers=built.layers,
        opt_level=options.opt_level,
        build_seconds=built.seconds,
    )
    try:
        with atomic_folder(target) as folder:
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
