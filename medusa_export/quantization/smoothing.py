"""Moves the sizes of columns from the inputs of linear layers to their weights (SmoothQuant, arXiv 2211.10438).

Products with integers round their inputs in blocks of columns. One large column takes the precision of its whole block.
A linear layer computes the same if a column of its input is divided by a number, and the column of its weight is
multiplied by it. The division costs nothing where it changes the weights that make the input:

* a norm: its weights are divided;
* ``up_proj`` before ``down_proj``, and ``v_proj`` before ``o_proj``: the rows of the first weight are divided.

Each change is tried. If the decoder layer then computes anything else, it is undone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

# Pairs of linear layers, by the ends of their names. The first makes the columns of the second one's input. These are
# only multiplied by other numbers, and summed over tokens, in between.
_PAIRS = (("up_proj", "down_proj"), ("v_proj", "o_proj"))
# Largest distance of a layer's output from the one before, as a share of its norm.
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
# Smallest mean square of a column, as a share of the mean of all columns: smaller ones are treated as this.
_LEAST = 1e-6


@dataclass(frozen=True)
class NormOutput:
    """The output of a norm that linear layers read.

    Attributes:
        norm: The norm. It has a weight per column.
        readers: The names of the linear layers.
    """

    norm: nn.Module
    readers: tuple[str, ...]


@dataclass(frozen=True)
class _Change:
    """A change of a decoder layer.

    Attributes:
        readers: The names of the linear layers whose columns are multiplied.
        factors: The factors of the columns, [K].
        maker: The module that makes their input.
        divisors: The numbers that divide its weights, one per column of a norm or per row of a linear layer.
        offset: The number that a norm adds to its weights before it multiplies by them.
    """

    readers: tuple[str, ...]
    factors: Tensor
    maker: nn.Module
    divisors: Tensor
    offset: float = 0.0


def smooth(
    linears: Mapping[str, nn.Linear],
    outputs: Sequence[NormOutput],
    hessians: dict[str, Tensor],
    run: Callable[[], Tensor],
    *,
    head_dim: int,
) -> int:
    """Balances the sizes of columns between inputs and weights in a decoder layer.

    Args:
        linears: The linear layers of the decoder layer, by name. Their weights are changed.
        outputs: The outputs of norms that they read. The weights of these norms are changed.
        hessians: The sum of x xᵀ over the inputs x of each linear layer, by name. They are changed as the inputs are.
        run: Runs the decoder layer on a text, and returns its output.
        head_dim: Channels of an attention head.

    Returns:
        The number of inputs whose columns were balanced.
    """
    expected, count = run(), 0
    for change in _changes(linears, outputs, hessians, head_dim):
        # Some norms multiply by 1 + weight.
        variants = [change] if isinstance(change.maker, nn.Linear) else [change, replace(change, offset=1.0)]
        if any(_try(variant, linears, run, expected) for variant in variants):
            inverse = 1 / change.factors
            for name in change.readers:
                hessians[name] = hessians[name] * inverse * inverse.unsqueeze(1)
            count += 1
    return count


def _changes(
    linears: Mapping[str, nn.Linear], outputs: Sequence[NormOutput], hessians: Mapping[str, Tensor], head_dim: int
) -> Iterator[_Change]:
    """Yields the changes to try. Each is computed from the weights and inputs after the one before."""
    for output in outputs:
        weights = torch.stack([_column_squares(linears[name]) for name in output.readers]).mean(0)
        factors = _factors(hessians[output.readers[0]].diagonal(), weights)
        yield _Change(output.readers, factors, output.norm, factors)
    for first, second in _PAIRS:
        for name in [name for name in linears if name.endswith(first)]:
            reader, rows = name.removesuffix(first) + second, len(linears[name].weight)
            columns = linears[reader].in_features if reader in hessians else 0
            if not columns or columns % rows or (columns > rows and rows % head_dim):
                continue
            # Attention heads that share keys and values read the same values. These are columns of one maker.
            grouped = (-1, columns // rows, head_dim if columns > rows else 1)
            inputs, weights = (
                squares.view(grouped).mean(1).flatten()
                for squares in (hessians[reader].diagonal(), _column_squares(linears[reader]))
            )
            made = _factors(inputs, weights)
            read = made.view(-1, 1, grouped[2]).expand(-1, grouped[1], -1).flatten()
            yield _Change((reader,), read, linears[name], made)


def _column_squares(linear: nn.Linear) -> Tensor:
    """The mean square of each column of a weight, [K]."""
    return linear.weight.float().square().mean(0)


def _factors(inputs: Tensor, weights: Tensor) -> Tensor:
    """The numbers that balance columns: square roots of the ratios of their sizes, with a geometric mean of 1.

    Args:
        inputs: The mean square of each column of the input, times any number, [K].
        weights: The mean square of each column of the weight, times any number, [K].
    """
    logs = [(squares / squares.mean()).clamp(min=_LEAST).log() for squares in (inputs, weights)]
    ratio = logs[0] - logs[1]
    return ((ratio - ratio.mean()) / 4).exp()


def _try(change: _Change, linears: Mapping[str, nn.Linear], run: Callable[[], Tensor], expected: Tensor) -> bool:
    """Makes a change, and undoes it if the decoder layer computes anything else. True if it was kept."""
    modules = [change.maker, *(linears[name] for name in change.readers)]
    before = [{name: values.clone() for name, values in module.state_dict().items()} for module in modules]
    for values in (change.maker.weight, change.maker.bias if hasattr(change.maker, "bias") else None):
        if isinstance(values, Tensor):
            offset = change.offset if values is change.maker.weight else 0.0
            divisors = change.divisors.unsqueeze(1) if values.ndim == 2 else change.divisors
            values.copy_((values.float() + offset) / divisors - offset)
    for name in change.readers:
        linears[name].weight.copy_(linears[name].weight.float() * change.factors)
    error = (run() - expected).float().norm() / expected.float().norm()
    if error <= _TOLERANCES[expected.dtype]:
        return True
    for module, state in zip(modules, before, strict=True):
        module.load_state_dict(state)
    return False
