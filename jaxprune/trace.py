# SPDX-License-Identifier: Apache-2.0
"""`trace`: from a function and the shapes of its arguments to its channel groups."""

from __future__ import annotations

import functools
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxprune import jaxpr as jx
from jaxprune.base import (
    INPUT,
    OUTPUT,
    SINGLE,
    Apply,
    Extent,
    Frozen,
    Graph,
    GraphError,
    Group,
    Leaf,
    Path,
    PyTree,
    Role,
    Slot,
    Term,
    key_path,
    path_str,
)
from jaxprune.labels import FROM_INPUT, Labels, Solved, Value, fixed
from jaxprune.rules import RULES
from jaxprune.walk import Context, Tape, analyse


def trace(
    apply: Apply, variables: PyTree, *inputs: Any, exact: bool = True, **kwargs: Any
) -> Graph:
    """Find the channel groups of `apply(variables, *inputs, **kwargs)`.

    variables and inputs: pytrees of arrays or `jax.ShapeDtypeStruct`; only shapes and
    dtypes are used, nothing is computed and no array allocated. kwargs are static
    (`train=False`). With exact=False, groups that masking and cutting treat differently
    are prunable too, and marked so; else they are frozen.

    Returns a `Graph`; its groups are in order of first use. Raises GraphError where
    variables hold no array, or arrays without a key path of their own.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(variables)
    leaves = _leaves(flat, _nnx_statistics(variables))
    _check_leaves(leaves)
    structs = [struct(x) for _, x in flat]
    abstract, rebuild = abstract_inputs(inputs)

    def dense(flat_variables: list[Any], flat_inputs: list[Any]) -> Any:
        tree = jax.tree.unflatten(treedef, flat_variables)
        return apply(tree, *rebuild(flat_inputs), **kwargs)

    program, out = jx.trace(dense, structs, abstract)
    labels = Labels(exact=exact)
    ins = [
        leaf_value(labels, i, leaf.shape, x)
        for i, (leaf, x) in enumerate(zip(leaves, structs))
    ]
    ins += [
        fixed(len(var.aval.shape))._replace(leaf=FROM_INPUT)
        for var in program.invars[len(ins) :]
    ]
    tape = analyse(Context(labels, RULES), program, ins)
    states = state_outputs(out, leaves)
    _finish(labels, tape, ins, states)
    return _graph(labels, leaves, ins)


def struct(x: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype (weak or not) of an array or a Python number."""
    if is_arraylike(x):
        weak = getattr(x, "weak_type", False)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=weak)
    return jax.eval_shape(lambda: jax.numpy.asarray(x))


def is_arraylike(x: Any) -> bool:
    """Whether x has a shape and a dtype, and is not a type (`np.float32`) itself."""
    return hasattr(x, "shape") and hasattr(x, "dtype") and not isinstance(x, type)


def abstract_inputs(
    inputs: PyTree,
) -> tuple[list[jax.ShapeDtypeStruct], Callable[[Sequence[Any]], Any]]:
    """The arrays among the inputs, abstract, and how to put new ones in place."""
    flat, treedef = jax.tree.flatten(inputs)
    arrays = [i for i, x in enumerate(flat) if is_arraylike(x)]

    def rebuild(new: Sequence[Any]) -> Any:
        filled = list(flat)
        for i, x in zip(arrays, new, strict=True):
            filled[i] = x
        return jax.tree.unflatten(treedef, filled)

    return [struct(flat[i]) for i in arrays], rebuild


def leaf_value(labels: Labels, number: int, shape: tuple, x: Any) -> Value:
    """A variable: its own labels on every axis, and zero where a channel is removed."""
    if not jx.is_array(x):
        return fixed(len(shape))
    axes = tuple(labels.fresh(n) for n in shape)
    return Value(axes, (0.0,) * len(shape), None, number)


def state_outputs(out: PyTree, leaves: Sequence[Leaf]) -> list[int | None]:
    """For each output, the leaf that it updates (batch statistics), if any."""
    by_path = {leaf.path: i for i, leaf in enumerate(leaves)}
    states: list[int | None] = []
    for keys, x in jax.tree_util.tree_flatten_with_path(out)[0]:
        path, found = key_path(keys), None
        for start in range(len(path)):
            number = by_path.get(path[start:])
            if number is not None and leaves[number].shape == x.shape and x.shape:
                found = number
                break
        states.append(found)
    return states


def _leaves(
    flat: Sequence[tuple[Any, Any]], statistics: Sequence[Path]
) -> tuple[Leaf, ...]:
    paths = [key_path(keys) for keys, _ in flat]
    collections = any(path[:1] == ("params",) for path in paths)
    leaves = []
    for path, (_, x) in zip(paths, flat):
        x = struct(x)
        trained = jx.is_array(x) and jax.numpy.issubdtype(x.dtype, jax.numpy.inexact)
        trained = trained and (path[:1] == ("params",) or not collections)
        trained = trained and path not in statistics
        leaves.append(Leaf(path, tuple(x.shape), str(x.dtype), trained))
    return tuple(leaves)


def _check_leaves(leaves: Sequence[Leaf]) -> None:
    if not any(leaf.shape for leaf in leaves):
        raise GraphError("variables hold no array; pass what apply takes first")
    seen: set[Path] = set()
    for leaf in leaves:
        if not leaf.path:
            raise GraphError("variables are one array; name it: {'kernel': array}")
        if leaf.path in seen:
            raise GraphError(
                f"two arrays of the variables are {path_str(leaf.path)}; rename one"
            )
        seen.add(leaf.path)


def _nnx_statistics(variables: PyTree) -> list[Path]:
    """Where an nnx state holds variables other than parameters."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return []
    flat, _ = jax.tree_util.tree_flatten_with_path(
        variables, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
    return [
        key_path(keys)
        for keys, x in flat
        if isinstance(x, nnx.Variable) and not isinstance(x, nnx.Param)
    ]


def _finish(
    labels: Labels, tape: Tape, ins: Sequence[Value], states: Sequence[int | None]
) -> None:
    """The user's outputs are fixed; updated variables go with the variables."""
    for value, state in zip(tape.outs, states):
        for axis, line in enumerate(value.labels):
            if state is None:
                labels.freeze(line, OUTPUT)
            else:
                labels.unify(line, ins[state].labels[axis], OUTPUT)


# From components to groups. A position is one index of one axis of one leaf; a channel
# is a component's positions; channels that lie in the same axes, of leaves and of the
# operations that cost, are one group: each of them is worth the same.

_AxisKey = tuple[int, int]
_Uses = tuple[tuple[int, int], ...]


def _graph(labels: Labels, leaves: tuple[Leaf, ...], ins: Sequence[Value]) -> Graph:
    solved = labels.solve()
    order = sorted(
        range(len(leaves)), key=lambda i: (labels.first_use.get(i, len(leaves)), i)
    )
    channels: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    frozen: list[Frozen] = []
    for rank, i in enumerate(order):
        for axis, line in enumerate(ins[i].labels[: len(leaves[i].shape)]):
            if line is None:
                continue
            components = solved.component[line]
            stays = solved.frozen[components]
            frozen += _frozen(leaves[i], axis, components[stays], solved)
            for index in np.flatnonzero(~stays):
                channels[int(components[index])].append((rank, axis, int(index)))

    uses = _uses(labels, solved)
    families: dict[tuple[tuple[_AxisKey, ...], _Uses], list[int]] = defaultdict(list)
    for channel, positions in channels.items():
        family_axes = tuple((rank, axis) for rank, axis, _ in positions)
        families[family_axes, tuple(uses[channel])].append(channel)
    consumed = _consumed(labels)
    groups: dict[str, Group] = {}
    owner = np.full(len(solved.frozen), -1)
    for members in families.values():
        members.sort(key=lambda c: channels[c])
    for family in sorted(families, key=lambda f: (f[0], channels[families[f][0]])):
        members = families[family]
        leaf_axes = [(order[rank], axis) for rank, axis in family[0]]
        slots = _slots(members, channels, leaf_axes, leaves, ins, consumed)
        if len(members) == 1:
            frozen += [Frozen(s.path, s.axis, s.indices.size, SINGLE) for s in slots]
            continue
        name = _name(leaves[leaf_axes[0][0]].path, groups, leaves)
        exact = not solved.inexact[members].any()
        owner[members] = len(groups)
        groups[name] = Group(name, len(members), slots, exact)
    terms = _terms(labels, solved, owner, list(groups))
    return Graph(groups, tuple(frozen), leaves, terms)


def _uses(labels: Labels, solved: Solved) -> dict[int, list[tuple[int, int]]]:
    """{component: (number of an axis of a cost, how often it lies in it)}."""
    axes = {axis.tobytes(): axis for term in labels.terms for axis in term.axes}
    uses: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for number, axis in enumerate(axes.values()):
        found, counts = np.unique(solved.component[axis], return_counts=True)
        for component, count in zip(found.tolist(), counts.tolist()):
            uses[component].append((number, count))
    return uses


def _consumed(labels: Labels) -> np.ndarray:
    mark = np.zeros(labels.count, bool)
    for axis in labels.consumed:
        mark[axis] = True
    return mark


def _slots(
    members: Sequence[int],
    channels: dict[int, list[tuple[int, int, int]]],
    leaf_axes: Sequence[_AxisKey],
    leaves: Sequence[Leaf],
    ins: Sequence[Value],
    consumed: np.ndarray,
) -> tuple[Slot, ...]:
    indices = np.array([[index for _, _, index in channels[c]] for c in members])
    columns: dict[_AxisKey, list[int]] = defaultdict(list)
    for column, key in enumerate(leaf_axes):
        columns[key].append(column)
    slots = []
    for (i, axis), which in columns.items():
        line = np.asarray(ins[i].labels[axis])
        role: Role = "in" if consumed[line[indices[0, which[0]]]] else "out"
        slots.append(Slot(leaves[i].path, axis, indices[:, which], role))
    return tuple(slots)


def _frozen(
    leaf: Leaf, axis: int, components: np.ndarray, solved: Solved
) -> list[Frozen]:
    counts: dict[str, int] = {}
    for component, count in zip(*np.unique(components, return_counts=True)):
        cause = solved.causes.get(int(component), INPUT)
        counts[cause] = counts.get(cause, 0) + int(count)
    return [Frozen(leaf.path, axis, count, cause) for cause, count in counts.items()]


def _name(path: Path, taken: dict[str, Group], leaves: Sequence[Leaf]) -> str:
    """The module's path, without the collection and the parameter's own name."""
    collections = any(leaf.path[:1] == ("params",) for leaf in leaves)
    parts = path[1:] if collections and len(path) > 1 else path
    name = "/".join(parts[:-1] or parts)
    if name not in taken:
        return name
    number = 2
    while f"{name}#{number}" in taken:
        number += 1
    return f"{name}#{number}"


def _terms(
    labels: Labels, solved: Solved, owner: np.ndarray, names: Sequence[str]
) -> tuple[Term, ...]:
    @functools.cache
    def extent(key: bytes) -> Extent:
        axis = np.frombuffer(key, np.int64)
        component = solved.component[axis]
        loose = component[(axis > 0) & ~solved.frozen[component]]
        channels, counts = np.unique(loose, return_counts=True)
        # Axes without a variable (a broadcast mask) have channels of no group.
        own = owner[channels]
        times = {}
        for number in np.unique(own[own >= 0]):
            times[names[number]] = int(counts[own == number].max())
        fixed_part = len(axis) - int(counts[own >= 0].sum())
        return Extent(fixed_part, tuple(times.items()))

    terms = []
    for raw in labels.terms:
        extents = tuple(
            extent(np.ascontiguousarray(axis, np.int64).tobytes()) for axis in raw.axes
        )
        terms.append(Term(raw.kind, raw.coefficient, extents, raw.name))
    return tuple(terms)
