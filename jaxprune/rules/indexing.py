# SPDX-License-Identifier: Apache-2.0
"""Primitives that read or write parts of an array.

Where the part is known when the program is made, its labels are cut out. Of what is
indexed at run time nothing can be cut; the axes that are taken whole pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxprune import jaxpr as jx
from jaxprune.labels import Axis, Value, fixed, unknown
from jaxprune.walk import Context, Cut, Rule, pick, rebind


def _slice(context: Context, eqn: jx.Eqn, ins: Sequence[Value]) -> list[Value]:
    (value,), windows = ins, _windows(eqn)
    labels = [
        _part(context, eqn, axis, None if axis is None else axis[w])
        for axis, w in zip(value.labels, windows)
    ]
    return [value._replace(labels=tuple(labels), leaf=None, even=())]


def _part(context: Context, eqn: jx.Eqn, axis: Axis, part: Axis) -> Axis:
    """Part of an axis; one index alone is an axis that cannot vanish, so it stays."""
    if axis is None or part is None or len(part) > 1 or len(axis) == 1:
        return part
    context.labels.freeze(part, jx.Site(eqn))
    return None


def _windows(eqn: jx.Eqn) -> list[slice]:
    p = eqn.params
    strides = p["strides"] or (1,) * len(p["start_indices"])
    return [slice(*w) for w in zip(p["start_indices"], p["limit_indices"], strides)]


def _rewrite_slice(cut: Cut) -> list[Any]:
    (x,) = cut.args
    windows = _windows(cut.eqn)
    starts, limits, strides = [], [], []
    for w, kept in zip(windows, cut.kept_in(0)):
        plain = kept is None
        starts.append(w.start if plain else 0)
        limits.append(w.stop if kept is None else len(kept))
        strides.append((w.step or 1) if plain else 1)
    x = jax.lax.slice(x, starts, limits, strides)
    for axis, (w, kept) in enumerate(zip(windows, cut.kept_in(0))):
        if kept is not None:
            x = pick(x, axis, _positions(kept, w))
    return [x]


def _positions(kept: np.ndarray, window: slice) -> np.ndarray:
    """Where the kept indices that a window selects lie among the kept ones."""
    chosen = np.arange(window.start, window.stop, window.step or 1)
    return np.flatnonzero(np.isin(kept, chosen))


def _split(context: Context, eqn: jx.Eqn, ins: Sequence[Value]) -> list[Value]:
    (value,), along = ins, eqn.params["axis"]
    ends = np.cumsum(eqn.params["sizes"])[:-1]
    length = eqn.invars[0].aval.shape[along]
    axis = value.labels[along]
    parts = np.split(np.zeros(length, int) if axis is None else axis, ends)
    pieces = []
    for part in parts:
        labels = list(value.labels)
        labels[along] = None if axis is None else _part(context, eqn, axis, part)
        pieces.append(value._replace(labels=tuple(labels), leaf=None, even=()))
    return pieces


def _rewrite_split(cut: Cut) -> list[Any]:
    along = cut.eqn.params["axis"]
    sizes = [cut.shape_out(i)[along] for i in range(len(cut.eqn.outvars))]
    return cut.bind(sizes=tuple(sizes))


def _dynamic_slice(context: Context, eqn: jx.Eqn, ins: Sequence[Value]) -> list[Value]:
    value, sizes = ins[0], eqn.params["slice_sizes"]
    labels: list[Axis] = []
    for axis, size in enumerate(sizes):
        whole = size == eqn.invars[0].aval.shape[axis]
        if not whole:
            context.labels.freeze(value.labels[axis], jx.Site(eqn))
        labels.append(value.labels[axis] if whole else None)
    return [value._replace(labels=tuple(labels), leaf=None, even=())]


def _rewrite_dynamic_slice(cut: Cut) -> list[Any]:
    return cut.bind(slice_sizes=cut.shape_out())


def _dynamic_update_slice(
    context: Context, eqn: jx.Eqn, ins: Sequence[Value]
) -> list[Value]:
    shapes = [atom.aval.shape for atom in eqn.invars[:2]]
    whole = {a: a for a, (n, part) in enumerate(zip(*shapes)) if n == part}
    return [_written(context, eqn, ins[0], ins[1], whole)]


def _written(
    context: Context,
    eqn: jx.Eqn,
    value: Value,
    update: Value,
    whole: dict[int, int],
    batch: dict[int, Axis] | None = None,
) -> Value:
    """An array into which an update is written.

    whole: {axis of the array: axis of the update that goes with it}; batch: {axis of
    the array: labels of the indices that go with it}. All other axes are fixed.
    """
    cause, ndim = jx.Site(eqn), len(value.labels)
    labels, fill = list(fixed(ndim).labels), list(fixed(ndim).fill)
    for axis, line in enumerate(value.labels):
        if axis not in whole:
            context.labels.freeze(line, cause)
            continue
        other = whole[axis]
        labels[axis] = context.labels.unify(line, update.labels[other], cause)
        if batch and axis in batch:
            labels[axis] = context.labels.unify(labels[axis], batch[axis], cause)
        known = {value.removed(axis), update.removed(other)}
        # What is set, or is the larger, of two equal numbers is that number.
        chosen = len(known) == 1 and eqn.primitive.name in _CHOOSING
        fill[axis] = known.pop() if known == {0.0} or chosen else unknown(*known)
        # `x.at[...].apply(f)` is a scatter that says so nowhere else.
        if eqn.primitive.name == "scatter" and eqn.params["update_jaxpr"] is not None:
            fill[axis] = math.nan
    for axis, line in enumerate(update.labels):
        if axis not in whole.values():
            context.labels.freeze(line, cause)
    return Value(tuple(labels), tuple(fill))


_CHOOSING = ("dynamic_update_slice", "scatter", "scatter-max", "scatter-min")


def _gather(context: Context, eqn: jx.Eqn, ins: Sequence[Value]) -> list[Value]:
    """Axes of the operand that are taken whole, and those of the indices."""
    (value, indices), dims = ins, eqn.params["dimension_numbers"]
    shape, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
    cause, ndim = jx.Site(eqn), len(eqn.outvars[0].aval.shape)
    batch = dict(zip(dims.start_indices_batching_dims, dims.operand_batching_dims))
    labels, fill = list(fixed(ndim).labels), list(fixed(ndim).fill)
    rows = [d for d in range(ndim) if d not in dims.offset_dims]
    for row, (to, line) in enumerate(zip(rows, indices.labels)):
        labels[to] = line
        if row in batch:
            labels[to] = context.labels.unify(line, value.labels[batch[row]], cause)
            fill[to] = value.removed(batch[row])
    context.labels.freeze(indices.labels[-1], cause)
    chosen = _chosen(eqn, ins)
    if chosen is not None:
        axis, to, index = chosen
        picked = np.asarray(value.labels[axis])[index]
        labels[to] = context.labels.unify(picked, labels[to], cause)
        fill[to] = value.removed(axis)

    dropped = (*dims.collapsed_slice_dims, *dims.operand_batching_dims)
    taken = [a for a in range(len(shape)) if a not in dropped]
    for to, axis in zip(dims.offset_dims, taken):
        if axis not in dims.start_index_map and sizes[axis] == shape[axis]:
            labels[to], fill[to] = value.labels[axis], value.removed(axis)
        else:
            context.labels.freeze(value.labels[axis], cause)
    for axis in dims.collapsed_slice_dims:
        if chosen is None or axis != chosen[0]:
            context.labels.freeze(value.labels[axis], cause)
    if chosen is None and "FILL" in str(eqn.params["mode"]).upper():
        fill = [unknown(number) for number in fill]
    return [Value(tuple(labels), tuple(fill))]


def _chosen(eqn: jx.Eqn, ins: Sequence[Value]) -> tuple[int, int, np.ndarray] | None:
    """Of indices that are constants: the axis that they are of, that of the output.

    None where they are not known, go beyond, or are not one row of indices of one axis.
    """
    (value, indices), dims = ins, eqn.params["dimension_numbers"]
    rows = set(range(len(eqn.outvars[0].aval.shape))) - set(dims.offset_dims)
    if indices.array is None or len(dims.start_index_map) != 1 or len(rows) != 1:
        return None
    (axis,), (to,), index = dims.start_index_map, rows, indices.array.reshape(-1)
    line = value.labels[axis]
    if line is None or not index.size or index.min() < 0 or index.max() >= len(line):
        return None
    known = indices.labels[0] is not None and axis in dims.collapsed_slice_dims
    return (axis, to, index) if known else None


def _rewrite_gather(cut: Cut) -> list[Any]:
    sizes = [
        n if kept is None or n == 1 else len(kept)
        for n, kept in zip(cut.eqn.params["slice_sizes"], cut.kept_in(0))
    ]
    x, indices = cut.args
    chosen = _chosen(cut.eqn, cut.node.ins)
    if chosen is not None and (kept := cut.kept_in(0)[chosen[0]]) is not None:
        _, to, index = chosen
        rows = cut.kept_out()[to]
        index = np.searchsorted(kept, index if rows is None else index[rows])
        indices = index[:, None].astype(indices.dtype)
    return cut.bind(x, indices, slice_sizes=tuple(sizes))


def _scatter(context: Context, eqn: jx.Eqn, ins: Sequence[Value]) -> list[Value]:
    (value, indices, update), dims = ins, eqn.params["dimension_numbers"]
    shape, part = eqn.invars[0].aval.shape, eqn.invars[2].aval.shape
    dropped = (*dims.inserted_window_dims, *dims.operand_batching_dims)
    windows = [a for a in range(len(shape)) if a not in dropped]
    whole = {
        axis: other
        for axis, other in zip(windows, dims.update_window_dims)
        if axis not in dims.scatter_dims_to_operand_dims and shape[axis] == part[other]
    }
    rows = [d for d in range(len(part)) if d not in dims.update_window_dims]
    batch = dict(zip(dims.operand_batching_dims, dims.scatter_indices_batching_dims))
    whole |= {axis: rows[d] for axis, d in batch.items()}
    for d, line in enumerate(indices.labels):
        if d not in batch.values():
            context.labels.freeze(line, jx.Site(eqn))
    lines = {axis: indices.labels[d] for axis, d in batch.items()}
    return [_written(context, eqn, value, update, whole, lines)]


RULES = {
    "dynamic_slice": Rule(_dynamic_slice, _rewrite_dynamic_slice),
    "dynamic_update_slice": Rule(_dynamic_update_slice, rebind),
    "gather": Rule(_gather, _rewrite_gather),
    "slice": Rule(_slice, _rewrite_slice),
    "split": Rule(_split, _rewrite_split),
    **{
        name: Rule(_scatter, rebind)
        for name in (
            *("scatter", "scatter-add", "scatter-sub", "scatter-mul"),
            *("scatter-min", "scatter-max"),
        )
    },
}
