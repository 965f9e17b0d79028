# SPDX-License-Identifier: Apache-2.0
"""One run on many hosts: the processes find each other before JAX touches a device."""

from __future__ import annotations

import os
import sys
import threading

import jax

from jaxprune.base import ConfigError

AUTO = "auto"
_FORM = "write HOST:PORT,PROCESSES,INDEX such as node0:1234,4,0, or 'auto'"


def join(where: str = AUTO, seconds: float = 300) -> None:
    """Become one of the processes of a run, by `jax.distributed`.

    where: 'auto', where JAX itself finds the others (SLURM, TPU pods, Open MPI, ...);
    else 'HOST:PORT,PROCESSES,INDEX': where process 0 listens, how many there are, and
    which of them this is. seconds: how long to wait for the others; then this process
    ends with exit code 1 and a line that says so.
    Raises ConfigError for another text, and where JAX finds no cluster.
    """
    address, count, index = (None, None, None) if where == AUTO else _parsed(where)
    # JAX would abort with a native trace, so its own limit is never to be reached.
    waiting = threading.Timer(seconds, _give_up, (where, seconds))
    waiting.daemon = True
    waiting.start()
    limit = int(seconds) + 60
    try:
        jax.distributed.initialize(address, count, index, initialization_timeout=limit)
    except ValueError as error:
        raise ConfigError(
            f"--distributed {where}: JAX finds no cluster here ({error}); {_FORM}"
        ) from error
    finally:
        waiting.cancel()


def _give_up(where: str, seconds: float) -> None:
    text = (
        f"error: --distributed {where}: not all processes came within {seconds:g} s; "
        "is each of them started, and can each reach the first's address?"
    )
    print(text, file=sys.stderr, flush=True)
    os._exit(1)


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
