"""What TensorRT says while it parses and builds, turned into one error that names the node and the remedy."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from medusa_export.common.errors import EngineBuildError

# Words of TensorRT's, and what helps. The first that is found counts.
REMEDIES: tuple[tuple[str, str], ...] = (
    (
        r"driver version is insufficient|no CUDA-capable device|getCurrentCC|cudaError (35|100)\b",
        "There is no usable GPU here: update the driver, or name architectures with --target, such as sm89.",
    ),
    (r"out of memory|OutOfMemory|cudaError 2\b", "There is no memory for it: lower --max-batch or --max-seq-len."),
    (r"violate shape constraints", "Raise --max-seq-len, or lower --max-prefill."),
    (
        r"static sequence length",
        "The caches must have a fixed capacity: this graph is not of contract version 1, so export the bundle again.",
    ),
    (r"more than one op named", "TensorRT-RTX trips over a fixed batch here: build with --max-batch 2 or more."),
    (r"timing cache", "The timing cache is of another TensorRT or GPU: delete it, or give another file."),
)
# What TensorRT logs as an error where it builds without a driver, and goes on.
NO_DRIVER = r"catchCudaError"


def remedy(text: str) -> str | None:
    """What helps, if these words of TensorRT's are known."""
    return next((helps for pattern, helps in REMEDIES if re.search(pattern, text, re.IGNORECASE)), None)


def parser_error(parser: Any, log: Any) -> EngineBuildError:
    """What the ONNX parser stumbled over."""
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    if not errors:
        return build_error(log.errors, ())
    first = errors[0]
    words, helps = _clean(first.desc()), None
    if not parser.supports_operator(first.node_operator()):
        helps = "This version of TensorRT doesn't know the operator: update it."
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return EngineBuildError(
        f"TensorRT's parser refused the node {first.node_name()!r} ({first.node_operator()}): {words}{more}",
        node=first.node_name(),
        remedy=helps or remedy(words),
    )


def build_error(errors: Sequence[str], nodes: Iterable[str]) -> EngineBuildError:
    """What the builder stumbled over.

    Args:
        errors: What it logged, oldest first.
        nodes: Names of the graph's nodes, the one to blame maybe among them.
    """
    text = " ".join(_clean(error) for error in errors) or "it gave no engine and no reason."
    named = sorted(
        (name for name in nodes if name and re.search(rf"(?<![\w/.]){re.escape(name)}(?![\w/])", text)), key=len
    )
    where = f" at the node {named[-1]!r}" if named else ""
    return EngineBuildError(
        f"TensorRT could not build the engine{where}: {text[:600]}",
        node=named[-1] if named else None,
        remedy=remedy(text),
    )


def _clean(text: str) -> str:
    """One line, without the places in TensorRT's source, nor the missing driver if there is more to say."""
    lines = text.splitlines()
    text = "\n".join([line for line in lines if not re.search(NO_DRIVER, line)] or lines)
    text = re.sub(r"\[\w+\.cpp::\w+::\d+\]\s*|\s*In \w+ at \S+\.cpp:\d+", " ", text)
    return re.sub(r"\s+", " ", text).strip()
