# SPDX-License-Identifier: Apache-2.0
"""Values that equations act on channel by channel, and how they do.

Three kinds: `Free` of the input, made from variables and constants alone, and computed
only where something asks for it; `Affine`, a product's answer y as y * scale + shift
with free vectors [C]; `Plain` arrays. Nothing here raises: what is of none of these
forms is None to the caller, which computes it as it stands.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxprune import jaxpr as jx

_ROOTS = ("rsqrt", "sqrt", "pow")
ARITHMETIC = ("add", "add_any", "sub", "mul", "div")
_ELEMENTWISE = (
    *ARITHMETIC,
    *("convert_element_type", "copy", "exp", "integer_pow", "log", "max", "min"),
    *("neg", "pow", "rsqrt", "sqrt", "square"),
)
PASSED = ("convert_element_type", "copy", "neg", "reshape", "transpose")
_Make = Callable[[], Any]


class Free(NamedTuple):
    """An array of `shape`; `make` gives it with 1 for the axes along which it repeats.

    compact: the shape that `make` gives. leaves: the variables that it is made of;
    root: by way of a square root. kernel: (variable, its axes), where it is one,
    transposed, cast, or turned round: ~axis is an axis from its end.
    """

    shape: tuple[Any, ...]
    compact: tuple[Any, ...]
    make: _Make
    leaves: frozenset[int] = frozenset()
    root: bool = False
    kernel: tuple[int, tuple[int, ...]] | None = None


class Affine(NamedTuple):
    """y * scale + shift along `axis`; y = the product `eqn` in another layout."""

    number: int  # of the kernel
    kernel_axis: int  # of the variable, that makes the channels
    eqn: jx.Eqn
    operands: tuple[Any, ...]
    axis: int
    shape: tuple[Any, ...]
    dtype: Any
    layout: tuple[jx.Eqn, ...] = ()
    scale: _Make | None = None
    shift: _Make | None = None
    steps: int = 0
    scaled: bool = False
    leaves: frozenset[int] = frozenset()


class Plain(NamedTuple):
    """An array, and what made it."""

    value: Any
    cause: str


Value = Free | Affine | Plain


def constant(x: Any) -> Free:
    """A literal or a constant of the program, free of the input."""
    return Free(jnp.shape(x), jnp.shape(x), functools.partial(itself, x))


def itself(x: Any) -> Any:
    """What makes an array that is there already."""
    return x


def free_outputs(eqn: jx.Eqn, ins: Sequence[Free]) -> list[Free]:
    """Outputs made of variables and constants alone, not computed yet.

    ins: all operands of the equation, in order. One for each output, of its shape; a
    kernel is still one where it was transposed, cast, copied or reversed.
    """
    name = eqn.primitive.name
    leaves = frozenset[int]().union(*(x.leaves for x in ins))
    root = any(x.root for x in ins) or (name in _ROOTS and bool(leaves))
    shape = tuple(eqn.outvars[0].aval.shape) if eqn.outvars else ()
    kernel = ins[0].kernel if len(ins) == 1 else None
    if name == "transpose" and kernel is not None:
        kernel = kernel[0], tuple(kernel[1][a] for a in eqn.params["permutation"])
    elif name == "rev" and kernel is not None:
        turned = eqn.params["dimensions"]
        axes = (~n if a in turned else n for a, n in enumerate(kernel[1]))
        kernel = kernel[0], tuple(axes)
    elif name not in ("convert_element_type", "copy"):
        kernel = None
    small = _compact(eqn, ins, shape)
    if small is not None:
        compact, make = small
        return [Free(shape, compact, functools.cache(make), leaves, root, kernel)]

    @functools.cache
    def whole() -> list[Any]:
        full = [
            x.make() if x.compact == x.shape else jnp.broadcast_to(x.make(), x.shape)
            for x in ins
        ]
        return jx.bind(eqn, *full)

    return [
        Free(
            tuple(getattr(v.aval, "shape", ())),
            tuple(getattr(v.aval, "shape", ())),
            functools.partial(lambda i: whole()[i], i),
            leaves,
            root,
            kernel,
        )
        for i, v in enumerate(eqn.outvars)
    ]


def _compact(
    eqn: jx.Eqn, ins: Sequence[Free], shape: tuple[Any, ...]
) -> tuple[tuple[Any, ...], _Make] | None:
    """The equation on arrays without their repetitions, where it can be run so."""
    name, rank = eqn.primitive.name, len(shape)
    if name in _ELEMENTWISE and all(len(x.shape) in (0, rank) for x in ins):
        each = zip(*(x.compact or (1,) * rank for x in ins))
        compact = tuple(next((n for n in s if not _one(n)), 1) for s in each)

        def apply() -> Any:
            return jx.bind(eqn, *(jnp.broadcast_to(x.make(), compact) for x in ins))[0]

        return compact, apply
    if len(ins) != 1:
        return None
    (x,) = ins
    if name == "broadcast_in_dim":
        sizes: list[Any] = [1] * rank
        for axis, size in zip(eqn.params["broadcast_dimensions"], x.compact):
            sizes[axis] = size
    elif name in ("reshape", "squeeze"):  # of a single operand: in order
        if [n for n in x.shape if not _one(n)] != [n for n in shape if not _one(n)]:
            return None
        of = iter(c for n, c in zip(x.shape, x.compact) if not _one(n))
        sizes = [1 if _one(n) else next(of) for n in shape]
    else:
        return None
    compact = tuple(sizes)
    return compact, lambda: jnp.reshape(x.make(), compact)


def longer(eqn: jx.Eqn, ins: Sequence[Value], chain: Affine) -> Affine | None:
    """The chain with one more operation, or None where that is no affine one.

    ins: the operands, `chain` among them; another must be free and, but for axes of 1,
    a scalar or [C] along the chain's axis. The answer must be of floats.
    """
    name, aval = eqn.primitive.name, eqn.outvars[0].aval
    shape = tuple(aval.shape)
    if not jnp.issubdtype(aval.dtype, jnp.floating):
        return None
    if len(ins) == 1 and name in PASSED:
        return _passed(eqn, chain, shape, aval.dtype)
    if name not in ARITHMETIC or shape != chain.shape:
        return None
    first = isinstance(ins[0], Affine)
    other = ins[1 if first else 0]
    if not isinstance(other, Free) or (name == "div" and not first):
        return None
    if not other.leaves:
        return None  # a number of the program may be another one at another size
    sizes = other.compact or (1,) * len(shape)
    if not all(_one(n) for a, n in enumerate(sizes) if a != chain.axis):
        return None
    f = functools.cache(lambda: jnp.reshape(other.make(), -1))
    scale, shift = chain.scale, chain.shift
    if name in ("mul", "div"):
        act = jnp.multiply if name == "mul" else jnp.divide
        new_scale = (lambda: act(scale(), f())) if scale else (lambda: act(1, f()))
        chain = chain._replace(
            scale=new_scale,
            shift=(lambda: act(shift(), f())) if shift else None,
            scaled=chain.scaled or bool(other.leaves),
        )
    elif name == "sub" and not first:
        chain = chain._replace(
            scale=(lambda: -scale()) if scale else (lambda: -jnp.ones(1, aval.dtype)),
            shift=(lambda: f() - shift()) if shift else f,
        )
    else:
        sign = -1 if name == "sub" else 1
        new_shift = (lambda: shift() + sign * f()) if shift else (lambda: sign * f())
        chain = chain._replace(shift=new_shift)
    leaves = chain.leaves | other.leaves
    return chain._replace(dtype=aval.dtype, steps=chain.steps + 1, leaves=leaves)


def _passed(
    eqn: jx.Eqn, chain: Affine, shape: tuple[Any, ...], dtype: Any
) -> Affine | None:
    """The chain cast, or in another layout."""
    name, axis, layout = eqn.primitive.name, chain.axis, (*chain.layout, eqn)
    if name == "transpose":
        axis = eqn.params["permutation"].index(axis)
        return chain._replace(axis=axis, shape=shape, layout=layout)
    if name == "reshape":
        last = axis == len(chain.shape) - 1 and shape and shape[-1] == chain.shape[-1]
        if not last:
            return None
        return chain._replace(axis=len(shape) - 1, shape=shape, layout=layout)
    if name == "neg":
        return None
    return chain._replace(dtype=dtype)


def inner_norms(eqn: jx.Eqn, ins: Sequence[Value]) -> list[int]:
    """Variables of which programs that this equation holds take a square root.

    ins: the operands, of which the last are the inner program's.
    """
    found = []
    for value in eqn.params.values():
        for inner in value if isinstance(value, tuple) else (value,):
            if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                program = jx.program(inner)
                names = list(ins)[len(ins) - len(program.invars) :]
                found += _roots(program, names)
    return found


def _roots(program: jx.Program, ins: Sequence[Value]) -> list[int]:
    of = {
        var: min(x.leaves)
        for var, x in zip(program.invars, ins)
        if isinstance(x, Free) and x.leaves
    }
    found = []
    for eqn in program.eqns:
        read = [a for a in eqn.invars if not jx.is_literal(a)]
        if read and all(a in of for a in read):
            if eqn.primitive.name in _ROOTS:
                found.append(of[read[0]])
            of.update((var, of[read[0]]) for var in eqn.outvars)
    return found


def _one(size: Any) -> bool:
    return isinstance(size, int) and size == 1
