# SPDX-License-Identifier: Apache-2.0
"""What a run says: cards, one live line on a terminal, plain lines elsewhere; rows."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxprune import disk, formats
from jaxprune.graph_io import bar
from jaxprune.train import vitals

_INTERVAL = 15.0  # seconds between plain lines
_SMOOTH = 0.95  # of the loss that is shown


class Progress:
    """The screen, `metrics.jsonl` and signs of life of one run.

    Other processes stay silent, but for their heartbeats. tensorboard: also write its
    events, into `tensorboard/`. profile: so many steps of each training, traced into
    `profile/`.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        speaks: bool = True,
        tensorboard: bool = False,
        profile: int = 0,
    ) -> None:
        from rich.console import Console

        self.rows = workdir / "metrics.jsonl"
        self.speaks = speaks
        self.console = Console(highlight=False, quiet=not speaks)
        self._heart = vitals.Heartbeat(workdir)
        self._board = None
        if tensorboard and speaks:
            self._board = vitals.Board(workdir / "tensorboard")
        self._trace = vitals.Trace(workdir / "profile", profile if speaks else 0)
        self._live: Any = None
        self._stage, self._total, self._per_epoch, self._batch = "", 0, 1, 1
        self._began = self._said = self._shown = 0.0
        self._first = self._at = 0
        self._loss: float | None = None
        self._score: float | None = None
        self._best: float | None = None

    def note(self, text: str) -> None:
        """A line of its own."""
        self.console.print(text, soft_wrap=True, markup=False)

    def alive(self, stage: str, step: int) -> None:
        """A sign of life, for who watches the heartbeat."""
        self._heart.beat(stage, step)

    def card(self, title: str, rows: Sequence[Sequence[str]], head: Any = None) -> None:
        """A table with a title; the first column is text, the others numbers."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, title_justify="left", show_header=head is not None)
        for i, name in enumerate(head or [""] * len(rows[0])):
            table.add_column(name, justify="right" if i and head else "left")
        for row in rows:
            table.add_row(*map(Text, row))
        self.console.print(table)

    def start(
        self, stage: str, at: int, total: int, per_epoch: int, batch: int
    ) -> None:
        """A training begins, or goes on, at a step."""
        self._stage, self._total, self._per_epoch = stage, total, per_epoch
        self._batch, self._first, self._at = batch, at + 1, at
        self._loss = self._score = self._best = None
        self._began = 0.0
        self.alive(stage, at)
        if self.console.is_terminal and self.speaks:
            from rich.live import Live

            self._live = Live(
                console=self.console, refresh_per_second=4, transient=True
            )
            self._live.start()

    def compiled(self, seconds: float) -> None:
        """The first step is done; its time does not count in what follows."""
        self.note(f"{self._stage}: compiling took {seconds:.0f} s")
        self._began = self._said = self._shown = time.perf_counter()
        self._trace.begin(self._stage)

    def step(self, done: int, loss: float) -> None:
        """The loss of the step that makes `done` steps has arrived."""
        before = loss if self._loss is None else self._loss
        self._loss = _SMOOTH * before + (1 - _SMOOTH) * loss
        self._at = done
        self.alive(self._stage, done)
        self._trace.step()
        now = time.perf_counter()
        if self._live is not None:
            if now - self._shown > 0.2:
                self._shown = now
                self._live.update(self._line())
        elif now - self._said > _INTERVAL:
            self._said = now
            self.note(self._line())

    def row(self, split: str, done: int, values: Mapping[str, Any]) -> None:
        """What was measured on a split at a step: to the file, and the mIoU shown."""
        if "miou" in values:
            self._score = values["miou"]
            self._best = max(self._score, self._best or 0.0)
        speed = {
            "images_per_s": round(self._rate() * self._batch, 2),
            **vitals.memory(),
        }
        epoch = {"epoch": round(done / self._per_epoch, 4)}
        place = {"stage": self._stage, "step": done, **epoch, "split": split}
        self.append({**place, **values, **(speed if split == "train" else {})})

    def finish(self) -> None:
        """The training ended, or was left: the last line stays, the live one goes."""
        self._trace.end()
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._at >= self._first:
            self.note(self._line())

    def close(self) -> None:
        """The run ended, or was left."""
        if self._board is not None:
            self._board.close()

    def append(self, row: Mapping[str, Any]) -> None:
        """One row of metrics.jsonl."""
        self.alive(row["stage"], row["step"])
        if self.speaks:
            line = json.dumps({**row, "time": round(time.time(), 1)}) + "\n"
            with (
                disk.writing(self.rows),
                open(self.rows, "a", encoding="utf-8") as file,
            ):
                file.write(line)
        if self._board is not None:
            self._board.add(row)

    def rewind(self, stage: str, step: int) -> None:
        """Drop a stage's rows that lie behind the step at which it goes on."""
        if self._board is not None:
            self._board.rewind(stage, step)
        if not (self.speaks and self.rows.exists()):
            return
        kept = []
        for line in self.rows.read_bytes().splitlines():
            try:
                row = formats.parse(line)
            except ValueError:  # cut short by a kill
                continue
            match row:  # what is no row is dropped as well
                case {"stage": str(of), "step": int(at)} if of != stage or at <= step:
                    kept.append(line + b"\n")
        disk.write(self.rows, b"".join(kept))

    def _rate(self) -> float:
        """Steps a second since the first one, which was compiled."""
        elapsed = time.perf_counter() - self._began
        count = self._at - self._first
        return count / elapsed if self._began and elapsed and count > 0 else 0.0

    def _line(self) -> str:
        done = self._at / max(self._total, 1)
        rate = self._rate()
        left = clock((self._total - self._at) / rate) if rate else "?"
        loss = "" if self._loss is None else f"  loss {self._loss:.3f}"
        epochs = round(self._total / self._per_epoch, 1)
        miou = ""
        if self._score is not None:
            miou = f"  mIoU {self._score:.3f} (best {self._best:.3f})"
        return (
            f"{self._stage:8} {bar(done, 20)} epoch {self._at / self._per_epoch:.1f}"
            f"/{epochs:g}, step {self._at}{loss}{miou}  "
            f"{rate * self._batch:.0f} images/s  {memory()}  {left} left"
        )


def memory() -> str:
    """The highest use so far: of the first device, or of the process on a CPU."""
    return f"{vitals.peak() / 2**30:.1f} GiB"


def clock(seconds: float) -> str:
    """`1:02:03`, or `2:03` under an hour."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
