# SPDX-License-Identifier: Apache-2.0
"""What jaxprune takes beyond JAX's own tracing: CPU seconds, and bytes at the peak."""

import contextlib
import gc
import importlib
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

from jaxprune import jaxpr as jx

# The package's attribute of that name is the function.
slim = importlib.import_module("jaxprune.slim")


class Spent(NamedTuple):
    """CPU seconds of JAX's tracing, of the rest, and of planning `slim` within that.

    peak, plan_peak: bytes that the rest, and the planning, held at most, if asked.
    """

    result: Any
    jaxpr: float
    beyond: float
    plan: float
    peak: int
    plan_peak: int


class _Clock:
    """Sums CPU seconds of a function; what was held after it, and at most within it."""

    def __init__(self) -> None:
        self.seconds, self.after, self.peak = 0.0, 0, 0

    def around(self, f: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            before = tracemalloc.get_traced_memory()[0]
            if tracemalloc.is_tracing():
                tracemalloc.reset_peak()
            start = time.process_time()
            result = f(*args)
            self.seconds += time.process_time() - start
            self.after, peak = tracemalloc.get_traced_memory()
            self.peak = peak - before
            if tracemalloc.is_tracing():
                tracemalloc.reset_peak()
            return result

        return timed


def spent(f: Callable[[], Any], *, memory: bool = False) -> Spent:
    """Run f once; ask for seconds and bytes apart, since counting bytes takes time."""
    gc.collect()
    tracing, planning = _Clock(), _Clock()
    with (
        mock.patch.object(jx, "trace", tracing.around(jx.trace)),
        mock.patch.object(slim, "_plan", planning.around(slim._plan)),
        _counted(memory),
    ):
        start = time.process_time()
        result = f()
        beyond = time.process_time() - start - tracing.seconds
        peak = tracemalloc.get_traced_memory()[1] - tracing.after
    return Spent(result, tracing.seconds, beyond, planning.seconds, peak, planning.peak)


@contextlib.contextmanager
def _counted(memory: bool) -> Iterator[None]:
    if memory:
        tracemalloc.start()
    try:
        yield
    finally:
        if memory:
            tracemalloc.stop()


def equations(program: Any) -> int:
    """Equations of a jaxpr, those of the programs that it calls included."""
    count = 0
    for eqn in jx.program(program).eqns:
        inner = [v for v in eqn.params.values() if hasattr(v, "eqns")]
        count += 1 + sum(map(equations, inner))
    return count
