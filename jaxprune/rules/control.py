# SPDX-License-Identifier: Apache-2.0
"""Loops and branches: analysed inside, re-emitted around the cut body.

A channel of a carry is one channel in every pass, so what a pass makes of it is tied to
what it took; what branches return is tied alike. The axis of passes is never cut.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune import jaxpr as jx
from jaxprune.labels import Axis, Labels, RawTerm, Value, unknown
from jaxprune.walk import Context, Cut, Rule, Tape, rebind


def _scan(context: Context, eqn: jx.Eqn, ins: Sequence[Value]) -> Any:
    """Every pass computes, so every pass costs."""
    consts, init, xs = jx.scan_parts(eqn, ins)
    for value in xs:
        context.labels.freeze(value.labels[0], jx.Site(eqn))
    xs = [v._replace(labels=v.labels[1:], fill=v.fill[1:]) for v in xs]
    tape, ends, inner = _passes(context, eqn, eqn.params["jaxpr"], consts, init, xs)
    inner.terms = [
        term._replace(coefficient=term.coefficient * eqn.params["length"])
        for term in inner.terms
    ]
    context.labels.absorb(inner)
    stacks = [
        Value((None, *v.labels), (None, *v.fill), v.const)
        for v in tape.outs[len(init) :]
    ]
    return [*ends, *stacks], tape


def _rewrite_scan(cut: Cut) -> list[Any]:
    (cut, operands), p = cut.parts(), cut.eqn.params
    consts, init, xs = jx.scan_parts(cut.eqn, operands)

    def body(carry: Any, x: Any) -> Any:
        outs = cut.run(cut.node.aux, *consts, *carry, *x)
        return outs[: len(init)], outs[len(init) :]

    carry, ys = jax.lax.scan(
        body, init, xs, p["length"], reverse=p["reverse"], unroll=p["unroll"]
    )
    return [*carry, *ys]


def _while(context: Context, eqn: jx.Eqn, ins: Sequence[Value]) -> Any:
    """The number of passes is unknown: one counts."""
    asked, consts, init = jx.while_parts(eqn, ins)
    body, ends, inner = _passes(context, eqn, eqn.params["body_jaxpr"], consts, init)
    context.labels.absorb(inner)
    carry = body.ins[len(consts) :]
    test = context.walk(jx.program(eqn.params["cond_jaxpr"]), [*asked, *carry])
    # Under vmap, examples lie along the answer's axes, and the first ones of a carry.
    batch = len(test.outs[0].labels)
    for value in (*test.outs, *carry):
        for axis in value.labels[:batch]:
            context.labels.freeze(axis, jx.Site(eqn))
    return ends, (test, body)


def _rewrite_while(cut: Cut) -> list[Any]:
    cut, operands = cut.parts()
    asked, consts, init = jx.while_parts(cut.eqn, operands)
    test, body = cut.node.aux
    # Under vmap each example has its own answer, and stays as it is once that is no.
    batch = len(test.outs[0].labels)

    def goes_on(carry: Any) -> Any:
        return cut.run(test, *asked, *carry)[0]

    def one_pass(carry: Any) -> Any:
        new = cut.run(body, *consts, *carry)
        if not batch:
            return new
        active = goes_on(carry)
        return [
            jnp.where(jax.lax.expand_dims(active, range(batch, jnp.ndim(a))), a, b)
            for a, b in zip(new, carry)
        ]

    until = (lambda carry: jnp.any(goes_on(carry))) if batch else goes_on
    return list(jax.lax.while_loop(until, one_pass, init))


def _passes(
    context: Context,
    eqn: jx.Eqn,
    jaxpr: Any,
    consts: Sequence[Value],
    init: Sequence[Value],
    xs: Sequence[Value] = (),
) -> tuple[Tape, list[Value], Labels]:
    """(a loop's body, its last carry, labels to absorb).

    What is known of a carry must be true in every pass. It is what is known of the
    first one, less what a pass does not preserve, until nothing is lost any more.
    """
    program = jx.program(jaxpr)
    carry = [Value(v.labels, v.held()) for v in init]
    while True:
        inner = dataclasses.replace(context, labels=context.labels.scratch())
        tape = inner.walk(program, [*consts, *carry, *xs])
        preserved = list(map(_preserved, carry, tape.outs))
        if all(a is b for a, b in zip(carry, preserved)):
            ends = [_one_of(inner.labels, eqn, pair) for pair in zip(tape.outs, init)]
            return tape, ends, inner.labels
        carry = preserved


def _preserved(carry: Value, out: Value) -> Value:
    """What is known of a carry, and of what a pass made of it."""
    labels = tuple(
        None if after is None else before
        for before, after in zip(carry.labels, out.labels)
    )
    fill = _agreed([carry, out])
    same = fill == carry.fill and all(a is b for a, b in zip(labels, carry.labels))
    return carry if same else Value(labels, fill)


def _one_of(labels: Labels, eqn: jx.Eqn, values: Sequence[Value]) -> Value:
    """A value that is one of these, at run time: their axes go together."""

    def tied(a: Axis, b: Axis) -> Axis:
        return labels.unify(a, b, jx.Site(eqn))

    axes = zip(*(v.labels for v in values))
    return Value(tuple(functools.reduce(tied, axis) for axis in axes), _agreed(values))


def _agreed(values: Sequence[Value]) -> tuple[float | None, ...]:
    """Per axis, the number that all of them hold at removed indices."""
    numbers = zip(*(v.held() for v in values))
    return tuple(n[0] if len(set(n)) == 1 else unknown(*n) for n in numbers)


def _cond(context: Context, eqn: jx.Eqn, ins: Sequence[Value]) -> Any:
    """Of branches, the dearest counts."""
    tapes: list[Tape] = []
    terms: list[list[RawTerm]] = []
    for branch in eqn.params["branches"]:
        inner = dataclasses.replace(context, labels=context.labels.scratch())
        tapes.append(inner.walk(jx.program(branch), ins[1:]))
        terms.append(inner.labels.terms)
        inner.labels.terms = []
        context.labels.absorb(inner.labels)
    dearest: list[RawTerm] = max(terms, key=_dense_flops)
    context.labels.terms += dearest
    ends = zip(*(tape.outs for tape in tapes))
    return [_one_of(context.labels, eqn, values) for values in ends], tuple(tapes)


def _dense_flops(terms: list[RawTerm]) -> int:
    return sum(
        term.coefficient * math.prod(map(len, term.axes))
        for term in terms
        if term.kind == "flops"
    )


def _rewrite_cond(cut: Cut) -> list[Any]:
    cut, (index, *operands) = cut.parts()
    branches = [functools.partial(cut.run, tape) for tape in cut.node.aux]
    return jax.lax.switch(index, branches, *operands)


def _empty(context: Context, eqn: jx.Eqn, ins: Sequence[Value]) -> list[Value]:
    """What a branch that was not taken leaves to the derivative: zero, never read."""
    del context, eqn, ins
    return [Value((), (), 0.0)]


RULES = {
    "cond": Rule(_cond, _rewrite_cond),
    "empty2": Rule(_empty, rebind),
    "scan": Rule(_scan, _rewrite_scan),
    "while": Rule(_while, _rewrite_while),
}
