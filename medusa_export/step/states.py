"""The states of a model, as a run on fake tensors shows them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from medusa_export.common.dtypes import KvCacheType
from medusa_export.common.errors import ExportError, ModelNotSupportedError, first_line
from medusa_export.compat.torch import FakeTensorMode
from medusa_export.compat.transformers import cache_argument, experts_function, noting_masks
from medusa_export.models.supported import max_positions
from medusa_export.step.adapters import adapted, only_shapes_from_length
from medusa_export.step.attention import ATTENTION_NAME, StepCache, attending
from medusa_export.step.experts import EXPERTS_NAME
from medusa_export.step.integer_caches import with_integers
from medusa_export.step.masks import MaskKind, StepMasks
from medusa_runtime.bundles.states import State, groups_of, with_margin

_ROLES = ("key", "value")


@dataclass
class _Written:
    """Keys and values that one layer gives to a cache.

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

    def get_query_offset(self, layer_idx: int = 0) -> int:  # masks are made of it; positions are not
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0

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
    """Notes which layers attend to which keys, and compares the masks of the step with those of the model.

    Args:
        longest: Positions of the model. Windows of that size hide nothing.
    """

    def __init__(self, longest: int) -> None:
        super().__init__(torch.ones(1, 1, 1, 1, dtype=torch.bool), lambda: (torch.zeros(1, 1), torch.zeros(1, 1)))
        self.read: list[tuple[int | None, Tensor]] = []
        self._longest = longest
        self._given: list[tuple[Tensor, int | None]] = []

    def make(self, window: int | None) -> Tensor:
        """A mask of the model, in which a token attends to ``window`` tokens, or to all."""
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
        self._given.append((mask, window))
        return mask

    def note(self, module: nn.Module, key: Tensor, given: Tensor | None, kind: MaskKind) -> None:
        layer = getattr(module, "layer_idx", None)
        self.read.append((layer, key))
        for mask, window in self._given:
            if mask is given and self._seen(window) != self._seen(kind.window or kind.chunk):
                raise ModelNotSupportedError(
                    f"a mask with a window of {window or 'all'} tokens in layer {layer}, which hands one of "
                    f"{kind.window or kind.chunk or 'all'} to its attention"
                )

    def _seen(self, window: int | None) -> int:
        return self._longest if window is None else min(window, self._longest)


def observed_states(model: PreTrainedModel, margin: int, kv_cache: KvCacheType | None = None) -> tuple[State, ...]:
    """Finds the states of a model by a run of one token without values.

    Configs name sizes of caches in many ways, or not at all. So this looks at what each layer gives to a cache, and at
    the keys that it attends to.

    Args:
        model: A model with our attention implementation.
        margin: M, the depth of the tree.
        kv_cache: The type that keys and values are stored in; None for the model's.

    Returns:
        Keys and values of each layer that writes some, in the order of layers. They are ``kv`` where layers attend to
        them as they are, and ``latent`` where layers compute keys and values from them. Integers are followed by their
        scales.

    Raises:
        ExportError: The model can't be run without values.
        ModelNotSupportedError: The model has no cache, or uses it in a way that a step can't honour.
    """
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        token = torch.zeros(1, 1, dtype=torch.int64)
        masks = _ProbeMasks(max_positions(model))
        probe = _Probe(token[0], masks)
        probe.shows_length = only_shapes_from_length(model)
        try:
            with (
                adapted(model),
                attending(masks),
                noting_masks(ATTENTION_NAME, masks.make),
                experts_function(model, EXPERTS_NAME),
            ):
                model(input_ids=token, position_ids=token, **{cache_argument(model): probe}, use_cache=True)
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
    states = _states(probe.written)
    return with_margin(with_integers(states) if kv_cache is not None else states, margin)


def pending_by_state(states: Sequence[State], pending: Sequence[Tensor]) -> list[Tensor]:
    """The pending entries of each state, as views; empty without a margin.

    Args:
        states: The states.
        pending: The pending entries of each group of states, [B, n · num_heads, M, head_dim]; empty without a margin.
    """
    views = {
        state.name: view
        for group, entries in zip(groups_of(states), pending, strict=False)
        for state, view in zip(group.states, entries.chunk(len(group.states), dim=1), strict=True)
    }
    return [views[state.name] for state in states] if views else []


def _states(written: dict[int, _Written]) -> list[State]:
    found = [
        (f"{role}_{layer}", layer, one.shapes[slot], one)
        for layer, one in sorted(written.items())
        for slot, role in enumerate(_ROLES)
    ]
    return [
        State(
            name=name,
            kind="kv" if one.readers else "latent",
            shape=shape,
            margin=0,
            readers=(layer, *sorted(one.readers - {layer})),
        )
        for name, layer, shape, one in found
    ]
