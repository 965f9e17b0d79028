# SPDX-License-Identifier: Apache-2.0
"""What a run tells watchers: a heartbeat, memory, TensorBoard's events, traces."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import resource
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxprune import disk
from jaxprune.base import ConfigError, DiskError

_BEAT = 5.0  # seconds between two heartbeats of one stage


class Heartbeat:
    """`heartbeat.json` of a work folder, of other processes `heartbeat.<index>.json`.

    {time: seconds since 1970, pid, host, process, processes, stage, step}, written from
    the run's own thread as it gets on, at most every few seconds, each time whole. A
    disk that refuses it does not end the run.
    """

    def __init__(self, workdir: Path) -> None:
        index = jax.process_index()
        name = f"heartbeat.{index}.json" if index else "heartbeat.json"
        self.file = workdir / name
        self._last, self._stage = 0.0, ""

    def beat(self, stage: str, step: int) -> None:
        """A sign of life at a step."""
        now = time.monotonic()
        if stage == self._stage and now - self._last < _BEAT:
            return
        self._last, self._stage = now, stage
        sign = {
            "time": round(time.time(), 1),
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "process": jax.process_index(),
            "processes": jax.process_count(),
            "stage": stage,
            "step": step,
        }
        with contextlib.suppress(DiskError):
            disk.write(self.file, f"{json.dumps(sign)}\n".encode(), sync=False)


def memory() -> dict[str, int | None]:
    """Bytes: resident of this process now, and the first device's highest use so far.

    The latter is None where the backend does not tell it, as on CPUs.
    """
    known = jax.local_devices()[0].memory_stats() or {}
    return {"host_bytes": _resident(), "device_bytes": known.get("peak_bytes_in_use")}


def peak() -> int:
    """The highest use so far in bytes: of the first device, or of the process."""
    device = memory()["device_bytes"]
    unit = 1 if sys.platform == "darwin" else 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return most if device is None else device


def _resident() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):  # not Linux
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return pages * os.sysconf("SC_PAGE_SIZE")


def check_tensorboard() -> None:
    """Raise ConfigError where TensorBoard's events cannot be written."""
    if importlib.util.find_spec("tensorboardX") is None:
        raise ConfigError(
            "--tensorboard: tensorboardX is not installed; pip install "
            '"jaxprune[tensorboard]"'
        )


class Board:
    """The numbers of metrics.jsonl as TensorBoard's events, a folder to each stage.

    Written at once, not from a thread as `SummaryWriter` does: what is in its queue a
    kill loses, and a flush leaves there.
    """

    def __init__(self, folder: Path) -> None:
        check_tensorboard()
        self.folder = folder
        self._writers: dict[str, Any] = {}
        self._opened = 0

    def rewind(self, stage: str, step: int) -> None:
        """What lies behind a step is not shown any more."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        if stage in self._writers:
            self._writers[stage].close()
        folder = self.folder / stage
        there = folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        self._opened += 1
        writer = EventsWriter(str(folder / "events"), f".{os.getpid()}.{self._opened}")
        self._writers[stage] = writer
        if there:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(stage, step + 1, session_log=start)

    def add(self, row: Mapping[str, Any]) -> None:
        """One row: its numbers as `split/name`, or `split/network/name`."""
        from tensorboardX.summary import scalar

        stage, step = row["stage"], row["step"]
        if stage not in self._writers:
            self.rewind(stage, step - 1)
        place = "/".join(str(row[k]) for k in ("split", "network") if k in row)
        for name, value in row.items():
            if name not in ("step", "time") and isinstance(value, int | float):
                self._write(stage, step, summary=scalar(f"{place}/{name}", value))
        self._writers[stage].flush()

    def close(self) -> None:
        """Nothing more comes."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def _write(self, stage: str, step: int, **what: Any) -> None:
        from tensorboardX.proto import event_pb2

        event = event_pb2.Event(wall_time=time.time(), step=step, **what)
        self._writers[stage].write_event(event)


class Trace:
    """A profile of the first `count` steps that are not compiled of each training."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count
        self._left = 0

    def begin(self, stage: str) -> None:
        """From here on."""
        if self.count and not self._left:
            jax.profiler.start_trace(str(self.folder / stage))
            self._left = self.count

    def step(self) -> None:
        """A step is done; the last one ends the trace."""
        if self._left:
            self._left -= 1
            if not self._left:
                jax.profiler.stop_trace()

    def end(self) -> None:
        """The training ended, maybe before so many steps."""
        if self._left:
            self._left = 0
            jax.profiler.stop_trace()
