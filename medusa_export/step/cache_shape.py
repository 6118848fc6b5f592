"""The shape of a model's KV caches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from medusa_export.common.errors import ExportError, ModelNotSupportedError, first_line
from medusa_export.compat.torch import FakeTensorMode
from medusa_export.step.attention import StepCache, StepMasks, attending


@dataclass(frozen=True)
class CacheShape:
    """The shape of a model's caches; it is the same for all layers.

    Attributes:
        num_layers: L, the number of layers.
        num_key_value_heads: The number of key/value heads per layer.
        head_dim: The size of a head.
    """

    num_layers: int
    num_key_value_heads: int
    head_dim: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self:
        """Finds the shape by a run of the model without values.

        Configs name these sizes in many ways, or not at all. So this looks at what each layer gives to a cache.

        Args:
            model: A model with our attention implementation.

        Raises:
            ExportError: The model can't be run without values.
            ModelNotSupportedError: Keys and values are not all of one size.
        """
        shapes: dict[int, tuple[tuple[int, ...], ...]] = {}

        class Probe(StepCache):
            """Records shapes, and returns the new keys and values as if the cache held no others."""

            def update(
                self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object
            ) -> tuple[Tensor, Tensor]:
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
        """2L: the keys and the values of each layer."""
        return 2 * self.num_layers
