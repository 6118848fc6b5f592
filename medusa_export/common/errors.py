"""The exceptions of the exporter; their base and those of the runtime are in ``medusa_runtime.errors``."""

from __future__ import annotations

from medusa_runtime.errors import MedusaError


class MedusaWarning(UserWarning):
    """Something in a model, its settings or its data that the user should know; the job goes on."""


class OptionError(MedusaError):
    """Options that are out of range or contradict each other."""


class MissingExtraError(MedusaError):
    """An optional package that is not installed.

    Args:
        package: The missing package.
        extra: The extra of ``medusa-export`` that installs it.

    Attributes:
        package: The missing package.
        extra: The extra of ``medusa-export`` that installs it.
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"This needs the package {package!r}. Install it with: pip install 'medusa-export[{extra}]'")
        self.package = package
        self.extra = extra


def first_line(error: BaseException) -> str:
    """The first line of an error's root cause, with its type. Libraries raise errors of many lines."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


class CheckpointError(MedusaError):
    """A model or a file of heads that can't be read, or that doesn't fit."""


class ExportError(MedusaError):
    """The graph can't be traced, rewritten or written."""


class ExtensionError(MedusaError):
    """An extension that isn't there, can't be loaded, or has the name of another."""


class OutputError(MedusaError):
    """A file that can't be written."""


class DatasetError(MedusaError):
    """Prompts, conversations or kept hidden states that can't be read, or that a job can't use."""


class SettingsError(MedusaError):
    """A folder whose job was begun with other settings."""


class TrainingError(MedusaError):
    """A training that can't start, or that failed."""


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
    """TensorRT refused a graph, or can't build an engine with these options.

    Args:
        message: The problem, as a sentence.
        node: The ONNX node that failed, if TensorRT names one.
        remedy: The remedy, as a sentence; None if it is not known.

    Attributes:
        node: The ONNX node that failed; None if TensorRT names none.
        remedy: The remedy; None if it is not known.
    """

    def __init__(self, message: str, *, node: str | None = None, remedy: str | None = None) -> None:
        super().__init__(f"{message.rstrip('.')}. {remedy}" if remedy else message)
        self.node = node
        self.remedy = remedy


class ModelNotSupportedError(ExportError):
    """The model uses a feature that the decoding step does not support.

    Args:
        feature: The feature, in words.

    Attributes:
        feature: The feature, in words.
    """

    def __init__(self, feature: str) -> None:
        super().__init__(f"This model can't be exported: it uses {feature}, which the decoding step does not support.")
        self.feature = feature
