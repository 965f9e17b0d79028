# SPDX-License-Identifier: Apache-2.0
"""Gates scale a channel where it is read; their proximal step is soft-thresholding."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toygraphs

import jaxprune
from jaxprune.base import GraphError
from jaxprune.gates import gate, gates_to_keep, init_gates, proximal_gates

SINGLE = toygraphs.chain(6)
GRAPH = toygraphs.chain(5, 4)
VARIABLES = toygraphs.variables(GRAPH)


def after(tx, params, updates=None):
    updates = jax.tree.map(jnp.zeros_like, params) if updates is None else updates
    updates, _ = tx.update(updates, tx.init(params), params)
    return optax.apply_updates(params, updates)


def test_gates_scale_each_channel_once_where_it_is_read():
    gates = {"l0": np.arange(1.0, 6), "l1": np.array([1, 0.5, 3, 2])}
    gated = gate(GRAPH, gates, VARIABLES)["params"]
    for i, name in enumerate(("l0", "l1")):
        reader = VARIABLES["params"][f"l{i + 1}"]["kernel"] * gates[name][:, None]
        np.testing.assert_allclose(gated[f"l{i + 1}"]["kernel"], reader)
    np.testing.assert_array_equal(
        gated["l0"]["kernel"], VARIABLES["params"]["l0"]["kernel"]
    )
    chex.assert_trees_all_equal(gate(GRAPH, init_gates(GRAPH), VARIABLES), VARIABLES)


def test_binary_gates_mask():
    keep = {"l0": np.array([1, 0, 1, 0, 1], bool), "l1": np.array([0, 1, 1, 0], bool)}
    gates = {n: k.astype(np.float32) for n, k in keep.items()}
    x = jax.random.normal(jax.random.key(0), (7, 3))
    masked = toygraphs.apply(jaxprune.mask(GRAPH, keep, VARIABLES), x)
    gated = toygraphs.apply(gate(GRAPH, gates, VARIABLES), x)
    np.testing.assert_allclose(gated, masked, rtol=1e-5)
    chex.assert_trees_all_equal(gates_to_keep(gates), keep)


def test_a_group_that_nobody_reads_is_gated_where_it_is_made():
    group = SINGLE.groups["l0"]
    makers = tuple(s for s in group.slots if s.role == "out")
    unread = jaxprune.Graph(
        {"l0": type(group)("l0", 6, makers)}, (), SINGLE.leaves, SINGLE.terms
    )
    variables = toygraphs.variables(unread)
    gated = gate(unread, {"l0": np.arange(6.0)}, variables)["params"]["l0"]
    expected = jax.tree.map(lambda x: x * np.arange(6.0), variables["params"]["l0"])
    chex.assert_trees_all_close(gated, expected)


def test_gates_are_soft_thresholded():
    gates = {"l0": jnp.array([1.0, -1, 0.2, -0.2, 0, 3])}
    updates = {"l0": jnp.array([0.0, 0, 0, 0, 0.5, -3])}
    new = after(proximal_gates(0.25), gates, updates)
    np.testing.assert_allclose(new["l0"], [0.75, -0.75, 0, 0, 0.25, 0], atol=1e-6)
    np.testing.assert_array_equal(new["l0"] == 0, [0, 0, 1, 1, 0, 1])
    np.testing.assert_array_equal(gates_to_keep(new)["l0"], [1, 1, 0, 0, 1, 0])
    heavy = after(proximal_gates(0.25, {"l0": np.array([1, 2, 1, 1, 1, 0])}), gates)
    np.testing.assert_allclose(heavy["l0"], [0.75, -0.5, 0, 0, 0, 3], atol=1e-6)
    last = after(proximal_gates(9.0), gates)
    np.testing.assert_array_equal(last["l0"], [0, 0, 0, 0, 0, 3])


def normed(norm):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = norm()(nn.relu(nn.Dense(8)(x)))
            return nn.Dense(3)(h)

    return Net()


def elementwise(v, x):
    h = jax.nn.relu(x @ v["a"])
    return h @ v["b"] + (h * v["s"]).sum(-1, keepdims=True)


def case(name):
    """apply, variables, x of nets that read a channel other than through a kernel."""
    x = jax.random.normal(jax.random.key(0), (5, 4))
    if name == "elementwise":
        shapes = {"a": (4, 8), "b": (8, 3), "s": (8,)}
        rng = np.random.default_rng(0)
        v = {n: jnp.asarray(rng.normal(size=s), "float32") for n, s in shapes.items()}
        return elementwise, v, x
    norms = {"layer": nn.LayerNorm, "group": lambda: nn.GroupNorm(num_groups=1)}
    net = normed(norms[name])
    return net.apply, toygraphs.init(net, x), x


@pytest.mark.parametrize("name", ["layer", "group", "elementwise"])
def test_gates_of_0_and_1_mask_whatever_reads_the_channel(name):
    apply, variables, x = case(name)
    graph = jaxprune.trace(apply, variables, x)
    (group,) = graph.groups
    keep = {group: np.arange(8) % 3 > 0}
    gates = {group: jnp.asarray(keep[group], jnp.float32)}
    gated = jax.jit(lambda g, v: gate(graph, g, v))(gates, variables)
    want = apply(jaxprune.mask(graph, keep, variables), x)
    np.testing.assert_allclose(apply(gated, x), want, rtol=1e-5, atol=1e-6)
    # What is cut after training is what was trained, at gates in between too.
    gated = gate(graph, {group: gates[group] * jnp.arange(8) / 3}, variables)
    alive = gates_to_keep({group: gates[group] * jnp.arange(8)})
    slim = jaxprune.slim(apply, graph, alive)(jaxprune.shrink(graph, alive, gated), x)
    np.testing.assert_allclose(slim, apply(gated, x), rtol=1e-5, atol=1e-6)


def test_a_group_that_nobody_reads_is_scaled_once():
    v = {"e": jnp.ones((1, 8)), "s": jnp.arange(1.0, 9)}
    x = jnp.ones((2, 1))

    def apply(v, x):
        return (x @ v["e"] * v["s"]).sum(-1)

    graph = jaxprune.trace(apply, v, x)
    (group,) = graph.groups
    half = apply(gate(graph, {group: jnp.full(8, 0.5)}, v), x)
    np.testing.assert_allclose(half, 0.5 * apply(v, x), rtol=1e-6)


def test_gradients_of_gates_that_are_not_zero_are_the_weights_own():
    gates = {"l0": jnp.arange(5.0), "l1": jnp.array([1, 0.5, 0, 2])}
    x = jax.random.normal(jax.random.key(0), (7, 3))

    def loss(gates):
        return jnp.sum(toygraphs.apply(gate(GRAPH, gates, VARIABLES), x) ** 2)

    gradient, step = jax.grad(loss)(gates), 1e-2
    for name, c in (("l0", 2), ("l1", 1)):
        up, down = (
            loss({**gates, name: gates[name].at[c].add(s)}) for s in (step, -step)
        )
        np.testing.assert_allclose(gradient[name][c], (up - down) / 2 / step, rtol=1e-2)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"b": 1.0}, "weights name group 'b'"),
        ({}, "weights lack group 'a'"),
        ({"a": np.ones(2)}, "'a' has 3 channels"),
    ],
)
def test_weights_that_do_not_fit_the_gates(weights, words):
    with pytest.raises(GraphError, match=words):
        after(proximal_gates(0.1, weights), {"a": jnp.ones(3)})
