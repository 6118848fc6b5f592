"""torch: two parts without a public name, and silence and speed while it traces.

Tried with torch 2.13.0, onnx_ir 1.1.0 and onnxscript 0.7.2.

* ``tree_flatten``, ``tree_unflatten``: the arguments of a decoder layer as a flat list, and back. Without them, layers
  that pass tensors in tuples or dictionaries could not share a trace.
* ``FakeTensorMode``: runs a model on shapes alone. Without it, reading the shape of a cache would run a step.
* ``quiet_tracing``: torch.onnx prints progress, and the three libraries log remarks on each weight. Without it they
  appear on the terminal.
* ``export_program``: torch keeps the shapes of each operation that it traced, to find them again for equal inputs. With
  free dimensions, to find a shape again costs more than to compute it. It also keeps a stack trace of each operation
  and a second description of its result, with the order of its axes in memory, which nothing reads. Without it, an
  export takes a seventh longer, and one that is traced a second time a third.
* ``tracing_once``: torch.onnx traces a traced program a second time, to decompose operations that have no translation.
  A step has a few of them. Each is a second name, or the in-place form, of an operation that has a translation, so it
  is renamed here. The second trace also writes ``flatten`` and ``unflatten`` as views, which is done here. torch.onnx
  traces the program a third time, to write casts out where torch casts by itself. These casts change no shape and no
  type of a result, so the results of the first trace are kept. torch.onnx also reads the signatures of all its
  translations for each export; here they are read once. Without it, an export of a small model takes twice as long.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import operator
import warnings
from collections.abc import Container, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import config as fx_config
from torch.fx.experimental import proxy_tensor
from torch.onnx._internal.exporter import _decomp, _fx_passes, _registration, _schemas
from torch.onnx._internal.fx.passes import type_promotion
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = ["FakeTensorMode", "export_program", "quiet_tracing", "tracing_once", "tree_flatten", "tree_unflatten"]

aten = torch.ops.aten
_OTHER_NAMES: dict[Any, Any] = {  # operations without a translation, and those with one that do the same
    aten.__and__.Tensor: aten.bitwise_and.Tensor,
    aten.__or__.Tensor: aten.bitwise_or.Tensor,
    aten.detach_.default: aten.detach.default,  # it changes no value
    aten.numpy_T.default: aten.t.default,  # of a matrix
    aten.reshape.default: aten.view.default,  # takes a size of 0 as it is, where reshape's translation doesn't
    aten.to.dtype: aten._to_copy.default,
    aten.to.dtype_layout: aten._to_copy.default,
    aten.to.device: aten._to_copy.default,
}
_ARITHMETIC: dict[Any, Any] = {  # operations in place, and those that return a new tensor
    aten.add_.Tensor: aten.add.Tensor,
    aten.div_.Tensor: aten.div.Tensor,
    aten.mul_.Tensor: aten.mul.Tensor,
    aten.sub_.Tensor: aten.sub.Tensor,
}
_IN_PLACE: dict[Any, Any] = {  # the same, with operations whose result always has the type of the first argument
    **_ARITHMETIC,
    aten.clamp_.default: aten.clamp.default,
    aten.scatter_.src: aten.scatter.src,
    aten.scatter_.value: aten.scatter.value,
}
_CHECKS = {aten._assert_tensor_metadata.default}  # torch.onnx removes them

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
    with _nothing_kept():
        return torch.export.export(module, args, dict(kwargs), dynamic_shapes=free, strict=False)


@contextlib.contextmanager
def _nothing_kept() -> Iterator[None]:
    """Lets torch trace without keeping shapes, layouts and stack traces; torch 2.11 keeps no stack traces."""
    from torch._dynamo import config  # noqa: PLC0415  it takes a second to import, and torch.export needs it anyway

    name = "do_not_emit_stack_traces"
    kept = getattr(fx_config, name, None)
    if kept is not None:
        setattr(fx_config, name, True)
    tracer: Any = proxy_tensor
    described = tracer._extract_tensor_metadata
    tracer._extract_tensor_metadata = lambda _: None
    try:
        with config.patch(fake_tensor_cache_enabled=False):
            yield
    finally:
        tracer._extract_tensor_metadata = described
        if kept is not None:
            setattr(fx_config, name, kept)


@contextlib.contextmanager
def tracing_once() -> Iterator[None]:
    """Makes ``torch.onnx.export`` translate a program without tracing it again, while the block lasts.

    A program with an operation that has no translation, or that changes a tensor which another one shares, is still
    traced again.
    """
    decompose = _fx_passes.decompose_with_registry
    promoter: Any = type_promotion._TypePromotionInterpreter
    run_node = promoter.run_node

    def decompose_if_needed(
        exported_program: torch.export.ExportedProgram, registry: _registration.ONNXRegistry
    ) -> torch.export.ExportedProgram:
        translated = {*_decomp.get_onnx_implemented_overloads(registry), *_CHECKS}
        called = [node for node in exported_program.graph_module.graph.nodes if node.op == "call_function"]
        if not all(_is_ready(node, translated) or _is_alone(node) for node in called):
            with _nothing_kept():
                return decompose(exported_program, registry)
        for node in called:
            _rename(node)
        return exported_program

    _fx_passes.decompose_with_registry = decompose_if_needed
    promoter.run_node = _promote
    signature = _schemas.op_signature_from_function
    _schemas.op_signature_from_function = _signature
    try:
        yield
    finally:
        _fx_passes.decompose_with_registry = decompose
        promoter.run_node = run_node
        _schemas.op_signature_from_function = signature


_signature = functools.cache(_schemas.op_signature_from_function)


def _promote(promoter: Any, node: torch.fx.Node) -> Any:
    """Writes out the casts of an operation's arguments. Returns the result that tracing recorded, if there is one."""
    with promoter._set_current_node(node):
        rule = type_promotion.get_type_promotion_rule(node, promoter.type_promotion_table)
        if rule is not None:
            promoter._maybe_promote_node(node, rule)
    return node.meta["val"] if "val" in node.meta else torch.fx.Interpreter.run_node(promoter, node)


def _is_ready(node: torch.fx.Node, translated: Container[object]) -> bool:
    """Returns True if ``torch.onnx.export`` can translate an operation of a traced program without decomposing it."""
    operation = node.target
    if operation is aten.index_add.default:
        return bool(node.args[1] == 0) and not node.kwargs
    if operation is aten.numpy_T.default and len(node.meta["val"].shape) != 2:
        return False
    if isinstance(operation, torch._ops.OpOverload):
        changes = operation._schema.is_mutable and operation not in _OTHER_NAMES
        return _OTHER_NAMES.get(operation, operation) in translated and not changes
    return not isinstance(operation, torch._ops.HigherOrderOperator)


def _is_alone(node: torch.fx.Node) -> bool:
    """Returns True if an operation in place may give a new tensor: nothing shares the one that it changes."""
    if node.target not in _IN_PLACE:
        return False
    changed, *others = node.args
    if not isinstance(changed, torch.fx.Node) or (changed.target not in _IN_PLACE and not _is_new(changed)):
        return False
    return (
        not node.kwargs
        and (node.target not in _ARITHMETIC or _keeps_type(changed, others[0]))
        and all(user is node or (user < node and _is_new(user)) for user in changed.users)
    )


def _keeps_type(changed: torch.fx.Node, other: Any) -> bool:
    """Returns True if the result of an operation with another value has the type of the tensor that it changes."""
    value: Any = changed.meta["val"]
    result = torch.result_type(value, other.meta["val"] if isinstance(other, torch.fx.Node) else other)
    return bool(result == value.dtype)


def _is_new(node: torch.fx.Node) -> bool:
    """Returns True if the result of an operation shares no memory with an argument or with another result."""
    operation = node.target
    if operation is operator.getitem:  # one of several results
        source, index = node.args
        assert isinstance(source, torch.fx.Node)
        return _is_new(source) and all(user is node or user.args != (source, index) for user in source.users)
    return isinstance(operation, torch._ops.OpOverload) and not any(
        result.alias_info for result in operation._schema.returns
    )


def _rename(node: torch.fx.Node) -> None:
    """Gives an operation of a traced program the name that has a translation."""
    operation: Any = node.target
    node.target = (_OTHER_NAMES | _IN_PLACE).get(operation, operation)
    if node.target is aten._to_copy.default:
        names = [argument.name for argument in operation._schema.arguments]
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        node.args = (given["self"],)
        node.kwargs = {} if given.get("dtype") is None else {"dtype": given["dtype"]}
    elif operation is aten.index_add.default:
        changed, _, index, rows = node.args
        node.target, node.args = aten.index_put.default, (changed, [index], rows, True)
    elif operation in (aten.flatten.using_ints, aten.unflatten.int):
        _as_view(node)


def _as_view(node: torch.fx.Node) -> None:
    """Writes ``flatten`` or ``unflatten`` as a view, if the sizes that it makes are known.

    Their translations compute sizes in the graph.
    """
    source, start, *_ = (*node.args, 0)
    assert isinstance(source, torch.fx.Node) and isinstance(start, int)
    old, new = source.meta["val"].shape, node.meta["val"].shape
    start %= max(len(old), 1)
    more = len(new) - len(old)
    sizes: list[Any] = list(new)
    for axis, size in enumerate(new):
        if isinstance(size, int):
            continue
        if start <= axis <= start + max(more, 0):  # one of those that it makes
            return
        sizes[axis] = _size(node, source, axis if axis < start else axis - more)
    node.target, node.args = aten.view.default, (source, sizes)


def _size(node: torch.fx.Node, source: torch.fx.Node, axis: int) -> torch.fx.Node:
    """The operation that gives a free size of a tensor. Adds one before ``node`` if there is none."""
    size = source.meta["val"].shape[axis]
    sizes: list[torch.fx.Node] = node.graph.find_nodes(op="call_function", target=aten.sym_size.int)
    known = (other for other in sizes if other < node and other.meta["val"].node.expr == size.node.expr)
    found = next(known, None)
    if found is None:
        with node.graph.inserting_before(node):
            found = node.graph.call_function(aten.sym_size.int, (source, axis))
        found.meta["val"] = size
    return found
