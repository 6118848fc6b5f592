"""torch: two parts without a public name, and silence while it traces.

Tried with torch 2.13.0, onnx_ir 1.1.0 and onnxscript 0.7.2.

* ``tree_flatten``, ``tree_unflatten``: the arguments of a decoder layer as a flat list, and back. Without them, layers
  that pass tensors in tuples or dictionaries could not share a trace.
* ``FakeTensorMode``: runs a model on shapes alone. Without it, reading the shape of a cache would run a step.
* ``quiet_tracing``: torch.onnx prints progress, and the three libraries log remarks on each weight. Without it all that
  is on the terminal.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = ["FakeTensorMode", "quiet_tracing", "tree_flatten", "tree_unflatten"]

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
