# SPDX-License-Identifier: Apache-2.0
"""Products and what is affine behind them, channel by channel, in a running program.

Three kinds of values: `Free` of the input, made from variables and constants alone, and
computed only where something asks for it; `Affine`, a product's answer y as
y * scale + shift with free vectors [C]; `Plain` arrays. Programs that are called are
run in place; loops, branches and functions with derivatives of their own are run whole.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxprune import jaxpr as jx
from jaxprune.taps import CALLS

_ROOTS = ("rsqrt", "sqrt", "pow")
_ARITHMETIC = ("add", "add_any", "sub", "mul", "div")
_ELEMENTWISE = (
    *_ARITHMETIC,
    *("convert_element_type", "copy", "exp", "integer_pow", "log", "max", "min"),
    *("neg", "pow", "rsqrt", "sqrt", "square"),
)
_PASSED = ("convert_element_type", "copy", "neg", "reshape", "transpose")
_Make = Callable[[], Any]


class Free(NamedTuple):
    """An array of `shape`; `make` gives it with 1 for the axes along which it repeats.

    compact: the shape that `make` gives. leaves: the variables that it is made of;
    root: by way of a square root. kernel: (variable, its axes), where it is one,
    transposed or cast.
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


_Value = Free | Affine | Plain


class Found(NamedTuple):
    """What may be folded: {kernel: the variables that go in}, and what may not.

    read: variables that are still read. left: {variable: why}.
    """

    merged: dict[int, frozenset[int]]
    read: set[int]
    left: dict[int, str]


class _State(NamedTuple):
    """What a walk is told, and notes."""

    shift: Callable[[Affine], Any]  # the bias [C] of a chain that is folded
    shunned: Mapping[int, str]  # kernels that must stay, and why
    merged: dict[int, frozenset[int]]
    starts: Counter
    read: set[int]
    left: dict[int, str]


def look(program: jx.Program, leaves: Sequence[Any], given: Sequence[Any]) -> Found:
    """Find the chains; leaves, given: the program's operands, or their shapes."""
    shunned: dict[int, str] = {}
    while True:
        state = _state(_zeros, shunned)

        def walk(arrays: list[Any], inputs: list[Any], state: _State = state) -> Any:
            makes = [functools.partial(_self, x) for x in arrays]
            return _start(program, makes, arrays, inputs, state)

        jax.eval_shape(walk, list(leaves), list(given))
        taken = {n for numbers in state.merged.values() for n in numbers}
        more = {
            n: "its kernel is read elsewhere too"
            for n in state.merged
            if state.starts[n] > 1 or n in state.read or n in taken
        }
        if not more:
            return Found(state.merged, state.read, state.left)
        shunned.update(more)


def fold(
    program: jx.Program, arrays: Sequence[Any], given: Sequence[Any], found: Found
) -> dict[int, tuple[Any, Any]]:
    """{kernel: (the kernel scaled, the bias [C])}; given: only its shapes are used."""
    made: dict[int, tuple[Any, Any]] = {}

    def shift(chain: Affine) -> Any:
        kernel = arrays[chain.number]
        size = kernel.shape[chain.kernel_axis]
        one = jnp.ones((), chain.dtype)
        scale = jnp.broadcast_to(chain.scale() if chain.scale else one, (size,))
        along = [1] * kernel.ndim
        along[chain.kernel_axis] = size
        scaled = (kernel * scale.reshape(along)).astype(kernel.dtype)
        bias = chain.shift() if chain.shift else 0 * one
        bias = jnp.broadcast_to(bias, (size,)).astype(chain.dtype)
        made[chain.number] = scaled, bias
        return bias

    state = _state(shift, _not(found.merged, len(arrays)))
    makes = [functools.partial(_self, x) for x in arrays]
    inputs = [jnp.zeros(x.shape, x.dtype) for x in given]
    _start(program, makes, arrays, inputs, state)
    return made


def run(
    program: jx.Program,
    makes: Sequence[_Make],
    structs: Sequence[Any],
    given: Sequence[Any],
    biases: Mapping[int, Any],
) -> tuple[list[Any], set[int]]:
    """The outputs with the chains of these kernels replaced, and which were met."""
    state = _state(lambda c: biases[c.number], _not(biases, len(structs)))
    values = _start(program, makes, structs, given, state)
    return values, set(state.merged)


def _state(shift: Callable[[Affine], Any], shunned: Mapping[int, str]) -> _State:
    return _State(shift, shunned, {}, Counter(), set(), {})


def _not(chosen: Any, count: int) -> dict[int, str]:
    return {n: "" for n in range(count) if n not in chosen}


def _self(x: Any) -> Any:
    return x


def _zeros(chain: Affine) -> Any:
    return jnp.zeros((chain.shape[chain.axis],), chain.dtype)


def _start(
    program: jx.Program,
    makes: Sequence[_Make],
    structs: Sequence[Any],
    given: Sequence[Any],
    state: _State,
) -> list[Any]:
    values: list[_Value] = [
        Free(x.shape, x.shape, make, frozenset([n]), False, (n, (*range(x.ndim),)))
        for n, (x, make) in enumerate(zip(structs, makes, strict=True))
    ]
    values += [Plain(x, "it follows the network's input") for x in given]
    return [_array(x, state) for x in _walk(program, values, state)]


def _walk(program: jx.Program, args: Sequence[_Value], state: _State) -> list[_Value]:
    env: dict[Any, _Value] = {}
    for var, const in zip(program.constvars, program.consts, strict=True):
        env[var] = _constant(const)
    uses = Counter(
        atom
        for atoms in (*(e.invars for e in program.eqns), program.outvars)
        for atom in atoms
        if not jx.is_literal(atom)
    )

    def read(atom: Any) -> _Value:
        return _constant(atom.val) if jx.is_literal(atom) else env[atom]

    def write(var: Any, out: _Value) -> None:
        if isinstance(out, Affine) and uses[var] > 1:
            cause = f"what {jx.Site(out.eqn)} answers is read elsewhere too"
            out = Plain(_array(out, state), cause)
        env[var] = out

    for var, x in zip(program.invars, args, strict=True):
        write(var, x)
    for eqn in program.eqns:
        outs = _equation(eqn, [read(a) for a in eqn.invars], state)
        for var, x in zip(eqn.outvars, outs, strict=True):
            write(var, x)
    return [read(a) for a in program.outvars]


def _constant(x: Any) -> Free:
    return Free(jnp.shape(x), jnp.shape(x), functools.partial(_self, x))


def _array(x: _Value, state: _State) -> Any:
    """The value itself; what it is made of is noted as read."""
    if isinstance(x, Plain):
        return x.value
    if isinstance(x, Free):
        state.read.update(x.leaves)
        made = x.make()
        return made if x.compact == x.shape else jnp.broadcast_to(made, x.shape)
    y = jx.bind(x.eqn, *x.operands)[0]
    for eqn in x.layout:
        y = jx.bind(eqn, y)[0]
    y = y.astype(x.dtype)
    if not x.steps:
        return y
    if x.number in state.shunned or not (x.leaves and (x.scaled or x.steps > 1)):
        state.read.update(x.leaves)
        shift = x.shift() if x.shift else 0
    else:
        state.merged[x.number] = x.leaves
        shift = state.shift(x)
    along = [1] * len(x.shape)
    along[x.axis] = -1
    return y + jnp.reshape(jnp.asarray(shift, x.dtype), along)


def _equation(eqn: jx.Eqn, ins: Sequence[_Value], state: _State) -> Sequence[_Value]:
    name = eqn.primitive.name
    if name in CALLS and any(
        isinstance(x, Affine) or isinstance(x, Free) and x.leaves for x in ins
    ):
        return _walk(jx.program(eqn.params[CALLS[name]]), ins, state)
    if all(isinstance(x, Free) for x in ins) and not eqn.effects:
        return _free(eqn, ins, state)  # type: ignore[arg-type]
    product = _product(eqn, ins, state)
    if product is not None:
        return [product]
    chains = [x for x in ins if isinstance(x, Affine)]
    cause = f"it follows {jx.Site(eqn)}"
    if len(chains) == 1 and all(isinstance(x, Affine | Free) for x in ins):
        longer = _longer(eqn, ins, chains[0])
        if longer is not None:
            return [longer]
        cause = f"it does not lie along the channels of {jx.Site(chains[0].eqn)}"
    if name in ("mul", "div") and len(ins) == 2:
        _note(ins, cause, state)
    for number in _inner_norms(eqn, ins):
        state.left[number] = f"it lies within {jx.Site(eqn)}"
    outs = jx.bind(eqn, *(_array(x, state) for x in ins))
    before = [x.cause for x in ins if isinstance(x, Plain)]
    if before and name in (*_ARITHMETIC, *_PASSED):
        cause = before[0]
    return [Plain(x, cause) for x in outs]


def _note(ins: Sequence[_Value], cause: str, state: _State) -> None:
    """That a batch norm's factor meets something that it cannot be folded into."""
    for x, y in (ins, ins[::-1]):
        if isinstance(x, Free) and x.root and x.leaves and not isinstance(y, Free):
            state.left[min(x.leaves)] = y.cause if isinstance(y, Plain) else cause


def _inner_norms(eqn: jx.Eqn, ins: Sequence[_Value]) -> list[int]:
    """Variables of which programs that this equation holds take a square root."""
    found = []
    for value in eqn.params.values():
        for inner in value if isinstance(value, tuple) else (value,):
            if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                program = jx.program(inner)
                names = list(ins)[len(ins) - len(program.invars) :]
                found += _roots(program, names)
    return found


def _roots(program: jx.Program, ins: Sequence[_Value]) -> list[int]:
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


def _free(eqn: jx.Eqn, ins: Sequence[Free], state: _State) -> list[Free]:
    """Outputs made of variables and constants alone, not computed yet."""
    name = eqn.primitive.name
    leaves = frozenset[int]().union(*(x.leaves for x in ins))
    root = any(x.root for x in ins) or (name in _ROOTS and bool(leaves))
    shape = tuple(eqn.outvars[0].aval.shape) if eqn.outvars else ()
    kernel = ins[0].kernel if len(ins) == 1 else None
    if name == "transpose" and kernel is not None:
        kernel = kernel[0], tuple(kernel[1][a] for a in eqn.params["permutation"])
    elif name not in ("convert_element_type", "copy", "rev"):
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
        longer = [n for n in x.shape if not _one(n)]
        if longer != [n for n in shape if not _one(n)]:
            return None
        of = iter(c for n, c in zip(x.shape, x.compact) if not _one(n))
        sizes = [1 if _one(n) else next(of) for n in shape]
    else:
        return None
    compact = tuple(sizes)
    return compact, lambda: jnp.reshape(x.make(), compact)


def _product(
    eqn: jx.Eqn, ins: Sequence[_Value], state: _State
) -> Affine | Plain | None:
    """A convolution or matrix product of features with a variable."""
    name, p = eqn.primitive.name, eqn.params
    if name not in ("conv_general_dilated", "dot_general"):
        return None
    at = [i for i, x in enumerate(ins) if isinstance(x, Free) and x.kernel]
    if len(at) != 1 or (name == "conv_general_dilated" and at != [1]):
        return None
    k = at[0]
    shape = tuple(eqn.outvars[0].aval.shape)
    if name == "conv_general_dilated":
        if p["batch_group_count"] != 1:
            return None
        kernel_axis = p["dimension_numbers"].rhs_spec[0]
        axis = p["dimension_numbers"].out_spec[1]
    else:
        summed, batch = p["dimension_numbers"]
        left = [a for a in range(len(ins[k].shape)) if a not in summed[k]]  # type: ignore[union-attr]
        if any(batch) or len(left) != 1:
            return None
        kernel_axis, axis = left[0], len(shape) - 1 if k else 0
    kernel = ins[k]
    number, axes = kernel.kernel  # type: ignore[union-attr,misc]
    state.starts[number] += 1
    if number in state.shunned:
        cause = state.shunned[number] or f"it follows {jx.Site(eqn)}"
        arrays = [_array(x, state) for x in ins]
        return Plain(jx.bind(eqn, *arrays)[0], cause)
    operands = [
        kernel.make() if i == k else _array(x, state)  # type: ignore[union-attr]
        for i, x in enumerate(ins)
    ]
    dtype = eqn.outvars[0].aval.dtype
    return Affine(number, axes[kernel_axis], eqn, (*operands,), axis, shape, dtype)


def _longer(eqn: jx.Eqn, ins: Sequence[_Value], chain: Affine) -> Affine | None:
    """The chain with one more operation, or None where that is no affine one."""
    name, aval = eqn.primitive.name, eqn.outvars[0].aval
    shape = tuple(aval.shape)
    if not jnp.issubdtype(aval.dtype, jnp.floating):
        return None
    if len(ins) == 1 and name in _PASSED:
        return _passed(eqn, chain, shape, aval.dtype)
    if name not in _ARITHMETIC or shape != chain.shape:
        return None
    first = isinstance(ins[0], Affine)
    other = ins[1 if first else 0]
    if not isinstance(other, Free) or (name == "div" and not first):
        return None
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


def _one(size: Any) -> bool:
    return isinstance(size, int) and size == 1
