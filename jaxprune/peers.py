# SPDX-License-Identifier: Apache-2.0
"""The other processes of a run: found, and waited for, but not for ever.

JAX ends a process whose peer is gone, with SIGABRT and by its own clock. A peer that is
there but does nothing it waits for without end. So waits have a limit here: behind it
the process says which wait it was and ends with 75, for a launcher to start all again.
"""

from __future__ import annotations

import contextlib
import contextvars
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from jaxprune import exits
from jaxprune.base import ConfigError, PeerError

WAIT = 600.0  # seconds
MOST = 1e6  # clocks and JAX take no more
AUTO = "auto"
_FORM = "write HOST:PORT,PROCESSES,INDEX such as node0:1234,4,0, or 'auto'"
_wait: contextvars.ContextVar[float] = contextvars.ContextVar("wait", default=WAIT)


@contextlib.contextmanager
def patience(seconds: float) -> Iterator[None]:
    """How long others are waited for meanwhile; ConfigError unless positive."""
    if not 0 < seconds <= MOST:
        raise ConfigError(
            f"--wait {seconds:g}: must be a positive number of seconds, up to {MOST:g}"
        )
    token = _wait.set(seconds)
    try:
        yield
    finally:
        _wait.reset(token)


def limit() -> float:
    """How many seconds others are waited for."""
    return _wait.get()


def join(where: str = AUTO) -> None:
    """Become one of the processes of a run, by `jax.distributed`; before any device is.

    where: 'auto', where JAX itself finds the others (SLURM, TPU pods, Open MPI, ...);
    else 'HOST:PORT,PROCESSES,INDEX': where process 0 listens, how many there are, and
    which of them this is. Where the others do not come in time, see `patience`, this
    process ends with exit code 75 and a line that says so: a node may be slow to come.
    Raises ConfigError for another text, where JAX finds no cluster, and where it has
    touched a device already.
    """
    address, count, index = (None, None, None) if where == AUTO else _parsed(where)
    seconds = limit()
    late = (
        f"--distributed {where}: not all processes came within {seconds:g} s; "
        "is each of them started, and can each reach the first's address?"
    )
    # JAX would abort with a native trace, so its own limit is never to be reached.
    waiting = threading.Timer(seconds, exits.at_once, (exits.RESUMABLE, late))
    waiting.daemon = True
    waiting.start()
    most = int(seconds) + 60
    try:
        jax.distributed.initialize(address, count, index, initialization_timeout=most)
    except ValueError as error:
        raise ConfigError(
            f"--distributed {where}: JAX finds no cluster here ({error}); {_FORM}"
        ) from error
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"--distributed {where}: JAX refuses: {reason}") from error
    finally:
        waiting.cancel()


def _parsed(where: str) -> tuple[str, int, int]:
    """(address, processes, index) of 'HOST:PORT,PROCESSES,INDEX'."""
    try:
        address, count, index = where.split(",")
        port = int(address.rpartition(":")[2])
        found = (address, int(count), int(index))
    except ValueError:
        raise ConfigError(f"--distributed {where}: {_FORM}") from None
    if not (0 < port < 65536 and address.rpartition(":")[0]):
        raise ConfigError(f"--distributed {where}: no port in {address!r}; {_FORM}")
    if not 0 <= found[2] < found[1]:
        raise ConfigError(
            f"--distributed {where}: INDEX must be from 0 to {found[1] - 1}"
        )
    return found


def joined() -> bool:
    """Whether this is one of several processes; starts no device."""
    return jax.distributed.is_initialized()


@contextlib.contextmanager
def watched(what: str = "") -> Iterator[Callable[[str], None]]:
    """A limit on each wait inside; begins anew with every call of what it yields.

    what: is waited for. Where it is "", here or in a call, there is no limit until the
    next call.
    """
    if jax.process_count() == 1:
        yield lambda what: None
        return
    seconds, ended, last = limit(), threading.Event(), [(time.monotonic(), what)]

    def beat(what: str) -> None:
        last[0] = time.monotonic(), what

    def watch() -> None:
        while not ended.wait(min(seconds / 4, 5.0)):
            began, what = last[0]
            if what and time.monotonic() - began > seconds:
                exits.at_once(exits.RESUMABLE, _lost(f"no {what} within {seconds:g} s"))

    thread = threading.Thread(target=watch, daemon=True, name="jaxprune peers")
    thread.start()
    try:
        yield beat
    finally:
        ended.set()


def _lost(why: str) -> str:
    return (
        f"another process of this run is lost or stuck ({why}); start all of them "
        "again: they go on from the last save"
    )


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Raises PeerError for what JAX raises inside when another process is gone."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        # JAX has either for the same; its own begin with a status.
        reason = str(error).partition("\n")[0]
        gone = re.match(
            "[A-Z_]+: .*(?i:gloo|unavailable|deadline|connect|clos)", reason
        )
        if jax.process_count() == 1 or not gone:
            raise
        raise PeerError(_lost(reason)) from error


def barrier(name: str) -> None:
    """Wait for all processes, where there are several; PeerError where one is gone."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        with told(), watched(f"answer at {name!r}"):
            multihost_utils.sync_global_devices(name)


def first_says(tree: Any) -> Any:
    """What the first process has for a tree of numbers and arrays, in all, bit by bit.

    Arrays come back in NumPy, but for those that no process has whole, which stay as
    they are: all compute them together. Shapes and dtypes must be the same in all.
    Raises PeerError where a process is gone.
    """
    if jax.process_count() == 1:
        return tree
    from jax.experimental import multihost_utils

    leaves, treedef = jax.tree.flatten(tree)
    whole = [getattr(x, "is_fully_addressable", True) for x in leaves]
    own = [np.asarray(x) for x, w in zip(leaves, whole) if w]
    if not own:
        return tree
    # As bytes, since a sum of floats would lose the sign of 0, and 64 bits.
    content = np.frombuffer(b"".join(x.tobytes() for x in own), np.uint8)
    with told(), watched("word of the first process"):
        content = np.asarray(multihost_utils.broadcast_one_to_all(content))
    ends = np.cumsum([x.nbytes for x in own])[:-1]
    said = iter(
        np.frombuffer(part.tobytes(), x.dtype).reshape(x.shape)
        for x, part in zip(own, np.split(content, ends), strict=True)
    )
    agreed = [next(said) if w else x for x, w in zip(leaves, whole)]
    return jax.tree.unflatten(treedef, agreed)
