"""MEDUSA heads written to disk, in the layouts of ``head_files``."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from medusa_export.common.errors import CheckpointError, OutputError
from medusa_export.common.files import atomic_file, write_text
from medusa_export.heads.files import HEADS_FILE
from medusa_export.heads.modules import MedusaHeads

# What save_heads can write. "own" says all there is to say in the least space; the others are for other tools.
LAYOUTS = ("own", "v0.1", "v2", "vllm")


def save_heads(
    heads: MedusaHeads,
    folder: str | Path,
    *,
    base_model_name_or_path: str,
    dtype: torch.dtype | None = None,
    lm_head: nn.Linear | None = None,
    layout: str = "own",
) -> None:
    """Writes heads so that ``load_heads`` reads them, and what the layout is named after.

    Our own layout is v0.1, or v2 where the heads share the base model's ``lm_head``; a reduced vocabulary adds
    ``token_map``, and a projection that all heads have in common is written once, as ``lm_head.weight``. Each
    file appears whole or not at all.

    Args:
        heads: The heads.
        folder: Where to.
        base_model_name_or_path: What they belong to.
        dtype: What their weights are rounded to; as they are if None.
        lm_head: The base model's, to leave out a projection that is made of its rows.
        layout: One of ``LAYOUTS``.

    Raises:
        CheckpointError: The layout has no place for heads such as these.
        OutputError: A file can't be written, or would replace the configuration of a model.
    """
    folder = Path(folder)
    check_config(folder)
    tensors = {}
    for name, tensor in _named_tensors(heads, lm_head, layout):
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        # A copy, since a projection may be written for several heads and a file can't name one memory twice.
        tensors[name] = tensor.detach().to("cpu", kind, copy=True).contiguous()
    with atomic_file(folder / HEADS_FILE) as file:
        save_file(tensors, file, metadata={"format": "pt"})
    config = _vllm_config(heads, lm_head, tensors) if layout == "vllm" else _config(heads, tensors)
    config |= {"base_model_name_or_path": base_model_name_or_path}
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def check_config(folder: Path) -> None:
    """Refuses a folder where heads would replace what a model can't be loaded without.

    Raises:
        OutputError: It holds a model.
    """
    path = folder / "config.json"
    with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
        kind = json.loads(path.read_text(encoding="utf-8")).get("model_type")
        if kind not in (None, "medusa"):
            raise OutputError(f"{path} is the configuration of a {kind} model: give another folder for the heads.")


def _config(heads: MedusaHeads, tensors: dict[str, Tensor]) -> dict[str, Any]:
    size = heads.config
    shared = not any(name in (f"0.{size.num_layers}.weight", "lm_head.weight") for name in tensors)
    return {
        "medusa_num_heads": size.num_heads,
        "medusa_num_layers": size.num_layers,
        "version": "2" if shared else "1",
    }


def _vllm_config(heads: MedusaHeads, lm_head: nn.Linear | None, tensors: dict[str, Tensor]) -> dict[str, Any]:
    size = heads.config
    vocab_size = size.draft_vocab_size if lm_head is None else lm_head.out_features
    return {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "num_heads": size.num_heads,
        "num_hidden_layers": size.num_layers,
        "hidden_size": size.hidden_size,
        "vocab_size": vocab_size,
        "truncated_vocab_size": size.draft_vocab_size,
        "medusa_fc_bias": True,
        "original_lm_head": "lm_head.weight" in tensors,
    }


def _named_tensors(heads: MedusaHeads, lm_head: nn.Linear | None, layout: str) -> Iterator[tuple[str, Tensor]]:
    if heads.config.conditioned and layout != "own":
        raise CheckpointError(
            f"The layout {layout} has no place for heads that are conditioned on the next token: train with --plain "
            "for tools that read it."
        )
    if heads.token_map is not None and layout == "v0.1":
        raise CheckpointError(
            "The layout v0.1 has no place for heads that can propose some of the tokens only: train without "
            "--draft-vocab for tools that read it."
        )
    block = "blocks.{k}.layers.{j}" if layout == "vllm" else "{k}.{j}.linear"
    for j, layer in enumerate(heads.residual_layers):
        for k in range(heads.config.num_heads):
            weight, condition = layer.weight[k].tensor_split([heads.config.hidden_size])
            yield f"{block.format(k=k, j=j)}.weight", weight.T
            yield f"{block.format(k=k, j=j)}.bias", layer.bias[k, 0]
            if layer.conditioned:
                yield f"{k}.{j}.condition.weight", condition.T
    if heads.token_map is not None:
        yield "token_map", heads.token_map.int()
    common = heads.common_projection
    known = common is not None and _is_lm_head(common, heads.token_map, lm_head)
    if layout == "v2" and not known:
        raise CheckpointError("These heads have projections of their own, for which the layout v2 has no place.")
    if layout == "v2" or (layout == "own" and known):
        return
    own = "lm_heads.{k}.weight" if layout == "vllm" else "{k}.{n}.weight"
    if common is not None and layout != "v0.1":
        yield "lm_head.weight", common.weight
    else:
        for k in range(heads.config.num_heads):
            weight = common.weight if common is not None else _projection(heads, k)
            yield own.format(k=k, n=heads.config.num_layers), weight


def _projection(heads: MedusaHeads, k: int) -> Tensor:
    assert heads.projections is not None
    return heads.projections[k].get_parameter("weight")


def _is_lm_head(common: nn.Linear, token_map: Tensor | None, lm_head: nn.Linear | None) -> bool:
    """Whether the heads' one projection is the base model's, or made of its rows."""
    if lm_head is None or common is lm_head:
        return common is lm_head or token_map is None
    rows = lm_head.weight if token_map is None else lm_head.weight[token_map]
    return torch.equal(common.weight, rows.to(common.weight.dtype))
