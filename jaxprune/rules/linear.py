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
from jaxprune.base import INPUT, WINDOW
from jaxprune.labels import FROM_INPUT, Axis, RawTerm, Value
from jaxprune.walk import Context, Cut, Rule, freeze_all


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
    if 0.0 not in (a[0].removed(a[1]), b[0].removed(b[1])):
        labels.inexact(tied, jx.Site(eqn))
    return tied


def _zero(value: Value, axis: int) -> float | None:
    """Sums of zeros are zero; of anything else, unknown."""
    return 0.0 if value.removed(axis) == 0 else None


def _add_terms(
    context: Context,
    eqn: jx.Eqn,
    value: Value,
    summed: list[tuple[int, Axis]],
    scale: float = 1.0,
) -> None:
    """2 x (output elements) x (summed indices) FLOPs; the output's bytes."""
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
    (left, right), (summed, batch) = ins, eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    ties = [
        (shape[i], _contract(context, eqn, (left, i), (right, j)))
        for i, j in zip(*summed)
    ]
    labels: list[Axis] = []
    fill: list[float | None] = []
    for i, j in zip(*batch):
        tied = context.labels.unify(left.labels[i], right.labels[j], jx.Site(eqn))
        labels.append(tied)
        fill.append(0.0 if 0.0 in (left.removed(i), right.removed(j)) else None)
    for value, used in (
        (left, (*summed[0], *batch[0])),
        (right, (*summed[1], *batch[1])),
    ):
        for axis in range(len(value.labels)):
            if axis not in used:
                labels.append(value.labels[axis])
                fill.append(_zero(value, axis))
    out = Value(tuple(labels), tuple(fill))
    _add_terms(context, eqn, out, ties)
    return [out]


def _conv(context: Context, eqn: jx.Eqn, ins: Sequence[Value]) -> list[Value]:
    p, (image, kernel) = eqn.params, ins
    dims, groups = p["dimension_numbers"], p["feature_group_count"]
    (batch, feature, *space), (to, of, *window) = dims.lhs_spec, dims.rhs_spec
    if p["batch_group_count"] > 1:
        return freeze_all(context, eqn, ins)
    for value, axes in ((image, space), (kernel, window)):
        for axis in axes:
            context.labels.freeze(value.labels[axis], WINDOW)

    kernel_shape = eqn.invars[1].aval.shape
    if groups == 1:
        summed = _contract(context, eqn, (image, feature), (kernel, of))
        made = kernel.labels[to]
    else:
        made = _grouped(context, eqn, image.labels[feature], kernel, groups)
        summed = None
    ndim = len(kernel_shape)
    labels: list[Axis] = [None] * ndim
    fill: list[float | None] = [None] * ndim
    b, f, *_ = dims.out_spec
    labels[b], fill[b] = image.labels[batch], _zero(image, batch)
    labels[f], fill[f] = made, _zero(kernel, to)
    if groups > 1 and _zero(image, feature) == 0:
        fill[f] = 0.0
    out = Value(tuple(labels), tuple(fill))
    taps = [(kernel_shape[a], None) for a in window]
    terms = [*taps, (kernel_shape[of], summed)]
    _add_terms(context, eqn, out, terms, _positions(eqn))
    return [out]


def _grouped(
    context: Context, eqn: jx.Eqn, image: Axis, kernel: Value, groups: int
) -> Axis:
    """Whole groups go, inputs and outputs; depthwise, a group is one channel."""
    dims = eqn.params["dimension_numbers"]
    to, of = dims.rhs_spec[:2]
    labels, out = context.labels, kernel.labels[to]
    per_group = eqn.invars[1].aval.shape[of]
    labels.freeze(kernel.labels[of], jx.Site(eqn))
    if image is None or out is None:
        return labels.unify(image, out, jx.Site(eqn))
    ins, outs = image.reshape(groups, per_group), out.reshape(groups, -1)
    for column in (*ins.T[1:], *outs.T):
        labels.unify(ins[:, 0], column, jx.Site(eqn))
    return out


def _positions(eqn: jx.Eqn) -> float:
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
    groups = cut.eqn.params["feature_group_count"]
    if groups > 1:
        feature = cut.eqn.params["dimension_numbers"].lhs_spec[1]
        dense = cut.eqn.invars[0].aval.shape[feature]
        groups = groups * np.shape(cut.args[0])[feature] // dense
    return cut.bind(feature_group_count=groups)


def _rewrite_dot(cut: Cut) -> list[Any]:
    return cut.bind()


RULES = {
    "conv_general_dilated": Rule(_conv, _rewrite_conv),
    "dot_general": Rule(_dot_general, _rewrite_dot),
}
