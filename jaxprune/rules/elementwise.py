# SPDX-License-Identifier: Apache-2.0
"""Elementwise primitives: same-length axes go together; size-1 axes and scalars don't.

Run on small operands they are themselves. What the masked network holds at removed
indices is followed through those of `_NUMPY`, where it is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxprune import jaxpr as jx
from jaxprune.labels import Value, unknown
from jaxprune.walk import Context, Cut, Rule, freeze_all

_NUMPY: dict[str, Callable[..., Any]] = {
    "abs": np.abs,
    "add": np.add,
    "add_any": np.add,
    "asinh": np.arcsinh,
    "atan": np.arctan,
    "atan2": np.arctan2,
    "cbrt": np.cbrt,
    "ceil": np.ceil,
    "conj": np.conj,
    "cos": np.cos,
    "cosh": np.cosh,
    "div": np.divide,
    "eq": np.equal,
    "erf": math.erf,
    "erfc": math.erfc,
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "floor": np.floor,
    "ge": np.greater_equal,
    "gt": np.greater,
    "imag": np.imag,
    "is_finite": np.isfinite,
    "le": np.less_equal,
    "log": np.log,
    "log1p": np.log1p,
    "log2": np.log2,
    "logistic": lambda x: 1 / (1 + np.exp(-x)),
    "lt": np.less,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "ne": np.not_equal,
    "neg": np.negative,
    "one_minus_square": lambda x: 1 - x * x,
    "or": lambda x, y: x if x == y else math.nan,
    "pow": np.power,
    "real": np.real,
    "rem": np.fmod,
    # Which way halves go depends on a parameter; whole numbers stay.
    "round": lambda x: x if x == np.floor(x) else math.nan,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "select_n": lambda which, *cases: cases[int(which)],
    "sign": np.sign,
    "sin": np.sin,
    "sinh": np.sinh,
    "sqrt": np.sqrt,
    "square": np.square,
    "sub": np.subtract,
    "tan": np.tan,
    "tanh": np.tanh,
    "xor": lambda x, y: 0.0 if x == y else math.nan,
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
}
_SAME = ("convert_element_type", "copy", "name", "reduce_precision", "stop_gradient")
_EACH = (
    *("copy_p", "device_put", "layout_constraint", "mesh_cast"),
    *("optimization_barrier", "pmax", "pmin", "pvary", "reshard"),
    "sharding_constraint",
)
_OPAQUE = (
    *("acos", "acosh", "and", "asin", "atanh", "bessel_i0e", "bessel_i1e", "clz"),
    *("complex", "digamma", "eq_to", "erf_inv", "igamma", "igamma_grad_a", "igammac"),
    *("integer_pow", "le_to", "lgamma", "lt_to", "mulhi", "nextafter", "not"),
    *("polygamma", "polynomial", "population_count", "random_gamma_grad"),
    *("regularized_incomplete_beta", "shift_left", "shift_right_arithmetic"),
    *("shift_right_logical", "zeta"),
)


def _analyse(context: Context, eqn: jx.Eqn, ins: Sequence[Value]) -> list[Value]:
    shape = eqn.outvars[0].aval.shape
    labels = tuple(
        _tied(context, eqn, ins, axis, length) for axis, length in enumerate(shape)
    )
    fill = tuple(
        _apply(eqn, [_at(eqn, i, v, axis, length) for i, v in enumerate(ins)])
        for axis, length in enumerate(shape)
    )
    const = None
    if all(v.const is not None for v in ins):
        const = _apply(eqn, [v.const for v in ins])
    return [Value(labels, fill, const, _leaf(eqn, ins))]


def _tied(
    context: Context, eqn: jx.Eqn, ins: Sequence[Value], axis: int, length: int
) -> np.ndarray | None:
    """Unify one axis over all operands that have it in full."""
    if length == 1:
        return None
    axes = [
        value.labels[axis]
        for atom, value in zip(eqn.invars, ins)
        if atom.aval.shape and atom.aval.shape[axis] == length
    ]
    return context.labels.unify_all(axes, jx.Site(eqn))


def _at(eqn: jx.Eqn, i: int, value: Value, axis: int, length: int) -> float | None:
    """Operand i at the removed indices of an axis."""
    shape = eqn.invars[i].aval.shape
    full = bool(shape) and shape[axis] == length
    return value.removed(axis) if full else value.const


def _apply(eqn: jx.Eqn, numbers: list[float | None]) -> float | None:
    """The primitive at known numbers; None where the result is not known.

    Numbers that are not known are taken for finite ones.
    """
    name = eqn.primitive.name
    if name in ("mul", "and") and zero_product(*numbers):
        return 0.0
    if name == "div" and numbers[0] == 0 and numbers[1] != 0:
        return 0.0
    if name == "select_n" and None not in numbers[1:] and len(set(numbers[1:])) == 1:
        return numbers[1]
    if None in numbers:
        # The larger of -inf and a finite number is that number.
        return None if name in ("max", "min", "select_n") else unknown(*numbers)
    if name in _SAME:
        number: Any = numbers[0]
    elif name == "integer_pow":
        number = np.float64(numbers[0]) ** eqn.params["y"]
    elif name in _NUMPY:
        with np.errstate(all="ignore"):
            number = _NUMPY[name](*numbers)
    else:
        return None
    if name == "convert_element_type":
        number = np.asarray(number).astype(eqn.params["new_dtype"])
    dtype = np.dtype(eqn.outvars[0].aval.dtype)
    if dtype.kind in "iu" and not _holds(dtype, number):
        return None
    if np.imag(number) != 0:
        return None
    number = float(np.real(number))
    # The one object, so that what is nan equals itself where loops compare.
    return math.nan if math.isnan(number) else number


def zero_product(*numbers: float | None) -> bool:
    """Whether a product is 0: one factor is, and none is known to be inf or nan."""
    return 0.0 in numbers and all(n is None or math.isfinite(n) for n in numbers)


def _holds(dtype: np.dtype, number: Any) -> bool:
    """Whether an integer type has this number: those beside it wrap or truncate."""
    limits = np.iinfo(dtype)
    return limits.min <= number <= limits.max and number == np.floor(number)


def _leaf(eqn: jx.Eqn, ins: Sequence[Value]) -> int | None:
    """A variable (or the input) that was only cast or scaled is still that."""
    whole = [v for v, a in zip(ins, eqn.invars) if np.prod(a.aval.shape) > 1]
    return whole[0].leaf if len(whole) == 1 else None


def _analyse_each(context: Context, eqn: jx.Eqn, ins: Sequence[Value]) -> list[Value]:
    """Primitives that pass each operand on, one output each."""
    del context, eqn
    return list(ins)


def _analyse_bitcast(
    context: Context, eqn: jx.Eqn, ins: Sequence[Value]
) -> list[Value]:
    """The same bytes as another type: elementwise where the widths agree."""
    if eqn.invars[0].aval.shape != eqn.outvars[0].aval.shape:
        return freeze_all(context, eqn, ins)
    (value,) = ins  # Of the bytes it is only known what those of 0 are.
    zero = tuple(0.0 if f == 0 else None for f in value.fill)
    return [value._replace(fill=zero, const=0.0 if value.const == 0 else None)]


def _rewrite(cut: Cut) -> list[Any]:
    return cut.bind()


RULES = {name: Rule(_analyse, _rewrite) for name in (*_NUMPY, *_SAME, *_OPAQUE)}
RULES["bitcast_convert_type"] = Rule(_analyse_bitcast, _rewrite)
for _name in _EACH:
    RULES[_name] = Rule(_analyse_each, _rewrite)
