# SPDX-License-Identifier: Apache-2.0
"""Weights that belong to one channel by two axes, as in x + conv(x), count once.

What belongs to a channel is read off `mask`: the entries that clearing it alone clears.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import networks
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune import trees

KINDS = ("dense", "conv", "bilinear", "plain")


class Tied(nn.Module):
    """Layers that read and make the same channels, by twos or threes."""

    width: int
    kinds: tuple[str, ...]

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (1, 1))(x)
        for i, kind in enumerate(self.kinds):
            y = nn.tanh(x)
            if kind == "bilinear":
                shape = (self.width,) * 3
                w = self.param(f"w{i}", nn.initializers.normal(), shape)
                y = jnp.einsum("bhwi,bhwj,ijk->bhwk", y, y, w)
            elif kind == "dense":
                y = nn.Dense(self.width, use_bias=False)(y)
            else:
                y = nn.Conv(self.width, (2, 2))(y)
            x = nn.tanh(y) if kind == "plain" else x + y
        return nn.Dense(2)(x)


def made(width, kinds):
    net, x = Tied(width, kinds), networks.images(0, (1, 3, 3, 2))
    variables = networks.randomised(net.init(jax.random.key(0), x), 1)
    return jp.trace(net.apply, variables, x), variables


def belongs(graph, keep, tree):
    """{group: bool[C, all entries]}: what clearing a channel clears behind a keep."""

    def flat(keep):
        masked = jp.mask(graph, keep, jax.tree.map(jnp.ones_like, tree))
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(masked)])

    found, before = {}, flat(keep)
    for name, stays in keep.items():
        rows = []
        for c in range(len(stays)):
            less = {**keep, name: stays & (np.arange(len(stays)) != c)}
            rows.append((before - flat(less)) > 0)
        found[name] = np.array(rows)
    return found


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]).astype(float)


drawn = st.tuples(
    st.integers(2, 4), st.lists(st.sampled_from(KINDS), min_size=1, max_size=3)
)


@settings(max_examples=15, deadline=None)
@given(drawn, st.floats(0.01, 1.0))
def test_penalty_and_step_are_those_of_the_entries(net, strength):
    graph, variables = made(net[0], tuple(net[1]))
    own = belongs(graph, graph.full(), variables)
    v = flat(variables)
    counts = trees.channel_count(graph)
    lasso, factors = 0.0, np.ones_like(v)
    for name, rows in own.items():
        assert counts[name].tolist() == rows.sum(axis=1).tolist()
        norms = np.sqrt((rows * v**2).sum(axis=1))
        weights = np.sqrt(rows.sum(axis=1))
        lasso += weights @ norms
        factor = np.maximum(0, 1 - strength * weights / norms)
        if not factor.any():
            factor[np.argmax(norms)] = 1
        factors *= np.where(rows, factor[:, None], 1).prod(axis=0)
    assert float(jp.group_lasso(graph, variables)) == pytest.approx(lasso, rel=1e-5)
    none = jax.tree.map(jnp.zeros_like, variables)
    plain = jp.proximal(graph, strength)
    one = jp.preconditioned(
        optax.identity(),
        graph,
        strength,
        steps=lambda state, params: jax.tree.map(jnp.ones_like, params),
    )
    for tx in (plain, one):
        updates, _ = tx.update(none, tx.init(variables), variables)
        found = flat(optax.apply_updates(variables, updates))
        np.testing.assert_allclose(found, v * factors, rtol=2e-4, atol=1e-6)


@settings(max_examples=10, deadline=None)
@given(drawn, st.integers(0, 2))
def test_weights_of_live_channels_count_what_is_left(net, gone):
    graph, variables = made(1 + net[0], tuple(net[1]))
    keep = {n: np.arange(g.size) != gone for n, g in graph.groups.items()}
    own = belongs(graph, keep, variables)
    counts = {n: float(k.sum()) for n, k in keep.items()}
    weights = jp.repriced(graph, None)(counts)
    for name, rows in own.items():
        left = rows[keep[name]].sum(axis=1)
        np.testing.assert_allclose(float(weights[name]) ** 2, left, rtol=1e-5)


@pytest.mark.parametrize("p", [1, 2])
def test_norms_of_all_that_belongs_to_a_channel(p):
    graph, variables = made(3, ("dense", "bilinear"))
    own = belongs(graph, graph.full(), variables)
    found = jp.score(jp.magnitude(p, roles=("out", "in")), graph, variables)
    for name, rows in own.items():
        want = (rows * np.abs(flat(variables)) ** p).sum(axis=1) ** (1 / p)
        np.testing.assert_allclose(found[name], want, rtol=1e-5)
    values = jax.tree.map(np.asarray, variables)
    host = jp.score(jp.magnitude(p, roles=("out", "in")), graph, values)
    for name in own:
        np.testing.assert_allclose(host[name], found[name], rtol=1e-5)


def test_a_gate_on_what_is_read_twice_counts_twice():
    """x W x with the gate z at x: W[c, c] is read times z^2, as z x read by hand."""
    graph, variables = made(3, ("bilinear", "plain"))
    name = next(iter(graph.groups))
    gates = {n: jnp.ones(g.size) for n, g in graph.groups.items()}
    gates[name] = jnp.array([0.5, 2.0, 1.0])
    w = variables["params"]["w0"]
    gated = jp.gate(graph, gates, variables)["params"]["w0"]
    z = np.asarray(gates[name])
    np.testing.assert_allclose(gated, w * z[:, None, None] * z[None, :, None])
