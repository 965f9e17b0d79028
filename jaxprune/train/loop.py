# SPDX-License-Identifier: Apache-2.0
"""One training from the first step to the last: resumable, and the same if resumed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune import checkpoint, data, formats, integrity, peers
from jaxprune.base import Apply, CheckpointError, NonFinite, PyTree, path_str
from jaxprune.graph_io import graph_from_json
from jaxprune.sharded import fetched
from jaxprune.train import layout as layouts
from jaxprune.train import step as steps
from jaxprune.train.config import Config, Fit
from jaxprune.train.layout import Layout
from jaxprune.train.metrics import Counts, measures
from jaxprune.train.progress import Progress
from jaxprune.train.stopping import Stop, stoppable


@dataclasses.dataclass(frozen=True)
class Splits:
    """The data of a run; `train` may be stored larger than the others."""

    train: data.Split
    val: data.Split
    test: data.Split


@dataclasses.dataclass(frozen=True)
class Job:
    """One training: who is trained, on what, and where it is kept.

    `stage` names its checkpoints and rows; `teacher` is (apply, variables) or None;
    `carried` the optimiser state that it goes on from, or None. `around` makes the
    whole optimiser of the fit's. `begun`: the state at which it goes on in another
    shape, at the step that it tells, and `until` the step where it ends; schedules are
    those of the whole training.
    """

    stage: str
    apply: Apply
    fit: Fit
    config: Config
    splits: Splits
    workdir: Path
    teacher: tuple[Apply, PyTree] | None = None
    around: steps.Around | None = None
    carried: PyTree = None
    begun: steps.State | None = None
    until: int | None = None

    @property
    def per_epoch(self) -> int:
        """Steps an epoch; the last, partial batch of the split goes to the next one."""
        return steps_of(self.fit, len(self.splits.train))[0]

    @property
    def total(self) -> int:
        """Steps in all."""
        return steps_of(self.fit, len(self.splits.train))[1]

    @property
    def end(self) -> int:
        """The last step of this training."""
        return self.total if self.until is None else self.until


def steps_of(fit: Fit, images: int) -> tuple[int, int]:
    """(steps an epoch, steps in all) of a training on so many images."""
    per_epoch = max(1, images // fit.batch)
    return per_epoch, round(per_epoch * fit.epochs)


class SoFar(NamedTuple):
    """What a save holds beside the state.

    losses: of the steps of this epoch. skipped: each time, the step that was gone back
    to, and the one that was not finite.
    """

    losses: list[float]
    skipped: list[tuple[int, int]]

    @property
    def passed_over(self) -> int:
        """Batches that made no step of those that stay."""
        return sum(bad - good for good, bad in self.skipped)


def train(job: Job, variables: PyTree, progress: Progress) -> steps.State:
    """Train from `variables`, or on from the newest checkpoint; the state.

    In NumPy, but for what lies in shares over the devices, which stays there. Saves
    every `save_every` epochs, at the end, and on SIGTERM or Ctrl-C (then exits); where
    there are several processes, on a SIGTERM to any of them.
    Raises NonFinite that names the step and the last good checkpoint, where the fit
    does not say to skip what led there.
    """
    # With steps to go back to, the last regular save stays beside two on signals.
    keep = 3 if job.fit.on_nan == "skip" else 2
    folder = job.workdir / "checkpoints" / job.stage
    store = checkpoint.open_store(folder, keep_last=keep)
    tx, rate = steps.optimizer(job.fit, job.total, job.around)
    layout = steps.layout_of(job.config.scale)

    def fresh() -> steps.State:
        return _fresh(job, layout, variables, tx)

    state, so_far = fresh(), SoFar([], [])
    if store.latest() is not None:
        state, so_far = _restore(store, state)
        done = int(state.step) >= job.end
        what = "done already," if done else "resumed at"
        progress.note(f"{job.stage}: {what} step {state.step} of {job.end}")
    start = int(state.step)
    progress.rewind(job.stage, start)
    if store.latest() is None and job.end == 0:
        _save(store, job, state, so_far)  # for `finished`
    if start < job.end:
        with stoppable() as stop, jax.set_mesh(layout.mesh):
            while int(state.step) < job.end:
                try:
                    state = _run(job, tx, rate, store, state, so_far, progress, stop)
                except NonFinite as error:
                    state, so_far = _back(job, store, fresh, so_far, error, progress)
                finally:
                    progress.finish()
    return layouts.settled(state)


def _fresh(
    job: Job, layout: Layout, variables: PyTree, tx: optax.GradientTransformation
) -> steps.State:
    """The state that the training begins with."""
    if job.begun is None:
        return steps.begin(layout, variables, tx, job.carried)
    # A copy: the step takes over the memory of what it is given.
    return layouts.owned(layout, job.begun)


def _back(
    job: Job,
    store: checkpoint.Store,
    fresh: Callable[[], steps.State],
    so_far: SoFar,
    error: NonFinite,
    progress: Progress,
) -> tuple[steps.State, SoFar]:
    """The last regular save before a step that was not finite, to go on behind it.

    Regular, since saves on a signal must change nothing.
    """
    if job.fit.on_nan == "stop" or len(so_far.skipped) >= job.fit.rollbacks:
        raise error
    regular = [s for s in store.steps() if s % every(job, job.config.save_every) == 0]
    state, there = fresh(), SoFar([], [])
    if regular:
        state, there = _restore(store, state, regular[-1])
    good = int(state.step)
    progress.rewind(job.stage, good)
    progress.note(
        f"{job.stage}: not finite at step {error.step}; back at step {good}, the "
        "batches between are passed over "
        f"({len(so_far.skipped) + 1} of {job.fit.rollbacks} times)"
    )
    return state, SoFar(there.losses, [*so_far.skipped, (good, error.step)])


def ended(job: Job) -> bool:
    """Whether the training has been saved at its last step."""
    store = checkpoint.open_store(job.workdir / "checkpoints" / job.stage)
    return store.latest() == job.end


def finished(job: Job, variables: PyTree) -> steps.State:
    """The state that `train(job, variables, ...)` ended with, as it returns it.

    Of `variables` the shapes count. Raises CheckpointError where it has not ended.
    """
    store = checkpoint.open_store(job.workdir / "checkpoints" / job.stage)
    done = store.latest()
    if done is None or done < job.end:
        raise CheckpointError(
            f"{job.workdir}: the stage {job.stage!r} has not ended (step {done or 0} "
            f"of {job.end}); repeat 'jaxprune run' with this --workdir"
        )
    tx, _ = steps.optimizer(job.fit, job.total, job.around)
    layout = steps.layout_of(job.config.scale)
    state, _ = _restore(store, _fresh(job, layout, variables, tx))
    return layouts.settled(state)


def _restore(
    store: checkpoint.Store, state: Any, step: int | None = None
) -> tuple[steps.State, SoFar]:
    """A step, by default the newest, in the shardings of `state`."""
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    try:
        state, meta = store.restore(step, like)
    except CheckpointError as error:
        folder = store.directory / str(store.latest() if step is None else step)
        older = [s for s in store.steps() if s < int(folder.name)]
        out = "go on from the step before" if older else "begin this stage anew"
        damage = str(error).partition(f"; {integrity.WAY_OUT}")[0]
        raise CheckpointError(f"{damage}. To {out}, delete {folder}") from error
    skipped = [(int(a), int(b)) for a, b in meta.get("skipped", [])]
    return state, SoFar(list(meta.get("losses", [])), skipped)


def _save(store: checkpoint.Store, job: Job, state: steps.State, so_far: SoFar) -> None:
    done = int(state.step)
    meta: dict[str, Any] = {"losses": so_far.losses}
    if so_far.skipped:
        meta["skipped"] = so_far.skipped
    store.save(done, state, meta, force=True)
    if job.fit.on_nan == "skip" and jax.process_index() == 0:
        for step in store.steps():
            if step < done and step % every(job, job.config.save_every):
                integrity.remove(store.directory / str(step))


def _run(
    job: Job,
    tx: optax.GradientTransformation,
    rate: optax.Schedule,
    store: checkpoint.Store,
    state: steps.State,
    so_far: SoFar,
    progress: Progress,
    stop: Stop,
) -> steps.State:
    """The loop."""
    layout = steps.layout_of(job.config.scale)
    step, evaluate = _functions(job, tx, layout, state)
    losses = so_far.losses
    teacher = None
    if job.teacher is not None and job.config.distill.weight:
        teacher = layouts.put(layout, job.teacher[1])
    start = int(state.step)
    batches = _batches(job, start + so_far.passed_over)
    key = jax.random.key(job.config.seed)
    progress.start(job.stage, start, job.end, job.per_epoch, job.fit.batch)
    began = time.perf_counter()
    pending: Any = None

    def settle() -> None:
        """Read the loss of the step before: the device works on the next meanwhile."""
        nonlocal pending
        if pending is None:
            return
        done, loss = pending[0], float(pending[1])
        pending = None
        if not np.isfinite(loss):
            raise _non_finite(job, done, store, state)
        losses.append(loss)
        progress.step(done, loss)
        if done % job.per_epoch == 0 or done == job.end:
            row = {"loss": float(np.mean(losses)), "lr": float(rate(done - 1))}
            if so_far.skipped:
                row["skipped"] = so_far.passed_over
            progress.row("train", done, row)
            losses.clear()

    for done in range(start + 1, job.end + 1):
        batch = steps.put_batch(layout.mesh, next(batches))
        state, loss = step(state, batch, teacher, key)
        if done == start + 1:
            jax.block_until_ready(loss)
            progress.compiled(time.perf_counter() - began)
        settle()
        pending = done, loss
        last, stopping = done == job.end, stop.asked()
        judged = last or done % every(job, job.config.evaluate.every) == 0
        regular = last or done % every(job, job.config.save_every) == 0
        saved = stopping or regular
        if judged or saved:
            settle()  # while there is a limit to waiting for it
        # Of saves on a signal, where to go back to would depend on the signal.
        if regular or (saved and job.fit.on_nan == "stop"):
            _check_finite(job, done, store, state)
        stop.rest()
        if judged:
            val = job.splits.val
            found = counts_of(evaluate, state.average, val, job.fit.batch)
            progress.row("val", done, measures(found.confusion))
        if saved:
            _save(store, job, state, so_far)
        if stopping:
            _leave(job, done, progress, stop)
        stop.resume()
    if stop.signals:  # while the last step was judged and saved
        _leave(job, job.end, progress, stop)
    return state


def _leave(job: Job, done: int, progress: Progress, stop: Stop) -> None:
    progress.note(f"{job.stage}: saved step {done}; the same command resumes")
    stop.leave()


def every(job: Job, epochs: float) -> int:
    """So many epochs as steps, at least one."""
    return max(1, round(epochs * job.per_epoch))


def _functions(
    job: Job, tx: optax.GradientTransformation, layout: Layout, state: steps.State
) -> tuple[Any, Any]:
    """The jitted training step and evaluation."""
    ignore = job.splits.train.classes.ignore
    power = job.fit.class_weights
    target = steps.Target(ignore, data.class_weights(job.splits.train, power))
    step = steps.make_step(
        job.apply,
        tx,
        target,
        average=job.fit.ema,
        smoothing=job.fit.label_smoothing,
        jaccard=job.fit.jaccard,
        distill=job.config.distill,
        teacher=job.teacher[0] if job.teacher else None,
        accumulate=job.config.scale.accumulate,
        layout=layout,
    )
    evaluate = steps.make_evaluate(job.apply, ignore, layout)
    places = layouts.shardings(layout, state), steps.replicated(layout.mesh)
    return jax.jit(step, donate_argnums=0, out_shardings=places), jax.jit(evaluate)


def _batches(job: Job, start: int) -> Iterator[Any]:
    config = job.config
    how = config.data.augment.times(job.fit.augment)
    return data.batches(
        job.splits.train,
        batch=job.fit.batch,
        seed=config.seed,
        augment=dataclasses.replace(how, crop=config.data.size),
        start=start,
        process=(jax.process_index(), jax.process_count()),
    )


def counts_of(
    evaluate: Any, variables: PyTree, split: data.Split, batch: int
) -> Counts:
    """int64 Counts of a whole split, `batch` images at a time (or a few more)."""
    mesh, classes = steps.make_mesh(), len(split.classes)
    matrix = np.zeros((classes, classes), np.int64)
    images = [np.zeros((0, 3, classes), np.int64)]
    batch = -(-batch // jax.device_count()) * jax.device_count()

    def take(found: Counts) -> None:
        nonlocal matrix
        matrix = matrix + np.asarray(found.confusion)
        images.append(np.asarray(found.images, np.int64))

    pending = None
    with peers.watched(one := "batch of an evaluation") as beat:
        for whole in data.eval_batches(split, batch):
            new = evaluate(variables, steps.put_batch(mesh, _own_rows(whole)))
            if pending is not None:
                take(pending)
            pending = new
            beat(one)
        if pending is not None:
            take(pending)
    return Counts(matrix, np.concatenate(images))


def _own_rows(batch: Any) -> Any:
    """This process's rows of a batch that every process reads whole."""
    count, index = jax.process_count(), jax.process_index()
    if count == 1:
        return batch
    return jax.tree.map(lambda x: np.split(x, count)[index], batch)


def _check_finite(job: Job, step: int, store: checkpoint.Store, state: Any) -> None:
    """Raise NonFinite for variables or averages that aren't finite, before a save.

    A step's loss and gradient can be finite, and the statistics of its batch not.
    """
    found = jax.device_get(_finite((state.variables, state.average)))
    for path, fine in jax.tree_util.tree_leaves_with_path(found):
        if not fine:
            raise _non_finite(job, step, store, state, _joined(path[1:]))


@jax.jit
def _finite(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jnp.isfinite(x).all(), tree)


def _joined(path: Sequence[Any]) -> str:
    return "/".join(str(getattr(k, "key", k)) for k in path)


def _non_finite(
    job: Job,
    step: int,
    store: checkpoint.Store,
    state: Any,
    what: str = "the loss or its gradient",
) -> NonFinite:
    norms = {
        _joined(path): float(np.linalg.norm(fetched(x).astype(np.float64)))
        for path, x in jax.tree_util.tree_leaves_with_path(state.variables["params"])
    }
    largest = max(norms, key=lambda k: (not np.isfinite(norms[k]), norms[k]))
    good = store.latest()
    saved = "there is no checkpoint yet" if good is None else f"step {good} is saved"
    skip = ", or on_nan = 'skip'" if job.fit.on_nan == "stop" else ""
    error = NonFinite(
        f"{job.stage}: {what} is not finite at step {step} "
        f"({saved}); the parameter with the largest norm is {largest}"
        f"{_whose(job, largest)}, {norms[largest]:.4g}. Start anew with a lower "
        f"learning rate (lr), or clip{skip}"
    )
    error.step = step
    return error


def _whose(job: Job, parameter: str) -> str:
    """The groups whose channels a parameter holds, where the graph can be read."""
    try:
        text = formats.read_text(job.workdir / "graph.json")
        groups = graph_from_json(text).groups.values()
    except (OSError, ValueError):  # what is told here is the loss, not the file
        return ""
    path = f"params/{parameter}"
    names = [g.name for g in groups if any(path_str(s.path) == path for s in g.slots)]
    return f" (of the group {', '.join(names)})" if names else ""
