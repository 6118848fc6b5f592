"""The published file formats of MEDUSA heads, and our own.

``{k}`` is the number of a head, ``{j}`` that of a residual block, n the number of blocks per head:

* v0.1: ``{k}.{j}.linear.weight`` and ``.bias``, and ``{k}.{n}.weight``, the head's own projection;
* v2: the same without projections, because the heads share the base model's ``lm_head``;
* merged 1.0 (Medusa-2): v0.1 or v2 with the prefix ``medusa_head.``, among the base model's shards;
* conditioned heads, our own: v0.1 or v2 with ``{k}.0.condition.weight``;
* vLLM: ``blocks.{k}.layers.{j}.weight``, ``lm_heads.{k}.weight`` or one ``lm_head.weight`` for all heads, and
  ``token_map`` if the draft vocabulary is reduced.

The numbers of heads and blocks are taken from the tensors: published configs are often wrong about them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from medusa_export.common.errors import CheckpointError
from medusa_export.heads.architecture import HeadArchitecture, register_architecture
from medusa_export.heads.base import DraftHeads
from medusa_export.heads.loaded import LoadedHeads
from medusa_export.heads.modules import MedusaConfig, MedusaHeads
from medusa_export.heads.tensors import TOKEN_MAP, HeadTensors
from medusa_export.models.contents import Readable, read

_Read = Callable[[], Tensor]

_PREFIX = re.compile(r"^medusa_heads?\.")
_BLOCK = re.compile(r"^(?:(\d+)\.(\d+)\.linear|blocks\.(\d+)\.layers\.(\d+))\.(weight|bias)$")
_CONDITION = re.compile(r"^(\d+)\.0\.condition\.weight$")
_PROJECTION = re.compile(r"^(?:(\d+)\.\d+|lm_heads\.(\d+))\.weight$")
_COMMON = "lm_head.weight"


def select_heads(file: Path, names: Iterable[str]) -> list[str]:
    """The names of a file's tensors that belong to heads: those with the prefix of a merged checkpoint, or all.

    Raises:
        CheckpointError: The file is empty, or a name belongs to no known format.
    """
    names = list(names)
    merged = [name for name in names if _PREFIX.match(name)]
    strange = [name for name in merged or names if not _is_known(_PREFIX.sub("", name))]
    if not names:
        raise CheckpointError(f"{file} is empty: give a file that holds heads.")
    if strange:
        raise CheckpointError(
            f"{file} holds {strange[0]}, which belongs to no known format of MEDUSA heads; their tensors have names "
            "like 0.0.linear.weight, medusa_head.0.0.linear.weight or blocks.0.layers.0.weight."
        )
    return merged or names


def _is_known(name: str) -> bool:
    return name in (_COMMON, TOKEN_MAP) or any(pattern.match(name) for pattern in (_BLOCK, _PROJECTION, _CONDITION))


class _MedusaTensors:
    """The tensors of a file of MEDUSA heads, in any of the formats.

    Args:
        source: The tensors of the file.

    Raises:
        CheckpointError: The file mixes two formats.
    """

    def __init__(self, source: HeadTensors) -> None:
        self.source = source.renamed(lambda name: _PREFIX.sub("", name))
        names, file = self.source.names, source.file
        vllm = next((name for name in names if name.startswith(("blocks.", "lm_heads."))), None)
        other = next((name for name in names if name[0].isdigit()), None)
        if vllm and other:
            raise CheckpointError(f"{file} mixes two formats, {vllm} and {other}: keep the tensors of one.")
        self._is_vllm = vllm is not None
        blocks = [match for name in names if (match := _BLOCK.match(name))]
        self._projected = {int(m[1] or m[2]) for name in names if (m := _PROJECTION.match(name))}
        self.num_heads = max([*(int(match[1] or match[3]) for match in blocks), *self._projected], default=0) + 1
        self.num_layers = max((int(match[2] or match[4]) for match in blocks), default=0) + 1
        self.conditioned = any(_CONDITION.match(name) for name in names)
        self._has_biases = any(match[5] == "bias" for match in blocks)
        # vLLM also writes the one projection of all heads as that of head 0.
        one_of_vllm = self._is_vllm and self._projected == {0} and self.num_heads > 1
        self._one_for_all = _COMMON if _COMMON in names else "lm_heads.0.weight" if one_of_vllm else None

    def block(self, k: int, j: int, size: int) -> tuple[Readable, Readable]:
        """Takes the weight [size, size] and the bias [size] of a residual block; 0 in a format without biases."""
        name = f"blocks.{k}.layers.{j}" if self._is_vllm else f"{k}.{j}.linear"
        weight = self.source.take(f"{name}.weight", (size, size))
        bias = self.source.take(f"{name}.bias", (size,)) if self._has_biases else torch.zeros(size, dtype=weight.dtype)
        return weight, bias

    def condition(self, k: int, size: int) -> Readable:
        """Takes the weight [size, size] that the embedding of the next root is multiplied with."""
        return self.source.take(f"{k}.0.condition.weight", (size, size))

    def projections(self, token_map: Tensor | None, lm_head: nn.Linear, read_lm_head: _Read) -> list[_Read] | None:
        """Takes the projections [V', size], one per head or one for all; None if it is the ``lm_head``."""
        if self._one_for_all is None and self._projected:
            own = "lm_heads.{k}.weight" if self._is_vllm else "{k}.{n}.weight"
            names = [own.format(k=k, n=self.num_layers) for k in range(self.num_heads)]
            return [self._projection(name, token_map, lm_head) for name in names]
        if self._one_for_all is not None:
            one = self._projection(self._one_for_all, token_map, lm_head)
            return None if token_map is None and _are_equal(one(), read_lm_head()) else [one]
        return None if token_map is None else [partial(_rows, read_lm_head, token_map)]

    def _projection(self, name: str, token_map: Tensor | None, lm_head: nn.Linear) -> _Read:
        size, vocab_size = lm_head.in_features, lm_head.out_features
        if token_map is None:
            return partial(read, self.source.take(name, (vocab_size, size)))
        if self.source.length(name) == vocab_size:  # not reduced yet
            return partial(_rows, partial(read, self.source.take(name, (vocab_size, size))), token_map)
        return partial(read, self.source.take(name, (len(token_map), size)))


class MedusaArchitecture(HeadArchitecture):
    """MEDUSA heads, in every published file format."""

    def __init__(self) -> None:
        super().__init__(MedusaConfig, MedusaHeads)

    @property
    def layouts(self) -> tuple[str, ...]:
        return ("own", "v0.1", "v2", "vllm")

    def fresh(self, num_heads: int, lm_head: nn.Linear, *, seed: int = 0) -> MedusaHeads:
        return MedusaHeads.fresh(num_heads, lm_head)  # none of its weights is random

    def open(self, tensors: HeadTensors, lm_head: nn.Linear, read_lm_head: Callable[[], Tensor]) -> LoadedHeads:
        found = _MedusaTensors(tensors)
        vocab_size, size = lm_head.out_features, lm_head.in_features
        token_map = found.source.token_map(vocab_size)
        blocks = [[found.block(k, j, size) for j in range(found.num_layers)] for k in range(found.num_heads)]
        projections = found.projections(token_map, lm_head, read_lm_head)
        conditions = [found.condition(k, size) for k in range(found.num_heads) if found.conditioned]
        found.source.check_none_left()
        config = MedusaConfig(
            num_heads=found.num_heads,
            num_layers=found.num_layers,
            hidden_size=size,
            draft_vocab_size=vocab_size if token_map is None else len(token_map),
            shared_lm_head=projections is None,
            reduced_vocab=token_map is not None,
            one_projection=projections is not None and len(projections) < found.num_heads,
            conditioned=found.conditioned,
        )
        with torch.device("meta"):
            heads = MedusaHeads(config, lm_head)
        heads.token_map = token_map
        readers: dict[str, _Read] = {}
        for j, layer in enumerate(heads.residual_layers):
            weights, biases = zip(*(block[j] for block in blocks), strict=True)
            readers[f"layers.{j}.weight"] = partial(_stacked_weights, weights, conditions if layer.conditioned else ())
            readers[f"layers.{j}.bias"] = partial(_stacked_biases, biases)
        readers |= {f"projections.{k}.weight": projection for k, projection in enumerate(projections or ())}
        return LoadedHeads(heads, readers)

    def named_tensors(self, heads: DraftHeads, lm_head: nn.Linear | None, layout: str) -> Iterator[tuple[str, Tensor]]:
        assert isinstance(heads, MedusaHeads)
        _check_layout(heads, layout)
        block = "blocks.{k}.layers.{j}" if layout == "vllm" else "{k}.{j}.linear"
        for j, layer in enumerate(heads.residual_layers):
            for k in range(heads.config.num_heads):
                weight, condition = layer.weight[k].tensor_split([heads.config.hidden_size])
                yield f"{block.format(k=k, j=j)}.weight", weight.T
                yield f"{block.format(k=k, j=j)}.bias", layer.bias[k, 0]
                if layer.conditioned:
                    yield f"{k}.{j}.condition.weight", condition.T
        if heads.token_map is not None:
            yield TOKEN_MAP, heads.token_map.int()
        yield from _named_projections(heads, lm_head, layout)

    def config_json(
        self, heads: DraftHeads, tensors: Mapping[str, Tensor], lm_head: nn.Linear | None, layout: str
    ) -> dict[str, object]:
        assert isinstance(heads, MedusaHeads)
        size = heads.config
        if layout != "vllm":
            shared = not any(name in (f"0.{size.num_layers}.weight", _COMMON) for name in tensors)
            return {
                "medusa_num_heads": size.num_heads,
                "medusa_num_layers": size.num_layers,
                "version": "2" if shared else "1",
            }
        return {
            "architectures": ["MedusaModel"],
            "model_type": "medusa",
            "num_heads": size.num_heads,
            "num_hidden_layers": size.num_layers,
            "hidden_size": size.hidden_size,
            "vocab_size": size.draft_vocab_size if lm_head is None else lm_head.out_features,
            "truncated_vocab_size": size.draft_vocab_size,
            "medusa_fc_bias": True,
            "original_lm_head": _COMMON in tensors,
        }


def _stacked_weights(weights: Sequence[Readable], conditions: Sequence[Readable]) -> Tensor:
    """The weights of a residual block of all heads, as ``ResidualLayer`` has them."""
    parts = [weights, conditions] if conditions else [weights]
    return torch.stack([torch.cat([read(part).T for part in own]) for own in zip(*parts, strict=True)])


def _stacked_biases(biases: Sequence[Readable]) -> Tensor:
    """The biases of a residual block of all heads, as ``ResidualLayer`` has them."""
    return torch.stack([read(bias).unsqueeze(0) for bias in biases])


def _rows(read_matrix: _Read, token_map: Tensor) -> Tensor:
    """The rows of a matrix that project to the tokens of a reduced vocabulary."""
    return read_matrix()[token_map]


def _are_equal(projection: Tensor, lm_head: Tensor) -> bool:
    return torch.equal(projection.to(lm_head.dtype), lm_head)


def _check_layout(heads: MedusaHeads, layout: str) -> None:
    if heads.config.conditioned and layout != "own":
        raise CheckpointError(
            f"The layout {layout} has no place for heads that are conditioned on the next token: train plain "
            "heads for tools that read it."
        )
    if heads.token_map is not None and layout == "v0.1":
        raise CheckpointError(
            "The layout v0.1 has no place for heads that can propose some of the tokens only: train without a "
            "draft vocabulary for tools that read it."
        )


def _named_projections(heads: MedusaHeads, lm_head: nn.Linear | None, layout: str) -> Iterator[tuple[str, Tensor]]:
    """The projections to write: none if it is the base model's, one for all heads, or one per head."""
    common = heads.common_projection
    known = common is not None and _is_lm_head(common, heads.token_map, lm_head)
    if layout == "v2" and not known:
        raise CheckpointError("These heads have projections of their own, for which the layout v2 has no place.")
    if layout == "v2" or (layout == "own" and known):
        return
    if common is not None and layout != "v0.1":
        yield _COMMON, common.weight
        return
    own = "lm_heads.{k}.weight" if layout == "vllm" else "{k}.{n}.weight"
    for k in range(heads.config.num_heads):
        projection = common if common is not None else heads.get_submodule(f"projections.{k}")
        yield own.format(k=k, n=heads.config.num_layers), projection.get_parameter("weight")


def _is_lm_head(common: nn.Linear, token_map: Tensor | None, lm_head: nn.Linear | None) -> bool:
    """True if the heads' common projection is the base model's, or is made of its rows."""
    if lm_head is None or common is lm_head:
        return common is lm_head or token_map is None
    rows = lm_head.weight if token_map is None else lm_head.weight[token_map]
    return torch.equal(common.weight, rows.to(common.weight.dtype))


register_architecture(MedusaArchitecture())
