# SPDX-License-Identifier: Apache-2.0
"""Channel shuffles: each channel has one image, also between convolutions in groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import mixed
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.balance import Balance, balanced
from jaxprune.base import GraphError
from jaxprune.singles import in_pairs

X = np.random.default_rng(0).normal(size=(2, 2, 2, 3))


def moved(y: Any, groups: int) -> Any:
    """Shuffled on the way to NCHW."""
    n, h, w, c = y.shape
    y = y.reshape(n, h, w, groups, c // groups).transpose(0, 4, 3, 1, 2)
    return jnp.moveaxis(y.reshape(n, c, h, w), 1, -1)


def by_hand(y: Any, groups: int) -> Any:
    """As `moved`, but the parts are read in between, which keeps them tied."""
    y = y.reshape(*y.shape[:-1], groups, -1)
    return jnp.swapaxes(y + y.mean(), -1, -2).reshape(*y.shape[:3], -1)


class Between(nn.Module):
    """Two layers, and what lies between them."""

    body: Callable[[Any], Any]
    width: int = 12

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(3)(self.body(nn.Conv(self.width, (1, 1))(x)))


def checked(module: nn.Module) -> jp.Graph:
    """The graph; slim is mask in float64 there, gradients too."""
    with jax.enable_x64(True):
        shapes = jax.eval_shape(module.init, jax.random.key(0), X)
        rng = np.random.default_rng(1)
        variables = jax.tree.map(lambda a: rng.normal(size=a.shape), shapes)
        graph = jp.trace(module.apply, variables, X)
        keep = {n: rng.random(g.size) < 0.6 for n, g in graph.groups.items()}
        for kept in keep.values():
            kept[rng.integers(len(kept))] = True

        def run(apply: Any, v: Any) -> Any:
            out, pull = jax.vjp(lambda v: apply(v, X), v)
            return out, pull(jnp.cos(out))[0]

        masked, small = (f(graph, keep, variables) for f in (jp.mask, jp.shrink))
        want, back = jax.jit(run, static_argnums=0)(module.apply, masked)
        slimmed = jp.slim(module.apply, graph, keep)
        got, small_back = jax.jit(run, static_argnums=0)(slimmed, small)
        back = jp.shrink(graph, keep, back)
    pairs = (want, got), (back, small_back)
    for a, b in zip(*map(jax.tree.leaves, zip(*pairs)), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-10, atol=1e-10)
    return graph


@pytest.mark.parametrize(
    "body",
    [
        lambda y: nn.relu(mixed.shuffled(y, 2)),
        lambda y: mixed.shuffled(nn.softmax(y), 3, first=True) * 2,
        lambda y: moved(y, 4),
        lambda y: jax.jit(lambda y: mixed.shuffled(y, 3))(y),
        lambda y: mixed.shuffled(mixed.shuffled(y, 4), 2),
    ],
)
def test_each_channel_is_cut_by_itself(body: Any) -> None:
    graph = checked(Between(body))
    assert {n: g.size for n, g in graph.groups.items()} == {"Conv_0": 12}


def test_what_is_read_between_the_reshapes_stays_tied() -> None:
    graph = checked(Between(lambda y: by_hand(y, 3)))
    assert {n: g.size for n, g in graph.groups.items()} == {"Conv_0": 4}


@pytest.mark.parametrize(
    "kept, gathers", [("111011101110", 0), ("110011001100", 0), ("111011001000", 1)]
)
def test_even_parts_stay_a_reshape(kept: str, gathers: int) -> None:
    module = Between(lambda y: mixed.shuffled(y, 3))
    variables = module.init(jax.random.key(0), X)
    graph = jp.trace(module.apply, variables, X)
    keep = {"Conv_0": np.array(list(kept)) == "1"}
    small = jp.shrink(graph, keep, variables)
    program = jax.make_jaxpr(jp.slim(module.apply, graph, keep))(small, X)
    assert str(program).count("gather[") == gathers


class Unit(nn.Module):
    """ShuffleNet's: grouped, shuffled, depthwise, grouped."""

    groups: int
    width: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        n, g = self.width, self.groups
        x = nn.Conv(n, (1, 1))(x)
        x = nn.Conv(n, (1, 1), feature_group_count=g)(x)
        x = nn.relu(mixed.shuffled(x, g))
        x = nn.Conv(n, (3, 3), feature_group_count=n)(x)
        return nn.Dense(3)(nn.Conv(n, (1, 1), feature_group_count=g)(x))


# Of k channels a group, the next convolution ties {q, k + q, 2k + q, ...}. If k and the
# groups have no common divisor, that is one of each group already: k sets. If the
# groups divide k, all come from one group, and as many such sets as groups go together.
@pytest.mark.parametrize(
    "groups, width, sets", [(3, 12, 4), (2, 8, 2), (3, 18, 2), (4, 24, 3)]
)
def test_convolutions_in_groups_around_a_shuffle(
    groups: int, width: int, sets: int
) -> None:
    graph = checked(Unit(groups, width))
    each = width // groups
    assert {n: g.size for n, g in graph.groups.items()} == {
        "Conv_0": each,
        "Conv_1": sets,
        "Conv_3": each,
    }


def test_sets_take_as_many_of_every_group() -> None:
    rng = np.random.default_rng(2)
    for _ in range(200):
        groups, each, labels = rng.integers(1, 5), rng.integers(1, 7), 40
        component = np.unique(rng.integers(25, size=labels), return_inverse=True)[1]
        frozen = rng.random(component.max() + 1) < 0.1 * rng.integers(3)
        lines = [rng.integers(labels, size=groups * each) for _ in range(2)]
        tied = balanced(component, frozen, [Balance(line, groups) for line in lines])
        for c in np.unique(component):
            assert len(np.unique(tied[component == c])) == 1
        stuck = np.unique(tied[frozen[component]])
        for c in np.setdiff1d(tied, stuck):
            for line in lines:
                counts = (tied[line] == c).reshape(groups, each).sum(1)
                assert (counts == counts[0]).all()


def test_sets_of_a_joined_shortcut() -> None:
    """The first stage of ShuffleNet: 24 channels of the stem, then 3 groups of 72.

    The next convolution ties {q, 80 + q, 160 + q}. For q >= 24 that is one of each
    group; else two of the three, 8 times each two, and three such go together.
    """
    component = np.concatenate([np.zeros(1, int), 1 + np.arange(240) % 80])
    made = 1 + 24 + np.arange(216)
    tied = balanced(component, np.arange(81) == 0, [Balance(made, 3)])
    assert len(np.unique(tied[made])) == 56 + 8


def test_singles_in_pairs() -> None:
    """Three blocks of two halves: each way through them and its opposite."""
    marks = np.random.default_rng(3).integers(2**62, size=(3, 2), dtype=np.uint64)
    ways = [[way >> block & 1 for block in range(3)] for way in range(8)]
    sums = np.array([sum(marks[b, s] for b, s in enumerate(way)) for way in ways])
    merged = in_pairs(np.arange(8) + 1, sums, 10)
    assert merged is not None
    assert merged.tolist() == [0, 1, 2, 3, 4, 4, 3, 2, 1, 9]
    assert in_pairs(np.arange(3), sums[:3], 3) is None


def joined(y: Any, layers: Any) -> Any:
    return jnp.concatenate([layer(y) for layer in layers], axis=-1)


class Residual(nn.Module):
    """LEDNet's: in each of 3 blocks two layers of half the width, added, shuffled."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        y = nn.Conv(8, (1, 1))(x)
        for _ in range(3):
            halves = [nn.Conv(4, (1, 1)), nn.Conv(4, (3, 3))]
            y = mixed.shuffled(nn.relu(y + joined(y, halves)), 2)
        return nn.Dense(3)(y)


def test_channels_that_are_alone_after_shuffles() -> None:
    graph = checked(Residual())
    assert {n: g.size for n, g in graph.groups.items()} == {"Conv_0": 4}


def test_a_keep_that_the_groups_of_another_mode_do_not_take_is_an_error() -> None:
    def apply(v: Any, x: Any, groups: int) -> Any:
        kernel = v["kernel"].reshape(1, 1, 2, 8)
        dims = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(
            x[..., : 2 * groups],
            kernel,
            (1, 1),
            "SAME",
            dimension_numbers=dims,
            feature_group_count=groups,
        )
        return x @ v["head"]

    rng = np.random.default_rng(4)
    variables = {"kernel": rng.normal(size=(2, 8)), "head": rng.normal(size=(8, 3))}
    x = rng.normal(size=(2, 4, 4, 4))
    graph = jp.trace(apply, variables, x, groups=1)
    (name,) = graph.groups
    with jax.enable_x64(True):
        for kept, groups in (("11100111", 2), ("10110100", 1)):
            keep = {name: np.array(list(kept)) == "1"}
            assert jp.verify(apply, graph, keep, variables, x, groups=groups) < 1e-12
    keep = {name: np.array(list("10110100")) == "1"}
    with pytest.raises(GraphError, match="removed channels are tied"):
        jp.verify(apply, graph, keep, variables, x, groups=2)
