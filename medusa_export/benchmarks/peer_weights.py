"""The storage of a contestant's weights, which says whether its tokens can be compared with the bundle's."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from medusa_export.common.dtypes import DTYPES, torch_name
from medusa_export.common.errors import CheckpointError
from medusa_export.compat.gguf import open_gguf
from medusa_runtime.bundles.bundle import Bundle

_FLOATS = {torch_name(dtype): dtype for dtype in DTYPES}
_ONNX_FLOATS = {
    onnx.TensorProto.FLOAT: "fp32", onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.BFLOAT16: "bf16",
}  # fmt: skip
_GGUF_FLOATS = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}


@dataclass(frozen=True)
class StoredWeights:
    """The storage of most of a contestant's weights.

    Attributes:
        kind: The storage, such as ``fp32``, ``int4, blocks of 32`` or ``Q4_1``.
        same: True if the numbers are those of the bundle. Peers with unquantized weights share the numbers of an
            unquantized bundle of the same dtype. All others have numbers of their own, which they round themselves.
    """

    kind: str
    same: bool

    def __str__(self) -> str:
        return f"{'same' if self.same else 'own'}: {self.kind}"


def bundle_weights(bundle: Bundle) -> StoredWeights:
    """The weights of a bundle, measured with itself."""
    stored = bundle.weights
    if stored.layers is None:
        return StoredWeights(_FLOATS[bundle.dtype], same=True)
    has_blocks = stored.layers in ("int4", "int8")
    kind = _blocks(stored.layers, stored.block_size) if has_blocks else stored.layers
    return StoredWeights(kind, same=True)


def unquantized_weights(kind: str, bundle: Bundle) -> StoredWeights:
    """The weights of a peer that reads the same checkpoint as the bundle.

    Args:
        kind: The storage of the peer's weights. Another storage than the bundle's makes other numbers.
        bundle: The bundle.
    """
    return StoredWeights(kind, same=not bundle.weights.is_quantized and kind == _FLOATS[bundle.dtype])


def genai_weights(folder: Path, bundle: Bundle) -> StoredWeights:
    """The weights of a model for onnxruntime-genai.

    Args:
        folder: The model's folder.
        bundle: The bundle.

    Raises:
        CheckpointError: The folder has no such model.
    """
    try:
        config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
        model = onnx.load(folder / config["model"]["decoder"]["filename"], load_external_data=False)
    except (OSError, ValueError, KeyError, TypeError, DecodeError) as error:
        raise CheckpointError(f"{folder} has no model for onnxruntime-genai ({error!r}).") from error
    products = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    if products:
        blocks = Counter((_number(node, "bits"), _number(node, "block_size")) for node in products)
        bits, block_size = blocks.most_common(1)[0][0]
        return StoredWeights(_blocks(f"int{bits}", block_size), same=False)
    largest = max(model.graph.initializer, key=lambda tensor: math.prod(tensor.dims))
    return unquantized_weights(_ONNX_FLOATS.get(largest.data_type, "other types"), bundle)


def _number(node: onnx.NodeProto, name: str) -> int:
    return next(int(attribute.i) for attribute in node.attribute if attribute.name == name)


def gguf_weights(file: Path, bundle: Bundle) -> StoredWeights:
    """The weights of a GGUF file.

    Args:
        file: The file.
        bundle: The bundle.

    Raises:
        CheckpointError: The file can't be read.
    """
    try:
        reader = open_gguf(file)
    except (OSError, ValueError, IndexError) as error:
        raise CheckpointError(f"{file} can't be read as GGUF: {error}.") from error
    sizes = Counter[str]()
    for tensor in reader.tensors:
        sizes[tensor.tensor_type.name] += int(tensor.n_elements)
    kind = sizes.most_common(1)[0][0]
    return unquantized_weights(_GGUF_FLOATS[kind], bundle) if kind in _GGUF_FLOATS else StoredWeights(kind, same=False)


def _blocks(kind: str, block_size: int) -> str:
    return f"{kind}, blocks of {block_size}"
