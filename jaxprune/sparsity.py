# SPDX-License-Identifier: Apache-2.0
"""Sparsity in training: the group lasso and its proximal step.

The penalty is sum_g sum_c w[g,c] ||theta[g,c]||, where theta[g,c] is everything trained
that belongs to channel c of group g. Norms are not smooth at zero, so gradients never
reach it; the proximal step does. See `metric` for optimisers whose steps differ by
coordinate, `gates` for one number per channel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune import steering, trees
from jaxprune.base import (
    BOTH,
    ConfigError,
    Graph,
    GraphError,
    Group,
    PyTree,
    Role,
    check_roles,
)
from jaxprune.measures import floats, square
from jaxprune.pricing import Counts, Weights, concrete, resolved
from jaxprune.sharded import fetched
from jaxprune.steering import Strength

Blocks = Mapping[str, Sequence[str]]


def group_lasso(
    graph: Graph,
    variables: PyTree,
    weights: Weights | None = None,
    *,
    roles: tuple[Role, ...] = BOTH,
    blocks: Blocks | None = None,
) -> jax.Array:
    """sum over g, c of w[g,c] ||theta[g,c]||_2, a scalar; its gradient at 0 is 0.

    `weights` {group: float or float[C]}: sqrt of the number of entries in theta[g,c] by
    default (Yuan & Lin, 2006), in the network as the graph has it; `repriced(graph,
    None)` counts live ones, so that a cut changes nothing; see also `flops_weights`.
    `blocks`: as for `proximal`; a block counts once. Raises GraphError for weights or
    blocks that do not fit the graph.
    """
    _check_blocks(graph, blocks)
    squares = channel_squares(graph, variables, roles)
    weights = resolved(graph, weights, roles, lambda: counted(graph, squares, roles))
    if blocks:
        weights = of_blocks(graph, weights, blocks)
        squares = channel_squares(united(graph, blocks), variables, roles)
    each = [jnp.sum(weights[n] * root(s)) for n, s in squares.items()]
    return sum(each, jnp.zeros(()))


def proximal(
    graph: Graph,
    strength: Strength,
    weights: Weights | None = None,
    *,
    roles: tuple[Role, ...] = BOTH,
    blocks: Blocks | None = None,
) -> optax.GradientTransformation:
    """Block soft-thresholding of what the optimiser arrives at; last in an optax.chain.

    With v = params + updates and s = strength, every entry is multiplied by the factors

        f[g,c] = max(0, 1 - s w[g,c] / ||v[g,c]||)

    of all the channels that it belongs to: of one for a bias, of two for a kernel
    between two groups. All norms are taken at v. Where blocks do not overlap, this is
    the proximal operator of s * group_lasso; where they do, one step of it by factors,
    which agrees with the proximal operator to first order in s, and has its zeros
    wherever ||v[g,c]|| <= s w[g,c].
    A channel whose factor is 0 is exactly 0 after optax.apply_updates, and `dead` finds
    it. A group whose channels would all die keeps the one of the largest norm as it is.

    s = lr * lambda is the step of plain gradients x <- prox(x - lr g) on the loss plus
    lambda * group_lasso: it minimises |x - v|^2 / (2 lr) + lambda * group_lasso(x).
    Momentum m <- g + mu m, x <- prox(x - lr m), as optax.sgd and optax.trace have it,
    rests where m = g / (1 - mu): each gradient moves x by lr / (1 - mu) in the end, and
    that is the step, s = lr * lambda / (1 - mu); Nesterov's rests there, too. With
    lr * lambda the penalty would weigh 1 - mu of lambda. An average of gradients,
    (1 - mu) g + mu m, needs no such factor.
    Adam's step sizes differ by coordinate: behind it, this rests where a penalty
    reweighted by them would, which prunes well but is another problem;
    `preconditioned` solves the one above. Muon's updates are as long whatever the
    gradient is: behind it, lambda has no meaning of its own, and `steer` finds one that
    does what is wanted.

    Args:
      graph: of the dense network; params may be all variables or 'params' alone.
      strength: s; a number, a schedule of the step count, or a controller, see `steer`.
      weights: as for `group_lasso`. Those of `repriced` follow the live channels.
      roles: ('out',) leaves the weights that read a channel out of theta[g,c]: filters;
        ('in',) those that make it: the channels of what reads (Wen et al., 2016). What
        makes a dead channel then lives on, and may revive it. `mask` changes the
        function of what they leave with ('out',) where a dead channel is not 0 to its
        readers, as behind a sigmoid; with ('in',) where anything but weights reads it,
        such as a norm over the channels.
      blocks: {name: groups} whose channels die together, with one norm over all their
        entries, each once, and the weight sqrt(sum w[g,c]^2): the layers within a
        residual branch, say, so that the shortcut is what is left (depth, Wen et al.,
        2016). They may become 0 altogether; `dead` keeps one channel of zeros of each
        group, and what the branch's last bias and norm add stays. To penalise channels
        as well, chain two of these steps, channels first (Jenatton et al., 2011), with
        weights 0 for the groups that a step is to pass.

    optax.MultiSteps goes around the chain: before this step, every micro-step would be
    shrunk. Params that are an average of others, as schedule_free evaluates, have no
    exact zeros. optax.inject_hyperparams takes the weights of `repriced` for a
    schedule, unless static_args name them.
    Weights that the optimiser holds fixed, as optax.multi_transform may, are shrunk
    like all others: give the groups that they belong to the weight 0. Params are best
    in float32: in bfloat16 a factor over 0.998 rounds to 1, and weak penalties do
    nothing.

    Raises ConfigError for a negative strength or an unknown role, or where update is
    called without params; GraphError for weights or blocks that do not fit the graph;
    BudgetError where the strength is steered to a target that these weights and roles
    cannot reach.

    Source: Alvarez & Salzmann, "Learning the number of neurons in deep networks", 2016;
    Wen et al., "Learning structured sparsity in deep neural networks", 2016.
    """
    checked(graph, strength, weights, roles, blocks)
    units = united(graph, blocks)
    together = {names[0] for names in (blocks or {}).values()}

    def update(updates: PyTree, state: Any, params: PyTree | None = None):
        if params is None:
            raise ConfigError(
                "proximal needs the params: tx.update(updates, state, params)"
            )
        arrived = jax.tree.map(lambda p, u: p + u, params, updates)
        own = resolved(graph, weights, roles, lambda: live(graph, params, roles=roles))
        own = of_blocks(graph, own, blocks)
        squares = channel_squares(units, arrived, roles)
        norms = {n: root(s) for n, s in squares.items()}

        def deaths() -> Counts:
            found = trained_deaths(units, norms, own, roles)
            return of_channels(graph, found, blocks)

        s, state = steering.stepped(strength, state, deaths)
        factors = {
            n: shrinkage(norm, s * own[n], last=n not in together)
            for n, norm in norms.items()
        }
        scaled = trees.channel_scale(units, factors, arrived, roles=roles, once=True)
        return difference(scaled, arrived, updates, params), state

    def init(params: PyTree) -> Any:
        del params
        return steering.begun(strength)

    return optax.GradientTransformation(init, update)


def deaths(
    graph: Graph,
    variables: PyTree,
    weights: Weights | None = None,
    *,
    roles: tuple[Role, ...] = BOTH,
) -> dict[str, jax.Array]:
    """{group: float[C]}: the strengths s at which a step of `proximal` makes them 0.

    ||theta[g,c]|| / w[g,c]; infinite where there is no penalty. weights: as for
    `proximal`.
    """
    squares = channel_squares(graph, variables, roles)
    own = resolved(graph, weights, roles, lambda: counted(graph, squares, roles))
    norms = {n: root(s) for n, s in squares.items()}
    return trained_deaths(graph, norms, own, roles)


def live(
    graph: Graph, variables: PyTree, *, roles: tuple[Role, ...] = BOTH
) -> dict[str, jax.Array]:
    """{group: int32[]}: channels that are not all 0, one at least; jit-able.

    A group that has no trained weight in these roles counts in full, as for `dead`.
    """
    sums = trees.channel_sum(
        graph, jax.tree.map(jnp.abs, floats(variables)), roles=roles
    )
    return counted(graph, sums, roles)


def dead(
    graph: Graph, variables: PyTree, *, roles: tuple[Role, ...] = BOTH
) -> dict[str, np.ndarray]:
    """The keep {group: bool[C]} that cuts the channels whose weights are all exactly 0.

    A group that is wholly 0 keeps its first channel, since none may be emptied; one
    that has no trained weight in these roles (a frozen backbone) keeps all. Of
    roles other than both see `proximal`. Raises GraphError for variables that do not
    fit the graph.
    """
    sums = trees.channel_sum(
        graph, jax.tree.map(jnp.abs, floats(variables)), roles=roles
    )
    counts = trees.channel_count(graph, roles=roles)
    found = {n: fetched(s) for n, s in sums.items()}
    return {n: never_empty((s != 0) | (counts[n] == 0), s) for n, s in found.items()}


# What the steps of `metric` and `gates` share with those above.


def channel_squares(
    graph: Graph, tree: PyTree, roles: tuple[Role, ...]
) -> dict[str, jax.Array]:
    """||theta[g,c]||^2."""
    squares = jax.tree.map(square, floats(tree))
    sums = trees.channel_sum(graph, squares, roles=roles)
    return {n: jnp.asarray(s) for n, s in sums.items()}


def united(graph: Graph, blocks: Blocks | None) -> Graph:
    """The graph with each block as one channel, a group by its first group's name.

    So that an entry that lies between two groups of a block belongs to it once.
    """
    groups = dict(graph.groups)
    for names in (blocks or {}).values():
        slots = [
            dataclasses.replace(slot, indices=slot.indices.reshape(1, -1))
            for name in names
            for slot in groups.pop(name).slots
        ]
        groups[names[0]] = Group(names[0], 1, tuple(slots))
    return dataclasses.replace(graph, groups=groups, terms=()) if blocks else graph


def of_blocks(
    graph: Graph, weights: Mapping[str, Any], blocks: Blocks | None
) -> dict[str, Any]:
    """{group: weight} of `united`: sqrt(sum w[g,c]^2) of a block."""
    found = dict(weights)
    for names in (blocks or {}).values():
        each = [
            jnp.broadcast_to(found.pop(name), graph.groups[name].size) for name in names
        ]
        found[names[0]] = jnp.sqrt(sum(jnp.sum(w**2) for w in each))
    return found


def of_channels(
    graph: Graph, values: Mapping[str, Any], blocks: Blocks | None
) -> dict[str, Any]:
    """{group: [C]} of `united`'s [1], at each channel of each of a block's groups."""
    found = dict(values)
    for names in (blocks or {}).values():
        whole = found.pop(names[0])
        sizes = {name: graph.groups[name].size for name in names}
        found |= {n: jnp.broadcast_to(whole, size) for n, size in sizes.items()}
    return found


def root(x: jax.Array) -> jax.Array:
    """The square root, with the gradient 0 at 0."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


def shrinkage(norms: jax.Array, threshold: Any, *, last: bool = True) -> jax.Array:
    """max(0, 1 - threshold / norm); 1 for the largest where all would be 0.

    0 at a norm of 0 without a threshold, too: a channel whose squares underflow is dead
    to a controller, and has to be 0 for `dead`.
    """
    tiny = jnp.finfo(norms.dtype).tiny
    factor = jnp.where(norms > threshold, 1 - threshold / jnp.maximum(norms, tiny), 0)
    if not last:
        return factor
    largest = jnp.arange(norms.size) == jnp.argmax(norms)
    return jnp.where(factor.any(), factor, largest.astype(factor.dtype))


def difference(new: PyTree, old: PyTree, updates: PyTree, params: PyTree) -> PyTree:
    """The updates that lead to `new`; where that is `old`, those that are there."""

    def of(new: Any, old: Any, update: Any, p: Any) -> Any:
        return update if new is old else new - p

    return jax.tree.map(of, new, old, updates, params)


def trained_deaths(
    graph: Graph, sizes: Counts, weights: Counts, roles: tuple[Role, ...]
) -> dict[str, Any]:
    """`steering.deaths_of`, infinite for what has no trained weight in these roles."""
    counts = trees.channel_count(graph, roles=roles)
    found = steering.deaths_of(sizes, weights)
    return {n: jnp.where(counts[n] > 0, d, jnp.inf) for n, d in found.items()}


def counted(
    graph: Graph, sums: Mapping[str, Any], roles: tuple[Role, ...]
) -> dict[str, jax.Array]:
    """`live` of sums {group: float[C]} that are 0 where a channel is."""
    counts = trees.channel_count(graph, roles=roles)
    alive = {n: (s != 0) | (counts[n] == 0) for n, s in sums.items()}
    return {n: jnp.maximum(jnp.sum(a), 1) for n, a in alive.items()}


def never_empty(stays: np.ndarray, size: Any) -> np.ndarray:
    """The keep of one group, its largest channel in it where there is none."""
    if not stays.any():
        stays[np.argmax(size)] = True
    return stays


def checked(
    graph: Graph,
    strength: Strength,
    weights: Weights | None,
    roles: tuple[Role, ...],
    blocks: Blocks | None,
) -> None:
    """Raises for a penalty that does not fit the graph, see `proximal`."""
    steering.check_strength(strength)
    check_roles(roles)
    _check_blocks(graph, blocks)
    if isinstance(weights, Mapping):
        weights = concrete(weights)
    own = None if callable(weights) else resolved(graph, weights, roles, dict)
    if isinstance(strength, steering.Steering):
        strength.check(_mortal(graph, own, roles, blocks))


def _mortal(
    graph: Graph,
    weights: Mapping[str, Any] | None,
    roles: tuple[Role, ...],
    blocks: Blocks | None,
) -> dict[str, np.ndarray]:
    """{group: bool[C]}: what is penalised, and has a trained weight in these roles."""
    counts = trees.channel_count(graph, roles=roles)
    found = {n: c > 0 for n, c in counts.items()}
    for name, weight in (weights or {}).items():
        if not isinstance(weight, jax.core.Tracer):
            found[name] = found[name] & (np.asarray(weight) > 0)
    for names in (blocks or {}).values():
        some = any(found[n].any() for n in names)
        found.update({n: np.full(graph.groups[n].size, some) for n in names})
    return found


def _check_blocks(graph: Graph, blocks: Blocks | None) -> None:
    """Raises GraphError for blocks that do not fit the graph."""
    if not isinstance(blocks, Mapping | None):
        raise GraphError(f"blocks={blocks!r:.80}: {{name: [group, ...]}}")
    seen: dict[str, str] = {}
    for block, names in (blocks or {}).items():
        if isinstance(names, str):
            raise GraphError(f"block {block!r}={names!r}: a list, [{names!r}]")
        if not names:
            raise GraphError(f"block {block!r} names no group")
        for name in names:
            if name not in graph.groups:
                raise GraphError(
                    f"block {block!r} names group {name!r}, which the graph lacks"
                )
            if name in seen:
                raise GraphError(
                    f"group {name!r} is in the blocks {seen[name]!r} and {block!r}; "
                    "it may be in one"
                )
            seen[name] = block
