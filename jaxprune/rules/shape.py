# SPDX-License-Identifier: Apache-2.0
"""Primitives that move, repeat or make indices: labels are moved with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune import jaxpr as jx
from jaxprune.labels import (
    FROM_INPUT,
    Axis,
    Labels,
    Split,
    Value,
    fixed,
    joined,
    unknown,
)
from jaxprune.shuffles import blocks
from jaxprune.walk import Axes, Context, Cut, Rule, rebind, take


def _broadcast(context: Context, eqn: jx.Eqn, ins: Sequence[Value]) -> list[Value]:
    """New axes get labels of their own: they can be made at any length."""
    (value, *_), shape = ins, eqn.params["shape"]
    labels = [context.labels.fresh_repeat(n) for n in shape]
    fill: list[float | None] = [value.const] * len(shape)
    even = [True] * len(shape)
    for axis, to in enumerate(eqn.params["broadcast_dimensions"]):
        if eqn.invars[0].aval.shape[axis] == shape[to]:
            labels[to] = value.labels[axis]
            fill[to] = value.fill[axis]
            even[to] = value.is_even(axis)
    return [Value(tuple(labels), tuple(fill), value.const, value.leaf, tuple(even))]


def _rewrite_broadcast(cut: Cut) -> list[Any]:
    return cut.bind(shape=cut.shape_out())


def _broadcast_at_removed(cut: Cut, axes: Axes) -> Any:
    new, mine = cut.eqn.outvars[0].aval.shape, []
    for axis, to in enumerate(cut.eqn.params["broadcast_dimensions"]):
        if to in axes and cut.eqn.invars[0].aval.shape[axis] == new[to]:
            mine.append(axis)
    x = cut.at_removed(0, tuple(mine))
    return cut.bind(x, *cut.args[1:], shape=cut.shape_out())[0]


def _fold_broadcast(eqn: jx.Eqn, arrays: Sequence[np.ndarray]) -> np.ndarray:
    shape = [1] * len(eqn.params["shape"])
    for n, to in zip(arrays[0].shape, eqn.params["broadcast_dimensions"]):
        shape[to] = n
    return np.broadcast_to(arrays[0].reshape(shape), eqn.params["shape"])


def _fold_iota(eqn: jx.Eqn, arrays: Sequence[np.ndarray]) -> np.ndarray:
    del arrays
    shape, axis = eqn.params["shape"], eqn.params["dimension"]
    line = np.arange(shape[axis], dtype=eqn.params["dtype"])
    return np.broadcast_to(line.reshape([-1] + [1] * (len(shape) - axis - 1)), shape)


def _fold_reshape(eqn: jx.Eqn, arrays: Sequence[np.ndarray]) -> np.ndarray | None:
    """A squeeze too."""
    permuted = eqn.params.get("dimensions") if "new_sizes" in eqn.params else None
    return arrays[0].reshape(eqn.outvars[0].aval.shape) if permuted is None else None


def _fold_transpose(eqn: jx.Eqn, arrays: Sequence[np.ndarray]) -> np.ndarray:
    return arrays[0].transpose(eqn.params["permutation"])


def _fold_reverse(eqn: jx.Eqn, arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.flip(arrays[0], eqn.params["dimensions"])


def _fold_concatenate(eqn: jx.Eqn, arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays, eqn.params["dimension"])


def _transpose(context: Context, eqn: jx.Eqn, ins: Sequence[Value]) -> list[Value]:
    del context
    return [_permuted(ins[0], eqn.params["permutation"])]


def _permuted(value: Value, order: Sequence[int]) -> Value:
    return value._replace(
        labels=tuple(value.labels[a] for a in order),
        fill=tuple(value.fill[a] for a in order),
        even=tuple(value.is_even(a) for a in order),
    )


def _transpose_at_removed(cut: Cut, axes: Axes) -> Any:
    order = cut.eqn.params["permutation"]
    return cut.bind(cut.at_removed(0, tuple(order[a] for a in axes)))[0]


def _squeeze(context: Context, eqn: jx.Eqn, ins: Sequence[Value]) -> list[Value]:
    del context
    (value,) = ins
    return [_permuted(value, _unsqueezed(eqn))]


def _unsqueezed(eqn: jx.Eqn) -> list[int]:
    ndim, gone = len(eqn.invars[0].aval.shape), eqn.params["dimensions"]
    return [a for a in range(ndim) if a not in gone]


def _squeeze_at_removed(cut: Cut, axes: Axes) -> Any:
    rest = _unsqueezed(cut.eqn)
    return cut.bind(cut.at_removed(0, tuple(rest[a] for a in axes)))[0]


def _reverse(context: Context, eqn: jx.Eqn, ins: Sequence[Value]) -> list[Value]:
    del context
    (value,), turned = ins, eqn.params["dimensions"]
    labels = tuple(
        axis[::-1] if a in turned and axis is not None else axis
        for a, axis in enumerate(value.labels)
    )
    return [value._replace(labels=labels, leaf=None, even=())]


def _concatenate(context: Context, eqn: jx.Eqn, ins: Sequence[Value]) -> list[Value]:
    along, shape = eqn.params["dimension"], eqn.outvars[0].aval.shape
    of_variables = all(v.leaf not in (None, FROM_INPUT) for v in ins)
    labels: list[Axis] = []
    fill: list[float | None] = []
    even: list[bool] = []
    for axis in range(len(shape)):
        axes = [v.labels[axis] for v in ins]
        loose = [v for v, a in zip(ins, axes) if a is not None]
        known = {v.removed(axis) for v in loose}
        fill.append(known.pop() if len(known) == 1 else unknown(*known))
        # Of several arrays end to end, each may hold its own.
        one = axis != along or len(loose) == 1
        even.append(one and all(v.is_even(axis) for v in loose))
        if axis == along:
            lengths = [atom.aval.shape[axis] for atom in eqn.invars]
            labels.append(joined(list(zip(axes, lengths))))
            continue
        tied = context.labels.unify_all(axes, jx.Site(eqn))
        labels.append(tied)
        if of_variables and tied is not None:
            context.labels.joint.append((tied, *(a for a in axes if a is not None)))
    leaf = ins[0].leaf if of_variables else None
    return [Value(tuple(labels), tuple(fill), leaf=leaf, even=tuple(even))]


def _concatenate_at_removed(cut: Cut, axes: Axes) -> Any:
    """Along the axis that is joined, of the one array that loses indices."""
    along, ins = cut.eqn.params["dimension"], cut.node.ins
    read = [i for i, v in enumerate(ins) if v.labels[along] is not None]
    read = read if along in axes else list(range(len(ins)))
    return cut.bind(*(cut.at_removed(i, axes) for i in read))[0]


def _stack(context: Context, eqn: jx.Eqn, ins: Sequence[Value]) -> list[Value]:
    axis, ndim = eqn.params["axis"], len(eqn.outvars[0].aval.shape)
    labels: list[Axis] = []
    fill: list[float | None] = []
    for old in range(ndim - 1):
        axes = [value.labels[old] for value in ins]
        labels.append(context.labels.unify_all(axes, jx.Site(eqn)))
        known = {value.removed(old) for value in ins}
        fill.append(known.pop() if len(known) == 1 else unknown(*known))
    labels.insert(axis % ndim, None)
    fill.insert(axis % ndim, None)
    return [Value(tuple(labels), tuple(fill))]


def _unstack(context: Context, eqn: jx.Eqn, ins: Sequence[Value]) -> list[Value]:
    (value,), axis = ins, eqn.params["axis"] % len(ins[0].labels)
    context.labels.freeze(value.labels[axis], jx.Site(eqn))
    labels, fill = (
        (*line[:axis], *line[axis + 1 :]) for line in (value.labels, value.fill)
    )
    return [Value(labels, fill, value.const)] * len(eqn.outvars)


def _tile(context: Context, eqn: jx.Eqn, ins: Sequence[Value]) -> list[Value]:
    """Copies of an index go together; copies of the only one are as broadcast."""
    (value,), reps, out = ins, eqn.params["reps"], eqn.outvars[0].aval.shape
    new = (None,) * (len(out) - len(value.labels))
    labels, fill = [*new, *value.labels], [*new, *value.fill]
    for a, (axis, times) in enumerate(zip(labels, reps)):
        if times == 0:
            context.labels.freeze(axis, jx.Site(eqn))
        if axis is not None and times != 1:
            labels[a] = np.tile(axis, times)
        elif axis is None and times == out[a]:
            labels[a], fill[a] = context.labels.fresh_repeat(times), value.const
    return [Value(tuple(labels), tuple(fill), value.const)]


def _rewrite_tile(cut: Cut) -> list[Any]:
    dense, reps = cut.eqn.outvars[0].aval.shape, cut.eqn.params["reps"]
    pairs = zip(reps, dense, cut.shape_out())
    return cut.bind(reps=tuple(left if r == n else r for r, n, left in pairs))


def _pad(context: Context, eqn: jx.Eqn, ins: Sequence[Value]) -> list[Value]:
    """Padded-on indices are free: they go with whatever they are added to."""
    value, padding = ins
    config = eqn.params["padding_config"]
    padded = any(map(any, config))
    labels: list[Axis] = []
    fill: list[float | None] = []
    for axis, (low, high, inner) in enumerate(config):
        # What pads one axis also lies at the removed indices of the others. Where that
        # is -inf, for a maximum, something finite is taken to lie beside it.
        known = value.removed(axis)
        other = padded and padding.const != known
        fill.append(unknown(known) if other else known)
        old, length = value.labels[axis], eqn.invars[0].aval.shape[axis]
        if low == high == inner == 0:
            labels.append(old)
        elif inner or low < 0 or high < 0:
            context.labels.freeze(old, jx.Site(eqn))
            labels.append(None)
        else:
            ends = [(_fresh(context, n), n) for n in (low, high)]
            labels.append(joined([ends[0], (old, length), ends[1]]))
            if old is None:
                fill[axis] = padding.const
    return [Value(tuple(labels), tuple(fill))]


def _fresh(context: Context, length: int) -> Axis:
    """Labels even for one index: here it is part of a longer axis."""
    if length == 0:
        return np.zeros(0, int)
    longer = context.labels.fresh(length + 1)
    return None if longer is None else longer[:length]


def _rewrite_pad(cut: Cut) -> list[Any]:
    config = list(cut.eqn.params["padding_config"])
    for axis, kept in enumerate(cut.kept_out()):
        low, high, inner = config[axis]
        if kept is not None:
            end = cut.eqn.outvars[0].aval.shape[axis] - high
            config[axis] = (int((kept < low).sum()), int((kept >= end).sum()), inner)
    return cut.bind(padding_config=tuple(config))


def _reshape(context: Context, eqn: jx.Eqn, ins: Sequence[Value]) -> list[Value]:
    """Factor into blocks: passed on, merged (labels tiled), or split (coupled)."""
    value, old = ins[0], eqn.invars[0].aval.shape
    new, order = eqn.outvars[0].aval.shape, eqn.params["dimensions"]
    const = _number(eqn, value)
    if const is not None:
        axes = tuple(context.labels.fresh(n) for n in new)
        return [Value(axes, (None,) * len(new), const)]
    if order is not None:
        value, old = _permuted(value, order), [old[a] for a in order]
    labels: list[Axis] = [None] * len(new)
    fill: list[float | None] = [None] * len(new)
    even = [False] * len(new)
    for olds, news in blocks(old, new):
        loose = {i: a for i, a in enumerate(olds) if value.labels[a] is not None}
        if loose:
            lines = {i: np.asarray(value.labels[a]) for i, a in loose.items()}
            sizes = [old[a] for a in olds], [new[a] for a in news]
            read, made, line = _reshape_block(context.labels, eqn, lines, *sizes)
            labels[news[made]], fill[news[made]] = line, value.fill[olds[read]]
            # Beside other axes that merge, an index's copies hold what these have.
            alone = order is None and len(olds) == 1
            even[news[made]] = alone and value.is_even(olds[read])
    return [Value(tuple(labels), tuple(fill), None, value.leaf, tuple(even))]


def _number(eqn: jx.Eqn, value: Value) -> float | None:
    """The number that a whole array is; an empty one is any."""
    return 0.0 if 0 in eqn.invars[0].aval.shape else value.const


def _reshape_block(
    labels: Labels,
    eqn: jx.Eqn,
    lines: dict[int, np.ndarray],
    old: list[int],
    new: list[int],
) -> tuple[int, int, np.ndarray]:
    """Of each side one axis can be cut: which one of `lines`, of `new`, its labels."""

    # Of those that merge: more than repetition, that more than a constant; the longest.
    def worth(i: int) -> tuple[bool, bool, int, int]:
        first = int(lines[i][0])
        return first not in labels.constants, first not in labels.repeats, old[i], i

    read = max(lines, key=worth)
    for i, line in lines.items():
        if i != read:
            labels.freeze(line, jx.Site(eqn))
    place = [-1 if i == read else 1 for i in range(len(old))]
    grid = np.broadcast_to(np.reshape(lines[read], place), old).reshape(new)
    for made in range(len(new)):
        line = _first(grid, made)
        if (grid == np.expand_dims(line, tuple(range(1, len(new) - made)))).all():
            return read, made, line  # the one axis along which the labels change
    made = labels.split(id(eqn), new, grid)
    labels.splits.append(Split(id(eqn), lines[read], tuple(new), made))
    line, *others = np.moveaxis(grid, made, -1).reshape(-1, new[made])
    for other in others:
        labels.unify(line, other, jx.Site(eqn))
    return read, made, line


def _first(grid: np.ndarray, axis: int) -> np.ndarray:
    """The first line along an axis."""
    return grid[(0,) * axis + (slice(None),) + (0,) * (grid.ndim - axis - 1)]


def _rewrite_reshape(cut: Cut) -> list[Any]:
    const, shape = _number(cut.eqn, cut.node.ins[0]), cut.shape_out()
    if const is not None:
        return [jnp.full(shape, const, cut.eqn.outvars[0].aval.dtype)]
    return cut.bind(new_sizes=shape)


def _reshape_at_removed(cut: Cut, axes: Axes) -> Any:
    """Of an axis that is split, all parts hold the one number."""
    dense = (v.aval.shape for v in (cut.eqn.invars[0], cut.eqn.outvars[0]))
    found = [b for b in blocks(*dense) if set(b[1]) & set(axes)]
    parts = {a for _, news in found for a in news}
    x = cut.at_removed(0, tuple(olds[0] for olds, _ in found))
    shape = cut.shape_out()
    x = jnp.reshape(x, [1 if a in parts else n for a, n in enumerate(shape)])
    return jnp.broadcast_to(x, shape)


def _source(context: Context, eqn: jx.Eqn, ins: Sequence[Value]) -> list[Value]:
    """Arrays made from nothing: any index may be left out."""
    for value in ins:
        for axis in value.labels:
            context.labels.freeze(axis, jx.Site(eqn))
    outs = []
    for var in eqn.outvars:
        shape = getattr(var.aval, "shape", ())
        if not jx.is_array(var.aval):
            outs.append(fixed(len(shape)))
            continue
        labels = tuple(context.labels.fresh_constant(n) for n in shape)
        outs.append(Value(labels, (None,) * len(shape)))
    return outs


def _rewrite_source(cut: Cut) -> list[Any]:
    """Made whole, then cut: positions and random draws are the masked network's."""
    return [take(x, cut.kept_out(i)) for i, x in enumerate(cut.bind())]


RULES = {
    "broadcast_in_dim": Rule(
        _broadcast, _rewrite_broadcast, _broadcast_at_removed, _fold_broadcast
    ),
    "concatenate": Rule(
        _concatenate, rebind, _concatenate_at_removed, _fold_concatenate
    ),
    "iota": Rule(_source, _rewrite_source, fold=_fold_iota),
    "pad": Rule(_pad, _rewrite_pad),
    "reshape": Rule(_reshape, _rewrite_reshape, _reshape_at_removed, _fold_reshape),
    "rev": Rule(_reverse, rebind, fold=_fold_reverse),
    "stack": Rule(_stack, rebind),
    "squeeze": Rule(_squeeze, rebind, _squeeze_at_removed, _fold_reshape),
    "tile": Rule(_tile, _rewrite_tile),
    "unstack": Rule(_unstack, rebind),
    "transpose": Rule(_transpose, rebind, _transpose_at_removed, _fold_transpose),
    **{
        name: Rule(_source, _rewrite_source)
        for name in ("random_bits", "rng_uniform", "rng_bit_generator")
    },
    **{
        name: Rule(_source, rebind)
        for name in (
            "random_clone",
            "random_fold_in",
            "random_seed",
            "random_split",
            "random_wrap",
        )
    },
}
