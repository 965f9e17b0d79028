# SPDX-License-Identifier: Apache-2.0
"""Channel shuffles, read as one: the labels of the axis are permuted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxprune import jaxpr as jx
from jaxprune.labels import Value
from jaxprune.shuffles import NAME, Parts, Shuffle
from jaxprune.walk import Axes, Context, Cut, Kept, Rule, pick


def _shuffle(context: Context, eqn: Shuffle, ins: Sequence[Value]) -> list[Value]:
    (value,) = ins
    context.labels.shuffled = True
    labels = [None if axis < 0 else value.labels[axis] for axis in eqn.axes]
    for axis, parts in eqn.parts.items():
        line = labels[axis]
        labels[axis] = None if line is None else parts.of(line)
    fill = tuple(None if axis < 0 else value.fill[axis] for axis in eqn.axes)
    even = tuple(axis >= 0 and value.is_even(axis) for axis in eqn.axes)
    return [Value(tuple(labels), fill, value.const, value.leaf, even)]


def _rewrite_shuffle(cut: Cut) -> list[Any]:
    return [_permuted(cut, cut.args[0], ())]


def _shuffle_at_removed(cut: Cut, axes: Axes) -> Any:
    x = cut.at_removed(0, tuple(cut.eqn.axes[axis] for axis in axes))
    return _permuted(cut, x, axes)


def _permuted(cut: Cut, x: Any, single: Axes) -> Any:
    """The small operand permuted; `single`: axes of the output along which it is 1."""
    eqn, kept = cut.eqn, cut.kept_in(0)
    whole = all(k is None for k in (*kept, *cut.kept_out()))
    if whole and not single:
        for step in eqn.eqns:
            (x,) = jx.bind(step, x)
        return x
    for axis, parts in eqn.parts.items():
        if axis not in single:
            x = _along(x, eqn.axes[axis], parts, kept)
    order = [axis for axis in eqn.axes if axis >= 0]
    if order != list(range(x.ndim)):
        used = sorted(order)
        x = x.reshape([x.shape[axis] for axis in used])
        x = x.transpose([used.index(axis) for axis in order])
    return x.reshape(cut.shape_out())


def _along(x: Any, axis: int, parts: Parts, kept: Kept) -> Any:
    """One axis permuted: as before with shorter parts, if that is so, else picked."""
    total, here = math.prod(parts.sizes), kept[axis]
    order = parts.of(np.arange(total))
    if here is not None:
        order = np.searchsorted(here, order[np.isin(order, here)])
    for part, size in enumerate(parts.sizes):
        rest = total // size
        if len(order) % rest == 0:
            sizes = [*parts.sizes]
            sizes[part] = len(order) // rest
            small = Parts(tuple(sizes), parts.order)
            if np.array_equal(small.of(np.arange(len(order))), order):
                before, after = x.shape[:axis], x.shape[axis + 1 :]
                turn = [len(before) + a for a in parts.order]
                last = range(len(before) + len(sizes), x.ndim - 1 + len(sizes))
                y = x.reshape([*before, *sizes, *after])
                y = y.transpose([*range(len(before)), *turn, *last])
                return y.reshape(x.shape)
    return pick(x, axis, order)


def _fold_shuffle(eqn: Shuffle, arrays: Sequence[np.ndarray]) -> np.ndarray:
    (x,) = arrays
    for step in eqn.eqns:
        if step.primitive.name == "transpose":
            x = x.transpose(step.params["permutation"])
        else:
            x = x.reshape(step.outvars[0].aval.shape)
    return x


RULES = {NAME: Rule(_shuffle, _rewrite_shuffle, _shuffle_at_removed, _fold_shuffle)}
