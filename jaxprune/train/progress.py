# SPDX-License-Identifier: Apache-2.0
"""What a run says: cards, one live line on a terminal, plain lines elsewhere; rows."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_INTERVAL = 15.0  # seconds between plain lines


class Progress:
    """The screen and `metrics.jsonl` of one run; other processes stay silent."""

    def __init__(self, workdir: Path, *, speaks: bool = True) -> None:
        from rich.console import Console

        self.rows = workdir / "metrics.jsonl"
        self.speaks = speaks
        self.console = Console(highlight=False, quiet=not speaks)
        self._live: Any = None
        self._stage, self._total, self._per_epoch, self._batch = "", 0, 1, 1
        self._began = self._said = 0.0
        self._first = self._at = 0
        self._best, self._score, self._loss = 0.0, 0.0, 0.0

    def note(self, text: str) -> None:
        """A line of its own."""
        self.console.print(text, soft_wrap=True)

    def card(self, title: str, rows: Sequence[Sequence[str]], head: Any = None) -> None:
        """A table with a title."""
        from rich.table import Table

        table = Table(title=title, title_justify="left", show_header=head is not None)
        for i, name in enumerate(head or [""] * len(rows[0])):
            table.add_column(name, justify="right" if i else "left")
        for row in rows:
            table.add_row(*row)
        self.console.print(table)

    def start(
        self, stage: str, at: int, total: int, per_epoch: int, batch: int
    ) -> None:
        """A training begins, or goes on, at a step."""
        self._stage, self._total, self._per_epoch = stage, total, per_epoch
        self._batch, self._first, self._at = batch, at + 1, at
        self._best = self._score = 0.0
        if self.console.is_terminal and self.speaks:
            from rich.live import Live

            self._live = Live(console=self.console, refresh_per_second=4)
            self._live.start()

    def compiled(self, seconds: float) -> None:
        """The first step is done; its time does not count in what follows."""
        self.note(f"{self._stage}: compiling took {seconds:.0f} s")
        self._began = self._said = time.perf_counter()

    def step(self, number: int, loss: float) -> None:
        """A step's loss has arrived."""
        self._loss = loss if self._loss == 0 else 0.95 * self._loss + 0.05 * loss
        self._at = number
        if self._live is not None:
            self._live.update(self._line())
        elif time.perf_counter() - self._said > _INTERVAL:
            self._said = time.perf_counter()
            self.note(self._line())

    def evaluated(self, stage: str, number: int, row: Mapping[str, Any]) -> None:
        """The validation split was judged; a row for the file."""
        self._score, self._best = row["miou"], max(self._best, row["miou"])
        speed = {"images_per_s": round(self._rate() * self._batch, 2)}
        self.append({"stage": stage, "step": number, "split": "val", **speed, **row})
        if number == self._total:
            self._at = number
            if self._live is not None:
                self._live.update(self._line())
                self._live.stop()
                self._live = None
            else:
                self.note(self._line())

    def append(self, row: Mapping[str, Any]) -> None:
        """One row of metrics.jsonl."""
        if self.speaks:
            with open(self.rows, "a", encoding="utf-8") as file:
                file.write(json.dumps({**row, "time": round(time.time(), 1)}) + "\n")

    def rewind(self, stage: str, step: int) -> None:
        """Drop a stage's rows that lie behind the step at which it goes on."""
        if not (self.speaks and self.rows.exists()):
            return
        rows = []
        for line in self.rows.read_text("utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # cut short by a kill
                continue
            if row["stage"] != stage or row["step"] <= step:
                rows.append(line + "\n")
        partial = self.rows.with_suffix(".partial")
        partial.write_text("".join(rows), "utf-8")
        os.replace(partial, self.rows)

    def _rate(self) -> float:
        """Steps a second since the first one."""
        elapsed = time.perf_counter() - self._began
        return (
            (self._at - self._first + 1) / elapsed if self._began and elapsed else 0.0
        )

    def _line(self) -> str:
        done = self._at / max(self._total, 1)
        bar = "█" * round(20 * done) + "░" * (20 - round(20 * done))
        rate = self._rate()
        left = (self._total - self._at) / rate if rate else 0.0
        return (
            f"{self._stage:8} {bar} epoch {self._at / self._per_epoch:.1f}"
            f"/{self._total / self._per_epoch:.0f}  loss {self._loss:.3f}  "
            f"mIoU {self._score:.3f} ({self._best:.3f})  "
            f"{rate * self._batch:.0f} images/s  {clock(left)} left"
        )


def clock(seconds: float) -> str:
    """`1:02:03`, or `2:03` under an hour."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
