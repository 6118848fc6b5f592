"""The states of a model, as a run on fake tensors shows them."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from medusa_export.common.errors import ExportError, ModelNotSupportedError, first_line
from medusa_export.compat.torch import FakeTensorMode
from medusa_export.compat.transformers import experts_function
from medusa_export.step.adapters import adapted, only_shapes_from_length
from medusa_export.step.attention import StepCache, attending
from medusa_export.step.experts import EXPERTS_NAME
from medusa_export.step.masks import StepMasks
from medusa_runtime.bundles.states import State, pending_name

_ROLES = ("key", "value")


@dataclass
class _Written:
    """What one layer gives to a cache.

    Attributes:
        tensors: Keys and values, as the layer gets them back. Their identity shows who reads them.
        shapes: The shape of an entry of each, [N, d].
        readers: The layers that attend to them.
    """

    tensors: tuple[Tensor, Tensor]
    shapes: tuple[tuple[int, int], ...]
    readers: set[int] = field(default_factory=set)


class _Probe(StepCache):
    """Notes what layers write, and returns new keys and values as if the cache held no others."""

    def __init__(self, token: Tensor, masks: StepMasks) -> None:
        super().__init__((), (), (), token, masks)
        self.written: dict[int, _Written] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        layer = operator.index(layer_idx)
        if layer in self.written:
            raise ModelNotSupportedError("several attention layers that share one KV cache")
        tensors = (key_states.clone(), value_states.clone())
        self.written[layer] = _Written(tensors, tuple((t.shape[1], t.shape[3]) for t in tensors))
        return tensors


class _ProbeMasks(StepMasks):
    """Notes which layers attend to which keys."""

    def __init__(self) -> None:
        super().__init__(torch.ones(1, 1, 1, 1, dtype=torch.bool), lambda: (torch.zeros(1, 1), torch.zeros(1, 1)))
        self.read: list[tuple[int | None, Tensor]] = []

    def note(self, module: nn.Module, key: Tensor) -> None:
        self.read.append((getattr(module, "layer_idx", None), key))


def observed_states(model: PreTrainedModel, margin: int) -> tuple[State, ...]:
    """Finds the states of a model by a run of one token without values.

    Configs name sizes of caches in many ways, or not at all. So this looks at what each layer gives to a cache, and at
    the keys that it attends to.

    Args:
        model: A model with our attention implementation.
        margin: M, the depth of the tree.

    Returns:
        Keys and values of each layer that writes some, in the order of layers. They are ``kv`` where layers attend to
        them as they are, and ``latent`` where layers compute keys and values from them.

    Raises:
        ExportError: The model can't be run without values.
        ModelNotSupportedError: The model has no cache, or uses it in a way that a step can't honour.
    """
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        token = torch.zeros(1, 1, dtype=torch.int64)
        masks = _ProbeMasks()
        probe = _Probe(token[0], masks)
        probe.shows_length = only_shapes_from_length(model)
        try:
            with adapted(model), attending(masks), experts_function(model, EXPERTS_NAME):
                model(input_ids=token, position_ids=token, past_key_values=probe, use_cache=True)
        except ModelNotSupportedError:
            raise
        except Exception as error:
            raise ExportError(f"{type(model).__name__} can't be run on shapes: {first_line(error)}") from error
    if not probe.written:
        raise ModelNotSupportedError("no layer that keeps keys and values")
    writers = {id(written.tensors[0]): written for written in probe.written.values()}
    for reader, key in masks.read:
        if id(key) in writers and reader is not None:
            writers[id(key)].readers.add(reader)
    return _states(probe.written, margin)


def _states(written: dict[int, _Written], margin: int) -> tuple[State, ...]:
    found = [
        (f"{role}_{layer}", layer, one.shapes[slot], one)
        for layer, one in sorted(written.items())
        for slot, role in enumerate(_ROLES)
    ]
    shapes = [shape for _, _, shape, _ in found]
    return tuple(
        State(
            name=name,
            kind="kv" if one.readers else "latent",
            shape=shape,
            margin=margin,
            readers=(layer, *sorted(one.readers - {layer})),
            pending=pending_name(shapes, index) if margin else None,
        )
        for index, (name, layer, shape, one) in enumerate(found)
    )
