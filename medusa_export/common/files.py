"""Writes files and folders so that they appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import SafetensorError

from medusa_export.common.errors import ExportError, OutputError

# Errors of writing a file. safetensors wraps the system's errors in its own.
WRITE_ERRORS = (OSError, SafetensorError)
# Streams that are open already. They are written to, never replaced.
_STREAMS = ("/dev/stdout", "/dev/stderr", "/dev/fd/", "/proc/")
_PARTIAL = ".partial"  # in the names of files and folders that are not whole yet


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Gives a path to write to, which replaces ``target`` when the block ends without an error.

    If ``target`` is a stream or a device, the content is appended to it.

    Args:
        target: The file to write.

    Raises:
        OutputError: The file can't be written.
    """
    try:
        is_stream = str(target).startswith(_STREAMS) or (target.exists() and not (target.is_file() or target.is_dir()))
        with _behind(target) if is_stream else _instead(target) as path:
            yield path
    except WRITE_ERRORS as error:
        raise OutputError(f"{target} can't be written: {error}.") from error


@contextmanager
def _instead(target: Path) -> Iterator[Path]:
    """Gives a path beside a file, which replaces the file when the block ends without an error."""
    place = _linked(target)
    partial = place.with_name(f".{place.stem}.{os.getpid()}{_PARTIAL}{place.suffix}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)  # safetensors writes files that only their owner may read
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(place)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _behind(stream: Path) -> Iterator[Path]:
    """Gives a path whose content is appended to a stream.

    A file that the stream is redirected to keeps its content, and what is printed later comes after it.
    """
    with TemporaryDirectory() as scratch:
        aside = Path(scratch) / "content"
        yield aside
        sys.stdout.flush()
        own = {"/dev/stdout": 1, "/dev/stderr": 2}.get(str(stream))
        descriptor = os.open(stream, os.O_WRONLY | os.O_APPEND) if own is None else own
        with open(descriptor, "wb", closefd=own is None) as file:
            file.write(aside.read_bytes())


def is_unused(folder: Path) -> bool:
    """Returns True for a folder that does not exist, or that holds only partial files of a process that was killed."""
    paths = folder.iterdir() if folder.is_dir() else iter(())
    return all(path.name.startswith(".") and _PARTIAL in path.name for path in paths)


def _linked(target: Path) -> Path:
    """Returns the path that a link leads to, so that the link itself is kept."""
    try:
        place = target.resolve()
    except RuntimeError as error:  # up to Python 3.12
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP)) from error
    if place.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return place


@contextmanager
def atomic_folder(target: Path, *, replace_existing: bool = True) -> Iterator[Path]:
    """Gives a folder to fill, which replaces ``target`` when the block ends without an error.

    Args:
        target: The folder to write.
        replace_existing: If False, a folder with files that is there at the end is an error.

    Raises:
        OSError: The folder can't be written. The block may raise others of ``WRITE_ERRORS``.
    """
    target = _linked(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}{_PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        mode = partial.stat().st_mode & 0o666  # the mode of new files in this place
        for file in filter(Path.is_file, partial.rglob("*")):
            file.chmod(mode)  # as above
        _move(partial, target, replace_existing=replace_existing)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _move(partial: Path, target: Path, *, replace_existing: bool) -> None:
    """Moves a folder to its place. If that fails, the folder that was there stays."""
    if not (replace_existing and target.exists()):
        try:
            partial.rename(target)  # takes the place of an empty folder, too
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise FileExistsError(errno.EEXIST, "another process has written to it meanwhile") from error
        return
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        if not target.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        raise
    shutil.rmtree(old)


def check_target(target: Path, *, replace_existing: bool, marker: str = "medusa.json", noun: str = "bundle") -> None:
    """Refuses a target that holds other files of the user.

    Args:
        target: The folder to write.
        replace_existing: The target may be replaced if it is of the same kind.
        marker: The file that every folder of this kind holds.
        noun: The name of this kind of folder.

    Raises:
        ExportError: The target is or holds the working directory, is a file, holds other files, or may not be replaced;
            or it is a mount point; or its parent is a file, or can't be written to.
    """
    if Path.cwd().is_relative_to(
        target.resolve()
    ):  # the whole folder is replaced, and the user's shell would be in none
        raise ExportError(f"{target} holds the working directory: give another folder to write the {noun} to.")
    _check_writable(target, noun)
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
            f"There is {article} {noun} at {target} already: give another folder, or `overwrite=True` to replace it."
        )


def _check_writable(target: Path, noun: str) -> None:
    """Refuses a target that ``atomic_folder`` can't make, before the work that fills it."""
    place = target.resolve()
    if place.is_mount():
        raise ExportError(
            f"{target} is a mount point, which a finished {noun} can't replace: give a new folder inside it."
        )
    parent = next(path for path in place.parents if path.exists())
    if not parent.is_dir():
        raise ExportError(f"{target} can't be made, because {parent} is a file: give another folder for the {noun}.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ExportError(
            f"{target} can't be made, because this user can't write to {parent}: give another folder for the {noun}."
        )


def check_files(*targets: Path | None) -> None:
    """Refuses files that can't be written, before the work whose results they hold.

    Args:
        targets: The files to write; None for those that are not asked for.

    Raises:
        OutputError: A target is a folder, or the folder above it is a file or can't be written to.
    """
    for target in filter(None, targets):
        if target.is_dir():
            raise OutputError(f"{target} can't be written: it is a folder. Give a file.")
        parent = next(path for path in target.absolute().parents if path.exists())
        if not parent.is_dir() or not (target.exists() or os.access(parent, os.W_OK | os.X_OK)):
            reason = "this user can't write to it" if parent.is_dir() else "it is a file"
            raise OutputError(f"{target} can't be written, because of {parent}: {reason}. Give another file.")


def write_text(target: Path, text: str) -> None:
    """Writes a text file, whole or not at all.

    Args:
        target: The file to write.
        text: Its content.

    Raises:
        OutputError: The file can't be written.
    """
    write_bytes(target, text.encode())


def write_bytes(target: Path, data: bytes) -> None:
    """Writes a binary file, whole or not at all.

    Args:
        target: The file to write.
        data: Its content.

    Raises:
        OutputError: The file can't be written.
    """
    with atomic_file(target) as partial:
        partial.write_bytes(data)
