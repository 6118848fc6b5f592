"""transformers: loads a model whose weights stay in their files.

Tried with transformers 5.24.0.

``from_pretrained`` collects, for each weight, the tensors of the files that it is made of, and functions that read
them. Then it reads, converts and keeps one weight after the other. ``weights_left_in_files`` keeps the functions
instead of the weights. So a weight that is asked for later is read and converted by transformers' own code.

Without it a model has to fit in memory to be exported. transformers' own way, ``device_map="disk"``, reads all files
once and writes converted weights to a folder.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, core_model_loading, modeling_utils

Reader = Callable[[], Tensor]


@dataclass(frozen=True)
class LeftInFiles:
    """Weights that stay in their files.

    Attributes:
        readers: The functions that read the weights, by the weights' names in the model.
        sources: The tensor of a file that a weight is, by the weight's name in the model. Weights that transformers
            makes of several tensors, or converts, are not here.
        stacks: The tensors of files that a stack of matrices is made of, by the stack's name in the model: for each
            matrix, the tensors whose rows it has.
    """

    readers: dict[str, Reader] = field(default_factory=dict)
    sources: dict[str, object] = field(default_factory=dict)
    stacks: dict[str, list[list[object]]] = field(default_factory=dict)


_loading: Any = core_model_loading
_utils: Any = modeling_utils
_PATCHED = threading.Lock()  # the patches are those of a module, so of all threads


@contextmanager
def weights_left_in_files() -> Iterator[LeftInFiles]:
    """Makes ``from_pretrained`` leave weights in their files for the duration of a block.

    A weight of a model that is loaded inside the block is an empty tensor on the device ``meta``, of the right shape
    and dtype. Buffers, and weights that are in no file, are loaded as usual. Other threads wait.

    Yields:
        The weights, once the model is loaded. The files stay open while the functions that read them live.
    """
    left = LeftInFiles()
    transforms = (_loading.WeightRenaming, _loading.WeightConverter)
    with _PATCHED:
        spawn, originals = _loading.spawn_materialize, [transform.convert for transform in transforms]
        open_file = _utils.safe_open
        _loading.spawn_materialize = _job
        _utils.safe_open = partial(_opened, open_file)
        for transform, convert in zip(transforms, originals, strict=True):
            transform.convert = _recording(convert, left)
        try:
            yield left
        finally:
            _loading.spawn_materialize, _utils.safe_open = spawn, open_file
            for transform, convert in zip(transforms, originals, strict=True):
                transform.convert = convert


def _opened(open_file: Callable[..., Any], file: str, **options: Any) -> Any:
    """Replaces ``safe_open``: reads into memory. Pages of a mapped file would stay in memory until all are read."""
    return open_file(file, **{**options, "backend": "pread"})


def _job(pool: Any, tensor: Any, device: Any = None, dtype: Any = None, **_: Any) -> Reader:
    """Replaces ``spawn_materialize``: never starts to read."""
    return partial(_loading._materialize_copy, tensor, device, dtype)


def _recording(convert: Callable[..., dict[str, Any]], left: LeftInFiles) -> Callable[..., dict[str, Any]]:
    """Replaces ``convert`` of a transform: records how to run it, and returns empty weights."""

    def recorded(transform: Any, layer_name: str, model: Any = None, **given: Any) -> dict[str, Any]:
        sources = {pattern: list(jobs) for pattern, jobs in transform.collected_tensors.items()}

        def run(**options: Any) -> dict[str, Any]:
            transform.collected_tensors = {pattern: list(jobs) for pattern, jobs in sources.items()}
            return convert(transform, layer_name, model=model, **options)

        def read(name: str) -> Tensor:
            later = {key: value for key, value in given.items() if key != "loading_info"}
            return _single(run(**later)[name])

        empty = _renamed(transform, sources)
        if empty is None:
            made = {name: _single(value) for name, value in run(**given).items()}
            if len(made) == 1 and (stack := _stack(transform, sources)) is not None:
                left.stacks[next(iter(made))] = stack
        else:
            made = empty
            left.sources[transform.target_patterns[0]] = sources[transform.source_patterns[0]][0].args[0]
        for name in made:
            if _is_buffer(model, name):
                made[name] = read(name)
            else:
                left.readers[name] = partial(read, name)
                made[name] = made[name].to("meta")
        return made

    return recorded


def _renamed(transform: Any, sources: dict[str, list[Any]]) -> dict[str, Tensor] | None:
    """An empty weight of a transform that only renames; None for any other transform."""
    if not isinstance(transform, _loading.WeightRenaming) or transform.quantization_operation is not None:
        return None
    ((tensor, _, dtype),) = (job.args for job in sources[transform.source_patterns[0]])
    shape = tensor.get_shape() if hasattr(tensor, "get_shape") else tensor.shape
    return {transform.target_patterns[0]: torch.empty(tuple(shape), dtype=dtype, device="meta")}


def _stack(transform: Any, sources: dict[str, list[Any]]) -> list[list[object]] | None:
    """The tensors that each matrix of a stack is made of; None for a transform that does anything else.

    Such a transform stacks the matrices of all experts [E, N, K], and may join two such stacks along N.
    """
    steps = [(type(step), getattr(step, "dim", None)) for step in getattr(transform, "operations", ())]
    stacked = [(_loading.MergeModulelist, 0)]
    if transform.quantization_operation is not None or steps not in (stacked, [*stacked, (_loading.Concatenate, 1)]):
        return None
    patterns = [[job.args[0] for job in sources[pattern]] for pattern in transform.source_patterns]
    return [list(tensors) for tensors in zip(*patterns, strict=True)]


def _is_buffer(model: PreTrainedModel, name: str) -> bool:
    module, _, own = name.rpartition(".")
    return own in model.get_submodule(module)._buffers


def _single(value: Any) -> Tensor:
    tensor: Tensor = value[0] if isinstance(value, list) else value
    return tensor


def with_placeholders(model: nn.Module) -> None:
    """Replaces the weights of a model that are on the device ``meta`` by tensors on the CPU that take no memory.

    Each has one element in memory, and strides of 0. So the model can be traced, and weights that are tied stay so.
    """
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is None or weight.device.type != "meta":
                continue
            if id(weight) not in made:
                values = torch.zeros((), dtype=weight.dtype).expand(weight.shape)
                made[id(weight)] = nn.Parameter(values, requires_grad=False)
            module._parameters[name] = made[id(weight)]
