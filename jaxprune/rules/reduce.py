# SPDX-License-Identifier: Apache-2.0
"""Reductions and windows.

Over a cut axis a reduction is exact only where the masked network holds the operation's
neutral element, so that leaving indices out changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxprune import jaxpr as jx
from jaxprune.labels import Axis, Value
from jaxprune.walk import Context, Cut, Rule

_NEUTRAL = {"reduce_sum": 0.0, "reduce_prod": 1.0, "reduce_and": 1.0, "reduce_or": 0.0}
_IDEMPOTENT = ("reduce_max", "reduce_min", "reduce_and", "reduce_or")


def _reduce(context: Context, eqn: jx.Eqn, ins: Sequence[Value]) -> list[Value]:
    (value,), name, axes = ins, eqn.primitive.name, eqn.params["axes"]
    for axis in axes:
        labels = value.labels[axis]
        if name not in _NEUTRAL:
            context.labels.freeze(labels, jx.Site(eqn))
        elif value.removed(axis) != _NEUTRAL[name]:
            context.labels.inexact(labels, jx.Site(eqn))
    rest = [a for a in range(len(value.labels)) if a not in axes]

    def fill(axis: int) -> float | None:
        number = value.removed(axis)
        stays = number == _NEUTRAL.get(name) or name in _IDEMPOTENT
        return number if stays else None

    labels = tuple(value.labels[a] for a in rest)
    leaf = value.leaf if not axes else None
    return [Value(labels, tuple(fill(a) for a in rest), leaf=leaf)]


def _window(context: Context, eqn: jx.Eqn, ins: Sequence[Value]) -> list[Value]:
    """Axes with a window of one index pass; the others are fixed."""
    p, value = eqn.params, ins[0]
    out = eqn.outvars[0].aval.shape
    labels: list[Axis] = []
    fill: list[float | None] = []
    for axis, size in enumerate(p["window_dimensions"]):
        same = size == 1 and out[axis] == eqn.invars[0].aval.shape[axis]
        tied = value.labels[axis]
        for other in ins[1:]:
            tied = context.labels.unify(tied, other.labels[axis], jx.Site(eqn))
        if not same:
            context.labels.freeze(tied, jx.Site(eqn))
        labels.append(tied if same else None)
        fill.append(_pooled(eqn, value.removed(axis)))
    return [Value(tuple(labels), tuple(fill))] * len(eqn.outvars)


def _pooled(eqn: jx.Eqn, number: float | None) -> float | None:
    """What a window makes of one number; padding puts the neutral element beside it."""
    p = eqn.params
    if "sum" in eqn.primitive.name:
        return 0.0 if number == 0 else None
    # A window that only sees padding would be infinite.
    dilated = any(d > 1 for d in (*p["base_dilation"], *p["window_dilation"]))
    sees = all(max(pad) < n for pad, n in zip(p["padding"], p["window_dimensions"]))
    return number if sees and not dilated else None


def _select_and_scatter(
    context: Context, eqn: jx.Eqn, ins: Sequence[Value]
) -> list[Value]:
    """The gradient of max pooling: shaped like the pooled operand."""
    source, operand = ins
    labels = []
    for axis, size in enumerate(eqn.params["window_dimensions"]):
        if size == 1:
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


def _cumulative(context: Context, eqn: jx.Eqn, ins: Sequence[Value]) -> list[Value]:
    (value,), axis = ins, eqn.params["axis"]
    context.labels.freeze(value.labels[axis], jx.Site(eqn))
    labels = list(value.labels)
    labels[axis] = None
    zero = tuple(0.0 if value.removed(a) == 0 else None for a in range(len(labels)))
    fill = zero if eqn.primitive.name == "cumsum" else (None,) * len(labels)
    return [Value(tuple(labels), fill)]


def _rewrite(cut: Cut) -> list[Any]:
    return cut.bind()


RULES = {
    **{
        name: Rule(_reduce, _rewrite)
        for name in (
            *("reduce_sum", "reduce_max", "reduce_min", "reduce_prod"),
            *("reduce_and", "reduce_or", "argmax", "argmin"),
        )
    },
    **{
        name: Rule(_window, _rewrite)
        for name in ("reduce_window_max", "reduce_window_min", "reduce_window_sum")
    },
    **{
        name: Rule(_cumulative, _rewrite)
        for name in ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
    },
    "select_and_scatter_add": Rule(_select_and_scatter, _rewrite),
}
