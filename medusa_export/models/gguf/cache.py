"""Loading a GGUF file through transformers, with each piece of work done once.

transformers parses the file for the config, again for the weights and a third time for the tokenizer,
and builds the table of tensor names once per module of the model. Both are pure functions of their
arguments, so they can be remembered for as long as one load lasts. transformers looks them up in
``gguf`` at each call, which is where ``gguf_cache`` puts versions that remember.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

# The open blocks; only the outermost puts anything in place.
_open: list[None] = []


@contextmanager
def gguf_cache() -> Iterator[None]:
    """Within it, a GGUF file is parsed once and a table of tensor names built once; it may be nested.

    Nothing outlives the outermost block, within which a file must not change. It is not for several threads.
    Where ``gguf`` is not installed it does nothing.
    """
    if _open or find_spec("gguf") is None:
        yield
        return

    gguf: Any = import_module("gguf")
    reader, name_map = gguf.GGUFReader, gguf.get_tensor_name_map
    get = reader._get
    remembered = cache(reader)
    gguf.GGUFReader = lambda path, mode="r": remembered(Path(path).resolve()) if mode == "r" else reader(path, mode)
    gguf.get_tensor_name_map = cache(name_map)
    reader._get = _read_values
    _open.append(None)
    try:
        yield
    finally:
        _open.pop()
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, name_map
        reader._get = get


def open_gguf(path: Path) -> Any:
    """A ``gguf.GGUFReader`` of a file; within ``gguf_cache`` the one that transformers uses too."""
    gguf: Any = import_module("gguf")  # only here, since folders load without it
    return gguf.GGUFReader(path)


def _read_values(
    reader: Any, offset: int, dtype: DTypeLike, count: int = 1, override_order: Any = None
) -> NDArray[Any]:
    """``GGUFReader._get`` without slicing a ``np.memmap``, which is ten times as slow and is done per token.

    Returns:
        [count], a view of the file; ValueError where the file ends before it.
    """
    values = np.frombuffer(reader.data, dtype, int(count), int(offset))
    order = reader.byte_order if override_order is None else override_order
    return values if order == "I" else values.view(values.dtype.newbyteorder(order))
