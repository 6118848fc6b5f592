"""A traced program is traced again for its translation only where an operation needs it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.onnx._internal.exporter import _fx_passes
from torch.onnx._internal.fx.passes import type_promotion

from medusa_export.compat.onnxscript import unread_sources
from medusa_export.compat.torch import export_program, tracing_once

pytestmark = pytest.mark.slow

RUN_NODE = type_promotion._TypePromotionInterpreter.run_node
_NUMBERS = torch.tensor([[3.7, -1.2, 0.0], [2.0, 5.5, -4.0]])


class _Renamed(nn.Module):
    """Operations whose names have no translation, though other names of them have."""

    def forward(self, x: Tensor) -> Tensor:
        whole = x.to(torch.int64).to("cpu")
        kept = (whole > 0) & (whole < 5) | (whole == -4)
        return torch.where(kept, whole, 0).to(dtype=torch.float32)


class _Empty(nn.Module):
    """A size that is 0 for some inputs, and a shape that holds it."""

    def forward(self, x: Tensor) -> Tensor:
        none = x[:, x.shape[1] :].t()  # not contiguous
        return none.reshape(x.shape[0], none.shape[0] * 2)


class _AloneInPlace(nn.Module):
    """Changes tensors that nothing shares."""

    def forward(self, x: Tensor) -> Tensor:
        changed = x + 1
        twice = changed * 2
        changed *= x
        changed /= 3
        found = (
            torch.zeros_like(x)
            .scatter_(1, x.argmax(1, keepdim=True), 1)
            .scatter_(1, x.argmin(1, keepdim=True), x[:, :1])
        )
        return (changed - twice).clamp_(-2, 2) + found


class _ResultInPlace(nn.Module):
    """Changes one of the results of an operation, as routers of experts do."""

    def forward(self, x: Tensor) -> Tensor:
        values, places = torch.topk(x, 2)
        values /= values.sum(dim=-1, keepdim=True)
        return values.detach_() + places


class _ResultTwiceInPlace(nn.Module):
    """Changes a result that has a second name."""

    def forward(self, x: Tensor) -> Tensor:
        found = torch.topk(x, 2)
        values, again = found[0], found[0].view(-1)
        values /= values.sum(dim=-1, keepdim=True)
        return values + again.view_as(values)


class _SharedInPlace(nn.Module):
    """Changes a tensor that a view shares."""

    def forward(self, x: Tensor) -> Tensor:
        changed = x + 1
        view = changed.view(-1)
        changed *= x
        return changed + view.view_as(x)


class _NarrowInPlace(nn.Module):
    """Changes a tensor whose type is not that of the operation."""

    def forward(self, x: Tensor) -> Tensor:
        half = x.to(torch.float16) * 1
        half *= x
        return half.to(torch.float32)


class _InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        changed = x.clone()
        changed[:, 1:].add_(x[:, :1])
        return changed


class _Rearranged(nn.Module):
    """Repeats, splits and joins axes, beside one of a free size."""

    def forward(self, x: Tensor) -> Tensor:
        pairs = x.repeat_interleave(4, dim=1).unflatten(-1, (2, -1)).flatten(1)
        return pairs.unflatten(1, (3, 4)).flatten(0, 1)


class _Pairs(nn.Module):
    """Splits and joins axes of known sizes, beside one of a free size."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x, -x], -1).flatten(1).unflatten(1, (2, 3)).flatten(-2)


class _Columns(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.ones(2, 3).T


class _AddedRows(nn.Module):
    """Adds two rows to one."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(4, 3).index_add(0, torch.tensor([1, 1, 3])[: x.shape[0]], x)


class _AddedColumns(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.index_add(1, torch.tensor([2, 0]), x[:, :2], alpha=2)


class _Nested(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return x & x if x.dtype == torch.bool else x * x


class _Promoted(nn.Module):
    """Operations on several types, whose results have a type that not all arguments have."""

    def forward(self, x: Tensor) -> Tensor:
        whole = torch.arange(x.shape[1])
        half = x.to(torch.float16) * 0.5 + whole
        return torch.where(whole > 1, x / whole.add(1), half) ** 2


def translated(module: nn.Module) -> torch.onnx.ONNXProgram:
    program = export_program(module, (_NUMBERS,), {}, ({0: torch.export.Dim.DYNAMIC},))
    exported = torch.onnx.export(program, dynamo=True, optimize=False, verbose=False, opset_version=24)
    assert exported is not None
    return exported


@pytest.mark.parametrize("module", [_Promoted(), _Renamed()], ids=str)
def test_types_are_promoted_as_by_a_second_trace(monkeypatch: pytest.MonkeyPatch, module: nn.Module) -> None:
    with tracing_once(), unread_sources():
        once = translated(module)
    with tracing_once():
        monkeypatch.setattr(type_promotion._TypePromotionInterpreter, "run_node", RUN_NODE)
        twice = translated(module)
    assert once.model_proto.graph == twice.model_proto.graph


def test_known_sizes_are_not_computed() -> None:
    with tracing_once():
        graph = translated(_Pairs()).model_proto.graph
    shapes = [node for node in graph.node if node.op_type in ("Shape", "Slice")]
    assert len(shapes) == 1  # the free size


@pytest.mark.parametrize(
    ("module", "times"),
    [
        (_Renamed(), 0),
        (_Empty(), 0),
        (_AloneInPlace(), 0),
        (_ResultInPlace(), 0),
        (_ResultTwiceInPlace(), 1),
        (_SharedInPlace(), 1),
        (_NarrowInPlace(), 1),
        (_InPlace(), 1),
        (_Rearranged(), 0),
        (_Pairs(), 0),
        (_Columns(), 0),
        (_AddedRows(), 0),
        (_AddedColumns(), 1),
        (_Nested(), 1),
    ],
    ids=str,
)
def test_a_program_is_traced_again_only_if_it_must(
    monkeypatch: pytest.MonkeyPatch, module: nn.Module, times: int
) -> None:
    calls = []
    decompose = _fx_passes.decompose_with_registry

    def counted(*args: Any) -> Any:
        calls.append(args)
        return decompose(*args)

    monkeypatch.setattr(_fx_passes, "decompose_with_registry", counted)
    with tracing_once():
        exported = translated(module)
    session = onnxruntime.InferenceSession(exported.model_proto.SerializeToString())
    (result,) = session.run(None, {session.get_inputs()[0].name: _NUMBERS.numpy()})
    np.testing.assert_array_equal(result, module(_NUMBERS).numpy())
    assert len(calls) == times
