"""Compares a loaded model with its files: each tensor with the weight that it should have become.

The loader and this check share no code, because ``stored_weights`` reads the files. So it finds a weight that the
loader left out, made up, permuted or rounded in another way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from medusa_export.compat.transformers import may_be_left_out, may_be_missing
from medusa_export.models.checkpoints import stored_weights
from medusa_export.models.completeness import HEADS
from medusa_export.models.text_model import whole_of
from medusa_export.verification.checks import Check

CHECK = "weights in memory and in the files"
_MAX_NOTES = 5
# Tables that old versions of transformers saved, and that new versions compute.
_TABLES = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")


def weights_check(source: str, model: PreTrainedModel, dtype: str) -> Check:
    """Compares a model with the files that it was loaded from.

    Args:
        source: The folder, hub id or GGUF file that the model was loaded from.
        model: The model.
        dtype: PyTorch's name of the type that the weights were loaded in. They may be fp32 by now.

    Raises:
        CheckpointError: The files can't be read.
    """
    check = Check(CHECK, figures={"tensors": 0, "ignored": 0})
    weights = _Weights(model)
    for name, weight, stored in stored_weights(source, model):
        own = weight or weights.find(name)
        if own is not None:
            _compare(check, own, weights.take(own), stored, getattr(torch, dtype))
        elif weights.may_be_ignored(name):
            check.figures["ignored"] += 1
        else:
            _fault(check, stored.numel(), f"{name} is in the files, and the model has no place for it")
    for name, values in weights.left():
        _fault(check, values.numel(), f"{name} is in the model, and comes from no file")
    return check


def _compare(check: Check, name: str, loaded: Tensor, stored: Tensor, dtype: torch.dtype) -> None:
    check.figures["tensors"] += 1
    check.compared += stored.numel()
    if loaded.shape != stored.shape:
        _fault(
            check, stored.numel(), f"{name} is {list(loaded.shape)} in the model and {list(stored.shape)} in the files"
        )
        return
    if not stored.is_floating_point():
        _fault(check, stored.numel(), f"{name} is {stored.dtype} in the files: integers alone are no weights")
        return
    expected = stored.to(dtype).to(loaded.dtype)
    wrong = int(((expected != loaded) & ~(expected.isnan() & loaded.isnan())).sum())
    if wrong:
        _fault(check, wrong, f"{name} differs in {wrong:,} of {stored.numel():,} values")


def _fault(check: Check, values: int, words: str) -> None:
    check.mismatches += max(values, 1)
    if len(check.notes) < _MAX_NOTES:
        check.notes.append(words)
    elif len(check.notes) == _MAX_NOTES:
        check.notes.append("and more")


class _Weights:
    """A model's weights, under the names and in the layout of its files."""

    def __init__(self, model: PreTrainedModel) -> None:
        # The files of a text model are those of the larger model that it is a part of.
        self._model = whole_of(model)
        own = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
        state = self._model.state_dict(keep_vars=True)
        # As transformers would save them. This reverts its renaming, splitting and joining of tensors.
        self._named = _as_saved(self._model, {name: tensor for name, tensor in state.items() if id(tensor) in own})
        others = {name: tensor for name, tensor in state.items() if id(tensor) not in own}
        self._others = frozenset(_as_saved(self._model, others)) if others else frozenset()
        self._taken: set[int] = set()

    def find(self, name: str) -> str | None:
        """Returns the model's name of a tensor in the files, with or without the base model's prefix; or None."""
        return next((known for known in self._variants(name) if known in self._named), None)

    def take(self, name: str) -> Tensor:
        """Returns a weight, and counts it and all weights that share its memory as found."""
        self._taken.add(self._named[name].data_ptr())
        return self._named[name]

    def left(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the weights that were not found in the files."""
        for name, values in self._named.items():
            if values.data_ptr() not in self._taken and not may_be_missing(self._model, name):
                yield name, values

    def may_be_ignored(self, name: str) -> bool:
        """Returns True for tensors of heads, of other parts of a larger model, and those that its class ignores."""
        if any(known in self._others for known in self._variants(name)):
            return True
        computed = any(re.search(pattern, name) for pattern in _TABLES)
        return computed or bool(HEADS.search(name)) or may_be_left_out(self._model, name)

    def _variants(self, name: str) -> tuple[str, str, str]:
        prefix = f"{self._model.base_model_prefix}."
        return name, prefix + name, name.removeprefix(prefix)


def _as_saved(model: PreTrainedModel, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    named: dict[str, Tensor] = revert_weight_conversion(model, {name: w.detach() for name, w in weights.items()})
    return named
