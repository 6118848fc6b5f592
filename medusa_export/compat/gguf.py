"""gguf: a file is parsed once, and fast, while transformers loads it.

Tried with gguf 0.19.0 and transformers 5.24.0.

They were also tried with transformers 5.17.0, but on no model.

Without these patches a GGUF file still loads, to the same model, but slowly:

* transformers parses the file for the configuration, again for the weights and a third time for the tokenizer. It
  builds the table of tensor names once per module of the model. Both are pure functions, so their results are kept.
* ``GGUFReader._get`` slices a ``np.memmap`` for each token of the vocabulary, which takes ten times as long as a view.

transformers looks both up in ``gguf`` at each call, so they are replaced there.

``pre_tokenizer_splits``: the splits of text that transformers knows by the names that files have. Without it, this
project would need a table of its own.

``release_pages``: the file is mapped into memory. Without it all parts that were read stay there.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray
from transformers.integrations.gguf import gguf_tokenizer_mapping

# One entry per open block. Only the outermost block changes anything.
_open: list[None] = []


@contextmanager
def gguf_cache() -> Iterator[None]:
    """Parses each GGUF file once, and builds each table of tensor names once, for the duration of a block.

    Blocks may be nested. Results are kept until the outermost block ends, and files must not change before. Only one
    thread may use it at a time. Without the library ``gguf`` it does nothing.
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
    """A ``gguf.GGUFReader`` of a file. Within ``gguf_cache`` it is the one that transformers uses too."""
    gguf: Any = import_module("gguf")  # not needed for other formats
    return gguf.GGUFReader(path)


def pre_tokenizer_splits() -> dict[str, str]:
    """Regular expressions that split text, by ``tokenizer.ggml.pre``; none in older versions of transformers."""
    found: dict[str, str] = getattr(gguf_tokenizer_mapping, "GGUF_PRE_TOKENIZER_SPLITS", {})
    return found


def release_pages(reader: Any) -> None:
    """Lets the system take back the memory of the parts of a file that were read. They are read again when needed."""
    if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
        reader.data._mmap.madvise(mmap.MADV_DONTNEED)


def _read_values(
    reader: Any, offset: int, dtype: DTypeLike, count: int = 1, override_order: Any = None
) -> NDArray[Any]:
    """Replaces ``GGUFReader._get``.

    Returns:
        A view of the file, [count].

    Raises:
        ValueError: The file ends before it.
    """
    values = np.frombuffer(reader.data, dtype, int(count), int(offset))
    order = reader.byte_order if override_order is None else override_order
    return values if order == "I" else values.view(values.dtype.newbyteorder(order))
