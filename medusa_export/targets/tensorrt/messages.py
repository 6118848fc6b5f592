"""Turns TensorRT's messages into one error that names the node and the remedy."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from medusa_export.common.errors import EngineBuildError

# Patterns of TensorRT's messages, with remedies. The first pattern that matches counts.
REMEDIES: tuple[tuple[str, str], ...] = (
    (
        r"driver version is insufficient|no CUDA-capable device|getCurrentCC|cudaError (35|100)\b",
        "There is no usable GPU here: update the driver, or name architectures with `targets`, such as sm89.",
    ),
    (r"out of memory|OutOfMemory|cudaError 2\b", "The GPU's memory is too small: lower `max_batch` or `max_seq_len`."),
    (r"violate shape constraints", "Raise `max_seq_len`, or lower `max_prefill`."),
    (
        r"static sequence length",
        "The caches must have a fixed capacity. This graph is not of contract version 1: export the bundle again.",
    ),
    (r"more than one op named", "TensorRT-RTX fails on a fixed batch here: build with `max_batch=2` or more."),
    (r"timing cache", "The timing cache belongs to another TensorRT or GPU: delete it, or give another file."),
)
# TensorRT logs this as an error when it builds without a driver, and goes on.
NO_DRIVER = r"catchCudaError"


def remedy(text: str) -> str | None:
    """Returns the remedy for a message of TensorRT; None if the message is unknown."""
    return next((helps for pattern, helps in REMEDIES if re.search(pattern, text, re.IGNORECASE)), None)


def parser_error(parser: Any, log: Any) -> EngineBuildError:
    """Returns the error for a graph that the ONNX parser refused."""
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
    """Returns the error for a build that failed.

    Args:
        errors: Errors that the builder logged, oldest first.
        nodes: Names of the graph's nodes. The error names the one that the builder mentions.
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
    """Returns a message as one line, without positions in TensorRT's source.

    Lines about a missing driver are dropped if there are others.
    """
    lines = text.splitlines()
    text = "\n".join([line for line in lines if not re.search(NO_DRIVER, line)] or lines)
    text = re.sub(r"\[\w+\.cpp::\w+::\d+\]\s*|\s*In \w+ at \S+\.cpp:\d+", " ", text)
    return re.sub(r"\s+", " ", text).strip()
