# SPDX-License-Identifier: Apache-2.0
"""Channels chosen layer by layer, against the same steps in float64 NumPy."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from solvers import by_bounded_descent

import jaxprune as jp
from jaxprune.base import BudgetError, ConfigError, DataError, GraphError
from jaxprune.layerwise import check_readers

RNG = np.random.default_rng(7)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def apply(variables: Any, x: Any) -> Any:
    """Three matrices with functions in between: two groups."""
    x = jnp.tanh(x @ variables["a"])
    return jnp.tanh(x @ variables["b"]) @ variables["c"]


def chosen(features: Any, kernel: Any, answers: Any, count: int) -> np.ndarray:
    """The `count` channels that stay longest as lambda rises, by another solver."""
    z = np.float64(features)[:, :, None] * np.float64(kernel)[None]  # [n, C, outputs]
    z = z.transpose(0, 2, 1).reshape(-1, kernel.shape[0])
    y = np.float64(answers).ravel()
    gram, wanted = z.T @ z, z.T @ y
    strengths = np.abs(wanted).max() * 1e-3 ** (np.arange(1, 25) / 24)
    betas = np.array([by_bounded_descent(gram, s, wanted) for s in strengths])
    on = np.abs(betas) > 1e-6
    size = np.abs(betas).mean(axis=0)
    lasts = on.mean(axis=0) + 1e-3 * size / (1 + size)
    return np.sort(np.argsort(-lasts)[:count])


def test_each_layer_is_chosen_by_what_the_cut_network_reads() -> None:
    variables = {"a": normal(5, 8), "b": 0.5 * normal(8, 6), "c": normal(6, 3)}
    x = normal(40, 5)
    graph = jp.trace(apply, variables, x)
    keep, found = jp.lasso_select(
        apply,
        graph,
        variables,
        np.split(x, 40),  # of one position each, so that it does not matter which
        jp.channels(0.5),
        positions=1,
        steps=24,
        ridge=0,
    )
    a, b, c = (np.float64(variables[n]) for n in "abc")
    first = np.tanh(x @ a)
    one = chosen(first, b, first @ b, 4)
    refitted = np.linalg.lstsq(first[:, one], first @ b, rcond=None)[0]
    second, dense = np.tanh(first[:, one] @ refitted), np.tanh(first @ b)
    two = chosen(second, c, dense @ c, 3)
    last = np.linalg.lstsq(second[:, two], dense @ c, rcond=None)[0]
    names = [next(n for n, g in graph.groups.items() if g.size == s) for s in (8, 6)]
    np.testing.assert_array_equal(np.flatnonzero(keep[names[0]]), one)
    np.testing.assert_array_equal(np.flatnonzero(keep[names[1]]), two)
    np.testing.assert_allclose(
        found["b"][np.ix_(one, two)], refitted[:, two], atol=1e-4
    )
    np.testing.assert_allclose(found["c"][two], last, atol=1e-3)
    # And the same, but for rounding, as of that keep in one go.
    again = jp.reconstruct(
        apply, graph, keep, variables, np.split(x, 40), positions=1, ridge=0
    )
    jax.tree.map(lambda f, w: np.testing.assert_allclose(f, w, atol=1e-3), found, again)


class Joined(nn.Module):
    """A sum and a concatenation: of some groups there are several readers."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.relu(nn.Conv(8, (3, 3), name="one")(x))
        y = x + nn.tanh(nn.Conv(8, (3, 3), name="two")(x))
        z = nn.relu(nn.Conv(6, (1, 1), name="three")(y))
        y = jnp.concatenate([y, z], axis=-1)
        return nn.Dense(4, name="four")(y.mean(axis=(1, 2)))


class Normed(nn.Module):
    """A norm over channels, which reads what goes before the next layer does."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.LayerNorm()(nn.Dense(12, name="one")(x))
        x = nn.LayerNorm()(nn.Dense(10, name="two")(nn.relu(x)))
        return nn.Dense(3, name="three")(nn.relu(x))


def test_refits_are_of_what_the_cut_network_reads_behind_a_norm() -> None:
    """The same as `reconstruct` makes of that keep; what is cut is 0, biases too."""
    x = normal(64, 5)
    variables = Normed().init(jax.random.key(0), x)
    rng = np.random.default_rng(3)
    variables = jax.tree.map(
        lambda v: v + 0.3 * rng.normal(size=v.shape).astype(np.float32), variables
    )
    graph = jp.trace(Normed().apply, variables, x)
    given = Normed().apply, graph, variables, [x]
    keep, found = jp.lasso_select(*given, jp.channels(0.5), positions=None)
    again = jp.reconstruct(*given[:2], keep, *given[2:], positions=None)
    jax.tree.map(lambda f, w: np.testing.assert_allclose(f, w, atol=1e-3), found, again)
    for tree in (found, again):
        masked = jp.mask(graph, keep, tree)
        jax.tree.map(np.testing.assert_array_equal, tree, masked)


def test_what_others_stand_in_for_goes_from_all_readers() -> None:
    x = normal(8, 6, 6, 3)
    variables = Joined().init(jax.random.key(0), x)
    params = variables["params"]
    # The last half of the summed channels is the first half again, and larger.
    for name in ("one", "two"):
        kernel, bias = params[name]["kernel"], params[name]["bias"]
        if name == "two":
            kernel = kernel * 0
        kernel = kernel.at[..., 4:].set(kernel[..., :4] * 3)
        params[name] = {"kernel": kernel, "bias": bias}
    graph = jp.trace(Joined().apply, variables, x)
    wide = max(graph.groups, key=lambda n: graph.groups[n].size)
    keep, found = jp.lasso_select(
        Joined().apply, graph, variables, [x], jp.channels(0.5), ridge=1e-8
    )
    first = np.flatnonzero(keep[wide])
    assert len(set(first % 4)) == len(first) == 4  # one of each pair
    small = jp.slim(Joined().apply, graph, keep)(jp.shrink(graph, keep, found), x)
    want = Joined().apply(variables, x)
    bare = jp.slim(Joined().apply, graph, keep)(jp.shrink(graph, keep, variables), x)
    assert np.abs(small - want).max() < 0.3 * np.abs(bare - want).max()


def test_widths_are_the_budgets_and_nothing_is_done_where_all_stays() -> None:
    variables = {"a": normal(5, 8), "b": normal(8, 12), "c": normal(12, 3)}
    x = normal(10, 5)
    graph = jp.trace(apply, variables, x)
    more = {"multiple_of": 4, "min_channels": 4}
    keep, _ = jp.lasso_select(apply, graph, variables, [x], jp.flops(0.5), **more)
    local = jp.select(
        graph,
        jp.score(jp.magnitude(), graph, variables),
        jp.flops(0.5),
        scope="local",
        **more,
    )
    assert {n: k.sum() for n, k in keep.items()} == {
        n: k.sum() for n, k in local.items()
    }
    keep, same = jp.lasso_select(apply, graph, variables, [x], jp.flops(1.0))
    assert all(k.all() for k in keep.values())
    assert same is variables


def test_what_is_asked_is_checked() -> None:
    apply, variables, x = networks.two_layers(jax.nn.relu)
    graph = jp.trace(apply, variables, x)
    (name,) = graph.groups
    half = jp.channels(0.5)

    def asked(apply: Any = apply, batches: Any = (x,), budget: Any = half, **more: Any):
        return jp.lasso_select(apply, graph, variables, batches, budget, **more)

    for wrong in ({"positions": 0}, {"steps": 1}, {"ridge": -1.0}):
        with pytest.raises(ConfigError, match="=".join(map(str, *wrong.items()))):
            asked(**wrong)
    with pytest.raises(DataError, match="lasso_select: batches is empty"):
        asked(batches=[])
    with pytest.raises(
        DataError, match="what b reads of the batches, .* is not finite"
    ):
        asked(batches=[x, x * np.nan])
    with pytest.raises(BudgetError, match="what must stay"):
        asked(budget=jp.channels(0.01))

    def looped(variables: Any, x: Any) -> Any:
        return jax.lax.map(lambda row: apply(variables, row[None])[0], x)

    shapes = jax.eval_shape(lambda: variables), jax.eval_shape(lambda: x)
    with pytest.raises(GraphError, match=f"lasso_select: nothing reads '{name}'"):
        check_readers(looped, jp.trace(looped, variables, x), *shapes, half)
    check_readers(apply, graph, *shapes, half)
    with pytest.raises(GraphError, match=f"lasso_select: nothing reads '{name}'"):
        asked(looped)
