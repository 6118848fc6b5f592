"""Parity of a loaded model with its files: each tensor against the weight that it should have become.

The loader and this check share no code: ``stored_weights`` reads the files. It finds a weight that the loader left out,
made up, permuted or rounded otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from medusa_export.models.checkpoints import HEADS
from medusa_export.models.files import Place
from medusa_export.models.stored_weights import stored_weights
from medusa_export.verification.checks import Check

CHECK = "weights in memory and in the files"
_MAX_NOTES = 5
# Tables that older versions of transformers saved, and that newer ones compute.
_TABLES = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")


def weights_check(source: str, model: PreTrainedModel, dtype: str) -> Check:
    """Compares a model with the files that it was loaded from.

    Args:
        source: What was loaded: a folder, a hub id or a GGUF file.
        model: The model.
        dtype: torch's name of what its weights were rounded to when loaded; they may have become fp32 since.

    Raises:
        CheckpointError: The files can't be read.
    """
    check = Check(CHECK, figures={"tensors": 0, "ignored": 0})
    weights = _Weights(model)
    for name, weight, stored in stored_weights(Place.of(source), model):
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
        _fault(
            check, stored.numel(), f"{name} is {stored.dtype} in the files: whole numbers are no weights by themselves"
        )
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
    """A model's weights under the names and in the layout that its files have."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        # As transformers would save them: where it renames, splits or joins tensors while loading, this undoes it.
        self._named: dict[str, Tensor] = revert_weight_conversion(model, dict(model.state_dict()))
        self._taken: set[int] = set()

    def find(self, name: str) -> str | None:
        """The model's name of a tensor of the files: the same, or with or without the prefix of the base model."""
        prefix = f"{self._model.base_model_prefix}."
        return next((known for known in (name, prefix + name, name.removeprefix(prefix)) if known in self._named), None)

    def take(self, name: str) -> Tensor:
        """The values of a weight, which is then accounted for, with all that share its memory."""
        self._taken.add(self._named[name].data_ptr())
        return self._named[name]

    def left(self) -> Iterator[tuple[str, Tensor]]:
        """The weights that nobody has taken."""
        ignored = self._model._keys_to_ignore_on_load_missing or ()
        for name, values in self._named.items():
            if values.data_ptr() not in self._taken and not any(re.search(pattern, name) for pattern in ignored):
                yield name, values

    def may_be_ignored(self, name: str) -> bool:
        """Whether a tensor of the files belongs to heads, or the model's class has no use for it."""
        patterns = (*_TABLES, *(self._model._keys_to_ignore_on_load_unexpected or ()))
        return bool(HEADS.search(name)) or any(re.search(pattern, name) for pattern in patterns)
