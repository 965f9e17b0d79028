# SPDX-License-Identifier: Apache-2.0
"""Primitives that move, repeat or make indices: labels are moved with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune import jaxpr as jx
from jaxprune.labels import Axis, Value, fixed, joined
from jaxprune.walk import Context, Cut, Rule, freeze_all, take


def _broadcast(context: Context, eqn: jx.Eqn, ins: Sequence[Value]) -> list[Value]:
    """New axes get labels of their own: they can be made at any length."""
    (value, *_), shape = ins, eqn.params["shape"]
    labels = [context.labels.fresh(n) for n in shape]
    context.labels.repeats |= {int(axis[0]) for axis in labels if axis is not None}
    fill: list[float | None] = [value.const] * len(shape)
    for axis, to in enumerate(eqn.params["broadcast_dimensions"]):
        if eqn.invars[0].aval.shape[axis] == shape[to]:
            labels[to] = value.labels[axis]
            fill[to] = value.fill[axis]
    return [Value(tuple(labels), tuple(fill), value.const, value.leaf)]


def _rewrite_broadcast(cut: Cut) -> list[Any]:
    return cut.bind(shape=cut.shape_out())


def _transpose(context: Context, eqn: jx.Eqn, ins: Sequence[Value]) -> list[Value]:
    del context
    (value,), order = ins, eqn.params["permutation"]
    labels = tuple(value.labels[a] for a in order)
    return [value._replace(labels=labels, fill=tuple(value.fill[a] for a in order))]


def _squeeze(context: Context, eqn: jx.Eqn, ins: Sequence[Value]) -> list[Value]:
    del context
    (value,) = ins
    rest = [a for a in range(len(value.labels)) if a not in eqn.params["dimensions"]]
    labels = tuple(value.labels[a] for a in rest)
    return [value._replace(labels=labels, fill=tuple(value.fill[a] for a in rest))]


def _reverse(context: Context, eqn: jx.Eqn, ins: Sequence[Value]) -> list[Value]:
    del context
    (value,), turned = ins, eqn.params["dimensions"]
    labels = tuple(
        axis[::-1] if a in turned and axis is not None else axis
        for a, axis in enumerate(value.labels)
    )
    return [value._replace(labels=labels, leaf=None)]


def _same(cut: Cut) -> list[Any]:
    return cut.bind()


def _concatenate(context: Context, eqn: jx.Eqn, ins: Sequence[Value]) -> list[Value]:
    along, shape = eqn.params["dimension"], eqn.outvars[0].aval.shape
    labels: list[Axis] = []
    fill: list[float | None] = []
    for axis in range(len(shape)):
        axes = [v.labels[axis] for v in ins]
        known = {v.removed(axis) for v, a in zip(ins, axes) if a is not None}
        fill.append(known.pop() if len(known) == 1 else None)
        if axis == along:
            lengths = [atom.aval.shape[axis] for atom in eqn.invars]
            labels.append(joined(list(zip(axes, lengths))))
            continue
        labels.append(context.labels.unify_all(axes, jx.Site(eqn)))
    return [Value(tuple(labels), tuple(fill))]


def _stack(context: Context, eqn: jx.Eqn, ins: Sequence[Value]) -> list[Value]:
    axis, ndim = eqn.params["axis"], len(eqn.outvars[0].aval.shape)
    labels: list[Axis] = []
    fill: list[float | None] = []
    for old in range(ndim - 1):
        axes = [value.labels[old] for value in ins]
        labels.append(context.labels.unify_all(axes, jx.Site(eqn)))
        known = {value.removed(old) for value in ins}
        fill.append(known.pop() if len(known) == 1 else None)
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
    """Copies of an index go together."""
    (value,), reps = ins, eqn.params["reps"]
    new = len(eqn.outvars[0].aval.shape)
    labels = (None,) * (new - len(value.labels)) + value.labels
    fill = (None,) * (new - len(value.fill)) + value.fill
    for axis, times in zip(labels, reps):
        if axis is not None and times == 0:
            context.labels.freeze(axis, jx.Site(eqn))
    tiled = tuple(
        axis if axis is None or times == 1 else np.tile(axis, times)
        for axis, times in zip(labels, reps)
    )
    return [Value(tiled, fill, value.const)]


def _pad(context: Context, eqn: jx.Eqn, ins: Sequence[Value]) -> list[Value]:
    """Padded-on indices are free: they go with whatever they are added to."""
    value, padding = ins
    config = eqn.params["padding_config"]
    padded = any(map(any, config))
    labels: list[Axis] = []
    fill: list[float | None] = []
    for axis, (low, high, inner) in enumerate(config):
        # What pads one axis also lies at the removed indices of the others.
        known = value.removed(axis)
        fill.append(None if padded and padding.const != known else known)
        old, length = value.labels[axis], eqn.invars[0].aval.shape[axis]
        if low == high == inner == 0:
            labels.append(old)
        elif old is None or inner or low < 0 or high < 0:
            context.labels.freeze(old, jx.Site(eqn))
            labels.append(None)
        else:
            ends = [(_fresh(context, n), n) for n in (low, high)]
            labels.append(joined([ends[0], (old, length), ends[1]]))
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
    new = eqn.outvars[0].aval.shape
    if value.const is not None:
        axes = tuple(context.labels.fresh(n) for n in new)
        return [Value(axes, (None,) * len(new), value.const)]
    if eqn.params["dimensions"] is not None or 0 in old:
        return freeze_all(context, eqn, ins)
    labels: list[Axis] = [None] * len(new)
    fill: list[float | None] = [None] * len(new)
    for olds, news in _blocks(old, new):
        _reshape_block(context, eqn, value, olds, news, labels, fill)
    return [Value(tuple(labels), tuple(fill), None, value.leaf)]


def _blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[list, list]]:
    """Pairs of runs of axes, longer than 1, with the same product."""
    olds = [a for a, n in enumerate(old) if n != 1]
    news = [a for a, n in enumerate(new) if n != 1]
    blocks, i, j = [], 0, 0
    while i < len(olds) and j < len(news):
        left, right = [olds[i]], [news[j]]
        i, j = i + 1, j + 1
        while (a := math.prod(old[k] for k in left)) != (
            b := math.prod(new[k] for k in right)
        ):
            if a < b:
                left.append(olds[i])
                i += 1
            else:
                right.append(news[j])
                j += 1
        blocks.append((left, right))
    return blocks


def _reshape_block(
    context: Context,
    eqn: jx.Eqn,
    value: Value,
    olds: list[int],
    news: list[int],
    labels: list[Axis],
    fill: list[float | None],
) -> None:
    old = [eqn.invars[0].aval.shape[a] for a in olds]
    new = [eqn.outvars[0].aval.shape[a] for a in news]
    pairs = [(a, value.labels[a]) for a in olds]
    loose = [(a, line) for a, line in pairs if line is not None]
    if not loose:
        return
    # One axis of those that merge can be cut: the last that is more than repetition.
    loose.sort(key=lambda pair: int(pair[1][0]) not in context.labels.repeats)
    for _, fixed_line in loose[:-1]:
        context.labels.freeze(fixed_line, jx.Site(eqn))
    last, line = loose[-1]
    place = [-1 if a == last else 1 for a in olds]
    merged = np.broadcast_to(np.reshape(line, place), old).ravel()
    if len(news) == 1:
        labels[news[0]], fill[news[0]] = merged, value.fill[last]
        return
    grid = merged.reshape(new)
    varying = _varying(grid)
    longest = max(range(len(new)), key=lambda a: (new[a], a))
    axis = longest if varying is None else varying
    lines = np.moveaxis(grid, axis, -1).reshape(-1, new[axis])
    if not (lines == lines[:1]).all():
        for other in lines[1:]:
            context.labels.unify(lines[0], other, jx.Site(eqn))
    labels[news[axis]], fill[news[axis]] = lines[0], value.fill[last]


def _varying(grid: np.ndarray) -> int | None:
    """The one axis along which a tiled array of labels changes, if there is one."""
    for axis in range(grid.ndim):
        lines = np.moveaxis(grid, axis, -1).reshape(-1, grid.shape[axis])
        if (lines == lines[:1]).all():
            return axis
    return None


def _rewrite_reshape(cut: Cut) -> list[Any]:
    const, shape = cut.node.ins[0].const, cut.shape_out()
    if const is not None:
        return [jnp.full(shape, const, cut.eqn.outvars[0].aval.dtype)]
    return cut.bind(new_sizes=shape)


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
        labels = tuple(context.labels.fresh(n) for n in shape)
        outs.append(Value(labels, (None,) * len(shape)))
    return outs


def _rewrite_source(cut: Cut) -> list[Any]:
    """Made whole, then cut: positions and random draws are the masked network's."""
    return [take(x, cut.kept_out(i)) for i, x in enumerate(cut.bind())]


RULES = {
    "broadcast_in_dim": Rule(_broadcast, _rewrite_broadcast),
    "concatenate": Rule(_concatenate, _same),
    "pad": Rule(_pad, _rewrite_pad),
    "reshape": Rule(_reshape, _rewrite_reshape),
    "rev": Rule(_reverse, _same),
    "stack": Rule(_stack, _same),
    "squeeze": Rule(_squeeze, _same),
    "tile": Rule(_tile, _same),
    "unstack": Rule(_unstack, _same),
    "transpose": Rule(_transpose, _same),
    **{
        name: Rule(_source, _rewrite_source)
        for name in ("iota", "random_bits", "rng_uniform", "rng_bit_generator")
    },
    **{
        name: Rule(_source, _same)
        for name in (
            "random_clone",
            "random_fold_in",
            "random_seed",
            "random_split",
            "random_wrap",
        )
    },
}
