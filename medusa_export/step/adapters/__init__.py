"""Adapters: functions that replace parts of a model's code while it runs in a step.

They are for models that compute by themselves values that only a step knows, such as positions and masks. An adapter
takes one module of a model, and yields the attributes of it, or of its Python module, to replace. There is a file for
each subject: ``attention``, ``latent``, ``experts``, ``rotary`` and ``activations``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel

from medusa_export.compat.transformers import calls_attention_interface, using_attention
from medusa_export.step.adapters.activations import activation_adapter
from medusa_export.step.adapters.attention import attention_adapter
from medusa_export.step.adapters.experts import experts_adapter
from medusa_export.step.adapters.latent import latent_adapter
from medusa_export.step.adapters.replacement import Replacement, replaced
from medusa_export.step.adapters.rotary import rotary_adapter, rows_of_two_lengths
from medusa_export.step.attention import ATTENTION_NAME

# Models that compute nothing but shapes, and biases that an adapter replaces, from the length of the cache.
_ONLY_SHAPES = frozenset({"opt", "bloom", "mpt", "falcon"})

_ADAPTERS: tuple[Callable[[nn.Module], Iterator[Replacement]], ...] = (
    attention_adapter,
    latent_adapter,
    experts_adapter,
    rotary_adapter,
    activation_adapter,
)


def only_shapes_from_length(model: PreTrainedModel) -> bool:
    """True if a model may ask for the length of the cache: the answer changes no result."""
    return model.config.model_type in _ONLY_SHAPES


@contextmanager
def adapted(model: PreTrainedModel, is_long: Tensor | None = None) -> Iterator[None]:
    """Makes a model fit a step while the block lasts.

    Args:
        model: The model.
        is_long: [B] boolean, True in rows of long requests; None if the model has one set of rotary frequencies.
    """
    with ExitStack() as stack:
        if is_long is not None:  # first, as the adapters below hide which embeddings have two sets
            for replacement in rows_of_two_lengths(model, is_long):
                stack.enter_context(replaced(replacement))
        for module in model.modules():
            for adapter in _ADAPTERS:
                for replacement in adapter(module):
                    stack.enter_context(replaced(replacement))
        if not calls_attention_interface(model):  # its masks, which nothing reads, are those of its own attention
            own = model.config.model_type == "mpt"  # it fails without a mask
            stack.enter_context(using_attention(model, "eager" if own else ATTENTION_NAME))
        yield
