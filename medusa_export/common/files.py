"""Files and folders that appear whole or not at all."""

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

# What is raised where a file can't be written; safetensors wraps the system's errors in its own.
WRITE_ERRORS = (OSError, SafetensorError)
# Open already, by whoever started this process: written to, never replaced.
_STREAMS = ("/dev/stdout", "/dev/stderr", "/dev/fd/", "/proc/")
_PARTIAL = ".partial"  # in the name of what isn't whole yet


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """A path beside ``target`` to write to, which takes its place only if nothing failed; survives a crash.

    What is no file, but a stream or a device, gets what was written behind all that it has got before.

    Raises:
        OutputError: It can't be written.
    """
    try:
        is_stream = str(target).startswith(_STREAMS) or (target.exists() and not (target.is_file() or target.is_dir()))
        with _behind(target) if is_stream else _instead(target) as path:
            yield path
    except WRITE_ERRORS as error:
        raise OutputError(f"{target} can't be written: {error}.") from error


@contextmanager
def _instead(target: Path) -> Iterator[Path]:
    """Whole or not at all."""
    place = _linked(target)
    partial = place.with_name(f".{place.stem}.{os.getpid()}{_PARTIAL}{place.suffix}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)  # safetensors would keep what it writes from everybody else
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(place)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _behind(stream: Path) -> Iterator[Path]:
    """A file that the stream was redirected to is not begun anew, nor is what is printed later lost."""
    with TemporaryDirectory() as scratch:
        aside = Path(scratch) / "content"
        yield aside
        sys.stdout.flush()
        own = {"/dev/stdout": 1, "/dev/stderr": 2}.get(str(stream))
        descriptor = os.open(stream, os.O_WRONLY | os.O_APPEND) if own is None else own
        with open(descriptor, "wb", closefd=own is None) as file:
            file.write(aside.read_bytes())


def is_unused(folder: Path) -> bool:
    """Whether a folder isn't there, or holds nothing but what a process that was killed had not written to its end."""
    paths = folder.iterdir() if folder.is_dir() else iter(())
    return all(path.name.startswith(".") and _PARTIAL in path.name for path in paths)


def _linked(target: Path) -> Path:
    """What a link leads to, so that it stays one."""
    try:
        place = target.resolve()
    except RuntimeError as error:  # up to Python 3.12
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP)) from error
    if place.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    return place


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of ``target`` only if nothing failed.

    Raises:
        OSError: It can't be written; what fills it may raise others of ``WRITE_ERRORS``.
    """
    target = _linked(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}{_PARTIAL}")
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
        ExportError: It is the working directory or holds it, or there is a file, a folder of other things, or one that
            may not be replaced.
    """
    if Path.cwd().is_relative_to(target.resolve()):  # it is replaced whole, which would leave its user nowhere
        raise ExportError(f"{target} holds the folder that you are in: give another to write the {noun} to.")
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
