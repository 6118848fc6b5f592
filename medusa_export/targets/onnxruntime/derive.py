"""Derive the graphs for ONNX Runtime from a bundle's standard graph, and write them beside it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import onnx
import onnx_ir as ir

from medusa_export.common.errors import ExportError, RewriteError, first_line
from medusa_export.graph.rewrites.pipeline import Pipeline
from medusa_export.graph.rewrites.rewrite import StepFacts
from medusa_export.targets.onnxruntime.pipelines import DERIVED
from medusa_export.targets.onnxruntime.row_exact_attention import MakeAttentionRowExact
from medusa_runtime.bundles.bundle import GRAPH
from medusa_runtime.bundles.facts import GraphFacts
from medusa_runtime.bundles.slots import PANEL

# Characters of the longest reason that a bundle keeps.
_LONGEST_REASON = 1000


def derive_graphs(folder: Path, step: StepFacts) -> dict[str, GraphFacts]:
    """Writes each derived graph that can be made. Its weights are references to those of the standard graph.

    Args:
        folder: Holds the standard graph and its weights.
        step: Facts about the step.

    Returns:
        By file name, the rewrites of a graph, or the reason why it is left out.
    """
    return {pipeline.name: _derive(pipeline, folder, step) for pipeline in DERIVED}


def _derive(pipeline: Pipeline, folder: Path, step: StepFacts) -> GraphFacts:
    file = folder / pipeline.name
    model = ir.load(folder / GRAPH)
    try:
        counts = pipeline.run(model, step)
        _save(model, file)
    except (RewriteError, _InvalidGraphError) as error:
        file.unlink(missing_ok=True)
        return GraphFacts(left_out=str(error)[:_LONGEST_REASON])
    by_panels = bool(counts.get(MakeAttentionRowExact.name))
    return GraphFacts(rewrites=counts, panel=PANEL if by_panels else None, rows_differ=by_panels and step.has_experts)


class _InvalidGraphError(ExportError):
    """A rewritten graph that is not valid."""


def _save(model: ir.Model, file: Path) -> None:
    """Writes a graph that is valid by the rules of ONNX, and that ONNX Runtime, if it is installed, can load.

    Raises:
        _InvalidGraphError: The graph can't be written, breaks a rule, or can't be loaded.
    """
    try:
        ir.save(model, file)
        onnx.checker.check_model(str(file))
        _load(file)
    except OSError:
        raise  # a full disk, say, which is no fault of the graph
    # A wrong graph makes each of these libraries raise other errors.
    except Exception as error:
        raise _InvalidGraphError(f"Its rewrites gave a graph that is not valid: {first_line(error)}.") from error


def _load(file: Path) -> None:
    """Loads a graph as it is, without optimizing it. Weights are mapped, not read."""
    try:
        import onnxruntime  # noqa: PLC0415  # not needed to export
        from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernelError  # noqa: PLC0415
    except ImportError:
        return
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_prepacking", "1")
    with contextlib.suppress(NoKernelError):  # other devices may have a kernel that the CPU lacks
        onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
