"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from medusa_export.errors import ExportError, OutputError

# What is raised where a file can't be written; safetensors wraps the system's errors in its own.
WRITE_ERRORS = (OSError, SafetensorError)
# Open already, by whoever started this process: written to, never replaced.
_STREAMS = ("/dev/stdout", "/dev/stderr", "/dev/fd/", "/proc/")


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """A path beside ``target`` to write to, which takes its place only if nothing failed; survives a crash.

    Raises:
        OutputError: It can't be written.
    """
    if str(target).startswith(_STREAMS) or (target.exists() and not (target.is_file() or target.is_dir())):
        yield target
        return
    place = target.resolve()  # a link stays one
    partial = place.with_name(f".{place.stem}.{os.getpid()}.partial{place.suffix}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)  # safetensors would keep what it writes from everybody else
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(place)
    except WRITE_ERRORS as error:
        raise OutputError(f"{target} can't be written: {error}.") from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of ``target`` only if nothing failed.

    Raises:
        OSError: It can't be written; what fills it may raise others of ``WRITE_ERRORS``.
    """
    target = target.resolve()  # a link stays one
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        mode = partial.stat().st_mode & 0o666  # what any file gets here
        for file in filter(Path.is_file, partial.rglob("*")):
            file.chmod(mode)  # as above
        if target.exists():
            old = target.with_name(f".{target.name}.{os.getpid()}.old")
            target.rename(old)
            partial.rename(target)
            shutil.rmtree(old)
        else:
            partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_target(target: Path, *, replace_existing: bool, marker: str = "medusa.json", noun: str = "bundle") -> None:
    """Refuses a place that holds something of the user's.

    Args:
        target: The folder to write.
        replace_existing: What is there may be replaced, if it is of the same kind.
        marker: The file by which that kind is known.
        noun: Its name.

    Raises:
        ExportError: It is the working directory, or there is a file, a folder of other things, or one that may not be
            replaced.
    """
    if target.resolve() == Path.cwd():  # it is replaced whole, which would leave its user nowhere
        raise ExportError(f"{target} is the folder that you are in: give another to write the {noun} to.")
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir():
        raise ExportError(f"{target} is a file: give a folder to write the {noun} to.")
    if not any(target.iterdir()):
        return
    if not (target / marker).is_file():
        raise ExportError(f"{target} holds other files and no {noun}: give an empty or new folder.")
    if not replace_existing:
        article = "an" if noun[0] in "aeiou" else "a"
        raise ExportError(
            f"There is {article} {noun} at {target} already: give another folder, or --overwrite to replace it."
        )


def write_text(target: Path, text: str) -> None:
    """Writes a text whole or not at all.

    Raises:
        OutputError: It can't be written.
    """
    write_bytes(target, text.encode())


def write_bytes(target: Path, data: bytes) -> None:
    """Writes bytes whole or not at all.

    Raises:
        OutputError: It can't be written.
    """
    with atomic_file(target) as partial:
        partial.write_bytes(data)
