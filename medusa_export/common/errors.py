"""The exceptions of the exporter; their base and those of the runtime are in ``medusa_runtime.errors``."""

from __future__ import annotations

from medusa_runtime.errors import MedusaError


def first_line(error: BaseException) -> str:
    """What first went wrong, in a line: libraries give pages."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


class CheckpointError(MedusaError):
    """A model or a heads file that can't be read, or that doesn't fit."""


class ExportError(MedusaError):
    """Tracing, rewriting or writing the graph failed."""


class ExtensionError(MedusaError):
    """An extension that isn't there, can't be loaded, or has the name of another."""


class OutputError(MedusaError):
    """A file that can't be written."""


class DatasetError(MedusaError):
    """Prompts, conversations or cached features that can't be read, or are not what a job needs."""


class SettingsError(MedusaError):
    """A job that was begun under other settings than it is to go on with."""


class TrainingError(MedusaError):
    """A training that can't be begun, or went wrong."""


class VerificationError(MedusaError):
    """A bundle and a model that can't be compared."""


class RewriteError(ExportError):
    """A rewrite of a graph failed, or can't be applied to it.

    Args:
        graph: The name of the graph.
        rewrite: The name of the rewrite.
        problem: The end of a sentence about the rewrite, such as ``failed: …``.
    """

    def __init__(self, graph: str, rewrite: str, problem: str) -> None:
        super().__init__(f"The rewrite {rewrite!r} of the graph {graph} {problem}.")
        self.graph = graph
        self.rewrite = rewrite


class EngineBuildError(ExportError):
    """TensorRT refused a graph, or can't build for what was asked.

    Args:
        message: What went wrong.
        node: The ONNX node, where TensorRT names one.
        remedy: What helps, where that is known.
    """

    def __init__(self, message: str, *, node: str | None = None, remedy: str | None = None) -> None:
        super().__init__(f"{message.rstrip('.')}. {remedy}" if remedy else message)
        self.node = node
        self.remedy = remedy


class ModelNotSupportedError(ExportError):
    """The model needs something that the exported step can't honour.

    Args:
        feature: What the model needs, named for a person.
    """

    def __init__(self, feature: str) -> None:
        super().__init__(f"This model can't be exported: it uses {feature}, which the decoding step does not support.")
        self.feature = feature
