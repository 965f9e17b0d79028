# SPDX-License-Identifier: Apache-2.0
"""From solved labels to a `Graph`: channels, groups, what is frozen, and the costs."""

from __future__ import annotations

import difflib
import fnmatch
import functools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from jaxprune.base import (
    INPUT,
    SINGLE,
    WINDOW,
    Extent,
    Frozen,
    Graph,
    GraphError,
    Group,
    Leaf,
    Path,
    Role,
    Slot,
    Term,
    path_str,
)
from jaxprune.labels import Labels, Solved, Value

# From components to groups. A position is one index of one axis of one leaf; a channel
# is a component's positions; channels that lie in the same axes, of leaves and of the
# operations that cost, are one group: each of them is worth the same.

_AxisKey = tuple[int, int]
_Uses = tuple[tuple[int, int], ...]


def graph_of(labels: Labels, leaves: tuple[Leaf, ...], ins: Sequence[Value]) -> Graph:
    """The groups of a finished analysis; `ins` are the values of the leaves."""
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
    collections, times = _collections(leaves), Counter[str]()
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
        module = _module(leaves[leaf_axes[0][0]].path, collections)
        times[module] += 1
        name = _name(module, times[module], groups)
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
    """bool[labels], which ones are summed over; what is joined is so together."""
    mark = np.zeros(labels.count, bool)
    for axis in labels.consumed:
        mark[axis] = True
    for first, *others in reversed(labels.joint):
        for axis in others:
            mark[axis] |= mark[first]
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


def _name(module: str, number: int, taken: Mapping[str, Group]) -> str:
    """The name of a module's group, `number` being which of its groups this is."""
    if module not in taken:
        return module
    number = max(number, 2)
    while f"{module}#{number}" in taken:
        number += 1
    return f"{module}#{number}"


def _collections(leaves: Sequence[Leaf]) -> bool:
    """Whether the variables are {'params': ..., ...}."""
    return any(leaf.path[:1] == ("params",) for leaf in leaves)


def _module(path: Path, collections: bool) -> str:
    """The module's path, without the collection and the parameter's own name."""
    parts = path[1:] if collections and len(path) > 1 else path
    return "/".join(parts[:-1] or parts)


def check_strict(graph: Graph, strict: Sequence[str]) -> None:
    """Raise GraphError where a module that was asked for by name is frozen."""
    collections = _collections(graph.leaves)
    names = {leaf.path: _module(leaf.path, collections) for leaf in graph.leaves}
    for pattern in strict:
        mine = [p for p, name in names.items() if fnmatch.fnmatchcase(name, pattern)]
        if not mine:
            near = difflib.get_close_matches(pattern, names.values(), 1)
            hint = f"; is {near[0]!r} meant?" if near else ""
            raise GraphError(f"strict: no module is called {pattern!r}{hint}")
        stuck = [
            f"{f.count} indices of {path_str(f.path)} axis {f.axis} by {f.cause}"
            for f in graph.frozen
            if f.path in mine and f.cause not in (INPUT, WINDOW)
        ]
        if stuck:
            raise GraphError(f"strict: {pattern} is frozen: {'; '.join(stuck)}")


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
