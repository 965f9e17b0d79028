# SPDX-License-Identifier: Apache-2.0
"""What the disk refuses, by the name of the file and with the way out."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from jaxprune.base import DiskError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)
# What is the disk's matter, whatever else was asked.
REFUSALS = (*_FULL, *_CLOSED, errno.EIO)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises DiskError that names `path` where the system refuses what is inside."""
    try:
        yield
    except DiskError:
        raise
    except OSError as error:
        raise refused(path, error.errno) from error


def write(file: Path, content: bytes, *, sync: bool = True) -> None:
    """Write a file whole or not at all; on the disk when it returns, with `sync`.

    A kill meanwhile leaves the file that was there. Raises DiskError as `writing`; what
    was written until then is deleted.
    """
    partial = file.with_name(f"{file.name}.partial")
    with writing(file):
        try:
            with open(partial, "wb") as stream:
                stream.write(content)
                if sync:
                    stream.flush()
                    os.fsync(stream.fileno())
            os.replace(partial, file)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        if sync:
            sync_folder(file.parent)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder onto the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def refused(path: Path, number: int | None) -> DiskError:
    """The error for a file that cannot be written, by the system's errno."""
    if number in _FULL:
        way = "free some space there; what is complete stays, and a run goes on from it"
    elif number in _CLOSED:
        way = "make it writable, or choose another folder"
    else:
        way = "see to the disk; what is complete stays, and a run goes on from it"
    reason = os.strerror(number) if number else "refused"
    error = DiskError(f"{path}: cannot be written ({reason}); {way}")
    error.errno = number
    return error


def errno_of(error: BaseException) -> int | None:
    """The system's errno behind an error, also of Orbax, which tells it in its text."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno:
            return seen.errno
        if match := re.search(r"os_error_code='(\d+)'", str(seen)):
            return int(match[1])
        seen = seen.__cause__ or seen.__context__
    return None
