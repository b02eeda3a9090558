"""The disk, for every file format: private memory maps, and files written whole or not at all."""

import contextlib
import mmap
import os
import secrets
from collections.abc import Generator
from pathlib import Path
from typing import BinaryIO

from polyhead.errors import FileError


def map_file(path: Path) -> mmap.mmap:
    """Map a file copy-on-write: read when touched, never altered by writing to a tensor.

    Errors: FileError for what is missing, no regular file, empty, or unreadable.
    """
    try:
        with path.open("rb") as file:
            if not path.is_file():
                raise FileError(f"{path}: not a regular file; name a model file or a directory")
            if os.fstat(file.fileno()).st_size == 0:
                raise FileError(f"{path}: the file is empty (0 bytes); fetch it again")
            if os.name == "nt":
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            # Without NORESERVE Linux refuses private maps larger than memory.
            flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
            return mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except FileNotFoundError:
        raise FileError(f"{path}: no such file; check the path") from None
    except IsADirectoryError:
        raise FileError(f"{path}: a directory, where a file was expected") from None
    except (OSError, ValueError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{path}: cannot be read ({error}); check its permissions") from None


@contextlib.contextmanager
def atomic_file(path: Path) -> Generator[BinaryIO]:
    """Open a temporary file beside `path` that takes its place when the block ends well.

    It is on disk for good then; after an error nothing is left. Errors: FileError from the system.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        raise FileError(
            f"{path}: cannot be written ({error}); check space and permissions"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, doing: str) -> Generator[None]:
    """Keep other processes from doing the same to a file or directory that is there.

    Errors: FileError where one does; does nothing on Windows.
    """
    if os.name == "nt":
        yield
        return
    import fcntl

    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FileError(f"{path} is {doing} by another process: wait for it") from None
    else:
        yield
    finally:
        os.close(descriptor)


def sync_directory(directory: Path) -> None:
    """Make renames inside a directory survive a power cut; does nothing on Windows."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
