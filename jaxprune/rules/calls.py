# SPDX-License-Identifier: Apache-2.0
"""Equations that call a program: analysed inside, re-emitted around the cut body."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import jaxpr as jx
from jaxprune.labels import Value
from jaxprune.plan import plan
from jaxprune.walk import Context, Cut, Kept, Rule, Tape, run


def _call(in_place: bool = False) -> Callable[..., Any]:
    def rule(context: Context, eqn: jx.Eqn, ins: Sequence[Value]) -> Any:
        tape = context.walk(jx.called(eqn), ins, in_place)
        return list(tape.outs), tape

    return rule


# The programs that these rules hand to JAX outlive the call, so they must not hold its
# operands: `parts` takes the two apart.


def _rewrite_jit(cut: Cut) -> list[Any]:
    """One jitted body a site and plan: called again, it is not compiled again."""
    if cut.even:
        return _rewrite_inline(cut)
    cut, operands = cut.parts()

    def body(*args: Any) -> list[Any]:
        return cut.run(cut.node.aux, *args)

    bodies = getattr(cut.kept, "bodies", {})
    if id(cut.node) not in bodies:
        body.__name__ = cut.eqn.params.get("name") or "body"
        inline = bool(cut.eqn.params.get("inline"))
        bodies[id(cut.node)] = cut.node, jax.jit(body, inline=inline)
    return bodies[id(cut.node)][1](*operands)


def _rewrite_inline(cut: Cut) -> list[Any]:
    return cut.run_in_place(cut.node.aux)


def _rewrite_remat(cut: Cut) -> list[Any]:
    cut, operands = cut.parts()
    p = cut.eqn.params
    body = jax.checkpoint(
        lambda *args: cut.run(cut.node.aux, *args),
        prevent_cse=p["prevent_cse"],
        policy=p["policy"],
    )
    return body(*operands)


# Custom derivatives. JAX derives the dense equation; the programs that come out,
# tangents for custom_jvp, residuals and cotangents for custom_vjp, are cut as the
# primal one is. So relu'(0) stays 0, and a rule's own choice of residuals is kept.


def _rewrite_custom_jvp(cut: Cut) -> list[Any]:
    (cut, operands), node = cut.parts(), cut.node

    @jax.custom_jvp
    def f(*args: Any) -> list[Any]:
        return cut.run(node.aux, *args)

    @f.defjvp
    def f_jvp(primals: Any, tangents: Any) -> Any:
        moving = [i for i, x in enumerate(primals) if _is_float(x)]

        def dense(*args: Any) -> Any:
            xs, ts = args[: len(primals)], list(args[len(primals) :])
            zeros = [np.zeros(x.shape, jax.dtypes.float0) for x in xs]
            for i in moving:
                zeros[i] = ts.pop(0)
            return jax.jvp(lambda *a: jx.bind(node.eqn, *a), xs, tuple(zeros))

        still = [_still(v) for v in node.ins]
        values = [*node.ins, *(still[i] for i in moving)]
        outs = [*node.outs, *map(_still, node.outs)]
        args = (*primals, *(tangents[i] for i in moving))
        avals = [v.aval for v in node.eqn.invars]
        avals += [v.aval for i, v in enumerate(node.eqn.invars) if i in moving]
        flat = _derived(cut, dense, avals, values, outs, args)
        return flat[: len(node.outs)], flat[len(node.outs) :]

    return f(*operands)


def _rewrite_custom_vjp(cut: Cut) -> list[Any]:
    (cut, operands), node = cut.parts(), cut.node
    avals = [v.aval for v in node.eqn.invars]
    tree: list[Any] = []
    # Arrays that the function closes over come first; JAX derives by none of them.
    closed = node.eqn.params.get("num_consts", 0)

    def dense_forward(*args: Any) -> Any:
        held = args[:closed]
        out, pull = jax.vjp(lambda *a: jx.bind(node.eqn, *held, *a), *args[closed:])
        residuals, treedef = jax.tree.flatten(pull)
        tree[:] = [treedef]
        return out, residuals

    def dense_backward(*args: Any) -> Any:
        count = len(args) - len(node.outs)
        pulled = jax.tree.unflatten(tree[0], args[:count])(list(args[count:]))
        return (*map(_no_cotangent, avals[:closed]), *pulled)

    forward: list[tuple[Tape, Any, Any]] = []

    @jax.custom_vjp
    def f(*args: Any) -> list[Any]:
        return cut.run(node.aux, *args)

    def f_forward(*args: Any) -> Any:
        tape, kept, shapes = _plan(cut, dense_forward, avals, node.ins, node.outs)
        forward[:] = [(tape, kept, shapes)]
        flat = run(tape, kept, cut.rules, args)
        return flat[: len(node.outs)], flat[len(node.outs) :]

    def f_backward(residuals: Any, cotangents: Any) -> Any:
        tape, kept_forward, shapes = forward[0]
        values = tape.outs[len(node.outs) :]
        pulled = [_unknown(v) for v in node.outs]
        flat = _derived(
            cut,
            dense_backward,
            [*shapes[1], *(v.aval for v in node.eqn.outvars)],
            [*values, *pulled],
            [_unknown(v) for v in node.ins],
            [*residuals, *cotangents],
            kept=[*map(kept_forward, values), *map(cut.kept, node.outs)],
        )
        return tuple(flat)

    f.defvjp(f_forward, f_backward)
    return f(*operands)


def _no_cotangent(aval: Any) -> Any:
    if jnp.issubdtype(aval.dtype, jnp.inexact):
        return jnp.zeros(aval.shape, aval.dtype)
    return np.zeros(aval.shape, jax.dtypes.float0)


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _still(value: Value) -> Value:
    """A tangent: where a removed index holds a known number, it does not move."""
    return Value(value.labels, tuple(None if f is None else 0.0 for f in value.held()))


def _unknown(value: Value) -> Value:
    return Value(value.labels, (None,) * len(value.labels))


def _derived(
    cut: Cut,
    dense: Callable[..., Any],
    avals: Sequence[Any],
    ins: Sequence[Value],
    outs: Sequence[Value],
    args: Sequence[Any],
    kept: Sequence[Kept] | None = None,
) -> list[Any]:
    """Run a program that was derived from this equation on small operands."""
    tape, resolve, _ = _plan(cut, dense, avals, ins, outs, kept)
    return run(tape, resolve, cut.rules, args)


def _plan(
    cut: Cut,
    dense: Callable[..., Any],
    avals: Sequence[Any],
    ins: Sequence[Value],
    outs: Sequence[Value],
    kept: Sequence[Kept] | None = None,
) -> tuple[Tape, Callable[[Value], Kept], Any]:
    structs = [
        jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=jx.explicit_sharding(a))
        for a in avals
    ]
    # An equation under shard_map takes only operands that differ as its own did.
    axes = [jx.varying(a) for a in avals]

    def as_before(*args: Any) -> Any:
        return dense(*map(jx.vary, args, axes))

    program, shapes = jx.trace(as_before, *structs)
    kept_in = [cut.kept(v) for v in ins] if kept is None else list(kept)
    kept_out: list[Kept | None] = [*map(cut.kept, outs)]
    kept_out += [None] * (len(program.outvars) - len(outs))
    fills = [v.held() for v in ins]
    name, exact = str(jx.Site(cut.eqn)), cut.node.aux.exact
    tape, resolve = plan(
        program, kept_in, kept_out, fills, cut.rules, name, exact=exact
    )
    return tape, resolve, shapes


RULES = {
    "jit": Rule(_call(in_place=True), _rewrite_jit),
    "composite": Rule(_call(in_place=True), _rewrite_inline),
    "closed_call": Rule(_call(in_place=True), _rewrite_inline),
    "remat2": Rule(_call(), _rewrite_remat),
    "custom_jvp_call": Rule(_call(), _rewrite_custom_jvp),
    "custom_vjp_call": Rule(_call(), _rewrite_custom_vjp),
}
