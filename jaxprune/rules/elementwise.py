# SPDX-License-Identifier: Apache-2.0
"""Elementwise primitives: same-length axes go together; size-1 axes and scalars don't.

Run on small operands they are themselves. What the masked network holds at removed
indices is followed through those of `_NUMPY`, where it is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxprune import jaxpr as jx
from jaxprune.labels import Value, unknown
from jaxprune.walk import Axes, Context, Cut, Rule, freeze_all, rebind

_NUMPY: dict[str, Callable[..., Any]] = {
    "abs": np.abs,
    "add": np.add,
    "add_any": np.add,
    "and": np.bitwise_and,
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
    "not": np.invert,
    "one_minus_square": lambda x: 1 - x * x,
    "or": np.bitwise_or,
    "pow": np.power,
    "real": np.real,
    "rem": np.fmod,
    # Which way halves go depends on a parameter; whole numbers stay.
    "round": lambda x: x if x == np.floor(x) else None,
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
    "xor": np.bitwise_xor,
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
}
_SAME = ("convert_element_type", "copy", "name", "reduce_precision", "stop_gradient")
_EACH = (
    *("device_put", "layout_constraint", "optimization_barrier", "reshard"),
    "sharding_constraint",
)
_OPAQUE = (
    *("acos", "acosh", "asin", "atanh", "bessel_i0e", "bessel_i1e", "clz"),
    *("complex", "digamma", "eq_to", "erf_inv", "igamma", "igamma_grad_a", "igammac"),
    *("integer_pow", "le_to", "lgamma", "lt_to", "mulhi", "nextafter"),
    *(
        "polygamma",
        "polynomial",
        "population_count",
    ),
    *("regularized_incomplete_beta", "shift_left", "shift_right_arithmetic"),
    *("shift_right_logical", "zeta"),
)
# Finite functions that tell one zero from the other; others make of them what is inf.
_SIGNED = ("atan2", "complex", "eq_to", "le_to", "lt_to", "nextafter")
# Of complex numbers these do so too, at their branch cuts.
_BRANCHED = (
    *("acos", "acosh", "asin", "asinh", "atan", "atanh", "log", "log1p", "log2"),
    *("pow", "rsqrt", "sqrt"),
)
# XLA rounds these in ways of its own (log2(8) < 3); NumPy agrees where both are exact.
_ROUNDED = (
    *("asinh", "atan", "atan2", "cbrt", "cos", "cosh", "div", "erf", "erfc", "exp"),
    *("exp2", "expm1", "log", "log1p", "log2", "logistic", "pow", "rsqrt", "sin"),
    *("sinh", "sqrt", "tan", "tanh"),
)
# Those of the opaque that are finite wherever their operands are.
_ENTIRE = ("asin", "acos", "bessel_i0e", "bessel_i1e", "complex", "polynomial")


def _analyse(context: Context, eqn: jx.Eqn, ins: Sequence[Value]) -> list[Value]:
    known: dict[tuple[float | None, ...], float | None] = {}

    def result(numbers: tuple[float | None, ...]) -> float | None:
        if numbers not in known:  # most axes have those of another one
            known[numbers] = _apply(eqn, numbers)
        return known[numbers]

    labels: list[np.ndarray | None] = []
    fill: list[float | None] = []
    even: list[bool] = []
    for axis, length in enumerate(eqn.outvars[0].aval.shape):
        full = [_full(eqn, i, axis, length) for i in range(len(ins))]
        whole = [v for v, f in zip(ins, full) if f]
        # Unified over all operands that have the axis in full.
        lines = [v.labels[axis] for v in whole] if length != 1 else [None]
        labels.append(context.labels.unify_all(lines, jx.Site(eqn)))
        numbers = [v.removed(axis) if f else v.const for v, f in zip(ins, full)]
        fill.append(result(tuple(numbers)))
        even.append(_even(eqn, whole, axis))
    const = None
    if all(v.const is not None for v in ins):
        const = result(tuple(v.const for v in ins))
    return [Value(tuple(labels), tuple(fill), const, _leaf(eqn, ins), tuple(even))]


def _even(eqn: jx.Eqn, whole: Sequence[Value], axis: int) -> bool:
    """Whether it is computed of the same numbers at all removed indices."""
    signed = eqn.primitive.name in _SIGNED and any(v.removed(axis) == 0 for v in whole)
    branched = _is_branched(eqn) and any(v.removed(axis) is not None for v in whole)
    return all(v.is_even(axis) for v in whole) and not signed and not branched


def _is_branched(eqn: jx.Eqn) -> bool:
    """Whether the sign of a zero, which is not known, decides between two values."""
    name, dtype = eqn.primitive.name, eqn.invars[0].aval.dtype
    return name in _BRANCHED and jx.kind(dtype) == "c"


def at_removed(cut: Cut, axes: Axes) -> Any:
    """What the operands hold there, computed with as they are."""
    shape = cut.eqn.outvars[0].aval.shape
    args = []
    for i in range(len(cut.args)):
        mine = tuple(a for a in axes if _full(cut.eqn, i, a, shape[a]))
        args.append(cut.at_removed(i, mine))
    return cut.bind(*args)[0]


def _full(eqn: jx.Eqn, i: int, axis: int, length: int) -> bool:
    """Whether operand i has all the indices of an axis."""
    shape = eqn.invars[i].aval.shape
    return bool(shape) and shape[axis] == length


def _apply(eqn: jx.Eqn, numbers: Sequence[float | None]) -> float | None:
    """The primitive at known numbers; None where the result is not known.

    Numbers that are not known are taken for finite ones; nan may be anything.
    """
    name, dtype = eqn.primitive.name, np.dtype(eqn.outvars[0].aval.dtype)
    number = _absorbed(name, dtype, numbers)
    if number is None:
        number = _unknown(name, numbers)
        if number is None and None not in numbers:
            number = _evaluated(eqn, numbers)
    if jx.kind(dtype) in "iub":  # has no number that is not finite
        return None if number is None or not math.isfinite(number) else float(number)
    # The one object, so that what is nan equals itself where loops compare.
    return math.nan if number is not None and math.isnan(number) else number


def _absorbed(
    name: str, dtype: np.dtype, numbers: Sequence[float | None]
) -> float | None:
    """The result where some operands alone decide it."""
    if name in ("mul", "and") and zero_product(*numbers):
        # Which zero depends on signs; `_evaluated` lets nothing depend on that.
        return 0.0
    if name == "or" and dtype.kind == "b" and 1.0 in numbers:
        return 1.0
    if name == "div" and numbers[0] == 0 and numbers[1] is None:
        return 0.0 if jx.kind(dtype) in "fc" else None  # XLA's integer 0 / 0 is -1
    if name == "select_n":
        which, *cases = numbers
        if which is not None and math.isfinite(which):
            return cases[int(which)]
        if len(set(cases)) == 1:
            return cases[0]
    if name in ("max", "min"):
        end = math.inf if name == "max" else -math.inf
        if end in numbers and not any(n is not None and math.isnan(n) for n in numbers):
            return end
    return None


def _unknown(name: str, numbers: Sequence[float | None]) -> float | None:
    """nan where the result may be infinite or nan; None where nothing says so."""
    if any(n is not None and math.isnan(n) for n in numbers):
        return math.nan
    if name in ("div", "rem") and numbers[1] == 0:
        return math.nan  # the sign of the zero is not known
    if name == "pow" and numbers[0] == 0 and (numbers[1] is None or numbers[1] < 0):
        return math.nan
    if None not in numbers or name in ("max", "min", "select_n"):
        # The larger of -inf and a finite number is finite; and what chooses between
        # -inf and another is taken to be a mask that leaves something.
        return None
    return unknown(*numbers)


def _evaluated(eqn: jx.Eqn, numbers: Sequence[Any]) -> float | None:
    """The primitive at numbers that are all known, none of them nan, in its dtypes."""
    name, dtype = eqn.primitive.name, np.dtype(eqn.outvars[0].aval.dtype)
    if name == "integer_pow":
        power = eqn.params["y"]
        if numbers[0] == 0 and power < 0:
            return math.nan
        exact = _plain(np.float64(numbers[0]) ** power)
        return exact if exact in (0.0, 1.0) else unknown(exact)
    if name == "complex" and numbers[1] == 0:
        return numbers[0]
    if _is_branched(eqn):
        return math.nan if numbers[0] == 0 else unknown(*numbers)
    if name in _OPAQUE:
        return unknown(*numbers) if name in _ENTIRE else math.nan
    if name == "rsqrt" and numbers[0] == 0:
        return math.nan
    if name == "atan2" and numbers[0] == 0:
        return 0.0 if numbers[1] > 0 else None
    if name in ("reduce_precision", "convert_element_type"):
        return _cast(eqn, numbers[0])
    if name in _SAME:
        return numbers[0]
    given = []
    for number, atom in zip(numbers, eqn.invars):
        own = np.dtype(atom.aval.dtype)
        if jx.kind(own) in "iu" and not _holds(own, number):
            return None
        given.append(np.asarray(number).astype(own)[()])
    with np.errstate(all="ignore"):
        found = _NUMPY[name](*given)
        if found is None:
            return None
        wide = found
        if jx.kind(dtype) in "iu" and name not in (
            "and",
            "or",
            "xor",
            "not",
            "select_n",
        ):
            # Those beside an integer type's numbers wrap, or are truncated.
            wide = _NUMPY[name](*map(np.float64, numbers))
            if not _holds(dtype, wide):
                return None
        found = _plain(np.asarray(found).astype(dtype)[()])
    return unknown(found) if name in _ROUNDED and _rounds(numbers, found) else found


def _rounds(numbers: Sequence[float], found: float | None) -> bool:
    """Whether the last digits of a function at these numbers depend on who computes."""
    ends = (0.0, 1.0, math.inf)
    if found == numbers[0] and found in (0.0, 1.0):  # 0 / 3, 1 to any power
        return False
    known = found is not None and abs(found) in (0.5, *ends)
    return not known or not all(abs(n) in ends for n in numbers)


def _cast(eqn: jx.Eqn, number: float) -> float | None:
    """The number in another precision; None where that depends on the machine."""
    if eqn.primitive.name == "reduce_precision":
        return number if number in (0.0, 1.0) else unknown(number)
    dtype = np.dtype(eqn.params["new_dtype"])
    if dtype.kind == "b":
        return float(number != 0)
    if jx.kind(dtype) in "iu":
        whole = np.trunc(number)
        return float(whole) if math.isfinite(whole) and _holds(dtype, whole) else None
    with np.errstate(all="ignore"):
        return _plain(np.asarray(number).astype(dtype)[()])


def _plain(number: Any) -> float | None:
    return float(np.real(number)) if np.imag(number) == 0 else None


def zero_product(*numbers: float | None) -> bool:
    """Whether a product is 0: one factor is, and none is known to be inf or nan."""
    return 0.0 in numbers and all(n is None or math.isfinite(n) for n in numbers)


def _holds(dtype: np.dtype, number: Any) -> bool:
    """Whether an integer type, and a float, have this number exactly."""
    limits = jax.numpy.iinfo(dtype)
    inside = limits.min <= number <= limits.max and abs(number) <= 2**53
    return bool(inside and number == np.floor(number))


def _leaf(eqn: jx.Eqn, ins: Sequence[Value]) -> int | None:
    """A variable (or the input) that was only cast or scaled is still that."""
    whole = [v for v, a in zip(ins, eqn.invars) if any(n != 1 for n in a.aval.shape)]
    return whole[0].leaf if len(whole) == 1 else None


def _analyse_each(context: Context, eqn: jx.Eqn, ins: Sequence[Value]) -> list[Value]:
    """Primitives that pass each operand on, one output each."""
    del context, eqn
    return [value._replace(even=()) for value in ins]


def _analyse_bitcast(
    context: Context, eqn: jx.Eqn, ins: Sequence[Value]
) -> list[Value]:
    """The same bytes as another type: elementwise where the widths agree."""
    if eqn.invars[0].aval.shape != eqn.outvars[0].aval.shape:
        return freeze_all(context, eqn, ins)
    (value,) = ins
    made, of = (jx.kind(v.aval.dtype) for v in (*eqn.outvars, *eqn.invars))
    if of in "fc" and made not in "fc":  # of a float's 0 the sign is not known
        return [Value(value.labels, (None,) * len(value.labels), leaf=value.leaf)]
    # Of other bytes it is only known what those of 0 are.
    zero = tuple(0.0 if f == 0 else None for f in value.fill)
    const = 0.0 if value.const == 0 else None
    return [value._replace(fill=zero, const=const, even=())]


def _fold(eqn: jx.Eqn, arrays: Sequence[np.ndarray]) -> np.ndarray | None:
    """Integers in their own dtypes, which wrap as XLA's do."""
    name, dtype = eqn.primitive.name, eqn.outvars[0].aval.dtype
    if name == "select_n":
        which, *cases = np.broadcast_arrays(arrays[0].astype(int), *arrays[1:])
        few = len(cases) < 32  # or NumPy gives up
        return np.choose(which, cases, mode="clip").astype(dtype) if few else None
    if name in _SAME:
        return arrays[0].astype(dtype)
    with np.errstate(all="ignore"):
        return _NUMPY[name](*arrays).astype(dtype) if name in _WHOLE else None


# What NumPy does to integers as XLA does.
_WHOLE = (
    *("add", "sub", "mul", "neg", "max", "min", "eq", "ne", "lt", "le", "gt", "ge"),
    *("and", "or", "xor", "not"),
)
RULES = {
    name: Rule(_analyse, rebind, at_removed, _fold)
    for name in (*_NUMPY, *_SAME, *_OPAQUE)
}
RULES["bitcast_convert_type"] = Rule(_analyse_bitcast, rebind)
for _name in _EACH:
    RULES[_name] = Rule(_analyse_each, rebind)
