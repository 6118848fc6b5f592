"""torch: two parts without a public name, and silence and speed while it traces.

Tried with torch 2.13.0, onnx_ir 1.1.0 and onnxscript 0.7.2.

* ``tree_flatten``, ``tree_unflatten``: the arguments of a decoder layer as a flat list, and back. Without them, layers
  that pass tensors in tuples or dictionaries could not share a trace.
* ``FakeTensorMode``: runs a model on shapes alone. Without it, reading the shape of a cache would run a step.
* ``quiet_tracing``: torch.onnx prints progress, and the three libraries log remarks on each weight. Without it all that
  is on the terminal.
* ``export_program``: torch keeps the shapes of each operation that it traced, to find them again for equal inputs. With
  free dimensions, to find a shape again costs more than to compute it. Without it, an export takes a tenth longer.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = ["FakeTensorMode", "export_program", "quiet_tracing", "tree_flatten", "tree_unflatten"]

_LOGGERS = ("torch.onnx", "onnx_ir", "onnxscript")


@contextlib.contextmanager
def quiet_tracing() -> Iterator[None]:
    """Keeps messages of the tracer and the optimizer off the terminal."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def export_program(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], free: dict[str, Any] | tuple[Any, ...]
) -> torch.export.ExportedProgram:
    """Traces a module by ``torch.export.export``.

    Args:
        module: The module.
        args: Positional example inputs.
        kwargs: Example inputs by name.
        free: Free dimensions of the inputs, ``dynamic_shapes`` of ``torch.export.export``.
    """
    from torch._dynamo import config  # noqa: PLC0415  it takes a second to import, and torch.export needs it anyway

    with config.patch(fake_tensor_cache_enabled=False):
        return torch.export.export(module, args, dict(kwargs), dynamic_shapes=free, strict=False)
