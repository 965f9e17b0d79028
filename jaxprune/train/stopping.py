# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and Ctrl-C, answered between two steps, when the state can be saved."""

from __future__ import annotations

import contextlib
import itertools
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any, NamedTuple

import jax

# JAX agrees on a number that all processes have yet to reach, and so wants numbers that
# rise from one training of a run to the next.
_asked = itertools.count(1)


class Stop(NamedTuple):
    """`signals`: those that have arrived, where there is one process."""

    signals: list[int]

    def asked(self) -> bool:
        """Whether to stop behind this step; all processes get the same answer.

        To be called once a step. Where there are several processes, a SIGTERM to any of
        them counts, a second or more later.
        """
        if jax.process_count() == 1:
            return bool(self.signals)
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(next(_asked))

    def leave(self) -> None:
        """End the process as the signal asked: 143 for SIGTERM."""
        if signal.SIGINT in self.signals:
            raise KeyboardInterrupt
        raise SystemExit(128 + signal.SIGTERM)


@contextlib.contextmanager
def stoppable() -> Iterator[Stop]:
    """A `Stop` that SIGTERM and SIGINT fill; a second one ends the process at once.

    Several processes leave SIGTERM to JAX, whose handler one of Python would replace,
    and are not stoppable by Ctrl-C, which ends the one that it reaches.
    """
    stop = Stop([])
    before: dict[int, Any] = {}

    def handler(number: int, frame: FrameType | None) -> None:
        stop.signals.append(number)
        signal.signal(number, before[number])

    caught = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
    try:
        for number in caught:
            before[number] = signal.getsignal(number)
            signal.signal(number, handler)
    except ValueError:  # not the main thread, which alone gets signals
        before.clear()
    try:
        yield stop
    finally:
        for changed, previous in before.items():
            signal.signal(changed, previous)
