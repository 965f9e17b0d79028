# SPDX-License-Identifier: Apache-2.0
"""One training from the first step to the last: resumable, and the same if resumed."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
import optax

from jaxprune import checkpoint, data
from jaxprune.base import Apply, DataError, PyTree
from jaxprune.train import step as steps
from jaxprune.train.config import Config, Fit
from jaxprune.train.metrics import measures
from jaxprune.train.progress import Progress


class NonFinite(FloatingPointError):
    """The loss is not a number any more."""


class Preempted(SystemExit):
    """SIGTERM: the state is saved, and the same command goes on from it."""


@dataclasses.dataclass(frozen=True)
class Splits:
    """The data of a run; `train` may be stored larger than the others."""

    train: data.Split
    val: data.Split
    test: data.Split


@dataclasses.dataclass(frozen=True)
class Job:
    """One training: who is trained, on what, and where it is kept.

    `stage` names its checkpoints and rows; `teacher` is (apply, variables) or None.
    """

    stage: str
    apply: Apply
    fit: Fit
    config: Config
    splits: Splits
    workdir: Path
    teacher: tuple[Apply, PyTree] | None = None
    proximal: optax.GradientTransformation | None = None

    @property
    def per_epoch(self) -> int:
        """Steps an epoch; the last, partial batch of the split goes to the next one."""
        return max(1, len(self.splits.train) // self.fit.batch)

    @property
    def total(self) -> int:
        return round(self.per_epoch * self.fit.epochs)


def train(job: Job, variables: PyTree, progress: Progress) -> PyTree:
    """Train from `variables`, or on from the newest checkpoint; the averaged variables.

    Saves every `save_every` epochs, at the end, and on SIGTERM (then exits with 143).
    Raises NonFinite that names the step and the last good checkpoint.
    """
    store = checkpoint.open_store(job.workdir / "checkpoints" / job.stage)
    tx, rate = steps.optimizer(job.fit, job.total, job.proximal)
    mesh = steps.make_mesh()
    whole = steps.replicated(mesh)
    state = jax.device_put(steps.init_state(variables, tx), whole)
    if store.latest() is not None:
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        state, meta = store.restore(None, like, fallback=True)
        if meta["step"] < job.total:
            progress.note(f"{job.stage}: resumed at step {meta['step']} of {job.total}")
    start = int(state.step)
    progress.rewind(job.stage, start)
    if start < job.total:
        with _terminated() as asked, mesh_context(mesh):
            state = _run(job, tx, rate, mesh, store, state, start, progress, asked)
    return jax.tree.map(np.asarray, state.average)


def _run(
    job: Job,
    tx: optax.GradientTransformation,
    rate: optax.Schedule,
    mesh: jax.sharding.Mesh,
    store: checkpoint.Store,
    state: steps.State,
    start: int,
    progress: Progress,
    asked: list[int],
) -> steps.State:
    step, evaluate = _functions(job, tx)
    teacher = None
    if job.teacher is not None and job.config.distill.weight:
        teacher = jax.device_put(job.teacher[1], steps.replicated(mesh))
    batches = _batches(job, start)
    key = jax.random.key(job.config.seed)
    progress.start(job.stage, start, job.total, job.per_epoch, job.fit.batch)
    compiled = time.perf_counter()
    loss = None
    for number in range(start, job.total):
        batch = steps.put_batch(mesh, next(batches))
        state, new = step(state, batch, teacher, key)
        if number == start:
            jax.block_until_ready(new)
            progress.compiled(time.perf_counter() - compiled)
        # The loss is read one step late, so that the device never waits for the host.
        if loss is not None:
            _check(float(loss), number - 1, job, store, state)
            progress.step(number, float(loss))
        loss = new
        done = number + 1
        epoch, last = done / job.per_epoch, done == job.total
        if last or done % every(job, job.config.evaluate.every) == 0:
            _check(float(loss), number, job, store, state)
            matrix = confusion_of(
                evaluate, state.average, job.splits.val, job.fit, mesh
            )
            row = {"epoch": epoch, "loss": float(loss), "lr": float(rate(number))}
            progress.evaluated(job.stage, done, {**row, **measures(matrix)})
        if asked or last or done % every(job, job.config.save_every) == 0:
            store.save(done, state, {"epoch": epoch}, force=True)
        if asked:
            progress.note(f"{job.stage}: saved step {done}; the same command resumes")
            raise Preempted(143)
    return state


def every(job: Job, epochs: float) -> int:
    """So many epochs as steps, at least one."""
    return max(1, round(epochs * job.per_epoch))


def _functions(job: Job, tx: optax.GradientTransformation) -> tuple[Any, Any]:
    ignore = job.splits.train.classes.ignore
    power = job.fit.class_weights
    target = steps.Target(ignore, data.class_weights(job.splits.train, power))
    step = steps.make_step(
        job.apply,
        tx,
        target,
        average=job.fit.ema,
        smoothing=job.fit.label_smoothing,
        distill=job.config.distill,
        teacher=job.teacher[0] if job.teacher else None,
    )
    evaluate = steps.make_evaluate(job.apply, ignore)
    return jax.jit(step, donate_argnums=0), jax.jit(evaluate)


def _batches(job: Job, start: int) -> Iterator[Any]:
    config, count = job.config, jax.process_count()
    if job.fit.batch % jax.device_count():
        raise DataError(
            f"{job.stage}: a batch of {job.fit.batch} does not divide over "
            f"{jax.device_count()} devices"
        )
    how = dataclasses.replace(config.data.augment, crop=config.data.size)
    return data.batches(
        job.splits.train,
        batch=job.fit.batch,
        seed=config.seed,
        augment=how,
        start=start,
        process=(jax.process_index(), count),
    )


def confusion_of(
    evaluate: Any, variables: PyTree, split: data.Split, fit: Fit, mesh: Any
) -> np.ndarray:
    """int64[K, K] over a whole split."""
    classes = len(split.classes)
    matrix = np.zeros((classes, classes), np.int64)
    batch_size = -(-fit.batch // jax.device_count()) * jax.device_count()
    pending = None
    for batch in data.eval_batches(split, batch_size):
        new = evaluate(variables, steps.put_batch(mesh, _own_rows(batch)))
        if pending is not None:
            matrix += np.asarray(pending)
        pending = new
    return matrix if pending is None else matrix + np.asarray(pending)


def _own_rows(batch: Any) -> Any:
    """This process's rows of a batch that every process reads whole."""
    count, index = jax.process_count(), jax.process_index()
    if count == 1:
        return batch
    return jax.tree.map(lambda x: np.split(x, count)[index], batch)


def _check(loss: float, number: int, job: Job, store: Any, state: steps.State) -> None:
    if np.isfinite(loss):
        return
    norms = {
        "/".join(str(getattr(k, "key", k)) for k in path): float(np.linalg.norm(x))
        for path, x in jax.tree_util.tree_leaves_with_path(state.variables["params"])
    }
    largest = max(norms, key=lambda k: (not np.isfinite(norms[k]), norms[k]))
    good = store.latest()
    saved = "no checkpoint yet" if good is None else f"the last good one is {good}"
    raise NonFinite(
        f"{job.stage}: the loss is {loss} at step {number} ({saved}); the largest norm "
        f"is {largest}'s. Lower {job.stage}.lr, or look at the data"
    )


def mesh_context(mesh: jax.sharding.Mesh) -> Any:
    """The mesh as the ambient one."""
    return jax.set_mesh(mesh)


@contextlib.contextmanager
def _terminated() -> Iterator[list[int]]:
    """A list that SIGTERM fills, so that the loop stops between two steps."""
    asked: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    try:
        before = signal.signal(signal.SIGTERM, handler)
    except ValueError:  # not the main thread
        yield asked
        return
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)
