# SPDX-License-Identifier: Apache-2.0
"""From solved labels to a `Graph`: channels, groups, what is frozen, and the costs."""

from __future__ import annotations

import difflib
import fnmatch
import functools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

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
from jaxprune.singles import in_pairs

# From components to groups. A position is one index of one axis of one leaf; a channel
# is a component's positions; channels that lie in the same axes, of leaves and of the
# operations that cost, are one group: each of them is worth the same.

_AxisKey = tuple[int, int]


class _Channels(NamedTuple):
    """All loose components, int each: c of them, p positions, those of one together.

    ids: [c], the components, by first position. places: [p], numbers of axes of leaves
    in order of first use; indices: [p], along these. Those of ids[i] are at
    starts[i]:starts[i + 1].
    """

    ids: np.ndarray
    starts: np.ndarray
    places: np.ndarray
    indices: np.ndarray


def graph_of(
    labels: Labels, solved: Solved, leaves: tuple[Leaf, ...], ins: Sequence[Value]
) -> Graph:
    """The groups of a finished, solved analysis; `ins` are the values of the leaves."""
    order = sorted(
        range(len(leaves)), key=lambda i: (labels.first_use.get(i, len(leaves)), i)
    )
    axes = [
        (i, axis)
        for i in order
        for axis, line in enumerate(ins[i].labels[: len(leaves[i].shape)])
        if line is not None
    ]
    lines = [solved.component[ins[i].labels[axis]] for i, axis in axes]
    frozen: list[Frozen] = []
    for (i, axis), line in zip(axes, lines):
        frozen += _frozen(leaves[i], axis, line[solved.frozen[line]], solved)

    channels = _channels(lines, solved)
    uses = _uses(labels, solved)
    if (merged := in_pairs(*_alone(channels, uses, solved))) is not None:
        solved = solved._replace(component=merged[solved.component])
        lines = [merged[line] for line in lines]
        channels, uses = _channels(lines, solved), _uses(labels, solved)
    consumed = _consumed(labels)
    groups: dict[str, Group] = {}
    collections, times = _collections(leaves), Counter[str]()
    owner = np.full(len(solved.frozen), -1)
    for members in _families(channels, uses):
        slots = _slots(members, channels, axes, leaves, ins, consumed)
        if len(members) == 1:
            frozen += [Frozen(s.path, s.axis, s.indices.size, SINGLE) for s in slots]
            continue
        first = channels.places[channels.starts[members[0]]]
        module = _module(leaves[axes[first][0]].path, collections)
        times[module] += 1
        name = _name(module, times[module], groups)
        ids = channels.ids[members]
        exact = not solved.inexact[ids].any()
        owner[ids] = len(groups)
        groups[name] = Group(name, len(members), slots, exact)
    terms = _terms(labels, solved, owner, list(groups))
    return Graph(groups, tuple(frozen), leaves, terms)


def _channels(lines: Sequence[np.ndarray], solved: Solved) -> _Channels:
    component = np.concatenate([*lines, np.zeros(0, int)])
    sizes = [len(line) for line in lines]
    places = np.repeat(np.arange(len(lines)), sizes)
    indices = np.concatenate([*map(np.arange, sizes), np.zeros(0, int)])
    loose = np.flatnonzero(~solved.frozen[component])
    ids, first, which = np.unique(
        component[loose], return_index=True, return_inverse=True
    )
    by_first = np.argsort(first)
    rank = np.empty_like(by_first)
    rank[by_first] = np.arange(len(ids))
    which = rank[which]
    together = loose[np.argsort(which, kind="stable")]
    starts = np.concatenate([[0], np.cumsum(np.bincount(which, minlength=len(ids)))])
    return _Channels(ids[by_first], starts, places[together], indices[together])


def _families(
    channels: _Channels, uses: tuple[np.ndarray, np.ndarray]
) -> list[list[int]]:
    """Numbers of channels that are one group, in order; groups by their axes."""
    pairs, ends = uses
    found: dict[tuple[bytes, bytes], list[int]] = defaultdict(list)
    starts = channels.starts.tolist()
    for i, (c, start, stop) in enumerate(
        zip(channels.ids.tolist(), starts, starts[1:])
    ):
        used = pairs[ends[c] : ends[c + 1]].tobytes()
        found[channels.places[start:stop].tobytes(), used].append(i)

    def place(members: list[int]) -> tuple[list[int], int]:
        first = members[0]
        return channels.places[starts[first] : starts[first + 1]].tolist(), first

    return sorted(found.values(), key=place)


def _alone(
    channels: _Channels, uses: tuple[np.ndarray, np.ndarray], solved: Solved
) -> tuple[np.ndarray, np.ndarray, int]:
    """The components that are groups of one, a sum of marks of where each lies, and
    how many components there are.
    """
    alone = [m for m, *more in _families(channels, uses) if not more]
    alone = sorted(m for m in alone if not solved.inexact[channels.ids[m]])
    pairs, ends = uses
    most = max(channels.places.max(initial=0), pairs[:, 0].max(initial=0))
    of_places, of_uses = np.random.default_rng(1).integers(
        2**63, size=(2, most + 1), dtype=np.uint64
    )
    sums = np.zeros(len(alone), np.uint64)
    for i, m in enumerate(alone):
        c = channels.ids[m]
        places = channels.places[channels.starts[m] : channels.starts[m + 1]]
        number, times = pairs[ends[c] : ends[c + 1]].T
        marks = of_places[places], of_uses[number] * times.astype(np.uint64)
        sums[i] = np.concatenate(marks).sum()
    return channels.ids[alone], sums, len(solved.frozen)


def _uses(labels: Labels, solved: Solved) -> tuple[np.ndarray, np.ndarray]:
    """(number of an axis of a cost, how often it lies in it), all of a component's.

    int[n, 2], and where those of each component start.
    """
    axes = {axis.tobytes(): axis for term in labels.terms for axis in term.axes}
    found = [np.zeros((3, 0), int)]
    for number, axis in enumerate(axes.values()):
        own, counts = np.unique(solved.component[axis], return_counts=True)
        found.append(np.stack([own, np.full(len(own), number), counts]))
    component, number, counts = np.concatenate(found, axis=1)
    order = np.argsort(component, kind="stable")
    ends = np.cumsum(np.bincount(component, minlength=len(solved.frozen)))
    return (
        np.stack([number[order], counts[order]], axis=1),
        np.concatenate([[0], ends]),
    )


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
    channels: _Channels,
    axes: Sequence[_AxisKey],
    leaves: Sequence[Leaf],
    ins: Sequence[Value],
    consumed: np.ndarray,
) -> tuple[Slot, ...]:
    start, stop = channels.starts[members[0]], channels.starts[members[0] + 1]
    positions = channels.starts[members][:, None] + np.arange(stop - start)
    indices = channels.indices[positions]
    columns: dict[int, list[int]] = defaultdict(list)
    for column, place in enumerate(channels.places[start:stop].tolist()):
        columns[place].append(column)
    slots = []
    for place, which in columns.items():
        i, axis = axes[place]
        line = np.asarray(ins[i].labels[axis])
        role: Role = "in" if consumed[line[indices[0, which[0]]]] else "out"
        slots.append(Slot(leaves[i].path, axis, indices[:, which], role))
    return tuple(slots)


def _frozen(
    leaf: Leaf, axis: int, components: np.ndarray, solved: Solved
) -> list[Frozen]:
    counts: dict[str, int] = {}
    if not len(components):
        return []
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
