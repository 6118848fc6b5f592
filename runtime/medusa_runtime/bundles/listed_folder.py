"""A folder whose files are listed with their sizes and digests. Files that are not listed are not read.

Links are followed as far as they can be trusted. If a file's digest is checked, its content can be trusted wherever the
file lies. Without digests a link may not lead outside the folder: a bundle could otherwise make a service read any file
of the machine. The one exception is the cache of the Hugging Face hub, whose snapshots consist of links to the
``blobs`` folder of the same repository.

Files that this process reads are read once, and the same bytes are checked and used. Graphs and weights are different:
libraries open them again after the check. So no other process may write to a folder while it is loaded.
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

# The most files that a description may list.
MAX_FILES = 10_000
FileName = Annotated[str, Meta(min_length=1, max_length=1024)]


@dataclass(frozen=True)
class FileFacts:
    """Size in bytes and SHA-256 of a file."""

    size: Count
    sha256: Annotated[str, Meta(max_length=64)]

    @classmethod
    def of(cls, path: Path) -> FileFacts:
        """Size and digest of a file."""
        with path.open("rb") as file:
            return cls(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


FileTable = Annotated[dict[FileName, FileFacts], Meta(max_length=MAX_FILES)]


@dataclass(frozen=True)
class ListedFolder:
    """A folder and the files in it that may be read.

    Attributes:
        path: The folder.
        files: Size and digest of each file that may be read, by name. None if all files may be read.
        check_digests: True to compare digests. Sizes are always compared.
        description: Name of the file that lists the others, for messages.
        noun: Kind of the folder for messages, such as ``bundle``.
    """

    path: Path
    files: Mapping[str, FileFacts] | None = None
    check_digests: bool = True
    description: str = ""
    noun: str = "folder"

    def names(self, under: str, suffix: str) -> list[str]:
        """Names of the files in a subfolder, sorted.

        Args:
            under: The subfolder.
            suffix: The files' suffix, such as ``.jinja``.
        """
        if self.files is not None:
            found = [PurePosixPath(name) for name in self.files]
        else:
            found = [PurePosixPath(under, path.name) for path in (self.path / under).glob(f"*{suffix}")]
        return sorted(str(name) for name in found if str(name.parent) == under and name.suffix == suffix)

    def read(self, name: str, *, at_most: int) -> bytes | None:
        """The content of a file; None if it is not listed. Without a list: None if it does not exist.

        Args:
            name: The file's name.
            at_most: The largest size that is read, in bytes.

        Raises:
            BundleError: The file is missing, altered, too large, not a regular file, or outside the folder.
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
        """Compares all listed files with their sizes and, if digests are checked, with their digests.

        Raises:
            BundleError: A file is missing, altered, cut off, not a regular file, or outside the folder.
        """
        for name, facts in (self.files or {}).items():
            with self._opened(name) as file:
                self._check_size(name, os.fstat(file.fileno()).st_size)
                if self.check_digests and hashlib.file_digest(file, "sha256").hexdigest() != facts.sha256:
                    raise self._altered(name)

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[io.BufferedReader]:
        """Opens a listed file. Errors while the file is read become a ``BundleError`` as well."""
        self._check_place(name)
        path = self.path / name
        try:
            with open_regular(path) as file:
                yield file
        except (FileNotFoundError, NotADirectoryError) as e:
            raise BundleError(
                f"The {self.noun} {self.path} lacks its file {brief(name)}. Copy all its files, or make it again."
            ) from e
        except (OSError, ValueError) as e:
            raise _unreadable(path, e) from e

    def _check_place(self, name: str) -> None:
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or "\\" in name or Path(name).is_absolute():
            raise BundleError(
                f"The {self.noun} {self.path} lists the file {brief(name)!r}, which is outside the folder. Such a file "
                f"is never read: get the {self.noun} from a source that you trust, or make it again."
            )
        if self.files is not None and self.check_digests:
            return
        if leads_outside(self.path, name) and not _is_blob(self.path, name):
            raise BundleError(
                f"The file {brief(name)} of the {self.noun} {self.path} is a link that leads outside the folder. Such "
                "a link is followed only if the file's digest is checked. Check digests, or replace the link by a copy "
                "of the file."
            )

    def _check_size(self, name: str, size: int) -> None:
        expected = (self.files or {})[name].size
        if size != expected:
            raise BundleError(
                f"{brief(self.path / name)} does not have the {expected:,} bytes that {self.description} states: it "
                f"was altered or cut off. Copy the {self.noun} again, or make it again."
            )

    def _altered(self, name: str) -> BundleError:
        return BundleError(
            f"{brief(self.path / name)} does not match the digest in {self.description}: it was altered. "
            f"Copy the {self.noun} again, or make it again."
        )


def read_file(path: Path, *, at_most: int, error: type[MedusaError] = BundleError) -> bytes:
    """The content of a regular file. Links are followed.

    Args:
        path: The file.
        at_most: The largest size in bytes. A larger file is refused and not read.
        error: The type of exception to raise.

    Raises:
        MedusaError: As ``error``: the file can't be read, is too large, or is not a regular file.
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
        raise error(f"{path} changed while it was read: try again when no other process writes to it.")
    return data


def open_regular(path: Path, *, follow: bool = True) -> io.BufferedReader:
    """Opens a regular file for reading. If the path is a pipe, the call fails and does not block.

    Args:
        path: The file.
        follow: True to follow the path if it is a link.

    Raises:
        OSError: The file can't be opened, or is not a regular file.
        ValueError: The path holds a zero character.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    if not follow:
        flags |= getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(path, flags)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("it is not a regular file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_cache_file(path: Path, *, at_most: int) -> bytes | None:
    """The content of a file that ``write_cache_file`` wrote; None if it is missing, too large, or a link."""
    with contextlib.suppress(OSError), open_regular(path, follow=False) as file:
        if os.fstat(file.fileno()).st_size <= at_most:
            return file.read(at_most)
    return None


def write_cache_file(path: Path, data: bytes | memoryview) -> None:
    """Writes measured or compiled data beside a bundle, for later processes.

    Does nothing if the folder can't be written to: services often mount it read-only. If the path is a link, the link
    is replaced; the file that it leads to is left alone.
    """
    with contextlib.suppress(OSError):
        descriptor, partial = tempfile.mkstemp(prefix=path.name, suffix=".partial", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            Path(partial).chmod(0o644)  # mkstemp makes files that only their owner can read
            Path(partial).replace(path)
        except OSError:
            Path(partial).unlink(missing_ok=True)


def leads_outside(folder: Path, name: str) -> bool:
    """True if a file of a folder is a link that leads outside the folder."""
    return not _resolved(folder / name).is_relative_to(_resolved(folder))


def _is_blob(folder: Path, name: str) -> bool:
    """True if a file is a link to the hub's cache: the folder belongs to a snapshot, the target to its blobs."""
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
    return error(f"{brief(path)} has {size:,} bytes, but at most {at_most:,} are read of such a file: it is damaged.")
