# SPDX-License-Identifier: Apache-2.0
"""Sparsity in training: the group lasso, its proximal step, and gates.

The penalty is sum_g sum_c w[g,c] ||theta[g,c]||, where theta[g,c] is everything trained
that belongs to channel c of group g. Norms are not smooth at zero, so gradients never
reach it; the proximal step does.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune import budget, trees
from jaxprune.base import ConfigError, Graph, GraphError, Group, PyTree, Role
from jaxprune.measures import floats

Weights = Mapping[str, Any]
Strength = float | Callable[[Any], Any]
BOTH: tuple[Role, ...] = ("out", "in")


def group_lasso(
    graph: Graph,
    variables: PyTree,
    weights: Weights | None = None,
    *,
    roles: tuple[Role, ...] = BOTH,
) -> jax.Array:
    """sum over g, c of w[g,c] ||theta[g,c]||_2, a scalar; its gradient at 0 is 0.

    `weights` {group: float or float[C]}: sqrt of the number of entries in theta[g,c] by
    default (Yuan & Lin, 2006), see also `flops_weights`. Raises GraphError for weights
    that do not fit the graph.
    """
    weights = _weights(graph, weights, roles)
    norms = _norms(graph, variables, roles)
    return sum((jnp.sum(weights[n] * norms[n]) for n in norms), jnp.zeros(()))


def flops_weights(
    graph: Graph, kind: budget.Kind = "flops", *, roles: tuple[Role, ...] = BOTH
) -> dict[str, np.ndarray]:
    """Weights {group: float[C]} that make the penalty paid in FLOPs (or another cost).

    sqrt(entries in theta[g,c]) times the cost of a channel at the dense network, the
    latter relative to its mean over all channels. Raises BudgetError for an unknown
    kind, or one that the dense network has nothing of.
    """
    share = budget.marginal(graph, kind)
    mean = share @ budget.sizes(graph) / max(graph.channels, 1)
    counts = trees.channel_count(graph, roles=roles)
    return {n: np.sqrt(counts[n]) * s / mean for n, s in zip(graph.groups, share)}


class ProximalState(NamedTuple):
    """`steps`: int32 scalar, the updates so far."""

    steps: jax.Array


def proximal(
    graph: Graph,
    strength: Strength,
    weights: Weights | None = None,
    *,
    roles: tuple[Role, ...] = BOTH,
) -> optax.GradientTransformation:
    """Block soft-thresholding of what the optimiser arrives at; last in an optax.chain.

    With v = params + updates and s = strength, every entry is multiplied by the factors

        f[g,c] = max(0, 1 - s w[g,c] / ||v[g,c]||)

    of all the channels that it belongs to: of one for a bias, of two for a kernel
    between two groups. All norms are taken at v. Where blocks do not overlap, this is
    the proximal operator of s * group_lasso; where they do, one step of it by factors.
    A channel whose factor is 0 is exactly 0 after optax.apply_updates, and `dead` finds
    it. A group whose channels would all die keeps the one of the largest norm as it is.

    Args:
      graph: of the dense network; params may be all variables or 'params' alone.
      strength: learning rate times lambda; a number or a schedule of the step count.
      weights: as for `group_lasso`.
      roles: ('out',) leaves the weights that read a channel out of theta[g,c].

    Raises ConfigError for a negative strength, or where update is called without
    params; GraphError for weights that do not fit the graph.

    Source: Alvarez & Salzmann, "Learning the number of neurons in deep networks", 2016.
    """
    _check_strength(strength)
    weights = _weights(graph, weights, roles)

    def update(updates: PyTree, state: ProximalState, params: PyTree | None = None):
        if params is None:
            raise ConfigError(
                "proximal needs the params: tx.update(updates, state, params)"
            )
        s = strength(state.steps) if callable(strength) else strength
        arrived = jax.tree.map(lambda p, u: p + u, params, updates)
        norms = _norms(graph, arrived, roles)
        factors = {n: _factor(norm, s * weights[n]) for n, norm in norms.items()}
        scaled = trees.channel_scale(graph, factors, arrived, roles=roles)

        def difference(new: Any, old: Any, update: Any, p: Any) -> Any:
            return update if new is old else new - p

        updates = jax.tree.map(difference, scaled, arrived, updates, params)
        return updates, ProximalState(optax.safe_increment(state.steps))

    def init(params: PyTree) -> ProximalState:
        del params
        return ProximalState(jnp.zeros((), jnp.int32))

    return optax.GradientTransformation(init, update)


def dead(
    graph: Graph, variables: PyTree, *, roles: tuple[Role, ...] = BOTH
) -> dict[str, np.ndarray]:
    """The keep {group: bool[C]} that cuts the channels whose weights are all exactly 0.

    A group that is wholly 0 keeps its first channel, since none may be emptied; one
    that has no trained weight in these roles (a frozen backbone) keeps all. Raises
    GraphError for variables that do not fit the graph.
    """
    sums = trees.channel_sum(
        graph, jax.tree.map(jnp.abs, floats(variables)), roles=roles
    )
    counts = trees.channel_count(graph, roles=roles)
    return {
        n: _never_empty((np.asarray(s) != 0) | (counts[n] == 0), np.asarray(s))
        for n, s in sums.items()
    }


def init_gates(graph: Graph) -> dict[str, jax.Array]:
    """Gates {group: float32[C]} of ones: every channel passes unchanged."""
    return {n: jnp.ones(g.size) for n, g in graph.groups.items()}


def gate(graph: Graph, gates: Mapping[str, Any], variables: PyTree) -> PyTree:
    """The variables with each channel scaled by its gate, once wherever it is read.

    The gate is folded into the trained kernels that read the channel. A group that none
    reads has one of its makers scaled: the trained one of least rank, biases aside, and
    the bias beside it. What reads a channel otherwise, a norm over the channels or an
    elementwise product, sees the ungated value, until the gate is 0: then everything
    that belongs to the channel is 0, and no gradient reaches it or its gate. So gates
    of 0 and 1 do what `mask` does. Raises GraphError for gates that do not fit the
    graph.

    Source: Huang & Wang, "Data-driven sparse structure selection for deep neural
    networks", 2018.
    """
    gates = _per_channel(graph, gates, "gates")
    counts = trees.channel_count(graph, roles=("in",))
    read = {n: g for n, g in gates.items() if counts[n].any()}
    unread = {n: g for n, g in gates.items() if n not in read}
    variables = trees.channel_scale(graph, read, variables, roles=("in",))
    variables = trees.channel_scale(
        _one_maker(graph, unread), unread, variables, roles=("out",)
    )
    alive = {
        n: (g if isinstance(g, np.ndarray) else jnp.asarray(g)) != 0
        for n, g in gates.items()
    }
    return trees.zeroed(graph, alive, variables)


def _one_maker(graph: Graph, names: Collection[str]) -> Graph:
    """The graph of these groups, each at one product of its makers alone."""
    leaves = {leaf.path: leaf for leaf in graph.leaves}

    def reduced(group: Group) -> Group:
        makers = [s for s in group.slots if leaves[s.path].trained and s.role == "out"]
        products = [s for s in makers if s.path[-1] != "bias"]
        if products:
            one = min(products, key=lambda s: len(leaves[s.path].shape))
            bias = (*one.path[:-1], "bias")
            makers = [s for s in makers if s is one or s.path == bias]
        return dataclasses.replace(group, slots=tuple(makers))

    return dataclasses.replace(
        graph, groups={n: reduced(graph.groups[n]) for n in names}, terms=()
    )


def proximal_gates(
    strength: Strength, weights: Weights | None = None
) -> optax.GradientTransformation:
    """Soft-thresholding, sign(z) max(0, |z| - strength w), last in a chain for gates.

    z = gates + updates. `strength` and the last one of a group are as in `proximal`.
    `weights` {group: float or float[C]}: 1 by default, see also `flops_weights`. Raises
    ConfigError for a negative strength, or where update is called without the gates;
    GraphError for weights that do not fit the gates.
    """
    _check_strength(strength)

    def update(updates: PyTree, state: ProximalState, params: PyTree | None = None):
        if params is None:
            raise ConfigError(
                "proximal_gates needs the gates: tx.update(updates, state, gates)"
            )
        s = strength(state.steps) if callable(strength) else strength

        def shrunk(gate: jax.Array, update: jax.Array, weight: Any) -> jax.Array:
            z = gate + update
            return z * _factor(jnp.abs(z), s * weight) - gate

        sizes = {n: np.size(g) for n, g in params.items()}
        own = dict.fromkeys(params, 1.0) if weights is None else weights
        each = _fitting(sizes, own, "weights")
        steps = optax.safe_increment(state.steps)
        return jax.tree.map(shrunk, params, updates, each), ProximalState(steps)

    def init(params: PyTree) -> ProximalState:
        del params
        return ProximalState(jnp.zeros((), jnp.int32))

    return optax.GradientTransformation(init, update)


def gates_to_keep(gates: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The keep that cuts channels whose gate is exactly 0; no group is emptied.

    `shrink(graph, gates_to_keep(gates), gate(graph, gates, variables))` is the network.
    """
    return {n: _never_empty(np.asarray(g) != 0, np.abs(g)) for n, g in gates.items()}


def _norms(graph: Graph, tree: PyTree, roles: tuple[Role, ...]) -> dict[str, jax.Array]:
    """||theta[g,c]||, with the gradient 0 at 0."""
    squares = jax.tree.map(jnp.square, floats(tree))

    def root(x: jax.Array) -> jax.Array:
        positive = x > 0
        return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)

    sums = trees.channel_sum(graph, squares, roles=roles)
    return {n: root(jnp.asarray(s)) for n, s in sums.items()}


def _factor(norms: jax.Array, threshold: Any) -> jax.Array:
    """max(0, 1 - threshold / norm); 1 for the largest where all would be 0."""
    tiny = jnp.finfo(norms.dtype).tiny
    factor = jnp.maximum(0, 1 - threshold / jnp.maximum(norms, tiny))
    last = jnp.arange(norms.size) == jnp.argmax(norms)
    return jnp.where(factor.any(), factor, last.astype(factor.dtype))


def _never_empty(stays: np.ndarray, size: Any) -> np.ndarray:
    if not stays.any():
        stays[np.argmax(size)] = True
    return stays


def _weights(
    graph: Graph, weights: Weights | None, roles: tuple[Role, ...]
) -> dict[str, np.ndarray]:
    if weights is None:
        counts = trees.channel_count(graph, roles=roles)
        return {n: np.sqrt(c) for n, c in counts.items()}
    return _per_channel(graph, weights, "weights")


def _per_channel(graph: Graph, values: Weights, what: str) -> dict[str, Any]:
    """{group: float or float[C]}, checked, in the graph's order."""
    return _fitting({n: g.size for n, g in graph.groups.items()}, values, what)


def _fitting(sizes: Mapping[str, int], values: Weights, what: str) -> dict[str, Any]:
    """The values of groups of these sizes, in their order; else GraphError."""
    for name in values:
        if name not in sizes:
            raise GraphError(f"{what} name group {name!r}, which the graph lacks")
    for name, size in sizes.items():
        if name not in values:
            raise GraphError(f"{what} lack group {name!r} (float[{size}])")
        shape = np.shape(values[name])
        if shape not in ((), (size,)):
            raise GraphError(
                f"group {name!r} has {size} channels, its {what} have shape {shape}"
            )
    return {n: values[n] for n in sizes}


def _check_strength(strength: Strength) -> None:
    if not callable(strength) and isinstance(strength, int | float) and strength < 0:
        raise ConfigError(f"strength={strength!r}: must not be negative")
