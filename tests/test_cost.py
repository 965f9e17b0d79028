# SPDX-License-Identifier: Apache-2.0
"""Law 7: costs against networks built at the cut widths, textbook counts, and XLA."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.cost import at
from jaxprune.models.segnet import SegNet


class Plain(nn.Module):
    """Convolutions without padding, so that XLA counts every tap."""

    widths: tuple[int, int, int] = (8, 12, 10)

    @nn.compact
    def __call__(self, x: Any) -> Any:
        a, b, c = self.widths
        x = nn.relu(nn.Conv(a, (3, 3), padding="VALID")(x))
        x = nn.relu(nn.Conv(b, (3, 3), (2, 2), padding="VALID")(x))
        x = nn.relu(nn.Dense(c)(x.reshape(x.shape[0], -1)))
        return nn.Dense(4)(x)


def keep_of(graph: jp.Graph, kept: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {n: np.arange(g.size) < k for (n, g), k in zip(graph.groups.items(), kept)}


def test_cost_is_the_textbook_count_of_the_small_network() -> None:
    apply, variables, x = networks.linen(Plain, shape=(2, 11, 13, 3))
    graph = jp.trace(apply, variables, x)
    for a, b, c in ((8, 12, 10), (5, 7, 3), (1, 1, 1)):
        cost = jp.cost(graph, keep_of(graph, (a, b, c)))
        first, second = 2 * 9 * 11, 2 * 4 * 5  # batch x output positions
        macs = first * 9 * 3 * a + second * 9 * a * b + 2 * (20 * b * c + c * 4)
        params = 27 * a + a + 9 * a * b + b + 20 * b * c + c + 4 * c + 4
        assert cost.flops == 2 * macs
        assert cost.params == params
        written = first * a + second * b + 2 * c + 2 * 4
        assert cost.activation_bytes == 4 * written


def test_cost_agrees_with_xla_on_the_slim_function() -> None:
    apply, variables, x = networks.linen(Plain, shape=(2, 11, 13, 3))
    graph = jp.trace(apply, variables, x)
    keep = keep_of(graph, (5, 7, 4))
    small = jp.shrink(graph, keep, variables)
    compiled = jax.jit(jp.slim(apply, graph, keep)).lower(small, x).compile()
    seen = compiled.cost_analysis()["flops"]
    # XLA counts an operation more for each bias and activation.
    first, second = 2 * 9 * 11, 2 * 4 * 5
    more = 2 * (first * 5 + second * 7 + 2 * 4) + 2 * 4
    assert seen == jp.cost(graph, keep).flops + more


def test_cost_agrees_with_xla_but_for_padding_taps() -> None:
    """With SAME padding XLA counts valid taps: 3n - 2 of 3n along an axis of n."""

    class Padded(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.Conv(16, (3, 3), use_bias=False)(x)
            return nn.Conv(8, (3, 3), use_bias=False)(x)

    apply, variables, x = networks.linen(Padded, shape=(1, 20, 30, 3))
    graph = jp.trace(apply, variables, x)
    keep = keep_of(graph, (11,))
    small = jp.shrink(graph, keep, variables)
    compiled = jax.jit(jp.slim(apply, graph, keep)).lower(small, x).compile()
    valid = (3 * 20 - 2) * (3 * 30 - 2) / (9 * 20 * 30)
    want = jp.cost(graph, keep).flops * valid
    np.testing.assert_allclose(compiled.cost_analysis()["flops"], want, rtol=0.01)


@pytest.mark.parametrize("seed", range(3))
def test_cost_is_that_of_the_plain_smaller_module(seed: int) -> None:
    net = SegNet(5, widths=(8, 8, 16, 16, 8))
    x = jax.ShapeDtypeStruct((1, 33, 50, 3), jnp.float32)
    variables = jax.eval_shape(net.init, jax.random.key(0), x)
    graph = jp.trace(net.apply, variables, x)
    keep = networks.random_keep(graph, seed)
    small = jax.tree.map(lambda v: np.zeros(v.shape, v.dtype), variables)
    small = jp.shrink(graph, keep, small)
    from jaxprune import models

    plain = models.rebuild(net, small)
    again = jp.trace(plain.apply, small, x)
    assert jp.cost(again) == jp.cost(graph, keep)
    jaxpr = jax.make_jaxpr(plain.apply)(small, x).jaxpr
    assert jp.cost(graph, keep).flops == 2 * networks.multiply_adds(jaxpr)
    counted = sum(math.prod(p.shape) for p in jax.tree.leaves(small["params"]))
    assert counted == jp.cost(graph, keep).params


def test_cost_of_segnet_agrees_with_xla() -> None:
    net = SegNet(11)
    x = jax.ShapeDtypeStruct((1, 45, 60, 3), jnp.float32)
    variables = jax.eval_shape(net.init, jax.random.key(0), x)
    graph = jp.trace(net.apply, variables, x)
    keep = {n: np.arange(g.size) % 2 == 0 for n, g in graph.groups.items()}
    small = jax.eval_shape(lambda v: jp.shrink(graph, keep, v), variables)
    slim = jp.slim(net.apply, graph, keep)
    jaxpr = jax.make_jaxpr(slim)(small, x).jaxpr
    whole, valid = (networks.multiply_adds(jaxpr, valid=v) for v in (False, True))
    seen = jax.jit(slim).lower(small, x).cost_analysis()["flops"]
    want = jp.cost(graph, keep).flops * float(valid / whole)
    np.testing.assert_allclose(seen, want, rtol=0.01)


def test_transposed_and_depthwise_convolutions() -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.Conv(6, (1, 1))(x)
            x = nn.Conv(6, (3, 3), feature_group_count=6)(x)
            return nn.ConvTranspose(2, (2, 2), (2, 2))(x)

    graph = jp.trace(*networks.linen(Net, shape=(1, 4, 5, 3)))
    keep = keep_of(graph, (4,))
    # Depthwise: one input channel an output; transposed: every tap once an input pixel.
    macs = 20 * (3 * 4 + 9 * 4 + 4 * 4 * 2)
    assert jp.cost(graph, keep).flops == 2 * macs


def test_many_keeps_at_once() -> None:
    apply, variables, x = networks.linen(networks.ResNet)
    graph = jp.trace(apply, variables, x)
    keeps = [networks.random_keep(graph, seed) for seed in range(5)]
    kept = np.array([[k.sum() for k in keep.values()] for keep in keeps])
    costs = at(graph, kept)
    for i, keep in enumerate(keeps):
        assert [c[i] for c in costs] == list(jp.cost(graph, keep))


def test_half_of_a_layer_used_alone_costs_as_half() -> None:
    """Channels that cost differently are of different groups."""

    def apply(v: Any, x: Any) -> Any:
        y = x @ v["a"]
        return (y @ v["b"]) * jnp.tanh(y[:, :4].T @ y[:, :4]).sum()

    shapes = {"a": (3, 8), "b": (8, 2)}
    variables = {k: jax.ShapeDtypeStruct(s, "float32") for k, s in shapes.items()}
    graph = jp.trace(apply, variables, jax.ShapeDtypeStruct((5, 3), "float32"))
    assert [g.size for g in graph.groups.values()] == [4, 4]
    assert jp.cost(graph).flops == 2 * 5 * (3 * 8 + 8 * 2 + 4 * 4)
    assert jp.cost(graph, keep_of(graph, (1, 4))).flops == 2 * 5 * (3 * 5 + 5 * 2 + 1)


def test_what_loops_and_branches_compute_is_counted() -> None:
    def apply(v: Any, x: Any) -> Any:
        w = v["w"]
        y, _ = jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=5)
        y = jax.lax.cond(y.sum() > 0, lambda y: y @ w @ w, lambda y: y @ w, y)
        return jax.lax.while_loop(lambda y: y.sum() > 1, lambda y: y @ w, y)

    variables = {"w": jax.ShapeDtypeStruct((8, 8), "float32")}
    graph = jp.trace(apply, variables, jax.ShapeDtypeStruct((4, 8), "float32"))
    assert jp.cost(graph).flops == (5 + 2 + 1) * 2 * 4 * 8 * 8
