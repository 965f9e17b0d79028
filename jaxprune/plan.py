# SPDX-License-Identifier: Apache-2.0
"""`plan`: what is kept inside a program of which it is known what is kept at its ends.

`slim` plans the user's function; calls with derivatives of their own, the programs that
JAX derives from them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxprune import jaxpr as jx
from jaxprune.base import GraphError
from jaxprune.labels import Labels, Value, kept_indices, longest
from jaxprune.walk import Context, Kept, Rule, Tape, analyse


def plan(
    program: jx.Program,
    kept_in: Sequence[Kept],
    kept_out: Sequence[Kept | None],
    fills: Sequence[tuple[float | None, ...]],
    rules: Mapping[str, Rule],
    name: str,
    *,
    exact: bool = True,
    inexact_in: Mapping[tuple[int, int], np.ndarray] | None = None,
    inputs: Sequence[str] = (),
) -> tuple[Tape, Callable[[Value], Kept]]:
    """Analyse a program of which it is known what is kept at its ends.

    kept_out None leaves an output to the analysis. inexact_in: by input and axis, the
    indices whose removal may differ from masking, where exact is False; None: all.
    inputs: what errors call the first inputs.

    Returns the tape and the function that says what is kept of any value in it. Raises
    GraphError where the program ties a removed index to one that stays.
    """
    labels = Labels(exact=exact)
    given = program, kept_in, kept_out, fills, rules, name
    try:
        return _planned(labels, *given, inexact_in, inputs)
    except GraphError as error:
        if not labels.balances:
            raise
        try:
            return _planned(Labels(exact=exact, later=True), *given, inexact_in, inputs)
        except GraphError:
            raise error from None


def _planned(
    labels: Labels,
    program: jx.Program,
    kept_in: Sequence[Kept],
    kept_out: Sequence[Kept | None],
    fills: Sequence[tuple[float | None, ...]],
    rules: Mapping[str, Rule],
    name: str,
    inexact_in: Mapping[tuple[int, int], np.ndarray] | None,
    inputs: Sequence[str],
) -> tuple[Tape, Callable[[Value], Kept]]:
    ins: list[Value] = []
    ends: list[_End] = []
    for i, (var, kept, fill) in enumerate(zip(program.invars, kept_in, fills)):
        called = inputs[i] if i < len(inputs) else f"input {i}"
        value, seeds = _seed(labels, called, var.aval.shape, kept, fill)
        if inexact_in is not None:
            seeds = [s._replace(firm=~inexact_in[i, s.number]) for s in seeds]
        ins.append(value)
        ends += seeds
    labels.split = _split_by(ends, labels.count)
    tape = analyse(Context(labels, rules), program, ins)
    for i, (var, end) in enumerate(zip(program.outvars, kept_out)):
        if end is not None:
            value, unknown = tape.outs[i], (None,) * len(end)
            seed, seeds = _seed(labels, f"output {i}", var.aval.shape, end, unknown)
            ends += seeds
            for a, b in zip(value.labels, seed.labels):
                labels.unify(a, b, f"an output of {name}")
    return tape, _resolver(labels, ends, name)


def _split_by(
    ends: Sequence[_End], count: int
) -> Callable[[int, Sequence[int], np.ndarray], int]:
    """Split axes along the part that the keep at the ends was cut along.

    Where the labels tell nothing of it, as where an axis of that shape was split last.
    """
    goes = np.zeros(count, bool)
    for end in ends:
        goes[end.labels] = ~end.kept
    before: dict[tuple[int, ...], int] = {}

    def split(site: int, sizes: Sequence[int], grid: np.ndarray) -> int:
        del site
        gone = goes[np.where(grid < count, grid, 0)]
        fits = [a for a in range(len(sizes)) if _repeats(gone, a)] if gone.any() else []
        shape = tuple(sizes)
        if fits:
            before[shape] = max(fits, key=lambda a: (sizes[a], a))
        return before.get(shape, longest(sizes))

    return split


def _repeats(grid: np.ndarray, axis: int) -> bool:
    """Whether a grid is the same along every axis but one."""
    rows = np.moveaxis(grid, axis, -1).reshape(-1, grid.shape[axis])
    return bool((rows == rows[:1]).all())


class _End(NamedTuple):
    """A cut axis of an input or output: its labels, and which indices are kept.

    called: the input or output. firm: whose removal must be the same as masking.
    """

    called: str
    number: int
    labels: np.ndarray
    kept: np.ndarray
    firm: np.ndarray


def _seed(
    labels: Labels,
    called: str,
    shape: Sequence[int],
    kept: Kept,
    fill: tuple[float | None, ...],
) -> tuple[Value, list[_End]]:
    """Labels for the cut axes of an end of the program, with what is kept of them."""
    axes, seeds = [], []
    for number, (length, indices) in enumerate(zip(shape, kept)):
        axis = None if indices is None else labels.fresh(length)
        if axis is not None:
            mask = np.zeros(length, bool)
            mask[indices] = True
            seeds.append(_End(called, number, axis, mask, np.zeros(length, bool)))
        axes.append(axis)
    return Value(tuple(axes), tuple(fill)), seeds


def _resolver(labels: Labels, ends: Sequence[_End], name: str) -> Resolver:
    solved = labels.solve(balance=False)
    number = len(solved.frozen)
    stays, goes = solved.frozen.copy(), np.zeros(number, bool)
    for end in ends:
        component = solved.component[end.labels]
        stays[component[end.kept]] = True
        goes[component[~end.kept]] = True
        wrong = component[~end.kept & end.firm]
        for found in wrong[solved.inexact[wrong]][:1]:
            raise GraphError(
                f"in {name}, {solved.causes[int(found)]} does not do without removed "
                "channels of an exact group what it does with zeros; keep them, or "
                "trace the function in this mode"
            )
    both = np.flatnonzero(stays & goes)
    if len(both):
        found = int(both[0])
        gone = _place(ends, solved.component, found, kept=False)
        stay = _place(ends, solved.component, found, kept=True)
        cause = solved.causes.get(found, stay or "what stays")
        raise GraphError(
            f"in {name}, removed channels are tied to {cause}: {gone} is removed; keep "
            "it, or trace the function in this mode"
        )
    for line, groups in labels.balances:
        gone = goes[solved.component[line]].reshape(groups, -1).sum(1)
        if (gone != gone[0]).any():
            raise GraphError(
                f"in {name}, some of a convolution's {groups} groups lose more "
                "channels than others; trace the function in this mode"
            )
    return Resolver(solved.component, goes)


def _place(
    ends: Sequence[_End], component: np.ndarray, found: int, *, kept: bool
) -> str | None:
    """An index of an end that is kept, or is not, of this component; in words."""
    for end in ends:
        here = (component[end.labels] == found) & (end.kept == kept)
        if here.any():
            index = int(np.flatnonzero(here)[0])
            return f"index {index} along axis {end.number} of {end.called}"
    return None


@dataclasses.dataclass(frozen=True, eq=False)
class Resolver:
    """resolver(value): per axis the indices that a plan keeps, or None for all.

    goes: bool[components]. bodies: what was jitted for the plan, by the id of its node.
    """

    component: np.ndarray
    goes: np.ndarray
    bodies: dict[int, tuple[Any, Any]] = dataclasses.field(default_factory=dict)
    _known: dict[int, tuple[np.ndarray, np.ndarray | None]] = dataclasses.field(
        default_factory=dict
    )

    def __call__(self, value: Value) -> Kept:
        return tuple(None if axis is None else self._of(axis) for axis in value.labels)

    def _of(self, axis: np.ndarray) -> np.ndarray | None:
        if id(axis) not in self._known:
            kept = kept_indices(~self.goes[self.component[axis]])
            self._known[id(axis)] = axis, kept
        return self._known[id(axis)][1]
