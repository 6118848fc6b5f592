"""The bundle that a script of trials runs, where the user gives none: a tiny random llama with heads that guess."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def bundle_folder(folder: Path | None, *, tokenizer: bool = False) -> Iterator[Path]:
    """The bundle to run: the one given, or a tiny one that is removed afterwards.

    Args:
        folder: The bundle that the user gave.
        tokenizer: Whether the tiny one has a tokenizer.
    """
    if folder is not None:
        yield folder
        return
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    # They need torch.
    from support.decoding import export, guessing_heads, make_step  # noqa: PLC0415
    from support.tiny_models import tiny_model  # noqa: PLC0415
    from support.tiny_tokenizer import make_tokenizer  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as scratch:
        model = tiny_model("llama")
        step = make_step(model, guessing_heads(model))
        exported = export(
            step, Path(scratch) / "bundle", tokenizer=make_tokenizer() if tokenizer else None, trained=True
        )
        yield exported.folder
