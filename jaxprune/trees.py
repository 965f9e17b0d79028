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

optax's SM3 and `optax.flatten` do not keep the variables' shapes: start these anew. All
other optimisers of optax pass, by themselves or within chain, masked, multi_transform,
MultiSteps, inject_hyperparams, apply_if_finite, schedule_free; tests/test_optimisers.py
lists those that are tested.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.base import (
    Graph,
    GraphError,
    Group,
    Keep,
    Leaf,
    Path,
    PyTree,
    Scores,
    Slot,
    key_path,
    path_str,
)

BOTH_ROLES = ("out", "in")


def mask(graph: Graph, keep: Keep, tree: PyTree) -> PyTree:
    """The tree with everything that belongs to a removed channel set to zero.

    `keep` may be traced: one compiled function serves every mask. Shapes, dtypes and
    shardings stay. Raises GraphError for a keep or a tree that does not fit, or whose
    arrays the graph knows none of.
    """
    return zeroed(graph, check_keep(graph, keep), tree)


def zeroed(graph: Graph, keep: Keep, tree: PyTree) -> PyTree:
    """`mask` for a keep {group: bool[C]} that is checked, or may empty a group."""

    def masked(leaf: Leaf, cuts: _Cuts, x: Any) -> Any:
        for axis, slots in cuts:
            stays = _axis_values(leaf.shape[axis], slots, keep, True, bool)
            if not (isinstance(stays, np.ndarray) and stays.all()):
                numpy = _numpy(x) and isinstance(stays, np.ndarray)
                where = np.where if numpy else jnp.where
                x = where(_along(stays, axis, x.ndim), x, np.zeros((), x.dtype))
        return x

    return _map(graph, masked, tree, _dense_shape)


def shrink(graph: Graph, keep: Keep, tree: PyTree) -> PyTree:
    """The tree with the removed channels cut out: smaller, dense arrays.

    `keep` must be concrete (shapes depend on it); the tree may be traced. Dtypes and
    named shardings stay. Raises GraphError for a keep or a tree that does not fit, and
    for a state of Adafactor that the smaller network cannot go on with.
    """
    keep = check_keep(graph, keep, concrete=True)
    _check_factored(graph, keep, tree)

    def cut(leaf: Leaf, cuts: _Cuts, x: Any) -> Any:
        kept = _kept(leaf, cuts, keep)
        if all(k is None for k in kept):
            return x
        # NumPy reads a CPU's array in place, and has nothing to compile for each shape.
        if _numpy(x):
            return _gathered(x, kept)
        if _on_cpu(x):
            return _from_cpu(x, _gathered(np.asarray(x), kept))
        small = x
        for axis, indices in enumerate(kept):
            if indices is not None:
                small = jnp.take(small, indices, axis=axis)
        return _placed_like(x, small)

    return _map(graph, cut, tree, _dense_shape)


def expand(graph: Graph, keep: Keep, tree: PyTree) -> PyTree:
    """The inverse of `shrink`: zeros where channels were cut; `mask`'s result.

    `keep` must be concrete. Raises GraphError for a keep that does not fit, and for a
    tree that is not one that `shrink` cut by it.
    """
    keep = check_keep(graph, keep, concrete=True)

    def grow(leaf: Leaf, cuts: _Cuts, x: Any) -> Any:
        kept = _kept(leaf, cuts, keep)
        if all(k is None for k in kept):
            return x
        where = np.ix_(
            *(np.arange(n) if k is None else k for n, k in zip(leaf.shape, kept))
        )
        if not _numpy(x):
            return _placed_like(x, jnp.zeros(leaf.shape, x.dtype).at[where].set(x))
        dense = np.zeros(leaf.shape, x.dtype)
        dense[where] = x
        return dense

    def shape(leaf: Leaf, cuts: _Cuts) -> tuple[int, ...]:
        kept = _kept(leaf, cuts, keep)
        return tuple(n if k is None else len(k) for n, k in zip(leaf.shape, kept))

    return _map(graph, grow, tree, shape)


def compose(keep1: Keep, keep2: Keep) -> dict[str, np.ndarray]:
    """The keep of the dense network that cuts by `keep1`, then `keep2` out of the rest.

    keep2[g] is bool[number of True in keep1[g]], both are concrete. Raises GraphError
    naming a group that only one of them has, that is not bool, or does not fit.
    """
    for name in (*keep1, *keep2):
        if name not in keep1 or name not in keep2:
            which = "first" if name not in keep1 else "second"
            raise GraphError(f"the {which} keep lacks group {name!r}")
    composed = {}
    for name in keep1:
        first, second = np.array(keep1[name]), np.asarray(keep2[name])
        for value in (first, second):
            if value.dtype != bool or value.ndim != 1:
                raise GraphError(
                    f"group {name!r}: a keep is bool[C], this one is {value.dtype} of "
                    f"shape {value.shape}"
                )
        if second.shape != (first.sum(),):
            raise GraphError(
                f"group {name!r}: the first keep leaves {first.sum()} channels, the "
                f"second one is for shape {second.shape}"
            )
        composed[name] = np.zeros_like(first)
        composed[name][np.flatnonzero(first)[second]] = True
    return composed


def shrink_graph(graph: Graph, keep: Keep) -> Graph:
    """The graph of the shrunk network: same names, smaller groups and leaves."""
    keep = check_keep(graph, keep, concrete=True)
    index = _index(graph)
    position: dict[tuple[Path, int], np.ndarray] = {}
    leaves = []
    for leaf, cuts in zip(graph.leaves, index.cuts):
        kept = _kept(leaf, cuts, keep)
        for axis, indices in enumerate(kept):
            if indices is not None:
                position[leaf.path, axis] = np.full(leaf.shape[axis], -1)
                position[leaf.path, axis][indices] = np.arange(len(indices))
        shape = tuple(n if k is None else len(k) for n, k in zip(leaf.shape, kept))
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


def channel_sum(
    graph: Graph, tree: PyTree, *, roles: tuple[str, ...] = BOTH_ROLES
) -> dict[str, Any]:
    """{group: float[C]}: the tree's entries, summed over all that belongs to a channel.

    Only trained leaves count, and of them the slots with one of `roles`. Feed it
    `tree.map(square, params)` for norms, `p * g` for Taylor, ones for counts.
    """
    sums: dict[str, Any] = dict.fromkeys(graph.groups, 0.0)

    def add(leaf: Leaf, cuts: _Cuts, x: Any) -> Any:
        for axis, slots in cuts if leaf.trained else ():
            wanted = [(g, s) for g, s in slots if s.role in roles]
            if wanted:
                others = tuple(a for a in range(x.ndim) if a != axis)
                line = x.sum(axis=others)
                for group, slot in wanted:
                    sums[group] = sums[group] + line[slot.indices].sum(axis=1)
        return x

    _map(graph, add, tree, _dense_shape)
    return {
        name: np.zeros(graph.groups[name].size) if isinstance(s, float) else s
        for name, s in sums.items()
    }


def channel_scale(
    graph: Graph,
    factors: Scores,
    tree: PyTree,
    *,
    roles: tuple[str, ...] = BOTH_ROLES,
) -> PyTree:
    """The tree with every slot of channel c of group g multiplied by factors[g][c].

    Only trained leaves, only slots with one of `roles`; factors may be traced.
    """

    def scaled(leaf: Leaf, cuts: _Cuts, x: Any) -> Any:
        for axis, slots in cuts if leaf.trained else ():
            wanted = tuple((g, s) for g, s in slots if s.role in roles and g in factors)
            if wanted:
                line = _axis_values(leaf.shape[axis], wanted, factors, 1, x.dtype)
                x = x * _along(line, axis, x.ndim)
        return x

    return _map(graph, scaled, tree, _dense_shape)


def channel_count(
    graph: Graph, *, roles: tuple[str, ...] = BOTH_ROLES
) -> dict[str, np.ndarray]:
    """{group: float[C]}: how many trained entries belong to each channel."""
    counts = {name: np.zeros(group.size) for name, group in graph.groups.items()}
    by_path = {leaf.path: leaf for leaf in graph.leaves}
    for group in graph.groups.values():
        for slot in group.slots:
            leaf = by_path[slot.path]
            if leaf.trained and slot.role in roles:
                rest = np.prod(leaf.shape, dtype=float) / leaf.shape[slot.axis]
                counts[group.name] += rest * slot.indices.shape[1]
    return counts


def check_keep(graph: Graph, keep: Keep, *, concrete: bool = False) -> dict[str, Any]:
    """The keep as bool arrays in the graph's order.

    Raises GraphError that names the first group which is missing, unknown, of another
    size or emptied.
    """
    if not isinstance(keep, Mapping):
        raise GraphError(
            f"a keep is {{group name: bool[C]}}, not {type(keep).__name__}; "
            "jaxprune.select returns one, graph.full() keeps everything"
        )
    for name in keep:
        if name not in graph.groups:
            near = difflib.get_close_matches(str(name), graph.groups, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise GraphError(f"keep names group {name!r}, which the graph lacks{hint}")
    checked = {}
    for name, group in graph.groups.items():
        if name not in keep:
            raise GraphError(f"keep lacks group {name!r} (bool[{group.size}])")
        checked[name] = _check_channels(group, keep[name], concrete)
    return checked


def _check_channels(group: Group, value: Any, concrete: bool) -> Any:
    if isinstance(value, jax.core.Tracer):
        if concrete:
            raise GraphError(
                f"group {group.name!r}: the keep is traced, but shapes depend on it; "
                "pass a concrete keep, or use mask inside jit"
            )
    else:
        value = np.asarray(value)
    if value.shape != (group.size,):
        raise GraphError(
            f"group {group.name!r} has {group.size} channels, its keep has shape "
            f"{value.shape}"
        )
    if value.dtype != bool:
        raise GraphError(
            f"group {group.name!r}: a keep is bool, this one is {value.dtype}; for "
            "soft masks see jaxprune.gate"
        )
    if isinstance(value, np.ndarray) and not value.any():
        raise GraphError(
            f"group {group.name!r}: keep removes all {group.size} channels; keep at "
            "least one"
        )
    return value


def kept_indices(graph: Graph, keep: Keep) -> list[tuple[np.ndarray | None, ...]]:
    """For each leaf of the graph, for each axis, the indices that stay; None: all."""
    return [
        tuple(_kept(leaf, cuts, keep))
        for leaf, cuts in zip(graph.leaves, _index(graph).cuts)
    ]


# Leaves are found by the end of their key path.

# Bytes that are cut at a time.
_BLOCK = 2**21

_Cuts = tuple[tuple[int, tuple[tuple[str, Slot], ...]], ...]


@dataclasses.dataclass(frozen=True)
class _Index:
    """`cuts`: per leaf, per axis, the (group, slot) pairs; `by_path`: leaf numbers.

    `collections`: the variables are {'params': ..., ...}, as linen's are.
    """

    cuts: tuple[_Cuts, ...]
    by_path: dict[Path, int]
    longest: int
    collections: bool


@functools.lru_cache(maxsize=32)
def _index(graph: Graph) -> _Index:
    per_leaf: dict[Path, dict[int, list[tuple[str, Slot]]]] = {}
    for group in graph.groups.values():
        for slot in group.slots:
            axes = per_leaf.setdefault(slot.path, {})
            axes.setdefault(slot.axis, []).append((group.name, slot))
    cuts = tuple(
        tuple((a, tuple(s)) for a, s in sorted(per_leaf.get(leaf.path, {}).items()))
        for leaf in graph.leaves
    )
    by_path = {leaf.path: i for i, leaf in enumerate(graph.leaves)}
    collections = any(leaf.path[:1] == ("params",) for leaf in graph.leaves)
    if collections:
        for i, leaf in enumerate(graph.leaves):
            by_path.setdefault(leaf.path[1:], i)
        for i, leaf in enumerate(graph.leaves):
            if leaf.path[0] == "params":
                by_path[leaf.path[1:]] = i
    by_path.pop((), None)
    longest = max((len(p) for p in by_path), default=0)
    return _Index(cuts, by_path, longest, collections)


def _map(
    graph: Graph,
    f: Callable[[Leaf, _Cuts, Any], Any],
    tree: PyTree,
    expected: Callable[[Leaf, _Cuts], tuple[int, ...]],
) -> PyTree:
    """Apply f to the leaves of the tree that a group touches."""
    index = _index(graph)
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    out: list[Any] = []
    found: dict[Path, set[int]] = {}
    partial: set[Path] = set()
    for keys, x in flat:
        path = key_path(keys)
        number = _leaf_number(index, path)
        if number is None:
            out.append(x)
            continue
        leaf, cuts = graph.leaves[number], index.cuts[number]
        context = _context(index, path, leaf)
        found.setdefault(context, set()).add(number)
        if any(hasattr(k, "name") for k in keys):
            partial.add(context)
        shape = tuple(np.shape(x))
        leaf, cuts = _stacked(*_statistic(leaf, cuts, path, len(shape)), shape)
        wanted = expected(leaf, cuts)
        if not cuts or shape != wanted and shape in ((), (1,)):  # a placeholder
            out.append(x)
            continue
        _check_shape(leaf, path, shape, wanted)
        out.append(f(leaf, cuts, x))
    if not found:
        _check_strange(graph, flat)
    whole = {c: numbers for c, numbers in found.items() if c not in partial}
    _check_complete(graph, index, whole)
    return jax.tree_util.tree_unflatten(treedef, out)


def _statistic(leaf: Leaf, cuts: _Cuts, path: Path, ndim: int) -> tuple[Leaf, _Cuts]:
    """The leaf as it lies in Adafactor's factored means of squared gradients.

    `v_row` lacks the longest axis of the leaf, `v_col` the second longest (Shazeer and
    Stern, 2018, "Adafactor"). Elsewhere: the leaf itself.
    """
    if ndim != len(leaf.shape) - 1 or not {"v_row", "v_col"} & set(path):
        return leaf, cuts
    gone = int(np.argsort(leaf.shape)[-1 if "v_row" in path else -2])
    shape = leaf.shape[:gone] + leaf.shape[gone + 1 :]
    rest = tuple((a - (a > gone), slots) for a, slots in cuts if a != gone)
    return dataclasses.replace(leaf, shape=shape), rest


def _check_factored(graph: Graph, keep: Keep, tree: PyTree) -> None:
    """Raise where a cut changes which axes of a leaf Adafactor factors.

    The state does not hold min_dim_size_to_factor: it is taken to be optax's 128 where
    the dense leaves allow that, else the least that is factored.
    """
    index, kept = _index(graph), kept_indices(graph, keep)
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    factored: set[int] = set()
    whole: set[int] = set()
    for keys, x in flat:
        path = key_path(keys)
        number = _leaf_number(index, path) if "v_row" in path else None
        if number is not None:
            dense = graph.leaves[number].shape
            same = len(dense) > 1 and np.ndim(x) == len(dense) - 1
            same &= np.shape(x) == tuple(np.delete(dense, np.argsort(dense)[-1:]))
            (factored if same else whole).add(number)
    least = min((_second(graph.leaves[n].shape) for n in factored), default=0)
    if least >= 128 > max((_second(graph.leaves[n].shape) for n in whole), default=0):
        least = 128
    for number in sorted(factored):
        leaf = graph.leaves[number]
        small = _cut_shape(leaf, kept[number])
        changed = list(np.argsort(leaf.shape)[-2:]) != list(np.argsort(small)[-2:])
        if changed or _second(small) < least:
            what = "other axes are the longest" if changed else "it is too small"
            raise GraphError(
                f"start this optimiser anew: Adafactor's means of squared gradients of "
                f"{path_str(leaf.path)} {leaf.shape} do not fit it at {small}, where "
                f"{what}; call tx.init(small params) after the cut"
            )


def _second(shape: tuple[int, ...]) -> int:
    return sorted(shape)[-2] if len(shape) > 1 else 0


def _cut_shape(leaf: Leaf, kept: tuple[np.ndarray | None, ...]) -> tuple[int, ...]:
    return tuple(n if k is None else len(k) for n, k in zip(leaf.shape, kept))


def _stacked(leaf: Leaf, cuts: _Cuts, shape: tuple[int, ...]) -> tuple[Leaf, _Cuts]:
    """The leaf behind the leading axes along which a tree holds many of it."""
    extra = len(shape) - len(leaf.shape)
    if extra <= 0:
        return leaf, cuts
    whole = dataclasses.replace(leaf, shape=shape[:extra] + leaf.shape)
    return whole, tuple((axis + extra, slots) for axis, slots in cuts)


def _leaf_number(index: _Index, path: Path) -> int | None:
    for start in range(max(0, len(path) - index.longest), len(path)):
        number = index.by_path.get(path[start:])
        if number is not None:
            return number
    return None


def _context(index: _Index, path: Path, leaf: Leaf) -> Path:
    """What stands before the leaf's own path, its collection included."""
    if not index.collections:
        return path[: len(path) - len(leaf.path)]
    if path[-len(leaf.path) :] == leaf.path:
        return (*path[: -len(leaf.path)], leaf.path[0])
    return path[: len(path) - len(leaf.path) + 1]


def _check_shape(leaf: Leaf, path: Path, seen: tuple, wanted: tuple) -> None:
    if tuple(seen) == tuple(wanted):
        return
    if len(seen) == len(wanted) and all(s <= w for s, w in zip(seen, wanted)):
        hint = (
            "is the tree cut already? Then it goes with the smaller graph, "
            "jaxprune.shrink_graph(graph, keep), keep being what it was cut by"
        )
    else:
        hint = "is the graph, or the keep, another network's?"
    raise GraphError(
        f"{path_str(path)} has shape {tuple(seen)}, expected is {tuple(wanted)} (dense "
        f"shape {leaf.shape}); {hint}"
    )


def _check_strange(graph: Graph, flat: list[tuple[Any, Any]]) -> None:
    """Raise for numbers of which none has a variable's key path.

    A tree without any, such as the state of plain SGD, has nothing to match.
    """
    for keys, x in flat if graph.groups else ():
        dtype = getattr(x, "dtype", None)
        if np.ndim(x) and dtype is not None and jnp.issubdtype(dtype, jnp.inexact):
            raise GraphError(
                f"nothing in the tree has a variable's key path: it holds "
                f"{path_str(key_path(keys))} {tuple(np.shape(x))}, the graph "
                f"{path_str(graph.leaves[0].path)} {graph.leaves[0].shape}; keep the "
                "variables' own containers and names"
            )


def _check_complete(graph: Graph, index: _Index, found: dict[Path, set[int]]) -> None:
    """A tree of variables has every leaf that a group touches, in each collection.

    Optimiser states and nnx states (key paths that hold named fields) may lack some:
    optax masks them, and gradients are of nnx.Param alone.
    """
    for context, numbers in found.items():
        collections = {graph.leaves[n].path[0] for n in numbers}
        for number, (leaf, cuts) in enumerate(zip(graph.leaves, index.cuts)):
            due = not index.collections or leaf.path[0] in collections
            if cuts and due and number not in numbers:
                where = f" under {path_str(context)}" if context else ""
                raise GraphError(
                    f"the tree lacks the leaf {path_str(leaf.path)} {leaf.shape}{where}"
                )


def _dense_shape(leaf: Leaf, cuts: _Cuts) -> tuple[int, ...]:
    del cuts
    return leaf.shape


def _kept(leaf: Leaf, cuts: _Cuts, keep: Keep) -> list[np.ndarray | None]:
    """Per axis, the indices that stay; None where all do."""
    kept: list[np.ndarray | None] = [None] * len(leaf.shape)
    for axis, slots in cuts:
        stays = _axis_values(leaf.shape[axis], slots, keep, True, bool)
        if not stays.all():
            kept[axis] = np.flatnonzero(stays)
    return kept


def _axis_values(
    length: int,
    slots: tuple[tuple[str, Slot], ...],
    values: Mapping[str, Any],
    rest: Any,
    dtype: Any,
) -> Any:
    """[length] with values[group][c] at each channel's indices, `rest` elsewhere."""
    if all(isinstance(values[g], np.ndarray) for g, _ in slots):
        line = np.full(length, rest, dtype)
        for group, slot in slots:
            line[slot.indices] = values[group][:, None]
        return line
    traced = jnp.full(length, rest, dtype)
    for group, slot in slots:
        new = jnp.asarray(values[group], dtype)[:, None]
        traced = traced.at[slot.indices].set(new)
    return traced


def _along(line: Any, axis: int, ndim: int) -> Any:
    return line.reshape([-1 if a == axis else 1 for a in range(ndim)])


def _numpy(x: Any) -> bool:
    return isinstance(x, np.ndarray | np.generic)


def _on_cpu(x: Any) -> bool:
    """Whether x is a whole, concrete JAX array in the memory that NumPy sees."""
    if isinstance(x, jax.core.Tracer) or not isinstance(x, jax.Array):
        return False
    (device, *others) = x.devices()
    return device.platform == "cpu" and not others and not x.weak_type


def _gathered(x: np.ndarray, kept: list[np.ndarray | None]) -> np.ndarray:
    """x at the kept indices of every axis, a few rows at a time.

    So nothing else of x's size is held; and JAX takes an array that starts at a
    multiple of 64 bytes over as it is.
    """
    shape = tuple(n if k is None else len(k) for n, k in zip(x.shape, kept))
    size = math.prod(shape) * x.dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    small = memory[start : start + size].view(x.dtype).reshape(shape)
    rows, *others = kept
    step = max(1, _BLOCK * len(x) // max(1, x.nbytes))
    for start in range(0, len(small), step):
        block = slice(start, start + step)
        part = x[block] if rows is None else x[rows[block]]
        for axis, indices in enumerate(others, 1):
            if indices is not None:
                part = np.take(part, indices, axis)
        small[block] = part
    return small


def _from_cpu(x: jax.Array, y: np.ndarray) -> jax.Array:
    """y as a JAX array where x is, committed to that place if x is."""
    return jax.device_put(y, x.sharding if x.committed else None)


def _placed_like(x: Any, y: Any) -> Any:
    """y on x's mesh, as x was; axes that no longer divide evenly are replicated."""
    if isinstance(x, jax.core.Tracer) or not isinstance(x, jax.Array):
        return y
    sharding = x.sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        spec = list(sharding.spec) + [None] * (y.ndim - len(sharding.spec))
        for axis, names in enumerate(spec):
            names = (names,) if isinstance(names, str) else names or ()
            parts = int(np.prod([sharding.mesh.shape[n] for n in names]))
            if y.shape[axis] % parts:
                spec[axis] = None
        sharding = jax.sharding.NamedSharding(
            sharding.mesh, jax.sharding.PartitionSpec(*spec)
        )
    return jax.device_put(y, sharding) if y.sharding != sharding else y
