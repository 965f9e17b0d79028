# SPDX-License-Identifier: Apache-2.0
"""The training step, one function of (state, batch), over a mesh of devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune.base import Apply, PyTree
from jaxprune.train import layout as layouts
from jaxprune.train.config import Distill, Fit, Scale
from jaxprune.train.layout import Layout
from jaxprune.train.metrics import counts


class State(NamedTuple):
    """What training changes: step int32[], variables, their average, the optimiser."""

    step: Any
    variables: PyTree
    average: PyTree
    opt_state: PyTree


class Target(NamedTuple):
    """What is learnt: the label that does not count, float32[K] class weights."""

    ignore: int
    weights: np.ndarray


Around = Callable[[optax.GradientTransformation], optax.GradientTransformation]


def optimizer(
    fit: Fit, steps: int, around: Around | None = None
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optax chain of a Fit over so many steps, and its learning rate by step.

    around: what makes the whole transformation of that chain, such as a proximal step
    behind it.
    """
    warm = round(fit.warmup / fit.epochs * steps) if fit.epochs else 0
    if fit.schedule == "cosine":
        # A training that is all warm-up ends before the first step of the fall.
        rate = optax.warmup_cosine_decay_schedule(
            0.0 if warm else fit.lr, fit.lr, warm, max(steps, warm + 1)
        )
    else:
        rate = optax.linear_schedule(0.0 if warm else fit.lr, fit.lr, max(warm, 1))
    decay = optax.add_decayed_weights(fit.weight_decay, mask=_kernels)
    clip = [optax.clip_by_global_norm(fit.clip)] if fit.clip else []
    if fit.optimizer == "adam":
        # Decoupled decay, as in AdamW (Loshchilov & Hutter, 2019).
        parts = [*clip, optax.scale_by_adam(), decay]
    elif fit.optimizer == "muon":
        parts = [*clip, _muon(fit.weight_decay), optax.scale(-1.0)]
    else:
        parts = [*clip, decay, optax.trace(fit.momentum)]
    tx = optax.chain(*parts, optax.scale_by_learning_rate(rate))
    return around(tx) if around else tx, rate


def momentum_gain(fit: Fit) -> float:
    """How far a gradient moves the weights in the end, over the learning rate.

    Steps of a penalty are as long, see `sparsity.proximal`.
    """
    return 1 / (1 - fit.momentum) if fit.optimizer == "sgd" else 1.0


def _muon(decay: float) -> optax.GradientTransformation:
    """Muon (Jordan, 2024) of kernels, each a matrix [all that is read, written].

    Updates have the root mean square of Adam's (Liu et al., 2025, eq. 4, with 1 for
    0.2), and Adam takes what is no kernel: one rate serves both.
    """
    matrix = optax.contrib.MuonDimensionNumbers

    def matrices(params: PyTree) -> PyTree:
        def of(p: Any) -> Any:
            last = p.ndim - 1
            return matrix(tuple(range(last)), (last,)) if last > 0 else None

        return jax.tree.map(of, params)

    return optax.contrib.muon(
        1.0,
        weight_decay=decay,
        muon_weight_dimension_numbers=matrices,
        consistent_rms=1.0,
    )


def _kernels(params: PyTree) -> PyTree:
    return jax.tree.map(lambda p: p.ndim > 1, params)


def init_state(
    variables: PyTree, tx: optax.GradientTransformation, carried: PyTree = None
) -> State:
    """The state before the first step.

    carried: the optimiser state of an earlier chain, whose moments go on; schedules
    start anew.
    """
    variables = jax.tree.map(jnp.array, variables)
    opt_state = tx.init(variables["params"])
    if carried is not None:
        # A chain's states are named tuples in plain ones, however nested.
        old = {type(part): part for part in jax.tree.leaves(carried, is_leaf=_named)}
        old.pop(optax.ScaleByScheduleState, None)
        opt_state = jax.tree.map(
            lambda part: old.get(type(part), part) if _named(part) else part,
            opt_state,
            is_leaf=_named,
        )
    average = jax.tree.map(jnp.array, variables)
    return State(jnp.zeros((), jnp.int32), variables, average, opt_state)


def _named(part: Any) -> bool:
    return isinstance(part, tuple) and hasattr(part, "_fields")


def scaled(images: Any) -> Any:
    """uint8 images as float32 in [0, 1]."""
    return images.astype(jnp.float32) / 255


def pixel_weights(labels: Any, target: Target) -> Any:
    """What each pixel counts: its class's weight, 0 where it has no label."""
    counted = labels != target.ignore
    safe = jnp.where(counted, labels, 0)
    return jnp.where(counted, jnp.asarray(target.weights)[safe], 0.0)


def cross_entropy(
    logits: Any, labels: Any, target: Target, smoothing: float = 0, total: Any = None
) -> Any:
    """Class-weighted cross entropy, the weighted mean over the labelled pixels.

    smoothing: the share of the target spread over all classes (Szegedy et al., 2016).
    total: the sum of the weights of the batch that these pixels are a part of, so that
    the parts' losses add up to the batch's; by default their own.
    """
    safe = jnp.where(labels != target.ignore, labels, 0)
    weight = pixel_weights(labels, target)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, safe)
    if smoothing:
        flat = -jnp.mean(jax.nn.log_softmax(logits), axis=-1)
        losses = (1 - smoothing) * losses + smoothing * flat
    total = jnp.sum(weight) if total is None else total
    return jnp.sum(weight * losses) / jnp.maximum(total, 1e-6)


def soft_jaccard(logits: Any, labels: Any, target: Target) -> Any:
    """One minus the mean IoU of the probabilities, over the classes that the batch has.

    Intersection and union are sums over all labelled pixels of the batch, of p y and of
    p + y - p y (Rahman & Wang, "Optimizing intersection-over-union in deep neural
    networks", 2016, eq. 5).
    """
    counted = (labels != target.ignore)[..., None]
    truth = jax.nn.one_hot(labels, logits.shape[-1]) * counted
    given = jax.nn.softmax(logits) * counted
    pixels = tuple(range(labels.ndim))
    both, present = jnp.sum(given * truth, pixels), jnp.sum(truth, pixels)
    union = jnp.sum(given, pixels) + present - both
    ious = jnp.where(present > 0, both / jnp.maximum(union, 1e-6), 0.0)
    return 1 - jnp.sum(ious) / jnp.maximum(jnp.sum(present > 0), 1)


def distillation(logits: Any, teacher: Any, temperature: float) -> Any:
    """KL divergence of the softened outputs, times T^2 (Hinton et al., 2015)."""
    wanted = jax.nn.softmax(teacher / temperature)
    given = jax.nn.log_softmax(logits / temperature)
    entropy = jnp.sum(jax.scipy.special.xlogy(wanted, wanted), axis=-1)
    return temperature**2 * jnp.mean(entropy - jnp.sum(wanted * given, axis=-1))


def make_step(
    apply: Apply,
    tx: optax.GradientTransformation,
    target: Target,
    *,
    average: float = 0.0,
    smoothing: float = 0.0,
    jaccard: float = 0.0,
    distill: Distill | None = None,
    teacher: Apply | None = None,
    accumulate: int = 1,
    layout: Layout | None = None,
) -> Callable[[State, Any, PyTree, Any], tuple[State, Any]]:
    """step(state, batch, teacher_variables, key) -> (state, loss), to be jitted.

    batch: image uint8[B, H, W, 3] and label int[B, H, W]. teacher_variables: of the
    dense network, or None. The key serves dropout, and is folded with the step. Where
    the loss or its gradient is not finite, the state stays as it is, the loss is NaN.
    accumulate: parts of a batch, one after the other, see `config.Scale`. layout: how
    the state lies over a mesh, if it does.
    """
    distill = distill or Distill()

    def step(
        state: State, batch: Any, teacher_variables: PyTree, key: Any
    ) -> tuple[State, Any]:
        own = {k: v for k, v in state.variables.items() if k != "params"}
        used = layouts.whole(layout, state.variables)
        rest = {k: v for k, v in used.items() if k != "params"}
        taught = layouts.whole(layout, teacher_variables)
        key = jax.random.fold_in(key, state.step)

        def loss_of(params: PyTree, rest: PyTree, part: Any, key: Any, total: Any):
            images = scaled(part["image"])
            logits, updated = apply(
                {"params": params, **rest},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": key},
            )
            labels = part["label"]
            loss = cross_entropy(logits, labels, target, smoothing, total)
            if jaccard:
                overlap = soft_jaccard(logits, labels, target)
                loss = loss + jaccard * overlap / accumulate
            if teacher is not None and distill.weight:
                wanted = teacher(taught, images, train=False)
                kl = distillation(logits, wanted, distill.temperature) / accumulate
                loss = (1 - distill.weight) * loss + distill.weight * kl
            return loss, updated

        gradient = jax.value_and_grad(loss_of, has_aux=True)
        if accumulate == 1:
            found, grads = gradient(used["params"], rest, batch, key, None)
            loss, updated = found
        else:
            total = jnp.sum(pixel_weights(batch["label"], target))

            def of(rest: PyTree, part: Any, number: Any) -> tuple[Any, PyTree]:
                own = jax.random.fold_in(key, number)
                found, grads = gradient(used["params"], rest, part, own, total)
                return found, layouts.split(layout, grads)

            parts = layouts.parts(layout, batch, accumulate)
            (loss, updated), grads = accumulated(of, rest, parts)
        params = state.variables["params"]
        grads, updated = layouts.split(layout, (grads, updated))
        updates, opt_state = tx.update(grads, state.opt_state, params)
        params = optax.apply_updates(params, updates)
        variables = {"params": params, **own, **updated}
        # The average trusts early weights less: its decay rises with the steps.
        decay = jnp.minimum(average, (1.0 + state.step) / (10.0 + state.step))
        averaged = jax.tree.map(
            lambda a, v: decay * a + (1 - decay) * v, state.average, variables
        )
        fine = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads))
        after = State(state.step + 1, variables, averaged, opt_state)
        # So that what led there can still be looked at.
        after = jax.tree.map(lambda a, b: jnp.where(fine, a, b), after, state)
        return after, jnp.where(fine, loss, jnp.nan)

    return step


def accumulated(
    gradient: Callable[[PyTree, Any, Any], tuple[Any, PyTree]],
    rest: PyTree,
    parts: PyTree,
) -> tuple[Any, PyTree]:
    """((sum of losses, rest), sum of gradients) over the first axis of `parts`.

    gradient(rest, part, number) -> ((loss, what it updates of rest), gradients): each
    part sees what the ones before it have updated, the batch statistics.
    """
    first = jax.tree.map(lambda x: x[0], parts)
    (loss, _), grads = jax.eval_shape(gradient, rest, first, 0)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (loss, grads))

    def add(carry: Any, part: Any) -> tuple[Any, None]:
        (loss, grads), rest = carry
        (more, updated), gained = gradient(rest, *part)
        sums = loss + more, jax.tree.map(jnp.add, grads, gained)
        return (sums, {**rest, **updated}), None

    count = jax.tree.leaves(parts)[0].shape[0]
    ((loss, grads), rest), _ = jax.lax.scan(
        add, (zeros, rest), (parts, jnp.arange(count))
    )
    return (loss, rest), grads


def make_evaluate(
    apply: Apply, ignore: int, layout: Layout | None = None
) -> Callable[[PyTree, Any], Any]:
    """evaluate(variables, batch) -> its Counts, on every device; to be jitted."""

    def evaluate(variables: PyTree, batch: Any) -> Any:
        variables = layouts.whole(layout, variables)
        logits = apply(variables, scaled(batch["image"]), train=False)
        found = counts(logits, batch["label"], ignore)
        return jax.lax.with_sharding_constraint(found, replicated(make_mesh()))

    return evaluate


# Devices. Batches are sharded over the mesh, the state as `layout` says; XLA adds the
# one reduction of gradients (and of batch statistics) by itself.


def layout_of(scale: Scale) -> Layout:
    """The layout of a run over all devices."""
    return Layout(make_mesh(), scale.shard)


def begin(
    layout: Layout,
    variables: PyTree,
    tx: optax.GradientTransformation,
    carried: PyTree = None,
) -> State:
    """`init_state` in the layout; with 'fsdp' made in shares from the start."""
    if layout.shard == "none":
        first = init_state(variables, tx, carried)
        # A copy: the step takes over the memory of what it is given.
        return layouts.put(layout, jax.tree.map(jnp.array, first))

    def made(variables: PyTree, carried: PyTree) -> State:
        return jax.tree.map(jnp.copy, init_state(variables, tx, carried))

    given = variables, carried
    places = layouts.shardings(layout, jax.eval_shape(made, *given))
    return jax.jit(made, out_shardings=places)(*layouts.put(layout, given))


def make_mesh() -> jax.sharding.Mesh:
    """All devices in one axis, 'data'."""
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=auto)


def replicated(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    """The same array on every device."""
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def put_batch(mesh: jax.sharding.Mesh, batch: Any) -> Any:
    """This process's rows of a global batch as global arrays."""
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch
    )
