# SPDX-License-Identifier: Apache-2.0
"""How the command ends: exit codes that a launcher can act on, and SIGTERM's way out.

75 is sysexits.h's EX_TEMPFAIL, "try again later"; batch systems requeue on it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from jaxprune.base import DiskError, NonFinite, PeerError

DONE, FAILED, BAD_INPUT, RESUMABLE, INTERRUPTED = 0, 1, 2, 75, 130
# What no other input would mend: full, over the quota, broken.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def code_of(error: BaseException) -> int:
    """The exit code for an error that the command tells in one line."""
    if isinstance(error, PeerError):
        return RESUMABLE
    seen: BaseException | None = error
    while seen is not None:
        full = isinstance(seen, OSError) and seen.errno in _DISK
        if full or isinstance(seen, DiskError | NonFinite):
            return FAILED
        seen = seen.__cause__
    return BAD_INPUT


@contextlib.contextmanager
def resumable() -> Iterator[None]:
    """SIGTERM meanwhile ends the process with 75, wherever it is.

    As safe as a kill: files are written whole or not at all. Trainings save before, see
    `train.stopping`.
    """

    def handler(number: int, frame: FrameType | None) -> None:
        raise SystemExit(RESUMABLE)

    try:
        before = signal.signal(signal.SIGTERM, handler)
    except ValueError:  # not the main thread, which alone gets signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def to_nobody() -> None:
    """Send the rest of standard output nowhere, where its reader is gone.

    Python would stumble over it once more at the process's end. That this ends with
    FAILED, in silence, is what its documentation recommends (`signal`, on SIGPIPE).
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def at_once(code: int, said: str = "") -> NoReturn:
    """End the process without waiting for its threads, or for other processes."""
    if said:
        print(f"error: {said}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
