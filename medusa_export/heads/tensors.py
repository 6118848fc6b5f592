"""The named tensors of one file of heads, each read when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from medusa_export.common.errors import CheckpointError
from medusa_export.models.contents import Readable

TOKEN_MAP = "token_map"  # noqa: S105  # no password


class HeadTensors:
    """The named tensors of one file of heads. Each is taken once, by its name and shape.

    Args:
        file: The file, for messages.
        tensors: The tensors by name, unread.
        config: The options of the heads as the file states them; empty for published formats.
    """

    def __init__(self, file: Path, tensors: Mapping[str, Readable], config: Mapping[str, object] | None = None) -> None:
        self.file = file
        self.config = dict(config or {})
        self._left = dict(tensors)

    @property
    def names(self) -> list[str]:
        """The names of the tensors that are not taken yet."""
        return list(self._left)

    def renamed(self, rename: Callable[[str], str]) -> HeadTensors:
        """The tensors that are left, under other names."""
        return HeadTensors(self.file, {rename(name): tensor for name, tensor in self._left.items()}, self.config)

    def take(self, name: str, shape: tuple[int, ...]) -> Readable:
        """Takes a tensor of floating-point weights, without reading it: ``tensor[...]`` reads it.

        Raises:
            CheckpointError: The file lacks it, or it has another shape or holds integers.
        """
        if name not in self._left:
            raise CheckpointError(
                f"{self.file} lacks the tensor {name}, expected with shape {list(shape)}: it is incomplete."
            )
        tensor = self._left.pop(name)
        if not tensor.dtype.is_floating_point:
            raise CheckpointError(
                f"The tensor {name} of {self.file} is {tensor.dtype}: expected floating-point weights."
            )
        if tensor.shape != shape:
            raise CheckpointError(
                f"The tensor {name} of {self.file} has the shape {list(tensor.shape)}, but this base model asks for "
                f"{list(shape)}: its hidden size or vocabulary is not that of the model the heads were trained for."
            )
        return tensor

    def length(self, name: str) -> int | None:
        """The size of a tensor's first dimension; None if the file lacks the tensor."""
        return self._left[name].shape[0] if name in self._left else None

    def token_map(self, vocab_size: int) -> Tensor | None:
        """Takes and reads ``token_map``: the base model's token of each draft token, [V']; None if the file has none.

        Raises:
            CheckpointError: It is no list of different tokens of the base model.
        """
        if TOKEN_MAP not in self._left:
            return None
        tokens = self._left.pop(TOKEN_MAP)[...]
        if tokens.ndim != 1 or tokens.is_floating_point() or not 0 < len(tokens) <= vocab_size:
            raise CheckpointError(
                f"The token_map of {self.file} is {list(tokens.shape)} of {tokens.dtype}: expected a list of 1 to "
                f"{vocab_size} token ids."
            )
        tokens = tokens.long()
        outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
        if len(outside):
            raise CheckpointError(
                f"The token_map of {self.file} names token {int(outside[0])}, but the base model's go from 0 to "
                f"{vocab_size - 1}: the heads were made for another vocabulary."
            )
        if len(set(tokens.tolist())) != len(tokens):
            raise CheckpointError(f"The token_map of {self.file} names a token twice: list each token once.")
        return tokens

    def check_none_left(self) -> None:
        """Raises ``CheckpointError`` if a tensor was not taken."""
        for name in self._left:
            raise CheckpointError(f"{self.file} holds {name}, which has no place beside its other tensors: remove it.")
