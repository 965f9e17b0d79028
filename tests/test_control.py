# SPDX-License-Identifier: Apache-2.0
"""Loops and branches: what can be cut, that cutting is masking, and what it costs."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from test_laws import assert_close, law1

import jaxprune as jp


def network(middle: Any, depth: int = 4) -> tuple[Any, Any, Any]:
    """(apply, variables, x) of middle(tanh(x @ a), p) @ b; its p: w, q and a stack."""

    def apply(v: Any, x: Any) -> Any:
        p = v["params"]
        return middle(jnp.tanh(x @ p["a"]), {**p, "x": x}) @ p["b"]

    shapes = {"a": (3, 6), "b": (6, 2), "q": (3, 6), "w": (6, 6), "s": (depth, 6, 6)}
    rng = np.random.default_rng(0)
    params = {k: rng.normal(0, 0.5, s).astype(np.float32) for k, s in shapes.items()}
    return apply, {"params": params}, rng.normal(size=(4, 3)).astype(np.float32)


def half(graph: jp.Graph) -> dict[str, np.ndarray]:
    return {n: np.arange(g.size) % 2 == 0 for n, g in graph.groups.items()}


def sizes(graph: jp.Graph, leaf: str = "") -> list[int]:
    """The sizes of the groups that lie in a leaf."""
    groups = graph.groups.values()
    return sorted(g.size for g in groups if any(leaf in s.path[-1] for s in g.slots))


def check_law(apply: Any, variables: Any, x: Any, *others: Any, **kw: Any) -> jp.Graph:
    """Cutting half of every group is masking it, and the network is not idle.

    Derivatives are compared at x, outputs at the others too.
    """
    graph = jp.trace(apply, variables, x)
    assert all(g.exact for g in graph.groups.values())
    keep = half(graph)
    masked, slim = law1(apply, graph, keep, variables, x, **kw)
    assert_close(masked[0], slim[0])
    assert_close(masked[1], slim[1])
    check_outputs(apply, graph, variables, x, *others)
    return graph


def check_outputs(apply: Any, graph: jp.Graph, variables: Any, *inputs: Any) -> None:
    keep, outs = half(graph), []
    with jax.enable_x64(True):
        double = jax.tree.map(lambda a: np.asarray(a, np.float64), variables)
        masked, small = (f(graph, keep, double) for f in (jp.mask, jp.shrink))
        dense, slim = jax.jit(apply), jax.jit(jp.slim(apply, graph, keep))
        for x in map(np.float64, inputs):
            outs.append(dense(masked, x))
            assert_close(outs[-1], slim(small, x))
    for out in outs[1:]:
        assert np.abs(out - outs[0]).max() > 1e-4 * np.abs(outs[0]).max()


def check_forward_law(apply: Any, variables: Any, x: Any, *others: Any) -> jp.Graph:
    """As `check_law`, with forward derivatives: a while loop has no others."""
    graph = jp.trace(apply, variables, x)
    keep, sides = half(graph), []
    with jax.enable_x64(True):
        double = jax.tree.map(lambda a: np.asarray(a, np.float64), variables)
        moved = jax.tree.map(
            lambda a: np.cos(np.arange(a.size)).reshape(a.shape), double
        )
        for f, to in ((apply, jp.mask), (jp.slim(apply, graph, keep), jp.shrink)):
            ends = to(graph, keep, (double, moved))
            along = functools.partial(jax.jvp, lambda v, f=f: f(v, np.float64(x)))
            sides.append(jax.jit(lambda v, t, along=along: along((v,), (t,)))(*ends))
    assert_close(*sides)
    assert np.abs(sides[0][1]).max() > 1e-4
    check_outputs(apply, graph, variables, x, *others)
    return graph


def _steps(body: Any, init: Any, length: int = 3, **kw: Any) -> Any:
    return lax.scan(lambda c, _: (body(c), None), init, None, length, **kw)[0]


def _carry_and_stack(y: Any, p: Any) -> Any:
    xs = jnp.stack([y, 2 * y, jnp.sin(y)])
    last, ys = lax.scan(lambda c, x: (jnp.tanh(c @ p["w"] + x), c * x), y, xs)
    return last + ys.sum(0) * ys[1].sum(-1, keepdims=True)


def _reverse(y: Any, p: Any) -> Any:
    """A stack of passes, run backwards, in pairs."""

    def body(c: Any, x: Any) -> Any:
        return jnp.tanh(c @ x), c

    last, ys = lax.scan(body, y, p["s"], reverse=True, unroll=2)
    return last + ys[0] * ys[-1]


def _nested(y: Any, p: Any) -> Any:
    def inner(c: Any) -> Any:
        return _steps(lambda c: jnp.tanh(c @ p["w"]), c, 2)

    def outer(c: Any, x: Any) -> Any:
        c = lax.cond(c.sum() + x > 0, inner, lambda c: 2 * c + jnp.tanh(c @ p["w"]), c)
        return c, c.sum(-1)

    last, sums = lax.scan(outer, y, jnp.array([-50.0, 50.0, 0.0]))
    return last * sums[1][:, None]


def _switch(y: Any, p: Any) -> Any:
    branches = (
        lambda y: jnp.tanh(y @ p["w"]),
        lambda y: jnp.zeros_like(y) + y.sum(-1, keepdims=True) * (y @ p["w"]),
        lambda y: y * np.linspace(1, 2, 6, dtype=np.float32),
        lambda y: jnp.zeros_like(y),
    )
    at = jnp.int32(jnp.abs(p["x"]).sum())
    return y + sum(lax.switch((at + i) % 4, branches, y) for i in range(3))


def _swap(y: Any, p: Any) -> Any:
    """Two features change places in every pass."""
    last = _steps(lambda c: (c[1], c[0]), (y, p["x"] @ p["q"]))
    return last[0] * 2 + jnp.tanh(last[1])


def _gradient_descent(y: Any, p: Any) -> Any:
    """A derivative inside: the program holds a transposed scan."""

    def loss(y: Any, w: Any) -> Any:
        return (_steps(lambda c: jnp.tanh(c @ w) + c, y) ** 2).sum()

    dy, dw = jax.grad(loss, argnums=(0, 1))(y, p["w"])
    return y - 0.1 * dy @ (p["w"] - 0.1 * dw)


def _gradient_of_branches(y: Any, p: Any) -> Any:
    """What the branches leave to the derivative is tied too, also under remat."""

    def body(c: Any) -> Any:
        return lax.cond(c.sum() > 0, lambda c: jnp.tanh(c @ p["w"]), jnp.sin, c)

    def loss(y: Any) -> Any:
        return (_steps(jax.checkpoint(body), _steps(body, y)) ** 2).sum()

    return y + jax.grad(loss)(y)


def _curvature(y: Any, p: Any) -> Any:
    def loss(y: Any) -> Any:
        return (_steps(lambda c: _tripled(jnp.tanh(c @ p["w"])), y) ** 2).sum()

    return jax.jvp(jax.grad(loss), (y,), (jnp.sin(y),))[1]


@jax.custom_vjp
def _tripled(x: Any) -> Any:
    return jnp.sin(x)


_tripled.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (3 * g * jnp.cos(x),))

SCANS = {
    "fori": lambda y, p: lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ p["w"]) + i, y),
    "carry and stack": _carry_and_stack,
    "reverse": _reverse,
    "nested": _nested,
    "cond": lambda y, p: lax.cond(
        p["x"].sum() > 0, lambda y: jnp.tanh(y @ p["w"]), lambda y: 2 * y, y
    ),
    "switch": _switch,
    "remat": lambda y, p: _steps(jax.checkpoint(lambda c: jnp.sin(c @ p["w"])), y),
    "custom_jvp": lambda y, p: _steps(lambda c: jax.nn.relu(c @ p["w"]) + c, y),
    "custom_vjp": lambda y, p: _steps(lambda c: _tripled(c @ p["w"]), y),
    "swap": _swap,
    "gradient descent": _gradient_descent,
    "gradient of branches": _gradient_of_branches,
    "curvature": _curvature,
    "from zero": lambda y, p: _steps(
        lambda c: jnp.tanh(c @ p["w"] + y) * (1 + c.sum()), jnp.zeros_like(y)
    ),
    "indexed stack": lambda y, p: lax.fori_loop(
        0, 4, lambda i, c: jnp.tanh(c @ p["s"][i]), y
    ),
    "vmap": lambda y, p: jax.vmap(
        lambda row: _steps(lambda c: jnp.tanh(c @ p["w"]), row)
    )(y),
    "scan in vmap in scan": lambda y, p: _steps(
        jax.vmap(lambda r: _steps(lambda c: jnp.tanh(c @ p["w"]), r, 2)), y
    ),
}


@pytest.mark.parametrize("name", SCANS)
def test_slim_is_mask_through_scans_and_branches(name: str) -> None:
    apply, variables, x = network(SCANS[name])
    graph = check_law(apply, variables, x, -x, 1 + x)
    assert sizes(graph, "b") == [6], graph.frozen


def _until(y: Any, p: Any) -> Any:
    """How many passes there are depends on the data, and on no removed channel."""

    def goes_on(c: Any) -> Any:
        return (c[0] < 9) & (jnp.abs(c[1]).sum() < 60)

    def body(c: Any) -> Any:
        return c[0] + 1, 1.5 * c[1] + jnp.tanh(c[1] @ p["w"])

    passes, last = lax.while_loop(goes_on, body, (0, y))
    return last * passes


WHILES = {
    "until": _until,
    "until, of each": lambda y, p: jax.vmap(lambda row: _until(9 * row, p))(y),
    "fori": lambda y, p: lax.fori_loop(
        0, jnp.int32(jnp.abs(p["x"]).sum()) % 5, lambda i, c: jnp.sin(c @ p["w"]) + i, y
    ),
    "within scan": lambda y, p: _steps(lambda c: 0.1 * _until(0.1 * c, p), y),
}


@pytest.mark.parametrize("name", WHILES)
def test_slim_is_mask_through_while_loops(name: str) -> None:
    apply, variables, x = network(WHILES[name])
    graph = check_forward_law(apply, variables, x, 2 * x, 1 + x)
    assert sizes(graph, "b") == [6], graph.frozen


def test_a_carry_that_is_turned_round_ties_channels_in_pairs() -> None:
    graph = check_law(*network(lambda y, p: _steps(lambda c: c[:, ::-1] * 2, y)))
    assert sizes(graph, "b") == [3]


FROZEN = {
    "rolled": lambda y, p: _steps(lambda c: jnp.roll(c, 1, axis=-1), y),
    "zero only at first": lambda y, p: (
        y
        * _steps(
            lambda c: (jnp.cos(c[0]), c[0].sum(-1, keepdims=True)), (y, y[:, :1] * 0)
        )[1]
    ),
    "a branch that is not zero": lambda y, p: (
        y * lax.cond(p["x"].sum() > 0, jnp.cos, jnp.sin, y).sum(-1, keepdims=True)
    ),
    "scanned": lambda y, p: _steps_over(y.T).T,
    "mapped": lambda y, p: jax.vmap(
        lambda c: lax.while_loop(lambda c: c.sum() < 3, lambda c: c * 2 + 1, c), 1, 1
    )(y),
    "while": lambda y, p: lax.while_loop(
        lambda c: c.sum() < 3, lambda c: c - jnp.sort(c, axis=-1), y
    ),
}


def _steps_over(xs: Any) -> Any:
    return lax.scan(lambda c, x: (c + x, c * x), xs[0], xs)[1]


@pytest.mark.parametrize("name", FROZEN)
def test_what_a_pass_mixes_is_frozen(name: str) -> None:
    apply, variables, x = network(FROZEN[name])
    graph = jp.trace(apply, variables, x)
    assert not sizes(graph, "b")
    assert jp.verify(apply, graph, half(graph), variables, x) < 1e-5
    if name == "zero only at first":
        graph = jp.trace(apply, variables, x, exact=False)
        assert not graph.groups["a"].exact


def test_the_axis_of_passes_is_frozen_and_named() -> None:
    apply, variables, x = network(
        lambda y, p: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), y, p["s"])[0]
    )
    graph = check_law(apply, variables, x)
    group = graph.groups["a"]
    slots = {("/".join(s.path), s.axis): s.role for s in group.slots}
    assert slots["params/s", 1] == "in" and slots["params/s", 2] == "out"
    frozen = {("/".join(f.path), f.axis): f for f in graph.frozen}
    assert frozen["params/s", 0].count == 4
    assert frozen["params/s", 0].cause.startswith("scan (test_control.py:")


def test_groups_are_in_order_of_first_use() -> None:
    """Inside a branch too."""

    def apply(v: Any, x: Any) -> Any:
        y = lax.cond(x.sum() > 0, lambda x: x @ v["z"], lambda x: 2 * x @ v["z"], x)
        return jnp.tanh(jnp.tanh(y @ v["m"]) @ v["b"])

    shapes = {"b": (6, 2), "m": (5, 6), "z": (3, 5)}
    variables = {k: jax.ShapeDtypeStruct(s, "float32") for k, s in shapes.items()}
    graph = jp.trace(apply, variables, jax.ShapeDtypeStruct((4, 3), "float32"))
    assert list(graph.groups) == ["z", "m"]


def test_the_dearest_branch_costs() -> None:
    apply, variables, x = network(
        lambda y, p: lax.cond(
            y.sum() > 0, lambda y: y @ p["w"] @ p["w"], lambda y: y @ p["w"], y
        )
    )
    graph = jp.trace(apply, variables, x)
    for c in (6, 2):
        keep = {**graph.full(), "a": np.arange(6) < c}
        assert jp.cost(graph, keep).flops == 2 * 4 * (3 * c + 2 * c * c + c * 2)


# Random bodies for a carry of two features.
PASSES = {
    "dense": lambda c, p: (jnp.tanh(c[0] @ p["w"]), c[1]),
    "swap": lambda c, p: (c[1], c[0]),
    "mix": lambda c, p: (c[0], (c[0] + jnp.sin(c[1])) / 2),
    "turn": lambda c, p: (c[0][:, ::-1], c[1]),
    "gate": lambda c, p: (c[0] * jnp.tanh(c[1].sum(-1, keepdims=True)), c[1]),
    "halves": lambda c, p: (jnp.concatenate([c[0][:, 3:], c[1][:, :3]], -1), c[1]),
    "cos": lambda c, p: (c[0], jnp.cos(c[1])),
    "zero": lambda c, p: (jnp.zeros_like(c[0]), c[1]),
}


def _composed(node: Any) -> Any:
    if isinstance(node, str):
        return PASSES[node]
    kind, first, second = node[0], _composed(node[1]), _composed(node[2])

    def both(c: Any, p: Any) -> Any:
        return second(first(c, p), p)

    def composed(c: Any, p: Any) -> Any:
        if kind == "scan":
            body = lambda c, _: (both(c, p), c[0] * c[1])  # noqa: E731
            c, ys = lax.scan(body, c, None, 2, reverse=True)
            return c[0] + ys[0], c[1]
        if kind == "stack":
            body = lambda c, x: (both((c[0] @ x, c[1]), p), None)  # noqa: E731
            return lax.scan(body, c, p["s"])[0]
        if kind == "cond":
            return lax.cond(
                c[1].sum() > 0, lambda c: first(c, p), lambda c: both(c, p), c
            )
        return lax.while_loop(
            lambda s: (s[0] < 3) & (jnp.abs(s[1][0]).sum() < 50),
            lambda s: (s[0] + 1, both(s[1], p)),
            (0, c),
        )[1]

    return composed


@settings(max_examples=15)
@given(
    st.recursive(
        st.sampled_from(sorted(PASSES)),
        lambda inner: st.tuples(
            st.sampled_from(("scan", "stack", "cond", "while")), inner, inner
        ),
        max_leaves=6,
    )
)
def test_slim_is_mask_on_random_loops(node: Any) -> None:
    f = _composed(node)
    apply, variables, x = network(lambda y, p: jnp.add(*f((y, p["x"] @ p["q"]), p)))
    check_outputs(apply, jp.trace(apply, variables, x), variables, x)


def test_slim_through_a_scan_can_be_transformed_and_leaks_nothing() -> None:
    apply, variables, x = network(_nested)
    graph = jp.trace(apply, variables, x)
    small = jp.shrink(graph, half(graph), variables)
    slim = jp.slim(apply, graph, half(graph))
    want = jax.jit(slim)(small, x)
    each = jax.vmap(lambda row: slim(small, row[None])[0])(x)
    assert each.shape == want.shape
    with jax.checking_leaks():
        jax.jit(jax.grad(lambda v, x: slim(v, x).sum()))(small, x)
