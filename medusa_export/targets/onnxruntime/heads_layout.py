"""The layout of queries, keys and values: [B, N, S, d] by heads, or [B, S, N · d] by rows."""

from __future__ import annotations

import onnx_ir as ir

from medusa_export.graph.rewrites.building import Builder
from medusa_export.graph.rewrites.matching import given, only_user, producer, rank_of, replace_value, shape_of
from medusa_export.targets.onnxruntime.constants import integers

SWAP = (0, 2, 1, 3)  # between [B, S, N, d] and [B, N, S, d]


def unswapped(tensor: ir.Value | None) -> ir.Value | None:
    """[B, S, N · d] before it was reshaped and transposed to [B, N, S, d]; None if anything else happened to it."""
    transpose = producer(tensor, "Transpose")
    reshape = producer(transpose.inputs[0], "Reshape") if transpose is not None else None
    if transpose is None or reshape is None or tuple(transpose.attributes["perm"].as_ints()) != SWAP:
        return None
    return reshape.inputs[0]


def replace_merged_heads(attention: ir.Node, rows: ir.Value) -> None:
    """Makes the readers of an attention's output read rows [B, S, N · d] instead.

    The output [B, N, S, d] goes through a ``Transpose`` and a ``Reshape``, to [B · S, N · d] in some models (GPT-2).
    """
    transpose = only_user(attention.outputs[0])
    reshape = only_user(transpose.outputs[0]) if transpose is not None else None
    assert reshape is not None and reshape.op_type == "Reshape"  # our attention function writes it so
    if rank_of(reshape.outputs[0]) == 3:
        replace_value(reshape.outputs[0], rows)
    else:
        reshape.replace_input_with(0, rows)


def flat(build: Builder, tensor: ir.Value) -> ir.Value:
    """[B, N, S, d] as [B, S, N · d]. A change of layout that has just been made is undone, not reversed."""
    rotary = producer(tensor, "RotaryEmbedding")
    if rotary is not None and only_user(tensor) is not None:
        source, cos, sin = (given(value) for value in rotary.inputs[:3])
        return build("RotaryEmbedding", [flat(build, source), cos, sin], interleaved=0, num_heads=shape_of(source)[1])
    transpose = producer(tensor, "Transpose")
    if transpose is not None and tuple(transpose.attributes["perm"].as_ints()) == SWAP:
        rows = transpose.inputs[0]
    else:
        rows = build("Transpose", [tensor], perm=SWAP)
    reshape = producer(rows, "Reshape")
    if reshape is not None and reshape.inputs[0] is not None and rank_of(reshape.inputs[0]) == 3:
        return reshape.inputs[0]
    return build("Reshape", [rows, integers(build.graph, "flat", [0, 0, -1])])
