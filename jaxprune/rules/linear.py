# SPDX-License-Identifier: Apache-2.0
"""Convolutions and matrix products: summed axes pair up, the others pass through.

A sum over a cut axis is exact if either operand is zero where removed. These are the
equations that cost: each leaves its terms for `jaxprune.cost`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxprune import jaxpr as jx
from jaxprune.balance import Balance
from jaxprune.base import INPUT, WINDOW
from jaxprune.labels import FROM_INPUT, Axis, Labels, RawTerm, Value, unknown
from jaxprune.rules.elementwise import zero_product
from jaxprune.walk import Axes, Context, Cut, Rule, rebind


def _contract(
    context: Context, eqn: jx.Eqn, a: tuple[Value, int], b: tuple[Value, int]
) -> Axis:
    """Tie a pair of summed axes."""
    labels = context.labels
    axes = [value.labels[axis] for value, axis in (a, b)]
    for (value, _), axis in zip((a, b), axes):
        if value.leaf not in (None, FROM_INPUT) and axis is not None:
            labels.consumed.append(axis)
    from_input = FROM_INPUT in (a[0].leaf, b[0].leaf)
    cause = INPUT if from_input else jx.Site(eqn)
    tied = labels.unify(axes[0], axes[1], cause)
    if not zero_product(a[0].removed(a[1]), b[0].removed(b[1])):
        labels.inexact(tied, jx.Site(eqn))
    return tied


def _zero(value: Value, axis: int) -> float | None:
    """Sums of zeros are zero; of anything else, unknown."""
    number = value.removed(axis)
    return 0.0 if number == 0 else unknown(number)


def _add_terms(
    context: Context,
    eqn: jx.Eqn,
    value: Value,
    summed: list[tuple[int, Axis]],
) -> None:
    """2 x (output elements) x (summed indices) FLOPs; the output's bytes."""
    shapes = [v.aval.shape for v in (*eqn.invars, *eqn.outvars)]
    if not all(isinstance(n, int) for shape in shapes for n in shape):
        return  # sizes are symbols where a function is exported; none counts it
    scale = 1.0 if eqn.primitive.name == "dot_general" else positions(eqn)
    out = eqn.outvars[0].aval
    written = list(zip(out.shape, value.labels))
    for flops, factor, axes in (
        (True, 2 * scale, written + summed),
        (False, out.dtype.itemsize, written),
    ):
        fixed = math.prod(n for n, axis in axes if axis is None)
        loose = tuple(axis for _, axis in axes if axis is not None)
        context.labels.terms.append(
            RawTerm(
                "flops" if flops else "activation_bytes",
                round(factor * fixed),
                loose,
                eqn.primitive.name,
            )
        )


def _dot_general(context: Context, eqn: jx.Eqn, ins: Sequence[Value]) -> list[Value]:
    (left, right), (summed, _) = ins, eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    ties = [
        (shape[i], _contract(context, eqn, (left, i), (right, j)))
        for i, j in zip(*summed)
    ]
    labels: list[Axis] = []
    fill: list[float | None] = []
    even: list[bool] = []
    for pair in _made(eqn):
        if len(pair) == 2:  # a batch axis
            lines = [(left, right)[side].labels[axis] for side, axis in pair]
            labels.append(context.labels.unify_all(lines, jx.Site(eqn)))
            numbers = [(left, right)[side].removed(axis) for side, axis in pair]
            fill.append(0.0 if zero_product(*numbers) else unknown(*numbers))
        else:
            ((side, axis),) = pair
            labels.append((left, right)[side].labels[axis])
            fill.append(_zero((left, right)[side], axis))
        even.append(all((left, right)[side].is_even(axis) for side, axis in pair))
    out = Value(tuple(labels), tuple(fill), even=tuple(even))
    _add_terms(context, eqn, out, ties)
    return [out]


def _made(eqn: jx.Eqn) -> list[tuple[tuple[int, int], ...]]:
    """For each axis of a matrix product's output, the (operand, axis) it is made of."""
    summed, batch = eqn.params["dimension_numbers"]
    free = [
        ((side, axis),)
        for side, (atom, s, b) in enumerate(zip(eqn.invars, summed, batch))
        for axis in range(len(atom.aval.shape))
        if axis not in (*s, *b)
    ]
    return [*(((0, i), (1, j)) for i, j in zip(*batch)), *free]


def _dot_at_removed(cut: Cut, axes: Axes) -> Any:
    made, args = _made(cut.eqn), []
    for i in (0, 1):
        mine = [a for axis in axes for side, a in made[axis] if side == i]
        args.append(cut.at_removed(i, tuple(mine)))
    return cut.bind(*args)[0]


def _conv(context: Context, eqn: jx.Eqn, ins: Sequence[Value]) -> list[Value]:
    p, (image, kernel) = eqn.params, ins
    dims, labels = p["dimension_numbers"], context.labels
    (batch, feature, *space), (to, of, *window) = dims.lhs_spec, dims.rhs_spec
    for value, axes in ((image, space), (kernel, window)):
        for axis in axes:
            labels.freeze(value.labels[axis], WINDOW)

    made, filled = kernel.labels[to], _zero(kernel, to)
    for axis, groups in (
        (feature, p["feature_group_count"]),
        (batch, p["batch_group_count"]),
    ):
        if groups > 1:
            line, made, whole = _grouped(
                labels, image.labels[axis], made, groups, jx.Site(eqn)
            )
            if whole and _zero(image, axis) == 0:
                filled = 0.0
            image = image._replace(labels=_put(image.labels, axis, line))
    summed = _contract(context, eqn, (image, feature), (kernel, of))
    ndim, (b, f, *_) = len(kernel.labels), dims.out_spec
    out = Value(
        _put(_put((None,) * ndim, b, image.labels[batch]), f, made),
        _put(_put((None,) * ndim, b, _zero(image, batch)), f, filled),
    )
    kernel_shape = eqn.invars[1].aval.shape
    taps = [(kernel_shape[a], None) for a in window]
    terms = [*taps, (kernel_shape[of], summed)]
    _add_terms(context, eqn, out, terms)
    return [out]


def _put(line: tuple, place: int, item: Any) -> tuple:
    return (*line[:place], item, *line[place + 1 :])


def _grouped(
    labels: Labels, read: Axis, made: Axis, groups: int, cause: object
) -> tuple[Axis, Axis, bool]:
    """What goes from the read and made channels of a convolution in groups.

    Either whole groups, read and made, or the same channels of every group, read and
    made each by themselves: whichever leaves more to choose from. Depthwise, where a
    group reads one channel, whole groups. `Labels.later`, for shuffles: never whole
    groups but there, and any made channels that are as many of every group. Returns
    what is cut of one group's read channels, the labels of all that are made, and
    whether whole groups go.
    """
    if read is not None and made is not None:
        each = [len(axis) // groups for axis in (read, made)]
        many = not labels.later and groups >= sum(n for n in each if n > 1)
        if each[0] == 1 or many:
            ins, outs = read.reshape(groups, -1), made.reshape(groups, -1)
            for column in (*ins.T[1:], *outs.T):
                labels.unify(ins[:, 0], column, cause)
            return None, np.repeat(outs[:, 0], outs.shape[1]), True
    if made is not None and len(made) > groups:
        labels.balances.append(Balance(made, groups))
        if labels.later:
            return _of_each_group(labels, read, groups, cause), made, False
    # Tiled, so that a reshape that takes the groups apart sees what they share.
    line, every = (_of_each_group(labels, a, groups, cause) for a in (read, made))
    return line, None if every is None else np.tile(every, groups), False


def _of_each_group(labels: Labels, axis: Axis, groups: int, cause: object) -> Axis:
    """Tie the same index of every group; one group's labels."""
    if axis is None:
        return None
    lines = axis.reshape(groups, -1)
    for other in lines[1:]:
        labels.unify(lines[0], other, cause)
    if len(lines[0]) > 1:
        return lines[0]
    labels.freeze(lines[0], cause)
    return None


def positions(eqn: jx.Eqn) -> float:
    """Positions at which the window is applied, over those of the output.

    A transposed convolution applies it once per input position.
    """
    dims, share = eqn.params["dimension_numbers"], 1.0
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    for dilation, i, o in zip(
        eqn.params["lhs_dilation"], dims.lhs_spec[2:], dims.out_spec[2:]
    ):
        if dilation > 1:
            share *= before[i] / after[o]
    return share


def _rewrite_conv(cut: Cut) -> list[Any]:
    """As many groups as there are left: with channels of each cut, all of them."""
    dims, (image, kernel) = cut.eqn.params["dimension_numbers"], cut.args
    batch, feature, *_ = dims.lhs_spec
    whole = cut.eqn.params["batch_group_count"]
    # Of no images at all there is nothing to count by.
    made = cut.shape_out()[dims.out_spec[0]]
    batches = np.shape(image)[batch] // made if made else whole
    groups = np.shape(image)[feature] // np.shape(kernel)[dims.rhs_spec[1]]
    return cut.bind(feature_group_count=groups, batch_group_count=batches)


RULES = {
    "conv_general_dilated": Rule(_conv, _rewrite_conv),
    "dot_general": Rule(_dot_general, rebind, _dot_at_removed),
}
