# SPDX-License-Identifier: Apache-2.0
"""nnx modules handed back at the widths that are left, or refused with the reason."""

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from flax import nnx

import jaxprune as jp


class Mobile(nnx.Module):
    """Unequal and equal widths, depthwise, transposed, batch norm, a dense head."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.depth = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.up = nnx.ConvTranspose(8, 6, (2, 2), strides=(2, 2), rngs=rngs)
        self.blocks = nnx.List([nnx.Conv(6, 6, (3, 3), rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.depth(nnx.relu(self.stem(x)))))
        x = self.up(x)
        for block in self.blocks:
            x = x + nnx.relu(block(x))
        return self.head(x.mean(axis=(1, 2)))


class Middle(nnx.Module):
    """Something between two dense layers."""

    def __init__(self, between) -> None:
        rngs = nnx.Rngs(1)
        self.one = nnx.Linear(3, 8, rngs=rngs)
        self.between = between(rngs)
        self.two = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.two(self.between(self.one(x)))


class HardCoded(nnx.Module):
    """Reshapes to a size that is written down."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.scale = nnx.Param(jnp.ones(8))

    def __call__(self, x):
        return (x * self.scale).reshape(-1, 8)


def traced(module, x):
    """(graph, keep of about half, randomised state)."""
    definition, state = nnx.split(module)
    state = networks.randomised(state, 0)
    graph = jp.trace(lambda s, x: nnx.merge(definition, s)(x), state, x)
    return graph, networks.random_keep(graph, 1, 0.5), state


@pytest.mark.parametrize("net", [networks.NnxResNet, Mobile])
def test_the_small_module_computes_what_the_masked_one_does(net):
    module, x = net(nnx.Rngs(0)), jnp.asarray(networks.images(0))
    module.eval()
    graph, keep, state = traced(module, x)
    assert any(not k.all() for k in keep.values())

    small = jp.to_nnx(module, graph, keep, jp.shrink(graph, keep, state), x)

    masked = nnx.merge(nnx.split(module)[0], jp.mask(graph, keep, state))
    np.testing.assert_allclose(small(x), masked(x), rtol=1e-4, atol=1e-5)
    left = int(keep["stem"].sum())
    assert small.stem.out_features == left
    assert small.norm.num_features == left
    # It is a module like any other: its state has the small shapes, it trains.
    shapes = [p.shape for p in jax.tree.leaves(nnx.state(small, nnx.Param))]
    assert left in shapes[0] or (left,) in shapes
    grads = nnx.grad(lambda m: jnp.sum(m(x) ** 2))(small)
    assert grads["stem"]["kernel"].shape == small.stem.kernel.shape
    assert module.stem.out_features == 8


def test_attributes_by_name_where_one_size_became_two():
    module, x = networks.NnxResNet(nnx.Rngs(0)), jnp.asarray(networks.images(0))
    module.eval()

    class Two(nnx.Module):
        def __init__(self):
            self.a = nnx.Linear(3, 8, rngs=nnx.Rngs(0))
            self.b = nnx.Linear(8, 8, rngs=nnx.Rngs(1))
            self.c = nnx.Linear(8, 3, rngs=nnx.Rngs(2))

        def __call__(self, x):
            return self.c(nnx.relu(self.b(nnx.relu(self.a(x)))))

    x = jnp.asarray(networks.images(0, (4, 3)))
    module = Two()
    graph, _, state = traced(module, x)
    keep = {"a": np.arange(8) < 5, "b": np.arange(8) < 2}
    small = jp.to_nnx(module, graph, keep, jp.shrink(graph, keep, state), x)
    sizes = [
        (m.in_features, m.out_features, m.kernel.shape)
        for m in (small.a, small.b, small.c)
    ]
    assert sizes == [(3, 5, (3, 5)), (5, 2, (5, 2)), (2, 3, (2, 3))]


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (lambda rngs: nnx.LayerNorm(8, rngs=rngs), "its output is off by"),
        (HardCoded, "its code fails|its outputs have shapes"),
    ],
)
def test_a_module_whose_code_does_something_else_is_refused(between, reason):
    module, x = Middle(between), jnp.asarray(networks.images(0, (4, 3)))
    graph, _, state = traced(module, x)
    assert "one" in graph.groups
    keep = {**graph.full(), "one": np.arange(8) % 2 == 0}
    assert not keep["one"].all()
    with pytest.raises(jp.base.GraphError, match=reason) as error:
        jp.to_nnx(module, graph, keep, jp.shrink(graph, keep, state), x)
    assert "jaxprune.slim" in str(error.value)
    definition = nnx.split(module)[0]

    def apply(s, x):
        return nnx.merge(definition, s)(x)

    assert jp.verify(apply, graph, keep, state, x) < 1e-5


def test_a_probe_of_shapes_alone_is_drawn():
    module = networks.NnxResNet(nnx.Rngs(0))
    module.eval()
    x = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    graph, keep, state = traced(module, x)
    small = jp.to_nnx(module, graph, keep, jp.shrink(graph, keep, state), x)
    assert small(jnp.ones((1, 8, 8, 3))).shape == (1, 3)


class Table(nnx.Module):
    """An array that is no `nnx.Variable`, between those that are."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.rows = jnp.arange(4)[::-1]
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.conv(x)[:, self.rows].mean(axis=(1, 2)))


def test_plain_arrays_of_a_module():
    module, x = Table(nnx.Rngs(0)), jnp.ones((1, 4, 4, 3))
    definition, state = nnx.split(module)
    apply = lambda s, x: nnx.merge(definition, s)(x)  # noqa: E731
    graph = jp.trace(apply, state, x)
    keep = {name: np.arange(g.size) % 2 == 0 for name, g in graph.groups.items()}
    assert jp.verify(apply, graph, keep, state, x) < 1e-5
    small = jp.shrink(graph, keep, nnx.filter_state(state, nnx.Param))
    assert small["conv"]["kernel"].shape == (3, 3, 3, 4)
