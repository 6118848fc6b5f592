"""The shape of a model's KV caches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from medusa_export.common.errors import ExportError, ModelNotSupportedError, first_line
from medusa_export.step.attention import StepCache, StepMasks, attending


@dataclass(frozen=True)
class CacheShape:
    """Layers, key/value heads per layer, and the size of a head; the same for all layers."""

    num_layers: int
    num_key_value_heads: int
    head_dim: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self:
        """Looks at what the layers hand to a cache, for configs name these things in many ways, or not at all.

        Args:
            model: A model whose attention implementation is ours.

        Raises:
            ExportError: It can't be run without values.
            ModelNotSupportedError: Its keys and values are not all of one size.
        """
        shapes: dict[int, tuple[tuple[int, ...], ...]] = {}

        class Probe(StepCache):
            """Notes shapes, and hands new keys and values back as if there were no others."""

            def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
                shapes[layer_idx] = tuple((t.shape[1], t.shape[3]) for t in (key_states, value_states))
                return key_states, value_states

        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            token = torch.zeros(1, 1, dtype=torch.int64)
            masks = StepMasks(torch.ones(1, 1, 1, 1, dtype=torch.bool), lambda: torch.zeros(1, 1, 1))
            probe = Probe([], [], token[0], masks)
            try:
                with attending(masks):
                    model(input_ids=token, position_ids=token, past_key_values=probe, use_cache=True)
            except ModelNotSupportedError:
                raise
            except Exception as error:
                raise ExportError(f"{type(model).__name__} can't be run on shapes: {first_line(error)}") from error
        found = {shape for pair in shapes.values() for shape in pair}
        if len(found) != 1 or sorted(shapes) != list(range(len(shapes))):
            raise ModelNotSupportedError("keys and values of more than one size")
        return cls(len(shapes), *found.pop())

    @property
    def num_caches(self) -> int:
        """Keys and values of each layer."""
        return 2 * self.num_layers
