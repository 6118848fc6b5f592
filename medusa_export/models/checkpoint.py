"""The base class of weight formats, and the registry of formats."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from medusa_export.common.registry import Registry
from medusa_export.compat.lazy_loading import LeftInFiles, weights_left_in_files, with_placeholders
from medusa_export.compat.transformers import (
    attention_of_text,
    is_larger,
    loaded_by_transformers,
    model_class,
    takes_attention,
)
from medusa_export.models.files import Place
from medusa_export.models.packed import StoredBlocks, exact_blocks, packed_kinds

# Functions that read weights, by the weights' names.
Readers = Mapping[str, Callable[[], Tensor]]


def readers_by_weight(model: nn.Module, readers: Readers) -> dict[int, Callable[[], Tensor]]:
    """The functions that read weights, by the ``id`` of the weight. Weights that are tied have the same reader.

    Args:
        model: The model. It has placeholders for the weights that are read.
        readers: The functions by the weights' names.
    """
    named = model.named_parameters(remove_duplicate=False)
    return {id(weight): readers[name] for name, weight in named if name in readers}


class StoredWeight(NamedTuple):
    """A tensor of a checkpoint's files.

    Attributes:
        name: The tensor's name in the file.
        weight: The name of the model's weight that it becomes; None if the file uses the model's own names.
        values: The values in the layout of the model, and in the type in which they are stored.
    """

    name: str
    weight: str | None
    values: Tensor


@dataclass(frozen=True)
class Precision:
    """The type of a model's weights, and its attention.

    Attributes:
        dtype: The type of the weights.
        attention: A name registered with transformers' ``AttentionInterface``; None for transformers' own choice.
    """

    dtype: torch.dtype
    attention: str | None = None


@dataclass(frozen=True)
class LoadedModel:
    """A model, and how its weights compare with those of the files.

    Attributes:
        model: The model on the CPU.
        missing: Weights of the model that are not in the files. They are random.
        unread: Tensors of the files that the model has no place for.
        mismatched: Weights of other shapes in the files: name, shape in the files, shape in the model.
        readers: Functions that read the weights that are still in the files, by the weights' names in the model. In
            the model these weights are placeholders, which have a shape and a dtype, but no values.
        blocks: The weights among these that blocks of integers hold exactly, by the same names. The name of a matrix
            in a stack is the stack's name, a point, and the matrix's place.
        packed: The storage, in words, of the weights among these that are dequantized when they are read, by the same
            names.
    """

    model: PreTrainedModel
    missing: frozenset[str] = frozenset()
    unread: frozenset[str] = frozenset()
    mismatched: frozenset[tuple[str, tuple[int, ...], tuple[int, ...]]] = frozenset()
    readers: Readers = field(default_factory=dict)
    blocks: Mapping[str, StoredBlocks] = field(default_factory=dict)
    packed: Mapping[str, str] = field(default_factory=dict)


class Checkpoint(abc.ABC):
    """A base model on disk, in one weight format.

    A subclass is a weight format. Its methods may raise any error for files that are damaged: callers turn it into a
    ``CheckpointError`` that names the source. They run with transformers' output silenced.

    Args:
        place: The folder, file or hub id.

    Attributes:
        suffixes: Suffixes of single files of this format, in lower case.
    """

    suffixes: ClassVar[tuple[str, ...]] = ()

    def __init__(self, place: Place) -> None:
        self.place = place

    @classmethod
    @abc.abstractmethod
    def recognizes(cls, place: Place) -> bool:
        """True if a checkpoint is of this format. It looks at names and first bytes only."""

    @abc.abstractmethod
    def config(self) -> PreTrainedConfig:
        """The model's configuration, with the end tokens and all settings that the files hold."""

    @abc.abstractmethod
    def load(self, config: PreTrainedConfig, precision: Precision) -> LoadedModel:
        """Loads the model. Its ``generation_config`` holds the generation settings of the files, if there are any.

        Args:
            config: The configuration.
            precision: The type of the weights, and the attention.
        """

    def open(self, config: PreTrainedConfig, precision: Precision) -> LoadedModel:
        """Loads the model, and leaves its weights in the files.

        This works for each format whose ``load`` calls ``from_pretrained``. What ``load`` itself reads is in memory.

        Args:
            config: The configuration.
            precision: The type of the weights, and the attention.
        """
        with weights_left_in_files() as left:
            loaded = self.load(config, precision)
        return left_in_files(loaded, left, precision)

    @abc.abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The model's tokenizer; None if the files hold none."""

    @abc.abstractmethod
    def stored_weights(self, model: PreTrainedModel) -> Iterator[StoredWeight]:
        """Each tensor of the files, in any order, one by one.

        ``verify`` compares them with the model. So they must be read without the code that ``load`` uses.

        Args:
            model: A model that was loaded from the files.
        """

    def check(self) -> None:  # noqa: B027  # most formats have nothing to check
        """Checks that files are present and complete, before any is read.

        Raises:
            CheckpointError: The message says what is wrong.
        """

    def reading(self) -> AbstractContextManager[None]:
        """A context in which files may be kept open, or parsed once for several calls. Contexts may be nested."""
        return nullcontext()

    def explain(self, problem: str) -> str:
        """A library's message, improved where this format knows more."""
        return problem


def from_pretrained(
    config: PreTrainedConfig, precision: Precision, path: str | None = None, **arguments: Any
) -> LoadedModel:
    """Loads a causal language model with transformers.

    Args:
        config: The configuration.
        precision: The type of the weights, and the attention.
        path: A folder or hub id with weights; None for weights in ``state_dict``.
        arguments: Further arguments of transformers' ``from_pretrained``, such as ``state_dict``.
    """
    found: Any = model_class(config)
    model, info = loaded_by_transformers(
        found,
        path,
        **arguments,
        config=config,
        dtype=precision.dtype,
        attn_implementation=_attention(found, config, precision),
        ignore_mismatched_sizes=True,  # they are reported by name instead
        output_loading_info=True,
    )
    return LoadedModel(
        model,
        missing=frozenset(info["missing_keys"]),
        unread=frozenset(info["unexpected_keys"]),
        mismatched=frozenset((name, tuple(found), tuple(own)) for name, found, own in info["mismatched_keys"]),
    )


def _attention(
    found: type[PreTrainedModel], config: PreTrainedConfig, precision: Precision
) -> str | dict[str, Any] | None:
    """The attention in the form that ``from_pretrained`` takes; None for a model's own.

    A larger model gets it in its text model only. Layers that know no attention but their own are left as they are:
    the step replaces them (``step.adapters``).
    """
    if precision.attention is None or not takes_attention(found):
        return None
    return precision.attention if not is_larger(config) else attention_of_text(config, precision.attention)


def left_in_files(loaded: LoadedModel, left: LeftInFiles, precision: Precision) -> LoadedModel:
    """A model that was loaded inside ``weights_left_in_files``, with placeholders and with readers of its weights."""
    with_placeholders(loaded.model)
    blocks = exact_blocks(left.sources, left.stacks, precision.dtype)
    return replace(loaded, readers=left.readers, blocks=blocks, packed=packed_kinds(left.sources, left.stacks))


FORMATS: Registry[type[Checkpoint]] = Registry("weight format", "medusa_export.weight_formats")
