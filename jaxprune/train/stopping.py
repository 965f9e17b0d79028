# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and Ctrl-C, answered between two steps, when the state can be saved."""

from __future__ import annotations

import contextlib
import itertools
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NamedTuple

import jax

from jaxprune import exits, peers

# JAX agrees on a number that all processes have yet to reach, and so wants numbers that
# rise from one training of a run to the next.
_asked = itertools.count(1)


class Stop(NamedTuple):
    """`signals`: those that have arrived, and been agreed on by all processes.

    `beat`: see `peers.watched`.
    """

    signals: list[int]
    beat: Callable[[str], None]

    def asked(self) -> bool:
        """Whether to stop behind this step; all processes get the same answer.

        To be called once a step. Where there are several processes, a SIGTERM to any of
        them counts, a second or more later.
        """
        self.resume()
        if jax.process_count() == 1:
            return bool(self.signals)
        from jax.experimental import multihost_utils

        # Once reached, in all at the same step, the answer stays.
        if not self.signals:
            if multihost_utils.reached_preemption_sync_point(next(_asked)):
                self.signals.append(signal.SIGTERM)
        return bool(self.signals)

    def rest(self) -> None:
        """No limit until `resume`: evaluations and saves have limits of their own."""
        self.beat("")

    def resume(self) -> None:
        """The next step is waited for, as long as `peers.patience` says."""
        self.beat("training step")

    def leave(self) -> None:
        """End the process as the signal asked: with 75, to be resumed, for SIGTERM."""
        if signal.SIGINT in self.signals:
            raise KeyboardInterrupt
        raise SystemExit(exits.RESUMABLE)


@contextlib.contextmanager
def stoppable() -> Iterator[Stop]:
    """A `Stop` that SIGTERM and SIGINT fill; a second one ends the process at once.

    Several processes leave SIGTERM to JAX, whose handler one of Python would replace,
    and are not stoppable by Ctrl-C, which ends the one that it reaches. They end with
    75 where no step comes to its end in time, since one of them is stuck.
    """
    signals: list[int] = []
    before: dict[int, Any] = {}

    def handler(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        signal.signal(number, before[number])

    caught = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
    try:
        for number in caught:
            before[number] = signal.getsignal(number)
            signal.signal(number, handler)
    except ValueError:  # not the main thread, which alone gets signals
        before.clear()
    try:
        with peers.watched() as beat:
            yield Stop(signals, beat)
    finally:
        for changed, previous in before.items():
            signal.signal(changed, previous)
