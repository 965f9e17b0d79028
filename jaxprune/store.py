# SPDX-License-Identifier: Apache-2.0
"""Training states by step: `STORE/<step>/`, each complete, checked and replaceable."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from jaxprune import integrity, leaves, storage
from jaxprune.base import CheckpointError, PyTree

_FILE = "step.json"
_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class Store:
    """Training states of one stage by step, in `directory`: see `open_store`."""

    directory: Path
    keep_last: int | None = 2
    keep_best: str | None = None

    def steps(self) -> list[int]:
        """The complete steps, ascending; damage is only seen on restoring."""
        names = os.listdir(self.directory) if self.directory.is_dir() else []
        found = (re.fullmatch(r"(\d+)|\.(\d+)\.old", name) for name in names)
        return sorted({int(m[1] or m[2]) for m in found if m})

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return max(self.steps(), default=None)

    def meta(self, step: int) -> dict[str, Any]:
        """What `save` was given as `meta`, and 'step'. Raises CheckpointError."""
        return {**self._meta(step), "step": step}

    def save(
        self,
        step: int,
        tree: PyTree,
        meta: Mapping[str, Any] = _NOTHING,
        *,
        force: bool = False,
    ) -> None:
        """Write a step, then delete those that are no longer to be kept.

        tree: arrays, PRNG keys and numbers in any containers; meta: JSON. In a
        multi-host run every process calls it. A step that exists is replaced if
        `force`, or if it is damaged. Raises CheckpointError where it is neither, and
        for what can't be kept.
        """
        folder = self._folder(step)
        if step in self.steps() and not force and self._damage(step) is None:
            raise CheckpointError(f"{folder}: the step exists; pass force=True")
        records, arrays = leaves.describe(tree)
        text = storage.to_json({"leaves": records, "meta": dict(meta)}, "meta")
        storage.write(folder, arrays, {_FILE: text})
        if jax.process_index() == 0:
            self._clean()

    def restore(
        self, step: int | None, like: PyTree, *, fallback: bool = False
    ) -> tuple[PyTree, dict[str, Any]]:
        """A step's (tree, meta); meta['step'] tells which. None: the newest one.

        like: arrays or ShapeDtypeStructs (`jax.eval_shape`) in the containers that the
        tree had; they give structure and shardings, of any mesh or number of devices.
        With `fallback`, a damaged step gives way to the newest intact one before it.

        Raises CheckpointError that names the damaged file and the intact step before,
        or the leaf that does not fit `like`.
        """
        steps = [s for s in self.steps() if step is None or s <= step]
        if not steps or (step is not None and step not in steps):
            there = ", ".join(map(str, self.steps())) or "none"
            wanted = "no step" if step is None else f"no step {step}"
            raise CheckpointError(f"{self.directory}: {wanted}; there are: {there}")
        chosen, damage = steps[-1], self._damage(steps[-1])
        if damage is not None:
            intact = next((s for s in steps[-2::-1] if not self._damage(s)), None)
            if intact is None:
                raise CheckpointError(f"{damage}; no step before it is intact")
            if not fallback:
                raise CheckpointError(
                    f"{damage}; step {intact} is intact: restore it, or pass "
                    "fallback=True"
                ) from damage
            logging.getLogger(__name__).warning("%s; using step %d", damage, intact)
            chosen = intact
        folder = integrity.resolve(self._folder(chosen))
        record = storage.read_record(folder, _FILE, "meta", verified=True)
        tree = storage.read_like(folder, record["leaves"], like)
        return tree, {**record["meta"], "step": chosen}

    def _folder(self, step: int) -> Path:
        if (
            isinstance(step, bool)
            or not isinstance(step, (int, np.integer))
            or step < 0
        ):
            raise CheckpointError(f"step = {step!r} is no whole number from 0 on")
        return self.directory / str(step)

    def _meta(self, step: int, *, verified: bool = False) -> dict[str, Any]:
        folder = integrity.resolve(self._folder(step))
        return storage.read_record(folder, _FILE, "meta", verified=verified)["meta"]

    def _damage(self, step: int) -> CheckpointError | None:
        try:
            integrity.verify(integrity.resolve(self._folder(step)))
        except CheckpointError as error:
            return error
        return None

    def _clean(self) -> None:
        steps = self.steps()
        if self.keep_last is not None:
            stay = set(steps[-self.keep_last :]) | {self._best(steps)}
            for step in set(steps) - stay:
                integrity.remove(self._folder(step))
        for name in os.listdir(self.directory):
            match = re.fullmatch(r"\.(\d+)\.(partial|trash|old)", name)
            if match and (match[2] != "old" or (self.directory / match[1]).exists()):
                shutil.rmtree(self.directory / name, ignore_errors=True)

    def _best(self, steps: Sequence[int]) -> int | None:
        values = {}
        for step in steps if self.keep_best else ():
            try:
                # The numbers alone: whole steps would be read at every save.
                value = self._meta(step, verified=True).get(str(self.keep_best))
            except CheckpointError:
                continue
            if isinstance(value, (int, float)) and not math.isnan(value):
                values[step] = value
        return max(values, key=lambda s: (values[s], s), default=None)


def open_store(
    directory: str | Path, *, keep_last: int | None = 2, keep_best: str | None = None
) -> Store:
    """The checkpoints of one stage, in a folder that need not exist yet.

    keep_last: how many of the newest steps stay (None: all). keep_best: an entry of
    meta; the step where it is highest stays too. Raises CheckpointError.
    """
    directory = Path(os.path.abspath(directory))
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory} is a file; checkpoints need a folder")
    if keep_last is not None and keep_last < 1:
        raise CheckpointError(f"keep_last = {keep_last}: at least 1, or None for all")
    return Store(directory, keep_last, keep_best)
