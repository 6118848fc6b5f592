"""The bundle for a script whose user gives none: a tiny random llama with heads."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def bundle_folder(folder: Path | None, *, tokenizer: bool = False, all_bytes: bool = False) -> Iterator[Path]:
    """A context manager with the folder of the bundle to run: the given one, or a tiny one that is removed afterwards.

    Args:
        folder: The bundle that the user gave; None for a tiny one.
        tokenizer: Whether the tiny bundle has a tokenizer.
        all_bytes: Whether its tokens are all bytes, and one that ends a text. Its texts may then be longer, too.
    """
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    if folder is not None:
        yield folder
        return
    # Imported here since they need torch.
    from support.decoding import export, make_step, random_heads  # noqa: PLC0415
    from support.tiny_models import tiny_model  # noqa: PLC0415
    from support.tiny_tokenizer import make_tokenizer  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as scratch:
        vocabulary = {"vocab_size": 257} if all_bytes else {}
        more = {"eos_token_id": 0, "max_position_embeddings": 4096} if all_bytes else {}
        model = tiny_model("llama", **vocabulary, **more)
        step = make_step(model, random_heads(model))
        exported = export(
            step, Path(scratch) / "bundle", tokenizer=make_tokenizer(**vocabulary) if tokenizer else None, trained=True
        )
        yield exported.folder
