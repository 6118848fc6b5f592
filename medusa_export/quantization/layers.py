"""Goes through a model's decoder layers in order, with the inputs that each one gets from quantized layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from medusa_export.common.errors import ModelNotSupportedError
from medusa_export.common.progress import OnProgress, Task
from medusa_export.training.conversations import Sample


@dataclass(frozen=True)
class LinearInputs:
    """A linear layer, and what its inputs are like.

    Attributes:
        name: The module's name in the model.
        module: The module.
        hessian: The sum of x xᵀ over its inputs x, [K, K] in fp32.
    """

    name: str
    module: nn.Linear
    hessian: Tensor


@torch.inference_mode()
def for_each_linear(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    quantize: Callable[[LinearInputs], None],
    on_progress: OnProgress,
) -> None:
    """Calls ``quantize`` for each linear layer of the decoder layers. It may change the layer's weight.

    Inputs of a decoder layer come from the layers before it, after ``quantize``.

    Args:
        model: The model.
        samples: Texts as tokens.
        quantize: Called with each linear layer.
        on_progress: Receives reports.

    Raises:
        ModelNotSupportedError: The model has no list of decoder layers, or its layers hold no ``nn.Linear``.
    """
    name, layers = _decoder_layers(model)
    hidden, options = _first_inputs(model, layers, samples)
    task = Task("quantizing layers", len(layers), on_progress)
    for index, layer in enumerate(layers):
        for inputs in _linears(layer, f"{name}.{index}", hidden, options[index]):
            quantize(inputs)
        hidden = [_run(layer, states, given) for states, given in zip(hidden, options[index], strict=True)]
        task.finish_piece()


def _decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers and its name: the list as long as the configuration says."""
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and _linears_of(module):
            return name, module
    raise ModelNotSupportedError("no decoder layers of nn.Linear modules, which GPTQ rounds")


def _linears_of(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}


def _first_inputs(
    model: PreTrainedModel, layers: nn.ModuleList, samples: Sequence[Sample]
) -> tuple[list[Tensor], list[list[dict[str, Any]]]]:
    """The inputs of the first layer, and the keyword arguments of each layer, by text."""
    first: list[Tensor] = []
    options: list[list[dict[str, Any]]] = [[] for _ in layers]

    def note(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
            if index == 0:
                first.append(args[0])
            options[index].append(given)

        return hook

    handles = [layer.register_forward_pre_hook(note(i), with_kwargs=True) for i, layer in enumerate(layers)]
    run: Any = model
    try:
        for sample in samples:
            run(torch.tensor([sample.input_ids], device=model.device), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return first, options


def _linears(
    layer: nn.Module, name: str, hidden: Sequence[Tensor], options: Sequence[dict[str, Any]]
) -> Iterator[LinearInputs]:
    """Runs a layer, and yields its linear layers. Those of one input share their Hessian."""
    linears = _linears_of(layer)
    sums: dict[str, Tensor] = {}
    shared: dict[str, str] = {}  # the first linear layer that got the same input
    seen: list[tuple[Tensor, str]] = []

    def note(part: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            owner = next((other for given, other in seen if given is args[0]), part)
            shared[part] = owner
            if owner == part:
                seen.append((args[0], part))
                rows = args[0].reshape(-1, args[0].shape[-1]).float()
                sums[part] = sums.get(part, 0) + rows.T @ rows

        return hook

    handles = [module.register_forward_pre_hook(note(part)) for part, module in linears.items()]
    try:
        for states, given in zip(hidden, options, strict=True):
            _run(layer, states, given)
            seen.clear()
    finally:
        for handle in handles:
            handle.remove()
    for part, module in linears.items():
        if part in shared:
            yield LinearInputs(f"{name}.{part}", module, sums[shared[part]])


def _run(layer: nn.Module, states: Tensor, given: dict[str, Any]) -> Tensor:
    output = layer(states, **given)
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result
