"""A folder of files, each listed with its size and digest: what isn't listed isn't read.

Links are followed as far as they can be trusted. A digest vouches for the content of a file, wherever it lies. Without
digests a link may not leave the folder, or else any file of this machine could be served. The cache of a Hugging Face
hub is the exception: its snapshots consist of links to the ``blobs`` folder of the same repository.

A file is checked by the bytes that are then used, where this process reads it. Libraries open graphs and weights by
themselves, after they were checked: nobody else may write to a folder while it is loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated

from msgspec import Meta

from medusa_runtime.bundles.json_file import Count, brief
from medusa_runtime.errors import BundleError, MedusaError

# Names and files in a description.
MAX_FILES = 10_000
FileName = Annotated[str, Meta(min_length=1, max_length=1024)]


@dataclass(frozen=True)
class FileFacts:
    """Size in bytes and SHA-256 of a file."""

    size: Count
    sha256: Annotated[str, Meta(max_length=64)]

    @classmethod
    def of(cls, path: Path) -> FileFacts:
        """Reads a file for its facts."""
        with path.open("rb") as file:
            return cls(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


FileTable = Annotated[dict[FileName, FileFacts], Meta(max_length=MAX_FILES)]


@dataclass(frozen=True)
class ListedFolder:
    """A folder, and which of its files may be read.

    Attributes:
        path: The folder.
        files: Facts of its files by name. None if nothing lists them: then each may be read.
        check_digests: Compare digests, not sizes alone.
        description: The name of the file that lists the others.
        noun: What the folder is.
    """

    path: Path
    files: Mapping[str, FileFacts] | None = None
    check_digests: bool = True
    description: str = ""
    noun: str = "folder"

    def names(self, under: str, suffix: str) -> list[str]:
        """Names of the files in a subfolder that end like this, sorted."""
        if self.files is not None:
            found = [PurePosixPath(name) for name in self.files]
        else:
            found = [PurePosixPath(under, path.name) for path in (self.path / under).glob(f"*{suffix}")]
        return sorted(str(name) for name in found if str(name.parent) == under and name.suffix == suffix)

    def read(self, name: str, *, at_most: int) -> bytes | None:
        """The content of a file, None if it is not listed, or not there where nothing lists files.

        Args:
            name: The file's name.
            at_most: The largest size that is read, in bytes.

        Raises:
            BundleError: The file is missing, altered, too large, no regular file, or it lies elsewhere.
        """
        path = self.path / name
        if self.files is None:
            if not os.path.lexists(path):
                return None
            self._check_place(name)
            return read_file(path, at_most=at_most)
        if name not in self.files:
            return None
        facts = self.files[name]
        with self._opened(name) as file:
            if facts.size > at_most:
                raise _too_large(path, facts.size, at_most)
            data = file.read(facts.size + 1)
        self._check_size(name, len(data))
        if self.check_digests and hashlib.sha256(data).hexdigest() != facts.sha256:
            raise self._altered(name)
        return data

    def check(self) -> None:
        """Holds all listed files against their facts.

        Raises:
            BundleError: A file is missing, altered, cut off, no regular file, or it lies elsewhere.
        """
        for name, facts in (self.files or {}).items():
            with self._opened(name) as file:
                self._check_size(name, os.fstat(file.fileno()).st_size)
                if self.check_digests and hashlib.file_digest(file, "sha256").hexdigest() != facts.sha256:
                    raise self._altered(name)

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[io.BufferedReader]:
        """A listed file, open; what goes wrong while it is read is a ``BundleError`` too."""
        self._check_place(name)
        path = self.path / name
        try:
            with open_regular(path) as file:
                yield file
        except (FileNotFoundError, NotADirectoryError) as e:
            raise BundleError(
                f"The {self.noun} {self.path} lacks its file {brief(name)}. Copy it whole, or make it again."
            ) from e
        except (OSError, ValueError) as e:
            raise _unreadable(path, e) from e

    def _check_place(self, name: str) -> None:
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or "\\" in name or Path(name).is_absolute():
            raise BundleError(
                f"The {self.noun} {self.path} lists the file {brief(name)!r}, which lies outside of it: refused."
            )
        if self.files is not None and self.check_digests:
            return
        if leaves(self.path, name) and not _is_blob(self.path, name):
            raise BundleError(
                f"The file {brief(name)} of the {self.noun} {self.path} is a link that leads outside: refused where no "
                "digest vouches for its content. Check digests, or put a copy of the file in the link's place."
            )

    def _check_size(self, name: str, size: int) -> None:
        expected = (self.files or {})[name].size
        if size != expected:
            raise BundleError(
                f"{brief(self.path / name)} does not have the {expected:,} bytes that {self.description} says: it was "
                f"altered or cut off. Copy the {self.noun} again, or make it again."
            )

    def _altered(self, name: str) -> BundleError:
        return BundleError(
            f"{brief(self.path / name)} does not match the digest in {self.description}: it was altered. "
            f"Copy the {self.noun} again, or make it again."
        )


def read_file(path: Path, *, at_most: int, error: type[MedusaError] = BundleError) -> bytes:
    """The content of a regular file, which links may lead to.

    Args:
        path: The file.
        at_most: The largest size that is read, in bytes. A larger file is refused unread.
        error: The exception to raise.

    Raises:
        MedusaError: ``error``. The file can't be read, is too large, or is no regular file.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > at_most:
                raise _too_large(path, size, at_most, error)
            data = file.read(size + 1)
    except (OSError, ValueError) as e:
        raise _unreadable(path, e, error) from e
    if len(data) != size:
        raise error(f"{path} changed while it was read: try again when nobody writes to it.")
    return data


def open_regular(path: Path, *, follow: bool = True) -> io.BufferedReader:
    """Opens a regular file to read it; a pipe in its place doesn't block.

    Args:
        path: The file.
        follow: Follow a link in its place.

    Raises:
        OSError: It can't be opened, or it is no regular file.
        ValueError: The path holds a zero character.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    if not follow:
        flags |= getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(path, flags)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("it is no regular file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_own(path: Path, *, at_most: int) -> bytes | None:
    """What ``keep_own`` left beside a bundle; None if there is nothing that can be used, or a link."""
    with contextlib.suppress(OSError), open_regular(path, follow=False) as file:
        if os.fstat(file.fileno()).st_size <= at_most:
            return file.read(at_most)
    return None


def keep_own(path: Path, data: bytes | memoryview) -> None:
    """Keeps data beside a bundle, if the folder can be written to: a service may well mount it read-only.

    A link in the file's place is replaced, never written through.
    """
    with contextlib.suppress(OSError):
        descriptor, partial = tempfile.mkstemp(prefix=path.name, suffix=".partial", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            Path(partial).chmod(0o644)  # temporary files are for their owner alone
            Path(partial).replace(path)
        except OSError:
            Path(partial).unlink(missing_ok=True)


def leaves(folder: Path, name: str) -> bool:
    """Whether a file of a folder is a link that leads outside."""
    return not _resolved(folder / name).is_relative_to(_resolved(folder))


def _is_blob(folder: Path, name: str) -> bool:
    """Whether a file lies in the blobs of the hub's cache that the folder is a snapshot of, or a part of one."""
    snapshot = next((parent for parent in (folder, *folder.parents) if parent.parent.name == "snapshots"), None)
    return snapshot is not None and _resolved(folder / name).is_relative_to(_resolved(snapshot.parent.parent / "blobs"))


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, ValueError, RuntimeError) as e:  # a name that is too long, a zero character, links in a circle
        raise _unreadable(path, e) from e


def _unreadable(path: Path, reason: Exception, error: type[MedusaError] = BundleError) -> MedusaError:
    words = reason.strerror if isinstance(reason, OSError) and reason.strerror else str(reason)
    return error(f"{brief(path)} can't be read: {words}.")


def _too_large(path: Path, size: int, at_most: int, error: type[MedusaError] = BundleError) -> MedusaError:
    return error(
        f"{brief(path)} has {size:,} bytes, but no more than {at_most:,} are read of such a file: it is damaged."
    )
