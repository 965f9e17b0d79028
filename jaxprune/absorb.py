# SPDX-License-Identifier: Apache-2.0
"""A program with chains of affine steps behind its products taken up by the kernels.

Programs that are called are run in place; loops, branches and functions with
derivatives of their own are run whole.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxprune import jaxpr as jx
from jaxprune.affine import (
    ARITHMETIC,
    PASSED,
    Affine,
    Free,
    Plain,
    Value,
    constant,
    free_outputs,
    inner_norms,
    itself,
    longer,
)
from jaxprune.taps import CALLS

_Make = Callable[[], Any]


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
    """Find the chains; leaves, given: the program's operands, or their shapes.

    The program takes the variables `leaves` first, then the inputs `given`; it runs in
    shapes alone, anew for each kernel that turns out to be read elsewhere too.
    """
    shunned: dict[int, str] = {}
    while True:
        state = _state(_zeros, shunned)

        def walk(arrays: list[Any], inputs: list[Any], state: _State = state) -> Any:
            makes = [functools.partial(itself, x) for x in arrays]
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
    """{kernel: (the kernel scaled, the bias [C])}; given: only its shapes are used.

    arrays: the variables, by number. A kernel keeps its shape and dtype; the bias has
    the chain's dtype.
    """
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
    makes = [functools.partial(itself, x) for x in arrays]
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
    """The outputs with the chains of these kernels replaced, and which were met.

    makes, structs: the variables, as functions that give them and their shapes. biases:
    {kernel: [C]}; a kernel in `makes` is then the scaled one.
    """
    state = _state(lambda c: biases[c.number], _not(biases, len(structs)))
    values = _start(program, makes, structs, given, state)
    return values, set(state.merged)


def _state(shift: Callable[[Affine], Any], shunned: Mapping[int, str]) -> _State:
    return _State(shift, shunned, {}, Counter(), set(), {})


def _not(chosen: Any, count: int) -> dict[int, str]:
    return {n: "" for n in range(count) if n not in chosen}


def _zeros(chain: Affine) -> Any:
    return jnp.zeros((chain.shape[chain.axis],), chain.dtype)


def _start(
    program: jx.Program,
    makes: Sequence[_Make],
    structs: Sequence[Any],
    given: Sequence[Any],
    state: _State,
) -> list[Any]:
    values: list[Value] = [
        Free(x.shape, x.shape, make, frozenset([n]), False, (n, (*range(x.ndim),)))
        for n, (x, make) in enumerate(zip(structs, makes, strict=True))
    ]
    values += [Plain(x, "it follows the network's input") for x in given]
    return [_array(x, state) for x in _walk(program, values, state)]


def _walk(program: jx.Program, args: Sequence[Value], state: _State) -> list[Value]:
    env: dict[Any, Value] = {}
    for var, const in zip(program.constvars, program.consts, strict=True):
        env[var] = constant(const)
    uses = program.uses()

    def read(atom: Any) -> Value:
        return constant(atom.val) if jx.is_literal(atom) else env[atom]

    def write(var: Any, out: Value) -> None:
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


def _array(x: Value, state: _State) -> Any:
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


def _equation(eqn: jx.Eqn, ins: Sequence[Value], state: _State) -> Sequence[Value]:
    name = eqn.primitive.name
    if name in CALLS and any(
        isinstance(x, Affine) or isinstance(x, Free) and x.leaves for x in ins
    ):
        return _walk(jx.called(eqn), ins, state)
    if all(isinstance(x, Free) for x in ins) and not eqn.effects:
        return free_outputs(eqn, ins)  # type: ignore[arg-type]
    product = _product(eqn, ins, state)
    if product is not None:
        return [product]
    chains = [x for x in ins if isinstance(x, Affine)]
    cause = f"it follows {jx.Site(eqn)}"
    if len(chains) == 1 and all(isinstance(x, Affine | Free) for x in ins):
        chain = longer(eqn, ins, chains[0])
        if chain is not None:
            return [chain]
        cause = f"it does not lie along the channels of {jx.Site(chains[0].eqn)}"
    if name in ("mul", "div") and len(ins) == 2:
        _note(ins, cause, state)
    for number in inner_norms(eqn, ins):
        state.left[number] = f"it lies within {jx.Site(eqn)}"
    outs = jx.bind(eqn, *(_array(x, state) for x in ins))
    before = [x.cause for x in ins if isinstance(x, Plain)]
    if before and name in (*ARITHMETIC, *PASSED):
        cause = before[0]
    return [Plain(x, cause) for x in outs]


def _note(ins: Sequence[Value], cause: str, state: _State) -> None:
    """That a batch norm's factor meets something that it cannot be folded into."""
    for x, y in (ins, ins[::-1]):
        if isinstance(x, Free) and x.root and x.leaves and not isinstance(y, Free):
            state.left[min(x.leaves)] = y.cause if isinstance(y, Plain) else cause


def _product(eqn: jx.Eqn, ins: Sequence[Value], state: _State) -> Affine | Plain | None:
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
    if axes[kernel_axis] < 0:
        return None  # channels in another order than the variable has them
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
