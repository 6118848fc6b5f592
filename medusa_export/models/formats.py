"""Find the weight format of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from medusa_export.common.errors import CheckpointError
from medusa_export.models.checkpoint import FORMATS, Checkpoint
from medusa_export.models.files import CONFIG, Place
from medusa_export.models.gguf.checkpoint import GgufCheckpoint
from medusa_export.models.hugging_face import HuggingFaceCheckpoint

FORMATS.register("gguf", GgufCheckpoint)


def open_checkpoint(source: str) -> Checkpoint:
    """Finds a checkpoint and its weight format. Nothing but names and first bytes is read.

    A folder or hub id that no registered format recognizes is taken for one in Hugging Face's layout.

    Args:
        source: A folder, a hub id, or a file of a registered format, such as GGUF.

    Raises:
        CheckpointError: There is no such checkpoint, or its file is damaged or of no known format.
        ExtensionError: A format can't be loaded.
    """
    formats = [FORMATS.get(name) for name in FORMATS.names]
    try:
        place = Place.of(source)
    except CheckpointError as error:
        raise _missing_file(source, formats) or error from None
    if place.is_remote and (missing := _missing_file(source, formats)):
        raise missing
    try:
        found = next((known for known in formats if known.recognizes(place)), None)
    except OSError as error:
        raise CheckpointError(
            f"{source} can't be opened ({error.strerror or error}): make it readable for this user."
        ) from error
    if found is not None:
        return found(place)
    if place.single_file is not None:
        raise CheckpointError(
            f"{source} is a file that is of no known weight format: give the folder that holds it and its {CONFIG}, or "
            f"a file of one of these formats: {', '.join(FORMATS.names)}."
        )
    return HuggingFaceCheckpoint(place)


def _missing_file(source: str, formats: list[type[Checkpoint]]) -> CheckpointError | None:
    """The error for a source that has the suffix of a weight file and does not exist; None for any other."""
    path = Path(source).expanduser()
    suffixes = {suffix for known in formats for suffix in known.suffixes}
    if path.suffix.lower() not in suffixes or path.is_symlink() or path.exists():
        return None
    return CheckpointError(f"There is no file {source}: give the path of a GGUF file, a folder or a hub id.")
