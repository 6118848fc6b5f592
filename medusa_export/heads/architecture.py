"""Head architectures by name: how the heads of each are configured, read and written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial

import msgspec
import torch
from torch import Tensor, nn

from medusa_export.common.errors import CheckpointError, OptionError
from medusa_export.common.registry import Registry
from medusa_export.heads.base import DraftHeads, HeadsConfig
from medusa_export.heads.loaded import LoadedHeads
from medusa_export.heads.tensors import TOKEN_MAP, HeadTensors
from medusa_export.models.contents import read

MAX_HEADS = 64


class HeadArchitecture:
    """A kind of heads.

    By default a file holds the ``state_dict`` of the heads, and their configuration as JSON. A subclass overrides
    ``open``, ``named_tensors`` and ``config_json`` for files of another format.

    Args:
        config_type: The class of the heads' configuration.
        heads_type: The class of the heads. Its ``architecture`` is the name in the registry.
    """

    def __init__(self, config_type: type[HeadsConfig], heads_type: type[DraftHeads]) -> None:
        self.config_type = config_type
        self.heads_type = heads_type

    @property
    def name(self) -> str:
        """The name in the registry and in files."""
        return self.heads_type.architecture

    @property
    def layouts(self) -> tuple[str, ...]:
        """The file layouts that heads of this architecture can be written in."""
        return ("own",)

    def fresh(self, num_heads: int, lm_head: nn.Linear, *, seed: int = 0) -> DraftHeads:
        """Makes untrained heads with the defaults of the configuration. Equal arguments give equal weights.

        Args:
            num_heads: K.
            lm_head: The base model's output projection.
            seed: Seed of random weights.

        Raises:
            OptionError: The configuration has no defaults for this number of heads and this model.
        """
        try:
            config = self.config_type(num_heads, lm_head.in_features, lm_head.out_features)
        except (TypeError, ValueError) as error:
            raise OptionError(f"There are no fresh heads of the architecture {self.name!r}: {error}.") from error
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            heads = self.heads_type(config, lm_head)
        return heads.to(dtype=lm_head.weight.dtype)

    def open(self, tensors: HeadTensors, lm_head: nn.Linear, read_lm_head: Callable[[], Tensor]) -> LoadedHeads:
        """Makes heads whose weights stay in a file, on the device ``meta``. Their buffers are read.

        Args:
            tensors: The tensors of the file, all of which must be taken.
            lm_head: The base model's output projection. Its weight may be a placeholder.
            read_lm_head: Reads the weight of ``lm_head``.

        Raises:
            CheckpointError: The file is incomplete, or was made for another model.
        """
        config = self._read_config(tensors, lm_head)
        with torch.device("meta"):
            heads = self.heads_type(config, lm_head)
        weights = {name for name, _ in heads.named_parameters(remove_duplicate=False)}
        readers, buffers = {}, {}
        for name, wanted in heads.state_dict().items():
            found = tensors.token_map(lm_head.out_features) if name == TOKEN_MAP else None
            if found is not None:
                buffers[name] = found
                continue
            tensor = tensors.take(name, tuple(wanted.shape))
            if name in weights:
                readers[name] = partial(read, tensor)
            else:
                buffers[name] = read(tensor)
        tensors.check_none_left()
        heads.load_state_dict(buffers, assign=True, strict=False)
        return LoadedHeads(heads, readers)

    def named_tensors(self, heads: DraftHeads, lm_head: nn.Linear | None, layout: str) -> Iterator[tuple[str, Tensor]]:
        """The tensors to write, by name.

        Args:
            heads: The heads.
            lm_head: The base model's output projection, to leave out copies of it; None if it isn't known.
            layout: One of ``layouts``.

        Raises:
            CheckpointError: The layout has no place for these heads.
        """
        yield from heads.state_dict().items()

    def config_json(
        self, heads: DraftHeads, tensors: Mapping[str, Tensor], lm_head: nn.Linear | None, layout: str
    ) -> dict[str, object]:
        """The content of the ``config.json`` beside the file.

        Args:
            heads: The heads.
            tensors: The tensors in the file.
            lm_head: As for ``named_tensors``.
            layout: One of ``layouts``.
        """
        return {"architecture": self.name, **asdict(heads.config)}

    def _read_config(self, tensors: HeadTensors, lm_head: nn.Linear) -> HeadsConfig:
        try:
            config = msgspec.convert(tensors.config, self.config_type)
        except msgspec.ValidationError as error:
            raise CheckpointError(f"The configuration of the heads in {tensors.file} is wrong: {error}.") from error
        if config.num_heads > MAX_HEADS:
            raise CheckpointError(f"{tensors.file} holds {config.num_heads} heads: expected {MAX_HEADS} at most.")
        if config.hidden_size != lm_head.in_features or config.draft_vocab_size > lm_head.out_features:
            raise CheckpointError(
                f"The heads in {tensors.file} read hidden states of size {config.hidden_size} and propose "
                f"{config.draft_vocab_size} tokens, but this base model has size {lm_head.in_features} and "
                f"{lm_head.out_features} tokens: give the model that they were trained for."
            )
        return config


_ARCHITECTURES: Registry[HeadArchitecture] = Registry("head architecture", "medusa_export.head_architectures")


def register_architecture(architecture: HeadArchitecture) -> HeadArchitecture:
    """Makes a head architecture available by its name.

    Raises:
        ExtensionError: Another architecture has that name.
    """
    return _ARCHITECTURES.register(architecture.name, architecture)


def head_architecture(name: str) -> HeadArchitecture:
    """The head architecture of a name.

    Raises:
        ExtensionError: There is none.
    """
    return _ARCHITECTURES.get(name)
