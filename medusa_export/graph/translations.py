"""The translations of our custom ops to ONNX: to standard operators, or to marks.

A mark is an operator of our own domain. Later passes replace all marks, so a finished graph has none.
"""

from __future__ import annotations

from typing import Any

import onnx
import torch
from onnxscript import values

from medusa_export.step.constraints import refused_bits
from medusa_export.step.sampling import HALVINGS, LEAST_LOGIT
from medusa_runtime.bundles.contract import MASK_BITS, mask_bytes

OPSET_VERSION = 24
MARK_DOMAIN = "medusa_export"
EXPERTS_MARK = "ExpertProducts"


def _mark(name: str, *attributes: str, outputs: int = 1) -> Any:
    """Makes an operator of our own domain.

    Args:
        name: Its name.
        attributes: The names of its attributes. All are integers, but ``port`` is a text.
        outputs: The number of its outputs.
    """
    types = [f"tensor({kind})" for kind in ("float", "float16", "bfloat16", "int64", "int32", "int8", "bool")]
    parameter, variadic = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema.FormalParameterOption.Variadic
    kinds = {"port": onnx.defs.OpSchema.AttrType.STRING}
    of_outputs = [f"T{i}" for i in range(outputs)]
    schema = onnx.defs.OpSchema(
        name,
        MARK_DOMAIN,
        1,
        inputs=[parameter("inputs", "T", param_option=variadic, is_homogeneous=False)],
        outputs=[parameter(f"output{i}", of_type) for i, of_type in enumerate(of_outputs)],
        type_constraints=[(of_type, types, "") for of_type in ("T", *of_outputs)],
        attributes=[
            onnx.defs.OpSchema.Attribute(attribute, kinds.get(attribute, onnx.defs.OpSchema.AttrType.INT), "")
            for attribute in attributes
        ],
    )
    return values.Op(values.Opset(MARK_DOMAIN, 1), name, schema)


_ONNX = values.Opset("", OPSET_VERSION)
_BOUNDARY = _mark("LayerBoundary", "layer", "port")
_LAYER = _mark("DecoderLayer", "layer", "like")
_BLOCKS = _mark("ConcatBlocks", "group")
_DRAW = _mark("DrawNodes", outputs=7)
_EXPERTS = _mark(EXPERTS_MARK, "transposed")


def _cache_scatter(cache: Any, update: Any, write_indices: Any) -> Any:
    return _ONNX.TensorScatter(cache, update, write_indices, axis=2)


def _attention(query: Any, key: Any, value: Any, mask: Any, scale: float, softcap: float) -> Any:
    return _ONNX.Attention(query, key, value, mask, scale=scale, softcap=softcap)[0]


def _layer_boundary(tensor: Any, layer: int, port: str) -> Any:
    return _BOUNDARY(tensor, layer=layer, port=port)


def _decoder_layer(inputs: Any, layer: int, like: int) -> Any:
    return _LAYER(*inputs, layer=layer, like=like)


def _concat_blocks(blocks: Any, group: int) -> Any:
    return _BLOCKS(*blocks, group=group)


def _expert_products(rows: Any, weights: Any, counts: Any, transposed: bool) -> Any:
    return _EXPERTS(rows, weights, counts, transposed=int(transposed))


def _draw_nodes(logits: Any, nodes: Any, parents: Any, ancestors: Any, given: Any) -> Any:
    return _DRAW(logits, nodes, parents, ancestors, *given)


def _number(value: float) -> Any:  # of the rank of its operands, so that TensorRT adds no layer for it
    return _ONNX.Constant(value=onnx.helper.make_tensor("", onnx.TensorProto.FLOAT, (1, 1, 1), (value,)))


def _nucleus_end(scaled: Any, weights: Any, mass: Any) -> Any:
    axis, none = _ONNX.Constant(value_ints=[-1]), _number(0.0)
    end = _ONNX.Expand(_number(LEAST_LOGIT), _ONNX.Shape(mass))
    for width in HALVINGS:
        middle = _ONNX.Add(end, _number(width))
        above = _ONNX.ReduceSum(_ONNX.Where(_ONNX.Greater(scaled, middle), weights, none), axis)
        end = _ONNX.Where(_ONNX.Less(above, mass), end, middle)
    kept = _ONNX.Where(_ONNX.Greater(scaled, end), scaled, none)
    return _ONNX.ReduceMin(kept, axis)


def _refused(masks: Any, vocab_size: int) -> Any:
    whole = _ONNX.Constant(value_ints=[0, 0, MASK_BITS * mask_bytes(vocab_size)])
    table = _ONNX.Constant(value=onnx.numpy_helper.from_array(refused_bits().numpy()))
    numbers = _ONNX.Gather(table, _ONNX.Cast(masks, to=onnx.TensorProto.INT32))
    padded = _ONNX.Reshape(numbers, whole)
    if vocab_size % MASK_BITS == 0:
        return padded
    begin, end, axis = (_ONNX.Constant(value_ints=[number]) for number in (0, vocab_size, 2))
    return _ONNX.Slice(padded, begin, end, axis)


def translations() -> dict[Any, Any]:
    """The functions that translate our custom ops to ONNX, by op."""
    ops = torch.ops.medusa_export
    return {
        ops.cache_scatter.default: _cache_scatter,
        ops.attention.default: _attention,
        ops.expert_products.default: _expert_products,
        ops.draw_nodes.default: _draw_nodes,
        ops.nucleus_end.default: _nucleus_end,
        ops.refused.default: _refused,
        ops.layer_boundary.default: _layer_boundary,
        ops.decoder_layer.default: _decoder_layer,
        ops.concat_blocks.default: _concat_blocks,
    }
