"""Trace one decoder layer of each kind.

Tracing costs about 20 ms of Python per operation, and a model of 80 layers repeats the same 60 operations 80 times. So
while a step is traced, the first layer of each kind runs as usual, between ``layer_boundary`` marks. Each other layer
becomes one opaque ``decoder_layer``. ``medusa_export.graph.layers`` replaces it by a copy of the first with its own
weights.

Two layers are of one kind if they differ in nothing but weights and ``layer_idx``: classes, attributes, shapes and call
are the same.
"""

from __future__ import annotations

import functools
from collections import UserDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from medusa_export.common.errors import ModelNotSupportedError
from medusa_export.compat.torch import tree_flatten, tree_unflatten
from medusa_export.step.attention import StepCache, attending
from medusa_export.step.masks import MaskKind, StepMasks

# Attributes in which modules keep the index of their layer. GPT-Neo has the second name.
_INDEX_NAMES = frozenset({"layer_idx", "layer_id"})


@torch.library.custom_op("medusa_export::layer_boundary", mutates_args=())
def layer_boundary(tensor: Tensor, layer: int, port: str) -> Tensor:
    """Marks a tensor that enters (``in0``, ``in1``, …) or leaves (``hidden``, ``block0``, …) a layer."""
    return tensor.clone()


@layer_boundary.register_fake
def _(tensor: Tensor, layer: int, port: str) -> Tensor:
    return torch.empty_like(tensor)


@torch.library.custom_op("medusa_export::decoder_layer", mutates_args=())
def decoder_layer(inputs: list[Tensor], layer: int, like: int) -> Tensor:
    """Represents layer ``layer``, a copy of layer ``like``. The first input is the hidden state. It never runs."""
    raise RuntimeError("decoder_layer represents a traced layer and can't run.")


@decoder_layer.register_fake
def _(inputs: list[Tensor], layer: int, like: int) -> Tensor:
    return torch.empty_like(inputs[0])


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The model's list of decoder layers.

    Raises:
        ModelNotSupportedError: The model has no such list, or several.
    """
    count = model.config.get_text_config().num_hidden_layers
    found = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and all(any(_INDEX_NAMES & vars(part).keys() for part in layer.modules()) for layer in module)
    ]
    if len(found) != 1:
        raise ModelNotSupportedError(f"{len(found)} lists of {count} decoder layers (one is expected)")
    return found[0]


class _LayerIndex(int):
    """A ``layer_idx`` that raises an error when a layer computes with it."""

    def _used(self, *_: object) -> Any:
        raise ModelNotSupportedError("decoder layers that compute with their own index")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _used
    __floordiv__ = __mod__ = __pow__ = __float__ = __lt__ = __le__ = __gt__ = __ge__ = _used


def _describe(layer: nn.Module) -> object:
    """All properties of a layer that can change its trace: all but the values of its weights."""
    parts = []
    for name, part in layer.named_modules():
        plain = {
            key: value
            for key, value in vars(part).items()
            if isinstance(value, (int, float, str, tuple, type(None), torch.dtype))
            and key not in (*_INDEX_NAMES, "training")
        }
        functions = {
            key: getattr(value, "__qualname__", type(value).__qualname__)
            for key, value in vars(part).items()
            if callable(value) and key != "forward"
        }
        weights = [
            (key, weight.shape, weight.dtype)
            for key, weight in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))
        ]
        parts.append((name, type(part), repr(sorted(plain.items())), repr(sorted(functions.items())), repr(weights)))
    return tuple(parts)


class _Call:
    """The arguments of one call of a layer, as a flat list of tensors.

    Among them are the keys and values that the layer finds in a dictionary that layers share, if there is one.

    Attributes:
        key: A description of the call. Layers of one kind have equal descriptions.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.leaves, self.spec = tree_flatten((args, kwargs))
        caches = [leaf for leaf in self.leaves if isinstance(leaf, StepCache)]
        if len(caches) != 1 or not isinstance(self.leaves[0], Tensor):
            raise ModelNotSupportedError("decoder layers called without a hidden state or without a cache")
        self.cache = caches[0]
        shared = [leaf for leaf in self.leaves if isinstance(leaf, UserDict)]
        self.shared: UserDict[str, tuple[Tensor, ...]] = shared[0] if shared else UserDict()
        handed_over = [tensor for tensors in self.shared.values() for tensor in tensors]
        unique = {id(leaf): leaf for leaf in (*self.leaves, *handed_over) if isinstance(leaf, Tensor)}
        self.tensors = list(unique.values())
        self._places = {key: place for place, key in enumerate(unique)}
        self.key = self._key()  # before the layer adds to what layers share

    def _key(self) -> object:
        shared = {key: [self._places[id(tensor)] for tensor in tensors] for key, tensors in self.shared.items()}
        names = {id(self.cache): "cache", id(self.shared): "shared"}
        leaves = [
            self._places[id(leaf)] if isinstance(leaf, Tensor) else names.get(id(leaf)) or repr(leaf)
            for leaf in self.leaves
        ]
        return repr((self.spec, leaves, sorted(shared.items())))

    def rebuild(
        self, tensors: list[Tensor], cache: StepCache, shared: UserDict[str, tuple[Tensor, ...]]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the same call with other tensors, another cache and another dictionary.

        Args:
            tensors: A tensor for each of ``self.tensors``.
            cache: The cache.
            shared: Receives the keys and values that the layer finds in the dictionary.
        """
        for key, found in self.shared.items():
            shared[key] = tuple(tensors[self._places[id(tensor)]] for tensor in found)
        others = {id(self.cache): cache, id(self.shared): shared}
        leaves = [
            tensors[self._places[id(leaf)]] if isinstance(leaf, Tensor) else others.get(id(leaf), leaf)
            for leaf in self.leaves
        ]
        args, kwargs = tree_unflatten(leaves, self.spec)
        return args, kwargs


class AnotherKindError(Exception):
    """A layer is called in another way than the layer whose trace it was to share.

    Args:
        layer: Index of the layer. It needs a trace of its own.
    """

    def __init__(self, layer: int) -> None:
        self.layer = layer


class _Stub(nn.Module):
    """Replaces a layer that shares a trace, so that its weights are not traced either."""

    def __init__(self, tracer: _Tracer, index: int, layer: nn.Module) -> None:
        super().__init__()
        self._call = (tracer.stand_in, index)
        self._layer = (layer,)

    def __getattr__(self, name: str) -> Any:
        if name in ("_call", "_layer"):
            raise AttributeError(name)
        return getattr(self._layer[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        function, index = self._call
        return function(index, _Call(args, kwargs))


@dataclass(frozen=True)
class _Traced:
    """A layer that was traced.

    Attributes:
        key: The description of its call.
        mask: The kind of its mask.
        returns_tuple: True if its output is a tuple.
        hands_over: True if it gives keys and values to later layers. Such a layer has no copies.
    """

    key: object
    mask: MaskKind
    returns_tuple: bool
    hands_over: bool


def _roles(cache: StepCache, layer: int) -> list[str]:
    """The roles of the states that a layer writes: ``key`` and ``value``, with their scales or without, or none."""
    return [role for role in ("key", "key_scale", "value", "value_scale") if f"{role}_{layer}" in cache.past]


class _Tracer:
    """Runs the first layer of each kind, and replaces the others by marks.

    Args:
        like: The index of the first layer of the same kind, per layer.
    """

    def __init__(self, like: list[int]) -> None:
        self.like = like
        self._calls: dict[int, _Traced] = {}

    def stand_in(self, index: int, call: _Call) -> Any:
        """The output of layer ``index``, as an opaque mark."""
        like = self.like[index]
        traced, cache = self._calls[like], call.cache
        if traced.key != call.key or traced.hands_over or _roles(cache, like) != _roles(cache, index):
            raise AnotherKindError(index)
        mask = cache.masks.of(traced.mask)
        hidden = decoder_layer([*call.tensors, mask, cache.write_indices], index, like)
        for role in _roles(cache, index):  # a trace needs their shape only
            cache.blocks[f"{role}_{index}"] = cache.blocks[f"{role}_{like}"]
        return (hidden,) if traced.returns_tuple else hidden

    def run(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs layer ``index`` between marks on its inputs and outputs."""
        call = _Call(args, kwargs)
        cache = call.cache

        def mark(tensor: Tensor, port: str) -> Tensor:
            marked: Tensor = layer_boundary(tensor, index, port)
            return marked

        kinds: list[MaskKind] = []

        class Masks(StepMasks):
            """Marks the mask that a layer asks for, and notes its kind."""

            def __init__(self) -> None:
                self.positions = cache.masks.positions

            def of(self, kind: MaskKind) -> Tensor:
                kinds.append(kind)
                return mark(cache.masks.of(kind), f"in{len(call.tensors)}")

        names = {role: f"{role}_{index}" for role in _roles(cache, index)}
        inner = StepCache(
            list(names.values()),
            [mark(cache.past[name], f"past_{role}") for role, name in names.items()],
            [mark(cache.pending[name], f"pending_{role}") for role, name in names.items() if cache.pending],
            mark(cache.write_indices, f"in{len(call.tensors) + 1}"),
            cache.masks,
        )
        shared: UserDict[str, tuple[Tensor, ...]] = UserDict()
        inputs = [mark(tensor, f"in{i}") for i, tensor in enumerate(call.tensors)]
        new_args, new_kwargs = call.rebuild(inputs, inner, shared)
        with attending(Masks()):
            output = forward(*new_args, **new_kwargs)
        if len(kinds) != 1 or len(inner.present) != len(names):
            raise ModelNotSupportedError(f"decoder layers with {len(kinds)} attention calls (one is expected)")
        for role, name in names.items():
            cache.blocks[name] = mark(inner.blocks[name], f"block_{role}")
            cache.present[name] = mark(inner.present[name], f"present_{role}")
        handed_over = {key: tensors for key, tensors in shared.items() if key not in call.shared}
        call.shared.update(handed_over)
        returns_tuple = isinstance(output, tuple)
        self._calls[index] = _Traced(call.key, kinds[0], returns_tuple, bool(handed_over))
        hidden = mark(output[0] if returns_tuple else output, "hidden")
        return (hidden,) if returns_tuple else hidden


def kinds_of(layers: nn.ModuleList, layer_types: Sequence[str] | None = None) -> list[int]:
    """The index of the first layer of the same kind, per layer.

    Args:
        layers: The decoder layers.
        layer_types: The kind of attention of each layer; None if the model's configuration does not say.
    """
    first: dict[object, int] = {}
    kinds = (layer_types or [""] * len(layers))[: len(layers)]
    described = [(_describe(layer), kind) for layer, kind in zip(layers, kinds, strict=True)]
    return [first.setdefault(description, index) for index, description in enumerate(described)]


@contextmanager
def reusing_layers(layers: nn.ModuleList, like: list[int]) -> Iterator[None]:
    """Makes a run of the model trace layer ``i`` only where ``like[i] == i``, for the duration of a block.

    Args:
        layers: The decoder layers.
        like: The index of the layer whose trace is shared, per layer.

    Raises:
        AnotherKindError: A layer is called in another way than the layer whose trace it shares.
    """
    tracer = _Tracer(like)
    originals = list(layers)
    indices: list[tuple[nn.Module, str, int]] = []
    try:
        for index, layer in enumerate(originals):
            if like[index] != index:
                layers[index] = _Stub(tracer, index, layer)
                continue
            layer.forward = functools.partial(tracer.run, index, layer.forward)
            for part in layer.modules():
                for name in _INDEX_NAMES & vars(part).keys():
                    found = vars(part)[name]
                    if isinstance(found, int):
                        indices.append((part, name, found))
                        setattr(part, name, _LayerIndex(found))
        yield
    finally:
        for part, name, found in indices:
            setattr(part, name, found)
        for index, layer in enumerate(originals):
            vars(layer).pop("forward", None)
            layers[index] = layer
