# SPDX-License-Identifier: Apache-2.0
"""Which leaf of a tree belongs to which variable, and what groups do to its axes.

A leaf is found by the end of its key path: see `trees`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.base import (
    Graph,
    GraphError,
    Keep,
    Leaf,
    Path,
    PyTree,
    Role,
    Slot,
    key_path,
    path_str,
)

Cuts = tuple[tuple[int, tuple[tuple[str, Slot], ...]], ...]


@dataclasses.dataclass(frozen=True)
class _Index:
    """`cuts`: per leaf, per axis, the (group, slot) pairs; `by_path`: leaf numbers.

    `collections`: the variables are {'params': ..., ...}, as linen's are. `named`: the
    collections' names, as fields (of a TrainState) are called, and None.
    """

    cuts: tuple[Cuts, ...]
    by_path: dict[Path, int]
    longest: int
    collections: bool
    named: frozenset[str | None]


@functools.lru_cache(maxsize=32)
def index_of(graph: Graph) -> _Index:
    """The graph's leaves by key path, and what groups cut of each; 32 are kept."""
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
    firsts = {leaf.path[0] for leaf in graph.leaves if collections}
    return _Index(cuts, by_path, longest, collections, frozenset({None, *firsts}))


def map_leaves(
    graph: Graph,
    f: Callable[[Leaf, Cuts, Any], Any],
    tree: PyTree,
    expected: Callable[[Leaf, Cuts], tuple[int, ...]],
) -> PyTree:
    """Apply f to the leaves of the tree that a group touches."""
    index = index_of(graph)
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
        if any(getattr(k, "name", None) not in index.named for k in keys):
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


def _statistic(leaf: Leaf, cuts: Cuts, path: Path, ndim: int) -> tuple[Leaf, Cuts]:
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


def check_factored(graph: Graph, keep: Keep, tree: PyTree) -> None:
    """Raise where a cut changes which axes of a leaf Adafactor factors.

    The state does not hold min_dim_size_to_factor: it is taken to be optax's 128 where
    the dense leaves allow that, else the least that is factored.
    """
    index, kept = index_of(graph), kept_indices(graph, keep)
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
        small = cut_shape(leaf, kept[number])
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


def cut_shape(leaf: Leaf, kept: Sequence[np.ndarray | None]) -> tuple[int, ...]:
    """The leaf's shape where these indices of its axes stay (None: all)."""
    return tuple(n if k is None else len(k) for n, k in zip(leaf.shape, kept))


def _stacked(leaf: Leaf, cuts: Cuts, shape: tuple[int, ...]) -> tuple[Leaf, Cuts]:
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

    Without collections, what is trained is one, and the rest another. Optimiser states
    and nnx states (key paths that hold other named fields) may lack some: optax masks
    them, and gradients are of nnx.Param alone.
    """

    def collection(leaf: Leaf) -> str | bool:
        return leaf.path[0] if index.collections else leaf.trained

    for context, numbers in found.items():
        collections = {collection(graph.leaves[n]) for n in numbers}
        for number, (leaf, cuts) in enumerate(zip(graph.leaves, index.cuts)):
            if cuts and collection(leaf) in collections and number not in numbers:
                where = f" under {path_str(context)}" if context else ""
                raise GraphError(
                    f"the tree lacks the leaf {path_str(leaf.path)} {leaf.shape}{where}"
                    "; optax.masked and multi_transform show parts of it"
                )


def dense_shape(leaf: Leaf, cuts: Cuts) -> tuple[int, ...]:
    """The shape of a leaf that nothing is cut of."""
    del cuts
    return leaf.shape


def kept_of(leaf: Leaf, cuts: Cuts, keep: Keep) -> list[np.ndarray | None]:
    """Per axis, the indices that stay; None where all do."""
    kept: list[np.ndarray | None] = [None] * len(leaf.shape)
    for axis, slots in cuts:
        stays = axis_values(leaf.shape[axis], slots, keep, True, bool)
        if not stays.all():
            kept[axis] = np.flatnonzero(stays)
    return kept


def kept_indices(graph: Graph, keep: Keep) -> list[tuple[np.ndarray | None, ...]]:
    """For each leaf of the graph, for each axis, the indices that stay; None: all."""
    return [
        tuple(kept_of(leaf, cuts, keep))
        for leaf, cuts in zip(graph.leaves, index_of(graph).cuts)
    ]


def trained_axes(
    leaf: Leaf, cuts: Cuts, roles: tuple[Role, ...]
) -> Iterator[tuple[int, tuple[tuple[str, Slot], ...], np.ndarray | None]]:
    """(axis, its slots with `roles`, what is new there) of a trained leaf.

    What is new broadcasts against the leaf, bool; None: all. It is False for entries
    that belong to the same channel by an axis before, as does the diagonal of the
    kernel in x + conv(x): they are counted, and shrunk, once.
    """
    before: list[tuple[int, tuple[tuple[str, Slot], ...]]] = []
    for axis, slots in cuts if leaf.trained else ():
        wanted = tuple((g, s) for g, s in slots if s.role in roles)
        if not wanted:
            continue
        new = None
        for other, theirs in before:
            for name in {g for g, _ in wanted} & {g for g, _ in theirs}:
                here = _channels_along(leaf, axis, wanted, name)
                there = _channels_along(leaf, other, theirs, name)
                differ = (here != there) | (here < 0)
                new = differ if new is None else new & differ
        yield axis, wanted, new
        before.append((axis, wanted))


def _channels_along(
    leaf: Leaf, axis: int, slots: tuple[tuple[str, Slot], ...], name: str
) -> np.ndarray:
    """The channel of group `name` at each index of an axis, or -1; as long as it."""
    line = np.full(leaf.shape[axis], -1)
    for group, slot in slots:
        if group == name:
            line[slot.indices] = np.arange(len(slot.indices))[:, None]
    return aligned(line, axis, len(leaf.shape))


def aligned(line: Any, axis: int, ndim: int) -> Any:
    """[n] as [1, .., n, .., 1], to broadcast along an axis of an array."""
    return line.reshape([-1 if a == axis else 1 for a in range(ndim)])


def axis_values(
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
