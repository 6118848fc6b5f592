"""ONNX Runtime sessions: how a graph is opened."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

from medusa_runtime.backends.onnxruntime.huge_pages import private_memory, use_huge_pages
from medusa_runtime.backends.onnxruntime.row_rules import overflows
from medusa_runtime.bundles.bundle import (
    ONNXRUNTIME_BATCH_GRAPH,
    ONNXRUNTIME_CUDA_GRAPH,
    ONNXRUNTIME_GRAPH,
    WEIGHTS,
    Bundle,
)
from medusa_runtime.bundles.listed_folder import leads_outside, open_regular
from medusa_runtime.common.processes import keep_in_children
from medusa_runtime.errors import BackendError
from medusa_runtime.tuning import DYNAMIC_BLOCKS, HUGE_PAGES_PATIENCE

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_PROVIDER_OPTIONS = {CUDA: {"use_tf32": "0"}}  # fp32 is fp32, as everywhere else


def import_onnxruntime() -> Any:
    """Imports the module ``onnxruntime``.

    Its telemetry is off, unless ``ORT_DISABLE_TELEMETRY`` is set to 0 or the module was imported before: the thread
    that sends it keeps a child made by ``fork`` from ending.

    Raises:
        BackendError: It is not installed.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            "ONNX Runtime is not installed. Install it with: pip install 'medusa-export[cpu]' (or [gpu])."
        ) from error
    return onnxruntime


class ClosedSession:
    """Stands in the place of a session that was closed."""

    def __getattr__(self, _: str) -> Any:
        raise BackendError("This backend is closed: open another one.")


def derived_graph(bundle: Bundle, rows: int) -> Path:
    """The graph that was derived for ONNX Runtime on a CPU, or the bundle's own where there is none.

    There is one for a single row and one for several: ``GroupQueryAttention`` takes several tokens of one sequence, or
    one token of several. The second also runs a single row, where a bundle lacks the first.
    """
    derived = (ONNXRUNTIME_GRAPH, ONNXRUNTIME_BATCH_GRAPH) if rows == 1 else (ONNXRUNTIME_BATCH_GRAPH,)
    return next((bundle.folder / name for name in derived if name in bundle.files), bundle.graph)


def cuda_graph(bundle: Bundle) -> Path:
    """The graph that was derived for ONNX Runtime's CUDA provider, or the bundle's own where there is none."""
    return bundle.folder / ONNXRUNTIME_CUDA_GRAPH if ONNXRUNTIME_CUDA_GRAPH in bundle.files else bundle.graph


def open_session(bundle: Bundle, graph: Path | bytes, *, threads: int, provider: str) -> Any:
    """Opens an ``InferenceSession``.

    Args:
        bundle: The bundle, whose weights the graph refers to.
        graph: The graph, as a path or as bytes.
        threads: Threads of one step.
        provider: ONNX Runtime's name of the execution provider.

    Raises:
        BackendError: ONNX Runtime can't load the graph, or can't start the provider.
    """
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(bundle.folder.resolve())
    )
    options.add_session_config_entry("session.dynamic_block_base", str(DYNAMIC_BLOCKS))
    if bundle.weights.activations is not None and graph != bundle.graph and overflows(ort):
        options.add_session_config_entry("session.x64quantprecision", "1")  # makes int8 matrices uint8
    weights = _linked_weights(bundle)
    if weights is not None:
        options.add_external_initializers_from_files_in_memory([WEIGHTS], [weights], [len(weights)])
    on_huge_pages = bundle.weights.has_integers and provider == CPU
    before = private_memory() if on_huge_pages else []
    try:
        session = ort.InferenceSession(
            graph if isinstance(graph, bytes) else str(graph),
            options,
            providers=[(provider, _PROVIDER_OPTIONS.get(provider, {}))],
            disabled_optimizers=["EliminateSlice"],  # it has nothing to eliminate here, and warns about each Slice
            enable_fallback=0,  # else it prints to standard output, and tries again on the CPU
        )
    except Exception as error:  # its exceptions share no base of their own
        named = bundle.graph if isinstance(graph, bytes) else graph
        raise BackendError(
            f"ONNX Runtime {ort.__version__} can't load {named}: {' '.join(str(error).split())}"
        ) from error
    if provider not in session.get_providers():  # it goes on without a provider that it can't start
        raise BackendError(
            f"ONNX Runtime {ort.__version__} could not start {provider}: check that the NVIDIA driver, CUDA and cuDNN "
            "have the versions that it needs."
        )
    keep_in_children(session)
    if on_huge_pages:
        use_huge_pages(before, HUGE_PAGES_PATIENCE)
    return session


def _linked_weights(bundle: Bundle) -> mmap.mmap | None:
    """The weights in memory, where they are a link that leads outside of the folder, as in a hub's cache.

    ONNX Runtime refuses such a link. It copies the weights that it needs from this memory, so it takes more memory than
    for a file in the folder.
    """
    if WEIGHTS not in bundle.files or not bundle.files[WEIGHTS].size or not leads_outside(bundle.folder, WEIGHTS):
        return None
    with open_regular(bundle.folder / WEIGHTS) as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
