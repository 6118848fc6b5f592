"""Goes through a model's decoder layers in order, with the inputs that each one gets from quantized layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from medusa_export.common.errors import ModelNotSupportedError
from medusa_export.common.progress import OnProgress, Task
from medusa_export.quantization.smoothing import NormOutput, smooth
from medusa_export.training.conversations import Sample


@dataclass(frozen=True)
class LinearInputs:
    """A linear layer, and the second moments of its inputs.

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
    *,
    smoothing: bool = False,
) -> None:
    """Calls ``quantize`` for each linear layer of the decoder layers. It may change the layer's weight.

    Inputs of a decoder layer come from the layers before it, after ``quantize``.

    Args:
        model: The model.
        samples: Texts as tokens.
        quantize: Called with each linear layer.
        smoothing: Balance the sizes of columns between inputs and weights first (``smooth``).
        on_progress: Receives reports.

    Raises:
        ModelNotSupportedError: The model has no list of decoder layers, or its layers hold no ``nn.Linear``.
    """
    name, layers = _decoder_layers(model)
    hidden, options = _first_inputs(model, layers, samples)
    head_dim = _head_dim(model)
    task = Task("quantizing layers", len(layers), on_progress)
    for index, layer in enumerate(layers):
        for inputs in _linears(layer, f"{name}.{index}", hidden, options[index], head_dim if smoothing else None):
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

    run: Any = model
    with ExitStack() as hooks:
        for index, layer in enumerate(layers):
            hooks.enter_context(layer.register_forward_pre_hook(note(index), with_kwargs=True))
        for sample in samples:
            run(torch.tensor([sample.input_ids], device=model.device), use_cache=False, logits_to_keep=1)
    return first, options


def _linears(
    layer: nn.Module,
    name: str,
    hidden: Sequence[Tensor],
    options: Sequence[dict[str, Any]],
    head_dim: int | None,
) -> Iterator[LinearInputs]:
    """Runs a layer, and yields its linear layers. Their columns are balanced first if ``head_dim`` is given."""
    linears = _linears_of(layer)
    notes = _Notes()
    with ExitStack() as hooks:
        for part, module in linears.items():
            hooks.enter_context(module.register_forward_pre_hook(notes.input_of(part)))
        for norm in _norms_of(layer):
            hooks.enter_context(norm.register_forward_hook(notes.output_of(norm)))
        for states, given in zip(hidden, options, strict=True):
            _run(layer, states, given)
            notes.finish_text()
    hessians = notes.hessians
    if head_dim is not None:
        smooth(linears, notes.norm_outputs, hessians, lambda: _run(layer, hidden[0], options[0]), head_dim=head_dim)
    for part, module in linears.items():
        if part in hessians:
            yield LinearInputs(f"{name}.{part}", module, hessians[part])


def _norms_of(module: nn.Module) -> list[nn.Module]:
    """The modules with one weight per column."""
    return [
        part for part in module.modules() if isinstance(getattr(part, "weight", None), Tensor) and part.weight.ndim == 1
    ]


class _Notes:
    """Hooks that note the inputs of a decoder layer's linear layers. Layers of one input share their sums."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._owner: dict[str, str] = {}  # the first linear layer that got the same input
        self._norm: dict[str, nn.Module] = {}  # the norm whose output a linear layer reads
        self._seen: list[tuple[Tensor, str]] = []
        self._outputs: list[tuple[Tensor, nn.Module]] = []

    def input_of(self, part: str) -> Callable[..., None]:
        """A hook that notes the input of a linear layer."""

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            owner = next((other for given, other in self._seen if given is args[0]), part)
            self._owner[part] = owner
            norm = next((module for output, module in self._outputs if output is args[0]), None)
            if norm is not None:
                self._norm[part] = norm
            if owner == part:
                self._seen.append((args[0], part))
                rows = args[0].reshape(-1, args[0].shape[-1]).float()
                self._sums[part] = self._sums.get(part, 0) + rows.T @ rows

        return hook

    def output_of(self, norm: nn.Module) -> Callable[..., None]:
        """A hook that notes the output of a norm."""

        def hook(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
            self._outputs.append((output, norm))

        return hook

    def finish_text(self) -> None:
        """Forgets the tensors of a text."""
        self._seen.clear()
        self._outputs.clear()

    @property
    def hessians(self) -> dict[str, Tensor]:
        """The sum of x xᵀ over the inputs x of each linear layer that ran, by its name."""
        return {part: self._sums[owner] for part, owner in self._owner.items()}

    @property
    def norm_outputs(self) -> list[NormOutput]:
        """The outputs of norms that linear layers read."""
        readers: dict[nn.Module, list[str]] = {}
        for part, norm in self._norm.items():
            readers.setdefault(norm, []).append(part)
        return [NormOutput(norm, tuple(parts)) for norm, parts in readers.items()]


def _head_dim(model: PreTrainedModel) -> int:
    """Channels of an attention head."""
    config = model.config.get_text_config()
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _run(layer: nn.Module, states: Tensor, given: dict[str, Any]) -> Tensor:
    output = layer(states, **given)
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result
