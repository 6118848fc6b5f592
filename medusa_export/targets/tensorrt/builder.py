"""Builds an engine in memory: parses the graph, sets up the builder, and runs it.

There is one engine with one copy of the weights and two profiles. The network is strongly typed: it computes in the
types of the graph. It updates its caches in place.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medusa_export.common.errors import EngineBuildError
from medusa_export.targets.tensorrt.messages import NO_DRIVER, build_error, parser_error
from medusa_export.targets.tensorrt.monitor import OnFraction, build_monitor, in_thread
from medusa_export.targets.tensorrt.network import check_network, layers_of
from medusa_export.targets.tensorrt.options import BuildOptions, known_targets
from medusa_export.targets.tensorrt.profiles import profiles_for
from medusa_export.targets.tensorrt.rewrites.pipeline import graph_for_tensorrt
from medusa_runtime.backends.tensorrt.cuda import Cuda
from medusa_runtime.backends.tensorrt.library import TensorRTLibrary, error_log
from medusa_runtime.bundles.bundle import Bundle
from medusa_runtime.bundles.compiled import Profile
from medusa_runtime.bundles.contract import fixed_shape
from medusa_runtime.common.collection import collection_paused
from medusa_runtime.errors import BackendError


@dataclass
class BuiltEngine:
    """A built engine in memory.

    Attributes:
        data: The serialized engine.
        targets: GPU architectures that it runs on.
        profiles: Its optimization profiles, in order.
        layers: Number of layers of the parsed network, by type.
        rewrites: Number of places that each rewrite changed, by its name.
        seconds: Time to parse and build, in seconds.
        timing_cache: The measured kernels, serialized; None if they are not kept.
    """

    data: memoryview
    targets: tuple[str, ...]
    profiles: tuple[Profile, ...]
    layers: dict[str, int]
    rewrites: Mapping[str, int]
    seconds: float
    timing_cache: bytes | None = None


@dataclass
class EngineBuilder:
    """Parses a bundle's graph and builds an engine from it.

    Args:
        library: The TensorRT to build with.
        bundle: The bundle to compile.
        options: Limits of the engine, and settings of the builder.

    Raises:
        EngineBuildError: There is a timing cache, but the flavor does not use one.

    Attributes:
        log: TensorRT's logger; ``log.errors`` holds the errors.
        network: The parsed network; None before ``parse``.
        rewrites: Number of places that each rewrite changed, by its name; empty before ``parse``.
    """

    library: TensorRTLibrary
    bundle: Bundle
    options: BuildOptions
    log: Any = field(init=False)
    network: Any = field(init=False, default=None)
    rewrites: Mapping[str, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        trt = self.library.trt
        if self.options.timing_cache is not None and self.library.flavor == "tensorrt-rtx":
            raise EngineBuildError(
                "tensorrt-rtx does nothing with a timing cache, because it measures no kernels when it builds.",
                remedy="Drop `timing_cache`. The runtime keeps the kernels that it compiles beside the engine.",
            )
        self.log = error_log(trt, ignore=NO_DRIVER if self.options.targets else None)
        # It calls the log with a lock held, which a builder that is collected there takes, too.
        with collection_paused():
            self._builder = trt.Builder(self.log)

    def parse(self) -> None:
        """Parses the graph, with caches of a fixed capacity and TensorRT's rewrites.

        Raises:
            EngineBuildError: The parser refuses the graph, or its network differs from the contract.
        """
        trt = self.library.trt
        flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        self.network = self._builder.create_network(1 << int(flag) if flag is not None else 0)
        self._parser = trt.OnnxParser(self.network, self.log)
        graph = graph_for_tensorrt(self.bundle, self.options.limits.capacity)
        self.rewrites = graph.rewrites
        self._made = graph.made  # the parser reads them until it is gone
        parser = self._parser
        loaded = parser.load_model_proto(graph.data, str(self.bundle.graph.resolve()))
        loaded = loaded and all(
            parser.load_initializer(name, data.ctypes.data, data.nbytes) for name, data in self._made.items()
        )
        if not loaded or not parser.parse_model_proto():
            raise parser_error(parser, self.log)
        check_network(trt, self.network, self.bundle, self.options.limits.capacity)
        self._allow_decomposed_attention()

    def _allow_decomposed_attention(self) -> None:
        """Lets TensorRT compute an attention in parts if it has no kernel for it (fp32, odd head sizes)."""
        trt = self.library.trt
        for layer in layers_of(self.network):
            if layer.type == trt.LayerType.ATTENTION_INPUT:
                layer.__class__ = trt.IAttentionInputLayer  # the bindings give the base class
                layer.attention.decomposable = True

    def layer_counts(self) -> dict[str, int]:
        """Returns the number of layers of the parsed network by type, most frequent first."""
        return dict(Counter(layer.type.name for layer in layers_of(self.network)).most_common())

    def build(self, on_fraction: OnFraction = lambda _: None) -> BuiltEngine:
        """Builds the engine in a thread, so that an interrupt can cancel it.

        Args:
            on_fraction: Receives the finished share of the build, from 0 to 1.

        Raises:
            EngineBuildError: The builder failed.
            KeyboardInterrupt: The build was interrupted, and the builder has stopped.
        """
        started = time.monotonic()
        targets = self.options.targets or (current_architecture(self.library),)
        self.parse()
        config, profiles = self._config(), profiles_for(self.bundle, self.options.limits)
        for profile in profiles:
            self._add_profile(config, profile)
        monitor = build_monitor(self.library.trt, on_fraction)
        config.progress_monitor = monitor
        data = in_thread(lambda: self._builder.build_serialized_network(self.network, config), monitor.cancel)
        if data is None:
            raise build_error(self.log.errors, self._layer_names())
        on_fraction(1.0)  # the builder does not always report its last steps
        kept = bytes(config.get_timing_cache().serialize()) if self.options.timing_cache is not None else None
        return BuiltEngine(
            data=memoryview(data),
            targets=targets,
            profiles=profiles,
            layers=self.layer_counts(),
            rewrites=self.rewrites,
            seconds=time.monotonic() - started,
            timing_cache=kept,
        )

    def _layer_names(self) -> list[str]:
        return [layer.name for layer in layers_of(self.network)]

    def _config(self) -> Any:
        trt, options = self.library.trt, self.options
        config = self._builder.create_builder_config()
        config.builder_optimization_level = options.opt_level
        config.clear_flag(trt.BuilderFlag.TF32)  # fp32 is fp32
        user_allocation = getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)
        if user_allocation is not None:  # without it, steps can't be captured as CUDA graphs
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
                remedy="If it belongs to another TensorRT or GPU, or was altered, delete it or give another file.",
            )

    def _add_profile(self, config: Any, profile: Profile) -> None:
        shapes = self._builder.create_optimization_profile()
        for spec in self.bundle.inputs:
            capacity = {"capacity": self.options.limits.capacity}
            shapes.set_shape(spec.name, *(fixed_shape(spec, capacity | sizes) for sizes in profile.sizes))
        if config.add_optimization_profile(shapes) < 0:
            raise build_error(self.log.errors, ())


def current_architecture(library: TensorRTLibrary) -> str:
    """Returns the architecture of this machine's GPU, such as sm89.

    Raises:
        EngineBuildError: This machine has no GPU that CUDA can use.
    """
    try:
        return Cuda.open().device.architecture
    except BackendError as error:
        known = known_targets(library)
        remedy = (
            f"To build without a GPU, name the architectures with `targets`: {', '.join(known)}." if known else None
        )
        raise EngineBuildError(str(error), remedy=remedy) from error
