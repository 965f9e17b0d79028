# SPDX-License-Identifier: Apache-2.0
"""A zoo: one small network a construct, each with the groups that it must have.

The groups are counted by hand, beside the network. So neither a wrong answer nor
"everything is frozen" passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
import zoo
from flax import nnx

import jaxprune as jp


class Net(NamedTuple):
    """`body(module, images)` between the input and a head, and its groups' sizes."""

    body: Callable[[nn.Module, Any], Any]
    groups: dict[str, int]
    tolerance: float = 1e-10
    rngs: tuple[str, ...] = ()


ZOO = {
    "convolution": Net(
        lambda m, x: zoo.conv(zoo.conv(x, 6, "a"), 5, "b"), {"a": 6, "b": 5}
    ),
    "strided": Net(lambda m, x: zoo.conv(x, 6, "a", strides=(2, 2)), {"a": 6}),
    "dilated": Net(lambda m, x: zoo.conv(x, 6, "a", kernel_dilation=2), {"a": 6}),
    "transposed": Net(zoo.transposed, {"a": 6, "b": 5, "c": 4}),
    "transposed, the other way": Net(zoo.linear_transposed, {"a": 6, "w": 5}),
    # Of 12 channels in 2 groups, 6 pairs read and 6 pairs made; else 2 groups.
    "grouped": Net(
        lambda m, x: zoo.conv(zoo.conv(x, 12, "a"), 12, "b", feature_group_count=2),
        {"a": 6, "b": 6},
    ),
    # 2 read and 2 made are no more than the 4 groups, which go whole.
    "grouped, whole": Net(
        lambda m, x: zoo.conv(zoo.conv(x, 8, "a"), 8, "b", feature_group_count=4),
        {"a": 4},
    ),
    # Of the input nothing can be cut; of 4 channels a group, all.
    "grouped input": Net(
        lambda m, x: zoo.conv(x, 12, "a", feature_group_count=3), {"a": 4}
    ),
    "grouped transposed": Net(zoo.grouped_transposed, {"a": 6, "w": 5}),
    "batch groups": Net(zoo.batch_grouped, {"a": 5, "w": 6}),
    "blur": Net(zoo.blurred, {"a": 6}),
    "a kernel an image": Net(zoo.kernel_per_image, {"w": 6}),
    "gradient of a grouped convolution": Net(zoo.downhill, {"a": 6, "b": 5}),
    # The depthwise layer's two channels an input go with it.
    "depthwise": Net(zoo.separable, {"a": 6, "c": 5}),
    "channels first": Net(zoo.channels_first, {"w": 6, "v": 5}),
    "dense": Net(lambda m, x: nn.tanh(zoo.dense(x, 7, "a")), {"a": 7}),
    "batch norm": Net(zoo.normalised(nn.BatchNorm(use_running_average=True)), {"a": 6}),
    "layer norm": Net(zoo.normalised(nn.LayerNorm()), {"a": 6}),
    # Two groups of four: the same channel of both.
    "group norm": Net(zoo.normalised(nn.GroupNorm(2), 8), {"a": 4}),
    "instance norm": Net(
        zoo.normalised(nn.GroupNorm(num_groups=None, group_size=1)), {"a": 6}
    ),
    "residual": Net(zoo.residual, {"a": 6, "b": 5}),
    "concatenation": Net(zoo.concatenated, {"a": 4, "b": 5, "c": 6}),
    "chunks": Net(zoo.chunked, {"a": 4, "a#2": 4, "b": 5}),
    # What the slice leaves out can go too, by itself.
    "slice": Net(lambda m, x: zoo.conv(x, 8, "a")[..., 2:6], {"a": 4, "a#2": 4}),
    # Of the zero-padded images nothing can be cut, of the padding all.
    "padded shortcut": Net(zoo.padded_shortcut, {"a": 5}),
    # What is the same place in groups of 3, 6 and 9 is the same one of 3.
    "norms around a concatenation": Net(zoo.normed_and_joined, {"a": 3}),
    "concatenation with itself": Net(zoo.with_itself, {"a": 6}),
    "flatten": Net(zoo.flattened, {"a": 6, "b": 7}),
    "reshape to an image": Net(zoo.unflattened, {"a": 6, "b": 5}),
    "reshape to a small image": Net(zoo.short_rows, {"a": 3, "b": 5}),
    # Heads; what queries and keys share; what values and the output share.
    "attention": Net(
        zoo.attention,
        {"a": 6, "att/query": 2, "att/query#2": 4, "att/value": 4, "att/out": 7},
    ),
    "grouped queries": Net(
        zoo.shared_heads, {"a": 6, "q": 2, "q#2": 5, "v": 7, "out": 6}
    ),
    # Of each head the same channels go.
    "attention, heads by reshape": Net(zoo.heads_by_reshape, {"a": 6, "q": 5, "v": 5}),
    "attention, fused": Net(zoo.fused_heads, {"a": 6, "qkv": 5, "qkv#2": 5}),
    # The output goes with what it is added to.
    "windowed attention": Net(zoo.windows, {"a": 6, "q": 2, "q#2": 5, "v": 5}),
    # Of queries and keys, pairs that are turned together.
    "rotary positions": Net(zoo.rotary, {"a": 6, "q": 2, "q#2": 3, "v": 6, "out": 6}),
    "maxout": Net(
        lambda m, x: zoo.conv(x, 12, "a").reshape(2, 8, 8, 6, 2).max(-1), {"a": 6}
    ),
    "depth to space": Net(zoo.to_space, {"a": 6}),
    "space to depth": Net(zoo.to_depth, {"a": 5, "b": 6}),
    # Of b's 6 pairs the shuffle lays the first three beside the last three.
    "channel shuffle": Net(zoo.shuffle, {"a": 6, "b": 3, "c": 6}),
    "un-pooling": Net(zoo.unpooled, {"a": 6, "b": 5}),
    "tied embedding": Net(zoo.tied_embedding, {"emb": 6, "b": 5}),
    "weight sharing": Net(zoo.shared, {"a": 6}),
    "free parameter": Net(lambda m, x: nn.relu(x @ zoo.param(m, "w", 3, 6)), {"w": 6}),
    "einsum": Net(
        lambda m, x: jnp.einsum(
            "bchw,dc->bhwd", jnp.moveaxis(x, 3, 1), zoo.param(m, "w", 6, 3)
        ),
        {"w": 6},
    ),
    "stopped gradient": Net(zoo.gated, {"a": 6}),
    "squeeze and excite": Net(zoo.squeezed, {"a": 6, "b": 4}),
    "gated linear unit": Net(lambda m, x: nn.glu(zoo.conv(x, 12, "a")), {"a": 6}),
    "resize": Net(zoo.resized, {"a": 6}),
    "cumulative sum": Net(zoo.summed_up, {"a": 6}),
    "sort": Net(zoo.sorted_over_space, {"a": 6}),
    "dynamic slices": Net(zoo.dynamic, {"a": 6}),
    "scatter": Net(zoo.scattered, {"a": 6}),
    "gather": Net(zoo.gathered, {"a": 6}),
    "spectral": Net(zoo.spectral, {"a": 6, "w": 5}),
    "patches": Net(zoo.unfolded, {"a": 6, "b": 5}),
    "reflection": Net(
        lambda m, x: jnp.pad(
            zoo.conv(x, 6, "a"), ((0, 0), (1, 1), (2, 1), (0, 0)), mode="reflect"
        ),
        {"a": 6},
    ),
    "weight standardisation": Net(zoo.standardised, {"a": 6, "w": 5}),
    "two-pass norms": Net(zoo.two_pass, {"a": 6, "b": 4}),
    "maximum over channels": Net(zoo.attended, {"a": 6}),
    "quantised weights": Net(zoo.quantised, {"p": 6, "q": 5}),
    "half precision": Net(zoo.halved, {"a": 6, "b": 5}, 0.05),
    # The head's inputs go with the constant's columns.
    "constants": Net(zoo.with_constants, {"a": 6, "head": 7}),
    "positions": Net(zoo.masked_by_position, {"a": 6}),
    "dropout": Net(
        lambda m, x: nn.Dropout(0.5, deterministic=False)(zoo.conv(x, 6, "a")),
        {"a": 6},
        rngs=("dropout",),
    ),
}


class NnxZoo(nnx.Module):
    """Convolutions, depthwise and grouped, group norm, attention, a head."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.a = nnx.Conv(3, 6, (3, 3), rngs=rngs)
        self.b = nnx.Conv(6, 6, (3, 3), feature_group_count=6, rngs=rngs)
        self.c = nnx.Conv(6, 12, (1, 1), rngs=rngs)
        self.d = nnx.Conv(12, 10, (3, 3), (4, 4), feature_group_count=2, rngs=rngs)
        self.norm = nnx.GroupNorm(10, num_groups=2, rngs=rngs)
        self.att = nnx.MultiHeadAttention(2, 10, 8, rngs=rngs, decode=False)
        self.head = nnx.Linear(10, 3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = nnx.relu(self.c(nnx.relu(self.b(self.a(x)))))
        x = self.norm(self.d(x)).reshape(len(x), 4, 10)
        return self.head(self.att(x))


# Convolution d: 6 pairs read, 5 made, which the norm ties no more than they are.
NNX_GROUPS = {"a": 6, "c": 6, "d": 5, "att/query": 2, "att/query#2": 4}
NNX_GROUPS |= {"att/value": 4, "att/out": 10}


def randomised(shapes: Any) -> Any:
    """Variables at which nothing is accidentally zero; integers where they are."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda a, x: rng.integers(1, 9, x.shape, x.dtype) if x.dtype == "int8" else a,
        networks.randomised(shapes, 0),
        shapes,
    )


def half(graph: jp.Graph) -> dict[str, np.ndarray]:
    """Of every group, half the channels at random."""
    rng = np.random.default_rng(2)
    return {n: rng.permutation(g.size) >= g.size // 2 for n, g in graph.groups.items()}


def check_law(
    apply: Any, graph: jp.Graph, variables: Any, x: Any, tolerance: float, **kw: Any
) -> None:
    """Slim's law in float64, on a masked network that depends on its input."""
    with jax.enable_x64(True):

        def double(a: Any) -> Any:
            return a if a.dtype == "int8" else np.asarray(a, np.float64)

        keep, variables, x = half(graph), jax.tree.map(double, variables), double(x)
        masked = jax.jit(lambda v, x: apply(v, x, **kw))
        slim = jax.jit(lambda v, x: jp.slim(apply, graph, keep)(v, x, **kw))
        zeroed = jp.mask(graph, keep, variables)
        want = np.asarray(masked(zeroed, x))
        got = np.asarray(slim(jp.shrink(graph, keep, variables), x))
        other = np.asarray(masked(zeroed, 1.5 * x + 0.3))
    scale = np.abs(want).max()
    assert np.abs(want - other).max() > 1e-3 * scale
    assert np.abs(want - got).max() < tolerance * scale


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo(name: str) -> None:
    net = ZOO[name]
    module, x = zoo.Whole(net.body), networks.images(0)
    rngs = {r: jax.random.key(3) for r in net.rngs}
    shapes = jax.eval_shape(module.init, {"params": jax.random.key(0), **rngs}, x)
    variables = randomised(shapes)
    kw = {"rngs": rngs} if rngs else {}
    graph = jp.trace(module.apply, variables, x, **kw)
    assert {n: g.size for n, g in graph.groups.items()} == net.groups, str(graph)
    check_law(module.apply, graph, variables, x, net.tolerance, **kw)


def test_the_zoo_in_nnx() -> None:
    definition, state = nnx.split(NnxZoo(nnx.Rngs(0)))

    def apply(state: Any, x: Any) -> Any:
        return nnx.merge(definition, state)(x)

    variables, x = networks.randomised(state, 0), networks.images(0)
    graph = jp.trace(apply, variables, x)
    assert {n: g.size for n, g in graph.groups.items()} == NNX_GROUPS, str(graph)
    check_law(apply, graph, variables, x, 1e-10)


def test_weight_standardisation_can_be_cut_plainly() -> None:
    module, x = zoo.Whole(zoo.standardised), networks.images(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    graph = jp.trace(module.apply, shapes, x, exact=False)
    found = {n: (g.size, g.exact) for n, g in graph.groups.items()}
    assert found == {"a": (6, False), "w": (5, True)}


@pytest.mark.parametrize(("width", "groups"), [(12, 2), (8, 4)])
def test_a_cut_grouped_convolution_costs_what_a_small_one_does(
    width: int, groups: int
) -> None:
    """Half the channels of every group, or half the groups."""

    def cost(width: int, groups: int, cut: bool = False) -> jp.Cost:
        def body(m: nn.Module, x: Any) -> Any:
            x = zoo.conv(x, width, "a")
            return zoo.conv(x, width, "b", feature_group_count=groups)

        module, x = zoo.Whole(body), networks.images(0)
        shapes = jax.eval_shape(module.init, jax.random.key(0), x)
        graph = jp.trace(module.apply, shapes, x)
        return jp.cost(graph, half(graph) if cut else None)

    small = (width // 2, groups if width == 12 else groups // 2)
    assert cost(width, groups, cut=True) == cost(*small)
