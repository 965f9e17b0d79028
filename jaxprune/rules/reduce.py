# SPDX-License-Identifier: Apache-2.0
"""Reductions, windows, cumulative sums, sorting, Fourier transforms.

Over a cut axis a reduction is exact where the masked network holds the operation's
neutral element, so that leaving indices out changes nothing, or where all that is left
out is the same: then one such index is computed beside those that stay (a variance
around a mean over the channels, a kernel that is standardised over them). What mixes an
axis in any other way fixes that axis; the others pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jax import lax

from jaxprune import jaxpr as jx
from jaxprune.labels import Axis, Value, unknown
from jaxprune.walk import Axes, Context, Cut, Rule, rebind

_NEUTRAL = {
    "reduce_sum": 0.0,
    "reduce_prod": 1.0,
    "reduce_and": 1.0,
    "reduce_or": 0.0,
    "reduce_xor": 0.0,
}
_IDEMPOTENT = ("reduce_max", "reduce_min", "reduce_and", "reduce_or")
_JOINED = (*_IDEMPOTENT, "reduce_sum", "reduce_prod")


def _reduce(context: Context, eqn: jx.Eqn, ins: Sequence[Value]) -> Any:
    """aux: the axes of which what is left out has to be brought in again."""
    (value,), name, axes = ins, eqn.primitive.name, eqn.params["axes"]
    neutral = _NEUTRAL.get(name)
    if name == "reduce_and" and eqn.invars[0].aval.dtype != bool:
        neutral = -1.0  # all bits
    brought = []
    for axis in axes:
        labels = value.labels[axis]
        if labels is None or (neutral is not None and value.removed(axis) == neutral):
            continue
        # Who asks for what is not exact gets the sum over what stays, as textbooks do.
        plain = neutral is not None and not context.labels.exact
        if value.is_even(axis) and name in _JOINED and not plain:
            brought.append(axis)
        elif neutral is None:
            context.labels.freeze(labels, jx.Site(eqn))
        else:
            context.labels.inexact(labels, jx.Site(eqn))
    rest = [a for a in range(len(value.labels)) if a not in axes]

    def fill(axis: int) -> float | None:
        number = value.removed(axis)
        stays = number == neutral or name in _IDEMPOTENT
        return number if stays else unknown(number)

    labels = tuple(value.labels[a] for a in rest)
    leaf = value.leaf if not axes else None
    even = tuple(value.is_even(a) and name in _JOINED for a in rest)
    fills = tuple(fill(a) for a in rest)
    return [Value(labels, fills, leaf=leaf, even=even)], tuple(brought)


def _rewrite_reduce(cut: Cut) -> list[Any]:
    return [_reduced(cut, ())]


def _reduce_at_removed(cut: Cut, axes: Axes) -> Any:
    rest = [a for a in range(len(cut.args[0].shape)) if a not in cut.eqn.params["axes"]]
    return _reduced(cut, tuple(rest[a] for a in axes))


def _reduced(cut: Cut, along: Axes) -> Any:
    """The dense reduction, at the removed indices of these axes of the operand."""
    dense, kept = cut.eqn.invars[0].aval.shape, cut.kept_in(0)
    lack = {a: dense[a] - len(k) for a in cut.node.aux if (k := kept[a]) is not None}
    if cut.eqn.primitive.name == "reduce_sum":
        return _summed(cut, along, lack)
    return cut.bind(_refilled(cut, along, lack))[0]


def _summed(cut: Cut, along: Axes, lack: dict[int, int]) -> Any:
    """Axis by axis, the sum over what stays and as often as it is left out the rest."""
    if not lack:
        return cut.bind(cut.at_removed(0, along))[0]
    (axis, times), *others = lack.items()
    stays = _summed(cut, along, dict(others))
    return stays + times * _summed(cut, (*along, axis), dict(others))


def _refilled(cut: Cut, along: Axes, lack: dict[int, int]) -> Any:
    """The operand with what was left out behind what stays: so ties stay ties."""
    if not lack:
        return cut.at_removed(0, along)
    (axis, times), *others = lack.items()
    stays = _refilled(cut, along, dict(others))
    one = _refilled(cut, (*along, axis), dict(others))
    stays = jx.laid_like(stays, stays, (axis,))
    return lax.concatenate([stays, *[one] * times], axis)


def _window(context: Context, eqn: jx.Eqn, ins: Sequence[Value]) -> list[Value]:
    """Axes with a window of one index pass; the others are fixed."""
    p, value = eqn.params, ins[0]
    labels: list[Axis] = []
    fill: list[float | None] = []
    for axis in range(len(p["window_dimensions"])):
        same = _passes(p, axis)
        tied = context.labels.unify_all([v.labels[axis] for v in ins], jx.Site(eqn))
        if not same:
            context.labels.freeze(tied, jx.Site(eqn))
        labels.append(tied if same else None)
        fill.append(_pooled(eqn, value.removed(axis)))
    return [Value(tuple(labels), tuple(fill))] * len(eqn.outvars)


def _pooled(eqn: jx.Eqn, number: float | None) -> float | None:
    """What a window makes of one number; padding puts the neutral element beside it."""
    p = eqn.params
    if "sum" in eqn.primitive.name:
        return 0.0 if number == 0 else unknown(number)
    # A window that only sees padding would be infinite.
    dilated = any(d > 1 for d in (*p["base_dilation"], *p["window_dilation"]))
    sees = all(
        p < n for pad, n in zip(p["padding"], p["window_dimensions"]) for p in pad
    )
    return number if sees and not dilated else math.nan


def _passes(p: Mapping[str, Any], axis: int) -> bool:
    """Whether a window leaves an axis as it is."""
    steps = (p["window_dimensions"][axis], p["window_strides"][axis])
    dilations = [p[k][axis] for k in ("base_dilation", "window_dilation") if k in p]
    still = all(n == 1 for n in (*steps, *dilations))
    return still and tuple(p["padding"][axis]) == (0, 0)


def _select_and_scatter(
    context: Context, eqn: jx.Eqn, ins: Sequence[Value]
) -> list[Value]:
    """The gradient of max pooling: shaped like the pooled operand."""
    source, operand = ins
    labels = []
    for axis in range(len(eqn.params["window_dimensions"])):
        if _passes(eqn.params, axis):
            labels.append(
                context.labels.unify(
                    operand.labels[axis], source.labels[axis], jx.Site(eqn)
                )
            )
        else:
            context.labels.freeze(operand.labels[axis], jx.Site(eqn))
            context.labels.freeze(source.labels[axis], jx.Site(eqn))
            labels.append(None)
    return [Value(tuple(labels), (None,) * len(labels))]


def _along(context: Context, eqn: jx.Eqn, ins: Sequence[Value]) -> list[Value]:
    """Some axes are fixed; on the others, what is one number all along may stay."""
    p, name, cause = eqn.params, eqn.primitive.name, jx.Site(eqn)
    ndim = len(eqn.invars[0].aval.shape)
    if name == "fft":
        mixed = range(ndim - len(p["fft_lengths"]), ndim)
    else:
        along = p[_AXIS.get(name, "axis")] % ndim
        mixed = range(along, along + 1)
    labels: list[Axis] = []
    for axis in range(ndim):
        axes = [value.labels[axis] for value in ins]
        if axis in mixed:
            for line in axes:
                context.labels.freeze(line, cause)
            labels.append(None)
        else:
            labels.append(context.labels.unify_all(axes, cause))
    outs = [
        Value(tuple(labels), tuple(_stays(name, v.removed(a)) for a in range(ndim)))
        for v in ins
    ]
    # Which of equal numbers come first is not known.
    return [*outs, outs[0]._replace(fill=(None,) * ndim)][: len(eqn.outvars)]


_AXIS = {"sort": "dimension", "approx_top_k": "reduction_dimension"}


def _stays(name: str, number: float | None) -> float | None:
    """What becomes of a number that is all along an axis."""
    stays = number in _FIXED_POINTS.get(name, (number,))
    return number if stays else unknown(number)


_FIXED_POINTS: dict[str, tuple[float, ...]] = {
    "cumsum": (0.0,),
    "cumprod": (0.0, 1.0),
    "cumlogsumexp": (),
    "fft": (0.0,),
}


RULES = {
    **{
        name: Rule(_reduce, _rewrite_reduce, _reduce_at_removed)
        for name in (
            *("reduce_sum", "reduce_max", "reduce_min", "reduce_prod"),
            *("reduce_and", "reduce_or", "reduce_xor", "argmax", "argmin"),
        )
    },
    **{
        name: Rule(_window, rebind)
        for name in ("reduce_window_max", "reduce_window_min", "reduce_window_sum")
    },
    **{
        name: Rule(_along, rebind)
        for name in (
            *("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"),
            *("approx_top_k", "fft", "sort", "top_k"),
        )
    },
    "select_and_scatter_add": Rule(_select_and_scatter, rebind),
}
