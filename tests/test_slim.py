# SPDX-License-Identifier: Apache-2.0
"""What slim makes of the user's function: derivatives, modes, what is compiled."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.base import GraphError


def test_relu_keeps_its_derivative_at_zero() -> None:
    apply, variables, _ = networks.two_layers(jax.nn.relu)
    x = np.zeros((4, 3), np.float32)
    graph = jp.trace(apply, variables, x)
    keep = networks.random_keep(graph, 0)
    small = jp.shrink(graph, keep, variables)
    slim = jp.slim(apply, graph, keep)
    gradient = jax.grad(lambda x: slim(small, x).sum())(x)
    np.testing.assert_array_equal(gradient, 0.0)


def test_custom_vjp_is_kept_and_cut() -> None:
    """A backward rule of its own: here it triples the gradient."""

    @jax.custom_vjp
    def f(x: Any) -> Any:
        return jnp.sin(x)

    f.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (3 * g * jnp.cos(x),))
    apply, variables, x = networks.two_layers(f)
    graph = jp.trace(apply, variables, x)
    keep = networks.random_keep(graph, 1)
    masked, small = jp.mask(graph, keep, variables), jp.shrink(graph, keep, variables)
    want = jp.shrink(graph, keep, jax.grad(lambda v: apply(v, x).sum())(masked))
    slim = jp.slim(apply, graph, keep)
    for transform in (lambda g: g, jax.jit):
        got = transform(jax.grad(lambda v: slim(v, x).sum()))(small)
        for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def _spread(x: Any) -> Any:
    return x / jnp.sqrt(x.var(-1, keepdims=True) + 1)


def _spread_vjp() -> Any:
    f = jax.custom_vjp(_spread)
    f.defvjp(lambda x: (_spread(x), x), lambda x, g: (g / (1 + x.var(-1)[:, None]),))
    return f


def _spread_jvp() -> Any:
    f = jax.custom_jvp(_spread)
    f.defjvp(lambda x, t: (_spread(*x), t[0] / (1 + x[0].var(-1)[:, None])))
    return f


@pytest.mark.parametrize("rule", [_spread_vjp, _spread_jvp])
def test_custom_derivatives_of_inexact_groups_are_cut(rule: Any) -> None:
    apply, variables, x = networks.two_layers(rule())
    graph = jp.trace(apply, variables, x, exact=False)
    keep = networks.random_keep(graph, 1)
    small, slim = jp.shrink(graph, keep, variables), jp.slim(apply, graph, keep)
    grads = jax.jit(jax.grad(lambda v: slim(v, x).sum()))(small)
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, small)


def test_a_backward_rule_that_mixes_removed_channels_is_an_error() -> None:
    """Their cotangents are not known to be zero."""
    f = jax.custom_vjp(jnp.sin)
    f.defvjp(lambda x: (jnp.sin(x), None), lambda _, g: (g - g.mean(-1)[:, None],))
    apply, variables, x = networks.two_layers(f)
    graph = jp.trace(apply, variables, x)
    keep = networks.random_keep(graph, 1)
    small, slim = jp.shrink(graph, keep, variables), jp.slim(apply, graph, keep)
    with pytest.raises(GraphError, match="custom_vjp_call.*reduce_sum"):
        jax.grad(lambda v: slim(v, x).sum())(small)


def test_slim_leaks_no_tracer() -> None:
    apply, variables, x = networks.two_layers(
        jax.checkpoint(lambda x: _spread_vjp()(jax.nn.relu(jnp.where(x > 1, 1, x))))
    )
    graph = jp.trace(apply, variables, x, exact=False)
    keep = networks.random_keep(graph, 1)
    small, slim = jp.shrink(graph, keep, variables), jp.slim(apply, graph, keep)
    with jax.checking_leaks():
        jax.jit(lambda v, x: slim(v, x).sum())(small, x)


def test_branches_on_channel_counts_stay_what_they_were() -> None:
    """The user's Python is never run at the new widths."""

    def apply(v: Any, x: Any) -> Any:
        y = x @ v["a"]
        z = jnp.tanh(y @ v["w"])
        if z.shape[-1] == 6:
            z = z + y
        return z @ v["b"]

    rng = np.random.default_rng(0)
    shapes = {"a": (3, 6), "w": (6, 6), "b": (6, 2)}
    variables = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    x = rng.normal(size=(2, 3)).astype(np.float32)
    graph = jp.trace(apply, variables, x)
    keep = {n: np.arange(g.size) < 4 for n, g in graph.groups.items()}
    assert jp.verify(apply, graph, keep, variables, x) < 1e-5


def test_another_mode_that_ties_more_is_an_error() -> None:
    def apply(v: Any, x: Any, sort: bool = False) -> Any:
        y = x @ v["a"]
        return (jnp.sort(y, -1) if sort else y) @ v["b"]

    _, variables, x = networks.two_layers(jax.nn.relu)
    graph = jp.trace(apply, variables, x)
    keep = {n: np.arange(6) < 3 for n in graph.groups}
    slim, small = jp.slim(apply, graph, keep), jp.shrink(graph, keep, variables)
    assert slim(small, x).shape == (4, 2)
    with pytest.raises(GraphError, match="tied to sort.*: index 3 along axis 1 of a "):
        slim(small, x, sort=True)


def test_outputs_that_only_look_like_variables_are_the_users() -> None:
    """A list's second item is no update of the second weight, whatever its shape."""
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=(8, 16)), rng.normal(size=(16, 10))]

    def apply(v: Any, x: Any) -> Any:
        hidden = jnp.tanh(x @ v[0])
        return hidden, hidden @ v[1]

    assert not jp.trace(apply, weights, rng.normal(size=(8, 8))).groups

    def step(v: Any, x: Any) -> Any:
        return jnp.tanh(x @ v[0]) @ v[1], [0.9 * w for w in v]

    graph = jp.trace(step, weights, rng.normal(size=(8, 8)))
    assert [g.size for g in graph.groups.values()] == [16]


def test_a_named_axis_of_another_size_is_another_program() -> None:
    """The mean over a named axis has its size in it."""
    _, variables, x = networks.two_layers(lambda x: x)
    x = np.random.default_rng(1).normal(size=(6, 4, 3)).astype(np.float32)

    def apply(v: Any, x: Any) -> Any:
        h = x @ v["a"]
        return (h - jax.lax.pmean(h, "batch")) @ v["b"]

    def mapped(f: Any, v: Any, x: Any) -> Any:
        return jax.vmap(lambda x: f(v, x), axis_name="batch")(x)

    graph = jp.trace(lambda v, x: mapped(apply, v, x), variables, x[:2])
    keep = {n: np.arange(g.size) < 3 for n, g in graph.groups.items()}
    slimmed = jp.slim(apply, graph, keep)
    masked, small = (f(graph, keep, variables) for f in (jp.mask, jp.shrink))
    for count in (2, 6, 3):
        want = mapped(apply, masked, x[:count])
        got = mapped(slimmed, small, x[:count])
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_second_eager_call_compiles_nothing() -> None:
    apply, variables, x = networks.two_layers(lambda x: jax.nn.relu(jax.nn.silu(x)))
    graph = jp.trace(apply, variables, x)
    keep = {n: np.arange(g.size) < 3 for n, g in graph.groups.items()}
    slimmed, small = jp.slim(apply, graph, keep), jp.shrink(graph, keep, variables)
    slimmed(small, x)
    compiled = []

    def note(event: str, seconds: float, **_: Any) -> None:
        compiled.append(event) if "backend_compile" in event else None

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        slimmed(small, x)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert not compiled


def test_slim_keeps_weak_types() -> None:
    _, variables, x = networks.two_layers(lambda x: x)
    half = {k: jnp.asarray(v, jnp.bfloat16) for k, v in variables.items()}

    def apply(v: Any, x: Any) -> Any:
        return jax.nn.relu(x @ v["a"]) * v["s"] @ v["b"]

    half, x = {**half, "s": 0.5}, jnp.asarray(x, jnp.bfloat16)
    graph = jp.trace(apply, half, x)
    keep = {n: np.arange(g.size) < 3 for n, g in graph.groups.items()}
    got = jp.slim(apply, graph, keep)(jp.shrink(graph, keep, half), x)
    assert got.dtype == apply(jp.mask(graph, keep, half), x).dtype == jnp.bfloat16


def test_an_inexact_cut_leaves_other_groups_exact() -> None:
    """A mode that sums exp over an exact group is not cut plainly beside others."""
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 6), "b": (6, 2), "c": (3, 6), "d": (6, 2)}
    variables = {k: rng.normal(size=s) for k, s in shapes.items()}
    x = rng.normal(size=(4, 3))

    def apply(v: Any, x: Any, train: bool = False) -> Any:
        left, right = x @ v["a"], x @ v["c"]
        left = left * jnp.exp(left).sum(-1, keepdims=True)
        if train:
            right = right * jnp.exp(right).sum(-1, keepdims=True)
        return left @ v["b"] + right @ v["d"]

    graph = jp.trace(apply, variables, x, exact=False)
    assert {n: g.exact for n, g in graph.groups.items()} == {"a": False, "c": True}
    keep = {n: np.arange(6) < 3 for n in graph.groups}
    jp.slim(apply, graph, keep)(jp.shrink(graph, keep, variables), x)
    for cut in ({"a": keep["a"]}, {"c": keep["c"]}, keep):
        cut = {**graph.full(), **cut}
        small = jp.shrink(graph, cut, variables)
        if not cut["a"].all() and not cut["c"].all():
            with pytest.raises(GraphError, match="reduce_sum"):
                jp.slim(apply, graph, cut)(small, x, train=True)
        else:
            got = jp.slim(apply, graph, cut)(small, x, train=True)
            want = apply(jp.mask(graph, cut, variables), x, train=True)
            assert np.allclose(got, want, rtol=1e-3) == cut["a"].all()


def test_axes_removed_together_are_asked_across_a_call_in_any_order() -> None:
    """Turned inside a jitted function, they come in another order than outside."""
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 8), "b": (8, 6), "c": (6, 2)}
    variables = {n: jnp.asarray(rng.normal(size=s)) for n, s in shapes.items()}
    x = jnp.asarray(rng.normal(size=(4, 3)))

    def apply(v: Any, x: Any) -> Any:
        shifted = jnp.exp(v["b"] + 0.3)  # 0.3 at removed rows, and at removed columns
        total = jax.jit(lambda w: w.T.sum())(shifted)
        return jnp.tanh(jnp.tanh(x @ v["a"]) @ v["b"]) @ v["c"] + total / 9

    graph = jp.trace(apply, variables, x)
    assert {g.size for g in graph.groups.values()} == {8, 6}
    keep = {n: np.arange(g.size) % 3 > 0 for n, g in graph.groups.items()}
    assert jp.verify(apply, graph, keep, variables, x) < 1e-5


@pytest.mark.parametrize(
    "first",
    [
        lambda x: np.linspace(1, 2, 12) * x,
        lambda x: jnp.broadcast_to(jnp.arange(4.0)[:, None], x.shape) * x,
        lambda x: jnp.where(
            jax.random.bernoulli(jax.random.key(0), 0.5, (4, 12)), x, 0
        ),
    ],
)
def test_where_channels_were_split_is_seen_behind_what_no_variable_made(
    first: Any,
) -> None:
    """The four in each group cannot go: that is known of the groups' kernel alone."""
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 12), "c": (12, 2)}
    variables = {n: jnp.asarray(rng.normal(size=s)) for n, s in shapes.items()}
    x = jnp.asarray(rng.normal(size=(4, 3)))

    def apply(v: Any, x: Any) -> Any:
        h = first(x @ v["a"]).reshape(4, 3, 4)
        return jnp.cumsum(h, -1).reshape(4, 12) @ v["c"]

    graph = jp.trace(apply, variables, x)
    ((name, group),) = graph.groups.items()
    assert group.size == 3
    keep = {name: np.array([True, False, True])}
    assert jp.verify(apply, graph, keep, variables, x) < 1e-5


def test_other_shapes_are_refused_by_every_call() -> None:
    """Also behind one that has been compiled: the dense tree would run as it is."""
    apply, variables, x = networks.two_layers(jax.nn.relu)
    graph = jp.trace(apply, variables, x)
    keep = networks.random_keep(graph, 0)
    slim, small = jp.slim(apply, graph, keep), jp.shrink(graph, keep, variables)
    for _ in range(2):
        with pytest.raises(GraphError, match="shrunk it is .*jaxprune.shrink"):
            slim(variables, x)
        slim(small, x)
    with pytest.raises(GraphError, match="another keep"):
        slim(jax.tree.map(lambda leaf: leaf[:1], small), x)
