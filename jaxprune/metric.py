# SPDX-License-Identifier: Apache-2.0
"""The proximal step in the metric of an optimiser whose steps differ by coordinate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune import sparsity, steering, trees
from jaxprune.base import BOTH, ConfigError, Graph, Leaf, PyTree, Role
from jaxprune.matching import (
    Cuts,
    aligned,
    axis_values,
    dense_shape,
    map_leaves,
    trained_axes,
)
from jaxprune.measures import square
from jaxprune.pricing import Weights, resolved
from jaxprune.sparsity import Blocks
from jaxprune.steering import Strength

_NEWTON = 12


def preconditioned(
    tx: optax.GradientTransformation,
    graph: Graph,
    strength: Strength,
    weights: Weights | None = None,
    *,
    steps: Callable[[PyTree, PyTree], PyTree],
    roles: tuple[Role, ...] = BOTH,
    blocks: Blocks | None = None,
) -> optax.GradientTransformation:
    """The optimiser `tx`, then the group lasso's proximal operator in its own metric.

    An optimiser that moves coordinate i by lr d[i] times the (averaged) gradient, such
    as Adam with d = 1 / (sqrt(nu^) + eps), minimises a model of the loss whose metric
    is P = diag(1 / (lr d)). Its proximal step is, for each channel, with t = s w d and
    s = lr * lambda,

        x = argmin (x - v)^T P (x - v) / 2 + lambda w ||x||
        x[i] = v[i] r / (r + t[i]),    r = ||x||

    where r > 0 solves sum_i (v[i] / (r + t[i]))^2 = 1, and x = 0 where there is no such
    r: where ||v / t|| <= 1. 1 / ||v / (r + t)|| is concave in r, so that Newton's
    method from a lower bound rises to the root without overshoot (Conn et al., "Trust
    region methods", 2000); 12 iterations, of elementwise operations. With
    d = 1 this is `proximal`. Where `tx` rests, lambda * group_lasso and the loss
    balance, which `proximal` behind Adam does not give. Entries that the loss does not
    move have large d, and go first.

    Blocks that overlap, a kernel between two groups, take one step by factors, as in
    `proximal`: r is solved for each block at v, and an entry is multiplied by the
    factors r / (r + t[i]) of both. Dead channels are exactly 0; a group is not emptied.

    Args:
      tx: the whole optimiser, learning rate included.
      strength: lr * lambda as for `proximal`, of the same lr that `tx` ends with.
      steps: (state of tx after its update, params) -> d, a tree like the params, of
        positive numbers; `adam_steps()`, or one's own.
      weights, roles, blocks: as for `proximal`.

    The state is (state of tx, state of the proximal step). Raises what `proximal` does.
    """
    sparsity.checked(graph, strength, weights, roles, blocks)
    whole = sparsity.united(graph, blocks)
    together = {names[0] for names in (blocks or {}).values()}
    tx = optax.with_extra_args_support(tx)

    def update(
        updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, Any]:
        if params is None:
            raise ConfigError(
                "preconditioned needs the params: tx.update(updates, state, params)"
            )
        updates, inner = tx.update(updates, state[0], params, **extra)
        arrived = jax.tree.map(lambda p, u: p + u, params, updates)
        each = steering.checked_steps(steps(inner, params))
        own = resolved(
            graph, weights, roles, lambda: sparsity.live(graph, params, roles=roles)
        )
        paid = sparsity.of_blocks(graph, own, blocks)
        units = _units(whole, arrived, each, paid, roles)
        deaths = {n: unit.death for n, unit in units.items()}
        s, outer = steering.stepped(
            strength, state[1], lambda: sparsity.of_channels(graph, deaths, blocks)
        )
        lines = {n: _line(u, s, last=n not in together) for n, u in units.items()}
        scaled = _scaled(whole, lines, arrived, each, roles)
        updates = sparsity.difference(scaled, arrived, updates, params)
        return updates, (inner, outer)

    def init(params: PyTree) -> Any:
        return tx.init(params), steering.begun(strength)

    return optax.GradientTransformationExtraArgs(init, update)


def adam_steps(
    b2: float = 0.999, eps: float = 1e-8
) -> Callable[[PyTree, PyTree], PyTree]:
    """d = 1 / (sqrt(nu^) + eps) of the Adam in an optimiser's state; see above.

    nu^ is the second moment, its bias corrected by b2, as optax.adam, adamw and nadam
    have them by default. Others keep something else in the same kind of state, which
    looks no different: adamax, radam, yogi and adopt need a function of one's own.
    Before the first gradient that is not all 0, nothing is known of the steps and d is
    0 but for rounding: nothing is shrunk. Gradients that optax.MultiSteps adds up make
    one step, so it goes around `preconditioned`, not into it. The function raises
    ConfigError where the state holds no moments of all params, or of more than one
    Adam.
    """

    def steps(state: PyTree, params: PyTree) -> PyTree:
        adam = optax.ScaleByAdamState
        parts = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, adam))
        found = [part for part in parts if isinstance(part, adam)]
        same = [f for f in found if _alike(f.nu, params)]
        if len(found) != 1 or not same:
            raise ConfigError(
                f"adam_steps: the optimiser's state holds {len(found)} Adams, of which "
                f"{len(same)} with a second moment of every parameter, where one is "
                "needed; pass steps=, a function of one's own"
            )
        nu = jax.tree.map(jnp.real, found[0].nu)  # complex weights have it complex
        known = jnp.any(jnp.stack([jnp.any(x > 0) for x in jax.tree.leaves(nu)]))
        count = jnp.maximum(found[0].count, 1).astype(jnp.float32)
        seen = 1 - b2**count

        def length(nu: jax.Array) -> jax.Array:
            d = 1 / (jnp.sqrt(nu / seen) + eps)
            return jnp.where(known, d, jnp.finfo(d.dtype).tiny)

        return jax.tree.map(length, nu)

    return steps


def _alike(a: PyTree, b: PyTree) -> bool:
    return bool(jax.tree.structure(a) == jax.tree.structure(b))  # type: ignore[operator]


class _Unit(NamedTuple):
    """What dies at once, for U channels or U = 1 block: v, d [U, n]; w, death [U]."""

    v: jax.Array
    d: jax.Array
    weight: jax.Array
    death: jax.Array


def _units(
    graph: Graph,
    arrived: PyTree,
    each: PyTree,
    weights: Mapping[str, Any],
    roles: tuple[Role, ...],
) -> dict[str, _Unit]:
    """{group: its channels}."""
    v = trees.channel_rows(graph, sparsity.floats(arrived), roles=roles)
    d = trees.channel_rows(graph, sparsity.floats(each), roles=roles)

    def unit(v: Any, d: Any, weight: Any) -> _Unit:
        size = jnp.sqrt(jnp.sum(square(v / d), axis=1))
        weight = jnp.broadcast_to(jnp.asarray(weight, size.dtype), v.shape[:1])
        death = steering.deaths_of({"": size}, {"": weight})[""]
        # What has no trained weight is not dead.
        death = death if v.shape[1] else jnp.full_like(death, jnp.inf)
        return _Unit(v, d, weight, death)

    return {n: unit(v[n], d[n], weights[n]) for n in graph.groups}


def _line(unit: _Unit, s: Any, *, last: bool) -> tuple[jax.Array, jax.Array]:
    """(r, s w) float[C] each: the factor of an entry is r / (r + s w d).

    last: the largest stays as it is where all would go.
    """
    pull = s * unit.weight
    alive = unit.death > s
    norm = jnp.sqrt(jnp.sum(square(unit.v), axis=1))
    if last:
        held = (jnp.arange(norm.size) == jnp.argmax(norm)) & ~alive.any()
        pull, alive = jnp.where(held, 0, pull), alive | held
    r = jnp.where(alive, norm * _radius(unit.v, unit.d, pull, norm), 0)
    # Where nothing pulls, the factor is exactly 1; 0 of what is dead to a controller.
    free = (pull == 0) & (alive | (unit.weight == 0))
    return jnp.where(free, 1, r), pull


def _radius(v: jax.Array, d: jax.Array, pull: jax.Array, norm: jax.Array) -> jax.Array:
    """||x|| / ||v||, float[U], of those that live; meaningless for others."""
    scale = jnp.where(norm > 0, norm, 1)[:, None]
    u, t = jnp.abs(v) / scale, pull[:, None] * d / scale
    if not v.shape[1]:
        return jnp.ones_like(norm)
    # From below: 1 = sum (u / (r + t))^2 is at least any of its terms, and at least
    # 1 / (r + max t)^2. There no ratio is over 1, so that nothing overflows.
    r = jnp.maximum(jnp.max(u - t, axis=1), 1 - jnp.max(t, axis=1))
    r = jnp.maximum(r, 0)
    tiny = jnp.finfo(u.dtype).tiny

    def closer(_: Any, r: jax.Array) -> jax.Array:
        far = jnp.maximum(r[:, None] + t, tiny)
        ratios = jnp.square(u / far)
        total = jnp.sum(ratios, axis=1)
        slope = jnp.sum(ratios / far, axis=1)
        more = (jnp.sqrt(total) - 1) * total / jnp.maximum(slope, tiny)
        return jnp.clip(r + more, 0, 1)

    return jax.lax.fori_loop(0, _NEWTON, closer, r)


def _scaled(
    graph: Graph,
    lines: Mapping[str, tuple[jax.Array, jax.Array]],
    arrived: PyTree,
    each: PyTree,
    roles: tuple[Role, ...],
) -> PyTree:
    """The tree with every entry multiplied by the factors of its channels."""
    radius = {n: r for n, (r, _) in lines.items()}
    pull = {n: p for n, (_, p) in lines.items()}

    def factor(leaf: Leaf, cuts: Cuts, d: Any) -> Any:
        whole = d
        for axis, slots, new in trained_axes(leaf, cuts, roles):
            r, p = (
                axis_values(leaf.shape[axis], slots, x, rest, d.dtype)
                for x, rest in ((radius, 1), (pull, 0))
            )
            r, p = (aligned(x, axis, d.ndim) for x in (r, p))
            own = jnp.where(r > 0, r / jnp.where(r > 0, r + p * d, 1), 0)
            own = own if new is None else jnp.where(new, own, 1)
            whole = own if whole is d else whole * own
        return whole

    factors = map_leaves(graph, factor, each, dense_shape)
    return jax.tree.map(
        lambda v, d, f: v if f is d else (v * f).astype(v.dtype), arrived, each, factors
    )
