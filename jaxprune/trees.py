# SPDX-License-Identifier: Apache-2.0
"""Masks, cuts and scalings of pytrees: pure functions of (graph, keep, tree).

A tree is anything that carries the variables' key paths: the variables, their
gradients, an optimiser state, a moving average. A leaf belongs to the variable whose
key path its own ends with (`opt_state[0].mu['params']['conv']['kernel']`); a tree over
one collection alone (`variables['params']`) matches too, and so do leaves that are
stacked along leading axes (an ensemble, the history of L-BFGS). All other leaves are
passed on, not copied. Adafactor's factored means are cut along the axes that they keep;
they still hold, averaged, what the removed channels had. Where a cut changes which two
axes are the longest, or would end the factoring, `shrink` raises.

optax's SM3, `optax.flatten`, GaLore and others that project what they keep do not keep
the variables' shapes: start these anew; and Shampoo, SOAP and the like, whose factors
of a square kernel look like its moments, and would be cut as those. All other
optimisers of optax pass, by themselves or within chain, masked, multi_transform,
MultiSteps, inject_hyperparams, apply_if_finite, schedule_free; tests/test_optimisers.py
lists those that are tested.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import jaxpr as jx
from jaxprune.base import (
    BOTH,
    Graph,
    Group,
    Keep,
    Leaf,
    Path,
    PyTree,
    Role,
    Scores,
    check_roles,
)
from jaxprune.keeps import check_keep
from jaxprune.matching import (
    Cuts,
    aligned,
    axis_values,
    check_factored,
    cut_shape,
    dense_shape,
    index_of,
    kept_of,
    map_leaves,
    trained_axes,
)
from jaxprune.placement import from_cpu, gathered, is_numpy, on_cpu, placed_like
from jaxprune.sharded import grown, lies_apart, taken


def mask(graph: Graph, keep: Keep, tree: PyTree) -> PyTree:
    """The tree with everything that belongs to a removed channel set to zero.

    `keep` may be traced: one compiled function serves every mask. Shapes, dtypes and
    shardings stay. Raises GraphError for a keep or a tree that does not fit, or whose
    arrays the graph knows none of.
    """
    return zeroed(graph, check_keep(graph, keep), tree)


def zeroed(graph: Graph, keep: Keep, tree: PyTree) -> PyTree:
    """`mask` for a keep {group: bool[C]} that is checked, or may empty a group."""

    def masked(leaf: Leaf, cuts: Cuts, x: Any) -> Any:
        for axis, slots in cuts:
            stays = axis_values(leaf.shape[axis], slots, keep, True, bool)
            if not (isinstance(stays, np.ndarray) and stays.all()):
                numpy = is_numpy(x) and isinstance(stays, np.ndarray)
                where: Any = np.where if numpy else jnp.where
                x = where(aligned(stays, axis, x.ndim), x, np.zeros((), x.dtype))
        return x

    return map_leaves(graph, masked, tree, dense_shape)


def shrink(graph: Graph, keep: Keep, tree: PyTree) -> PyTree:
    """The tree with the removed channels cut out: smaller, dense arrays.

    `keep` must be concrete (shapes depend on it); the tree may be traced. Dtypes stay,
    and so do named shardings where the new widths allow: devices that no longer divide
    an axis split the largest other one that they divide, or else hold the leaf whole.
    Arrays in parts over a mesh are cut there, and never put together.

    Raises GraphError for a keep or a tree that does not fit, and for a state of
    Adafactor that the smaller network cannot go on with.
    """
    keep = check_keep(graph, keep, concrete=True)
    check_factored(graph, keep, tree)

    def cut(leaf: Leaf, cuts: Cuts, x: Any) -> Any:
        kept = kept_of(leaf, cuts, keep)
        if all(k is None for k in kept):
            return x
        # NumPy reads a CPU's array in place, and has nothing to compile for each shape.
        if is_numpy(x):
            return gathered(x, kept)
        if on_cpu(x):
            return from_cpu(x, gathered(np.asarray(x), kept))
        if lies_apart(x):
            return taken(x, kept)
        small = x
        for axis, indices in enumerate(kept):
            if indices is not None:
                small = jx.laid_like(small, small, (axis,))
                small = jnp.take(small, indices, axis=axis)
        return placed_like(x, small)

    return map_leaves(graph, cut, tree, dense_shape)


def expand(graph: Graph, keep: Keep, tree: PyTree) -> PyTree:
    """The inverse of `shrink`: zeros where channels were cut; `mask`'s result.

    `keep` must be concrete. Raises GraphError for a keep that does not fit, and for a
    tree that is not one that `shrink` cut by it.
    """
    keep = check_keep(graph, keep, concrete=True)

    def grow(leaf: Leaf, cuts: Cuts, x: Any) -> Any:
        kept = kept_of(leaf, cuts, keep)
        if all(k is None for k in kept):
            return x
        if lies_apart(x):
            return taken(x, grown(kept, leaf.shape))
        where = np.ix_(
            *(np.arange(n) if k is None else k for n, k in zip(leaf.shape, kept))
        )
        if not is_numpy(x):
            whole = jx.laid_like(x, x, range(x.ndim))
            return placed_like(x, jnp.zeros(leaf.shape, x.dtype).at[where].set(whole))
        dense = np.zeros(leaf.shape, x.dtype)
        dense[where] = x
        return dense

    def shape(leaf: Leaf, cuts: Cuts) -> tuple[int, ...]:
        kept = kept_of(leaf, cuts, keep)
        return cut_shape(leaf, kept)

    return map_leaves(graph, grow, tree, shape)


def shrink_graph(graph: Graph, keep: Keep) -> Graph:
    """The graph of the shrunk network: same names, smaller groups and leaves."""
    keep = check_keep(graph, keep, concrete=True)
    index = index_of(graph)
    position: dict[tuple[Path, int], np.ndarray] = {}
    leaves = []
    for leaf, cuts in zip(graph.leaves, index.cuts):
        kept = kept_of(leaf, cuts, keep)
        for axis, indices in enumerate(kept):
            if indices is not None:
                position[leaf.path, axis] = np.full(leaf.shape[axis], -1)
                position[leaf.path, axis][indices] = np.arange(len(indices))
        shape = cut_shape(leaf, kept)
        leaves.append(dataclasses.replace(leaf, shape=shape))

    def smaller(group: Group) -> Group:
        slots = []
        for slot in group.slots:
            indices = slot.indices[keep[group.name]]
            moved = position.get((slot.path, slot.axis))
            indices = indices if moved is None else moved[indices]
            slots.append(dataclasses.replace(slot, indices=indices))
        size = int(np.sum(keep[group.name]))
        return dataclasses.replace(group, size=size, slots=tuple(slots))

    groups = {name: smaller(group) for name, group in graph.groups.items()}
    return dataclasses.replace(graph, groups=groups, leaves=tuple(leaves))


def nbytes(tree: PyTree) -> int:
    """Bytes of all leaves; a Python number counts as the array that JAX makes of it."""
    leaves = jax.tree.leaves(tree)
    return sum((x if hasattr(x, "nbytes") else jnp.asarray(x)).nbytes for x in leaves)


def sum_along(x: Any, axis: int) -> Any:
    """float[n]: the entries at each index of an axis, summed."""
    return x.sum(axis=tuple(a for a in range(x.ndim) if a != axis))


def channel_sum(
    graph: Graph,
    tree: PyTree,
    *,
    roles: tuple[Role, ...] = BOTH,
    along: Callable[[Any, int], Any] = sum_along,
) -> dict[str, Any]:
    """{group: float[C]}: the tree's entries, summed over all that belongs to a channel.

    Only trained leaves count, and of them the slots with one of `roles`. Feed it
    `tree.map(square, params)` for norms, `p * g` for Taylor, ones for counts.
    along(x, axis) -> float[n]: what is summed of an array at each index of an axis.
    """
    check_roles(roles)
    sums: dict[str, Any] = dict.fromkeys(graph.groups, 0.0)

    def add(leaf: Leaf, cuts: Cuts, x: Any) -> Any:
        for axis, slots, new in trained_axes(leaf, cuts, roles):
            line = along(x if new is None else x * new, axis)
            line = jx.laid_like(line, line, (0,))
            for group, slot in slots:
                sums[group] = sums[group] + line[slot.indices].sum(axis=1)
        return x

    map_leaves(graph, add, tree, dense_shape)
    return {
        name: np.zeros(graph.groups[name].size) if isinstance(s, float) else s
        for name, s in sums.items()
    }


def channel_rows(
    graph: Graph, tree: PyTree, *, roles: tuple[Role, ...] = BOTH
) -> dict[str, Any]:
    """{group: float[C, n]}: the trained entries of each channel, in one order.

    The same entries as `channel_sum` adds up; n differs by group, and may be 0.
    """
    rows: dict[str, list[Any]] = {n: [] for n in graph.groups}

    def add(leaf: Leaf, cuts: Cuts, x: Any) -> Any:
        for axis, slots, new in trained_axes(leaf, cuts, roles):
            lines = _lines(jnp.asarray(jx.laid_like(x, x, range(x.ndim))), axis)
            for group, slot in slots:
                own = lines[slot.indices]
                if new is not None:
                    own = own[_lines(np.broadcast_to(new, x.shape), axis)[slot.indices]]
                rows[group].append(own.reshape(len(slot.indices), -1))
        return x

    map_leaves(graph, add, tree, dense_shape)
    empty = {n: jnp.zeros((g.size, 0)) for n, g in graph.groups.items()}
    return {n: jnp.concatenate([empty[n], *r], axis=1) for n, r in rows.items()}


def channel_gram(
    graph: Graph, tree: PyTree, *, roles: tuple[Role, ...] = BOTH
) -> dict[str, Any]:
    """{group: float[C, C]}: inner products of what belongs to each two channels.

    Of complex ones the real part, of which squared distances are made as of real ones.
    From the mean channel of each axis on, so that distances do not cancel where all
    channels are nearly the same.
    """
    grams: dict[str, Any] = {
        n: np.zeros((g.size,) * 2) for n, g in graph.groups.items()
    }

    def add(leaf: Leaf, cuts: Cuts, x: Any) -> Any:
        for axis, slots, new in trained_axes(leaf, cuts, roles):
            x = jx.laid_like(x, x, range(x.ndim))
            rows = _lines(jnp.asarray(x if new is None else x * new), axis)
            for group, slot in slots:
                own = rows[slot.indices].reshape(len(slot.indices), -1)
                own = own - own.mean(axis=0)
                product = jnp.matmul(own, own.conj().T, precision="highest")
                grams[group] = grams[group] + jnp.real(product)
        return x

    map_leaves(graph, add, tree, dense_shape)
    return grams


def channel_scale(
    graph: Graph,
    factors: Scores,
    tree: PyTree,
    *,
    roles: tuple[Role, ...] = BOTH,
    once: bool = False,
) -> PyTree:
    """The tree with every slot of channel c of group g multiplied by factors[g][c].

    Only trained leaves, only slots with one of `roles`; factors may be traced. once:
    an entry that belongs to a channel by two axes is multiplied by its factor once.
    """

    def scaled(leaf: Leaf, cuts: Cuts, x: Any) -> Any:
        for axis, slots, new in trained_axes(leaf, cuts, roles):
            wanted = tuple((g, s) for g, s in slots if g in factors)
            if wanted:
                line = axis_values(leaf.shape[axis], wanted, factors, 1, x.dtype)
                scaled = x * aligned(line, axis, x.ndim)
                x = jnp.where(new, scaled, x) if once and new is not None else scaled
        return x

    return map_leaves(graph, scaled, tree, dense_shape)


def channel_count(
    graph: Graph, *, roles: tuple[Role, ...] = BOTH
) -> dict[str, np.ndarray]:
    """{group: float[C]}: how many trained entries belong to each channel."""
    check_roles(roles)
    counts = {name: np.zeros(group.size) for name, group in graph.groups.items()}
    for leaf, cuts in zip(graph.leaves, index_of(graph).cuts, strict=True):
        for axis, slots, new in trained_axes(leaf, cuts, roles):
            length = leaf.shape[axis]
            line = np.full(length, np.prod(leaf.shape, dtype=float) / length)
            if new is not None:
                line = sum_along(np.broadcast_to(new, leaf.shape), axis)
            for group, slot in slots:
                counts[group] += line[slot.indices].sum(axis=1)
    return counts


def _lines(x: Any, axis: int) -> Any:
    """[n, rest]: the entries at each index of an axis."""
    xp = np if isinstance(x, np.ndarray) else jnp
    return xp.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)
