"""Writes heads in another format."""

from __future__ import annotations

from os import PathLike, fspath
from pathlib import Path

import torch

from medusa_export.common import defaults
from medusa_export.common.dtypes import Dtype, torch_name
from medusa_export.common.progress import OnProgress, Progress, ignore_progress
from medusa_export.heads.files import load_heads, stored_dtype
from medusa_export.heads.writer import save_heads
from medusa_export.models.checkpoints import load_model


def convert_heads(
    model: str | PathLike[str],
    heads: str | PathLike[str],
    output: str | PathLike[str],
    *,
    layout: str = defaults.HEADS_LAYOUT,
    dtype: Dtype | None = None,
    text_only: bool = False,
    on_progress: OnProgress = ignore_progress,
) -> None:
    """Writes the heads of a model in another format.

    Args:
        model: The base model: a folder in Hugging Face's layout, a hub id, or the path of a ``.gguf`` file.
        heads: The heads: a file, a folder or a hub id, in any published format.
        output: The folder to write.
        layout: ``own``, the smallest format that holds everything; ``v0.1`` or ``v2`` of the reference implementation;
            or ``vllm``.
        dtype: Type of the weights in the file; the type of the given file if None.
        text_only: Take the text model out of a larger one, such as one for images and text.
        on_progress: Receives reports.

    Raises:
        OptionError: The type is unknown.
        CheckpointError: The model or the heads can't be read, or the format can't hold these heads.
        OutputError: The folder can't be written.
    """
    kind = stored_dtype(fspath(heads)) if dtype is None else getattr(torch, torch_name(dtype))
    source = fspath(model)
    on_progress(Progress(f"loading {source}"))
    base = load_model(source, dtype=torch.float32, text_only=text_only)
    save_heads(
        load_heads(fspath(heads), base),
        Path(output),
        base_model_name_or_path=source,
        dtype=kind,
        lm_head=base.get_output_embeddings(),
        layout=layout,
    )
