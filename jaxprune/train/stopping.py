# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and Ctrl-C, answered between two steps, when the state can be saved."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any, NamedTuple

import jax


class Stop(NamedTuple):
    """`signals`: those that have arrived."""

    signals: list[int]

    def asked(self, step: int) -> bool:
        """Whether to stop behind this step; all processes get the same answer."""
        if jax.process_count() == 1:
            return bool(self.signals)
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)

    def leave(self) -> None:
        """End the process as the signal asked: 143 for SIGTERM."""
        if signal.SIGINT in self.signals:
            raise KeyboardInterrupt
        raise SystemExit(128 + signal.SIGTERM)


@contextlib.contextmanager
def stoppable() -> Iterator[Stop]:
    """A `Stop` that SIGTERM and SIGINT fill; a second one ends the process at once."""
    stop = Stop([])
    before: dict[int, Any] = {}

    def handler(number: int, frame: FrameType | None) -> None:
        stop.signals.append(number)
        signal.signal(number, before[number])

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.getsignal(number)
            signal.signal(number, handler)
    except ValueError:  # not the main thread, which alone gets signals
        before.clear()
    try:
        yield stop
    finally:
        for caught, previous in before.items():
            signal.signal(caught, previous)
