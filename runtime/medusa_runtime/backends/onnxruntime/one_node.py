"""Writes an ONNX model of one node, without the package ``onnx``, which the runtime doesn't need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Types of ``TensorProto``.
_ELEMENT_TYPES = {
    np.dtype(kind): number for kind, number in ((np.float32, 1), (np.uint8, 2), (np.int8, 3), (np.int32, 6))
}
_IR_VERSION, _OPSET = 10, 21
_INTEGER = 2  # the type of an attribute


def one_node_model(
    op_type: str,
    domain: str,
    constants: Mapping[str, NDArray[Any]],
    attributes: Mapping[str, int],
    *,
    columns: tuple[int, int],
    dtypes: tuple[type[np.generic], type[np.generic]] = (np.float32, np.float32),
) -> bytes:
    """The model y = node(x, constants…), with x and y of any number of rows.

    Args:
        op_type: The operator.
        domain: The operator's domain.
        constants: The inputs behind x, by name.
        attributes: The node's attributes, all of them integers.
        columns: The columns of x and of y.
        dtypes: The dtypes of x and of y.
    """
    node = (
        *(_text(1, name) for name in ("x", *constants)),
        _text(2, "y"),
        _text(4, op_type),
        *(_part(5, [_text(1, name), _number(3, value), _number(20, _INTEGER)]) for name, value in attributes.items()),
        _text(7, domain),
    )
    graph = (
        _part(1, node),
        _text(2, "graph"),
        *(_part(5, _tensor(name, array)) for name, array in constants.items()),
        _part(11, _matrix("x", columns[0], dtypes[0])),
        _part(12, _matrix("y", columns[1], dtypes[1])),
    )
    opsets = [(_text(1, ""), _number(2, _OPSET))] + [(_text(1, domain), _number(2, 1))] * bool(domain)
    return b"".join([_number(1, _IR_VERSION), _part(7, graph), *(_part(8, opset) for opset in opsets)])


def _tensor(name: str, array: NDArray[Any]) -> Sequence[bytes]:
    dims = [_number(1, length) for length in array.shape]
    return [*dims, _number(2, _ELEMENT_TYPES[array.dtype]), _text(8, name), _bytes(9, array.tobytes())]


def _matrix(name: str, columns: int, dtype: type[np.generic]) -> Sequence[bytes]:
    """A tensor of any number of rows, as an input or output of the graph."""
    shape = (_part(1, [_text(2, "rows")]), _part(1, [_number(1, columns)]))
    tensor = (_number(1, _ELEMENT_TYPES[np.dtype(dtype)]), _part(2, shape))
    return [_text(1, name), _part(2, [_part(1, tensor)])]


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _text(field: int, value: str) -> bytes:
    return _bytes(field, value.encode())


def _part(field: int, parts: Sequence[bytes]) -> bytes:
    return _bytes(field, b"".join(parts))
