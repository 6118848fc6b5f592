"""Writes heads to disk, in the file formats that ``files`` reads."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from medusa_export.common.errors import CheckpointError, OutputError
from medusa_export.common.files import atomic_file, write_text
from medusa_export.heads.architecture import head_architecture
from medusa_export.heads.base import DraftHeads
from medusa_export.heads.files import ARCHITECTURE_KEY, CONFIG_KEY, HEADS_FILE
from medusa_export.heads.modules import MedusaHeads

# The file layouts of MEDUSA heads. "own" holds every variant in the least space; the others are for other tools.
LAYOUTS = head_architecture(MedusaHeads.architecture).layouts


def save_heads(
    heads: DraftHeads,
    folder: str | Path,
    *,
    base_model_name_or_path: str,
    dtype: torch.dtype | None = None,
    lm_head: nn.Linear | None = None,
    layout: str = "own",
) -> None:
    """Writes heads so that ``load_heads`` reads them, and so do the tools that the layout is named after.

    For MEDUSA heads our own layout is v0.1, or v2 if the heads share the base model's ``lm_head``. It adds
    ``token_map`` for a reduced vocabulary, and writes a projection that all heads have in common once, as
    ``lm_head.weight``. Each file appears whole or not at all.

    Args:
        heads: The heads.
        folder: The folder to write to.
        base_model_name_or_path: The base model, for ``config.json``.
        dtype: The dtype to round the weights to; None keeps theirs.
        lm_head: The base model's output projection, to leave out a projection that is made of its rows.
        layout: The file layout, one of the architecture's ``layouts``.

    Raises:
        CheckpointError: The layout has no place for these heads.
        OutputError: A file can't be written, or would replace the configuration of a model.
    """
    folder = Path(folder)
    check_config(folder)
    architecture = head_architecture(heads.architecture)
    if layout not in architecture.layouts:
        raise CheckpointError(
            f"The layout {layout} has no place for {architecture.name} heads: give {', '.join(architecture.layouts)}."
        )
    tensors = {}
    for name, tensor in architecture.named_tensors(heads, lm_head, layout):
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        # A copy, since a projection may be written for several heads and a file can't name one memory twice.
        tensors[name] = tensor.detach().to("cpu", kind, copy=True).contiguous()
    metadata = {"format": "pt"}
    if architecture.name != MedusaHeads.architecture:  # published files name none
        metadata |= {ARCHITECTURE_KEY: architecture.name, CONFIG_KEY: json.dumps(asdict(heads.config))}
    with atomic_file(folder / HEADS_FILE) as file:
        save_file(tensors, file, metadata=metadata)
    config = architecture.config_json(heads, tensors, lm_head, layout)
    config |= {"base_model_name_or_path": base_model_name_or_path}
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def check_config(folder: Path) -> None:
    """Refuses a folder in which heads would replace the configuration of a model.

    Raises:
        OutputError: The folder holds a model.
    """
    path = folder / "config.json"
    with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
        kind = json.loads(path.read_text(encoding="utf-8")).get("model_type")
        if kind not in (None, "medusa"):
            raise OutputError(f"{path} is the configuration of a {kind} model: give another folder for the heads.")
