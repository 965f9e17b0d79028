# SPDX-License-Identifier: Apache-2.0
"""Labels: which indices of which axes can only go together.

Every index of every axis carries an integer. Rules pass labels along, unify them, or
freeze them; their connected components at the end say which are one channel. Label
0, or None for a whole axis, is fixed.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxprune.balance import Balance, balanced

Axis = np.ndarray | None
FROM_INPUT = -1


class Value(NamedTuple):
    """What the analysis knows of one array of the program.

    labels: per axis, int[length], or None where every index is fixed. fill: per axis,
    the number that the masked network holds at removed indices (carried through
    functions such as logistic, where 0 becomes 1/2), None if unknown, but finite; nan
    if it may be anything. const: the number that the whole array is, if it is one.
    leaf: the variable that the array is a mere rearrangement of. even: per axis,
    whether removed indices hold the same as each other, though not one known number;
    empty where of no axis, or where the rule of the equation has no `at_removed`.
    array: what the array is, where that is made of whole constants alone: indices.
    """

    labels: tuple[Axis, ...]
    fill: tuple[float | None, ...]
    const: float | None = None
    leaf: int | None = None
    even: tuple[bool, ...] = ()
    array: np.ndarray | None = None

    def removed(self, axis: int) -> float | None:
        """The number at removed indices of an axis."""
        return self.fill[axis] if self.const is None else self.const

    def known(self, axis: int) -> float | None:
        """The number at removed indices of an axis, unless it may be anything.

        If 0, its sign may differ between indices.
        """
        number = self.removed(axis)
        return None if number is None or math.isnan(number) else number

    def is_even(self, axis: int) -> bool:
        """Whether what the removed indices of an axis hold does not depend on them."""
        number = self.removed(axis)
        if number is None:
            return bool(self.even) and self.even[axis]
        return not math.isnan(number)

    def held(self) -> tuple[float | None, ...]:
        """The number at removed indices of every axis."""
        return tuple(self.removed(axis) for axis in range(len(self.labels)))


def unknown(*numbers: float | None) -> float | None:
    """What is computed of these: nan (anything) if one is not finite, else None."""
    known = [n for n in numbers if n is not None]
    return None if all(map(math.isfinite, known)) else math.nan


def fixed(ndim: int, const: float | None = None) -> Value:
    """An array of which nothing can be cut."""
    return Value((None,) * ndim, (None,) * ndim, const)


class RawTerm(NamedTuple):
    """A cost before its labels are solved: coefficient * product of the axes."""

    kind: Literal["flops", "activation_bytes"]
    coefficient: int
    axes: tuple[np.ndarray, ...]
    name: str


class Solved(NamedTuple):
    """`component[label]`; per component whether `frozen` or `inexact`, and why."""

    component: np.ndarray
    frozen: np.ndarray
    inexact: np.ndarray
    causes: dict[int, str]


class Split(NamedTuple):
    """A reshape (`site` tells equations apart) that split the channels of an axis.

    line: their labels. sizes: the lengths of the parts. part: the one that can be cut.
    """

    site: int
    line: np.ndarray
    sizes: tuple[int, ...]
    part: int


def longest(sizes: Sequence[int]) -> int:
    """The longest part of a split axis, the last of several."""
    return max(range(len(sizes)), key=lambda part: (sizes[part], part))


@dataclasses.dataclass
class Labels:
    """What one analysis gathers: labels handed out, unions, freezes, costs.

    consumed: axes of variables that are summed over. joint: axes of variables that lie
    in one array, the first one's labels standing for all.
    repeats, constants: the first labels of axes along which an array was only repeated,
    and of those of arrays that no variable is part of. split: (site, sizes, grid of
    labels) -> along which part of a split axis its channels can be cut. shuffled:
    whether an axis was. balances: what convolutions in groups make; `later`, whether
    that is tied when all else is, not the same channel of every group at once.
    """

    exact: bool = True
    later: bool = False
    shuffled: bool = False
    split: Callable[[int, Sequence[int], np.ndarray], int] = lambda _, n, __: longest(n)
    count: int = 1
    unions: list[tuple[np.ndarray, np.ndarray]] = dataclasses.field(
        default_factory=list
    )
    freezes: list[tuple[np.ndarray, object]] = dataclasses.field(default_factory=list)
    softened: list[tuple[np.ndarray, object]] = dataclasses.field(default_factory=list)
    consumed: list[np.ndarray] = dataclasses.field(default_factory=list)
    joint: list[tuple[np.ndarray, ...]] = dataclasses.field(default_factory=list)
    first_use: dict[int, int] = dataclasses.field(default_factory=dict)
    terms: list[RawTerm] = dataclasses.field(default_factory=list)
    splits: list[Split] = dataclasses.field(default_factory=list)
    balances: list[Balance] = dataclasses.field(default_factory=list)
    repeats: set[int] = dataclasses.field(default_factory=set)
    constants: set[int] = dataclasses.field(default_factory=set)

    def fresh(self, length: int) -> Axis:
        """New labels for an axis; one of one index, or a symbol's, is never cut."""
        if not isinstance(length, int | np.integer) or length <= 1:
            return None
        self.count += length
        return np.arange(self.count - length, self.count)

    def fresh_repeat(self, length: int) -> Axis:
        """New labels for an axis along which an array is only repeated."""
        return _noted(self.repeats, self.fresh(length))

    def fresh_constant(self, length: int) -> Axis:
        """New labels for an axis of an array that no variable is part of."""
        return _noted(self.constants, self.fresh(length))

    def unify(self, a: Axis, b: Axis, cause: object) -> Axis:
        """Tie two axes of one length, index by index; the older labels.

        Those of variables come first: a reshape asks whether it has any, and `slim`
        which of them a keep cut.
        """
        if a is None or b is None:
            self.freeze(a, cause)
            self.freeze(b, cause)
            return None
        if a is not b:
            loose = (a > 0) & (b > 0)
            self.unions.append((a[loose], b[loose]))
            if not loose.all():
                self.freeze(a[~loose], cause)
                self.freeze(b[~loose], cause)
        return b if len(b) and b[0] < a[0] else a

    def unify_all(self, axes: Sequence[Axis], cause: object) -> Axis:
        """Tie axes of one length, index by index."""
        return functools.reduce(lambda a, b: self.unify(a, b, cause), axes)

    def freeze(self, axis: Axis, cause: object) -> None:
        """Nothing of this axis can be cut."""
        if axis is not None and len(axis):
            self.freezes.append((axis, cause))

    def inexact(self, axis: Axis, cause: object) -> None:
        """Cutting this axis is not the same as masking it: frozen unless asked for."""
        if axis is not None:
            (self.freezes if self.exact else self.softened).append((axis, cause))

    def scratch(self) -> Labels:
        """One without events that hands out the labels that come next; see `absorb`."""
        return Labels(
            **{
                name: [] if isinstance(held, list) else copy.copy(held)
                for name, held in vars(self).items()
            }
        )

    def absorb(self, scratch: Labels) -> None:
        """Let stand what an analysis gathered in a scratch; others are forgotten."""
        for name, held in vars(scratch).items():
            if isinstance(held, list):
                getattr(self, name).extend(held)
            else:
                setattr(self, name, held)

    def solve(self, balance: bool = True) -> Solved:
        """Merge what was unified; balance: and, if later, what balances ask for."""
        pairs = self.unions or [(np.zeros(0, int), np.zeros(0, int))]
        a, b = (np.concatenate(side) for side in zip(*pairs))
        component = components(self.count, a, b)
        number = int(component.max()) + 1
        if self.later and balance:
            held = np.zeros(number, bool)
            held[
                component[np.concatenate([[0], *(axis for axis, _ in self.freezes)])]
            ] = 1
            component = balanced(component, held, self.balances)
        frozen, inexact = np.zeros(number, bool), np.zeros(number, bool)
        frozen[component[0]] = True
        causes: dict[int, str] = {}
        for marked, events in ((frozen, self.freezes), (inexact, self.softened)):
            for axis, cause in events:
                hit = np.unique(component[axis[axis > 0]])
                new = hit[~marked[hit]].tolist()
                text = str(cause) if new else ""
                for c in new:
                    causes.setdefault(c, text)
                marked[hit] = True
        return Solved(component, frozen, inexact, causes)


def components(count: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """int[count]: the connected component of each node; edges join a[i] and b[i].

    Components are numbered by their first nodes. SciPy's takes longer to be imported
    than most networks to be traced. Each round hangs every tree that has an edge to an
    older one below that, so that at most half of those joined to others remain.
    """
    parent = np.arange(count)
    while True:
        x, y = parent[a], parent[b]
        apart = x != y
        if not apart.any():
            return np.unique(parent, return_inverse=True)[1]
        a, b, x, y = a[apart], b[apart], x[apart], y[apart]
        np.minimum.at(parent, np.maximum(x, y), np.minimum(x, y))
        while not np.array_equal(parent, above := parent[parent]):
            parent = above


def _noted(firsts: set[int], axis: Axis) -> Axis:
    if axis is not None:
        firsts.add(int(axis[0]))
    return axis


def joined(axes: list[tuple[Axis, int]]) -> Axis:
    """Axes end to end, as (labels, length); None where all are fixed."""
    if all(axis is None for axis, _ in axes):
        return None
    return np.concatenate(
        [np.zeros(length, int) if axis is None else axis for axis, length in axes]
    )


def kept_indices(mask: Any) -> np.ndarray | None:
    """The True positions of a bool array; None for 'all' (and for None)."""
    return None if mask is None or np.all(mask) else np.flatnonzero(mask)
