"""Options of an engine: its limits, the GPUs that it is for, and how it is built."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medusa_export.common import defaults
from medusa_export.common.errors import EngineBuildError
from medusa_runtime.backends.tensorrt.library import TensorRTLibrary
from medusa_runtime.bundles.bundle import Bundle
from medusa_runtime.bundles.compiled import EngineLimits

# Slots per row, and tokens per chunk, of an engine whose options leave them open: at most these.
MOST_SLOTS, MOST_PREFILL = 4096, 512
# The first architecture that has each type of weights. All architectures have the types that are not named.
_FIRST_ARCHITECTURES = {"int4": 80, "fp8": 89}
_ARCHITECTURE = re.compile(r"sm_?(\d{2,3})", re.IGNORECASE)


@dataclass(frozen=True)
class BuildOptions:
    """Options of one build.

    Attributes:
        limits: Rows, slots per row and tokens per step of the engine.
        targets: GPU architectures such as ``sm89``; empty for the GPU of this machine.
        opt_level: The builder's optimization level, 0 to 5.
        timing_cache: A file of measured kernels to read and to write; for ``tensorrt`` only.
    """

    limits: EngineLimits
    targets: tuple[str, ...] = ()
    opt_level: int = defaults.OPT_LEVEL
    timing_cache: Path | None = None


def choose_limits(
    bundle: Bundle, *, max_batch: int, max_seq_len: int | None = None, max_prefill: int | None = None
) -> EngineLimits:
    """Checks the limits of an engine against the bundle's contract, and chooses those that are None.

    Args:
        bundle: The bundle.
        max_batch: Rows.
        max_seq_len: Slots per row: for prompt, answer, and M + T - 2 for the tree in flight. If None, as many as the
            model's positions need, at most 4096.
        max_prefill: Tokens of the longest chunk. If None, 512 or as many as the slots allow.

    Raises:
        EngineBuildError: The limits contradict each other. The message says which ones would do.
    """
    tree, slots, margin = bundle.tree.size, bundle.slots, bundle.slots.margin
    capacity = max_seq_len or min(slots.sequence_capacity(bundle.model.max_positions, tree), MOST_SLOTS)
    smallest = slots.capacity(0, tree)
    if capacity < smallest:
        raise EngineBuildError(
            f"`max_seq_len={capacity}` is smaller than a step: the tree has {tree} nodes, and its depth takes {margin} "
            f"more slots. Give at least {smallest}, and room for prompt and answer."
        )
    most = slots.most_entries(capacity)
    prefill = max_prefill if max_prefill is not None else max(min(MOST_PREFILL, most), tree)
    if prefill < tree:
        raise EngineBuildError(
            f"`max_prefill={prefill}` is smaller than the tree of {tree} nodes. The last chunk of a prompt is padded "
            f"to the size of the tree, so give at least {tree}."
        )
    if prefill > most:
        raise EngineBuildError(
            f"`max_prefill={prefill}` doesn't fit into `max_seq_len={capacity}`, because the first {margin} slots of a "
            f"row are reserved. Give at most {most}."
        )
    return EngineLimits(max_batch=max_batch, capacity=capacity, max_prefill=prefill)


def known_targets(library: TensorRTLibrary) -> tuple[str, ...]:
    """Returns the architectures that a flavor builds for ahead of time; none if it builds only for the GPU at hand."""
    kinds = getattr(library.trt, "ComputeCapability", None)
    names = getattr(kinds, "__members__", {}) if hasattr(library.trt.IBuilderConfig, "set_compute_capability") else {}
    return tuple(name.lower() for name in names if name.startswith("SM"))


def check_targets(library: TensorRTLibrary, names: Sequence[str]) -> tuple[str, ...]:
    """Checks the names of architectures.

    Args:
        library: The TensorRT to build with.
        names: Names such as ``sm89`` or ``SM_89``.

    Returns:
        The architectures as ``sm89``, each once.

    Raises:
        EngineBuildError: This flavor can't build for one of them.
    """
    known = known_targets(library)
    if not known:
        raise EngineBuildError(
            f"{library.flavor} builds for the GPU at hand only: drop `targets` and run this on a machine with that "
            "GPU, or use `flavor='tensorrt-rtx'`."
        )
    targets = []
    for name in names:
        match = _ARCHITECTURE.fullmatch(name)
        if match is None or f"sm{match[1]}" not in known:
            raise EngineBuildError(
                f"{library.flavor} {library.version} can't build for {name!r}: it knows {', '.join(known)}."
            )
        targets.append(f"sm{match[1]}")
    return tuple(dict.fromkeys(targets))


def check_weights(bundle: Bundle, targets: Sequence[str]) -> None:
    """Checks that an engine can be built from the weights of a bundle, and that architectures have their types.

    Args:
        bundle: The bundle.
        targets: The architectures that are built for, as ``sm89``.

    Raises:
        EngineBuildError: One of them lacks a type, or the bundle rounds activations.
    """
    stored = bundle.weights
    if stored.activations is not None:
        raise EngineBuildError(
            "This bundle rounds activations to 8 bits, and no engine can be built from such a bundle yet: export the "
            "model again without `activations`."
        )
    kinds = {stored.layers, stored.lm_head, stored.heads}
    for kind, first in _FIRST_ARCHITECTURES.items():
        if kind not in kinds:
            continue
        older = [target for target in targets if int(target.removeprefix("sm")) < first]
        if older:
            raise EngineBuildError(
                f"This bundle has {kind} weights, which TensorRT takes from sm{first} on, not for {', '.join(older)}: "
                "leave these architectures out, or export the model again with other weights."
            )
