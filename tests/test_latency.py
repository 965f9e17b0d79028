# SPDX-License-Identifier: Apache-2.0
"""Latency as a budget: tables of milliseconds, and what lies between their points."""

from __future__ import annotations

import json
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import networks
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune import budget, weakest
from jaxprune.base import BudgetError, ConfigError, DiskError, GraphError
from jaxprune.latency import Product


class Net(nn.Module):
    """Two convolutions whose outputs are joined, a depthwise one, a dense layer."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        a = nn.relu(nn.Conv(24, (3, 3), name="a")(x))
        b = nn.relu(nn.Conv(16, (1, 1), name="b")(x))
        y = nn.Conv(40, (3, 3), feature_group_count=40, name="c")(
            jnp.concatenate([a, b], -1)
        )
        return nn.Dense(5, name="d")(y.mean(axis=(1, 2)))


@pytest.fixture(scope="module")
def net() -> tuple[Any, Any, Any, jp.Graph]:
    x = jnp.ones((2, 6, 7, 3))
    variables = Net().init(jax.random.key(0), x)
    return Net().apply, variables, x, jp.trace(Net().apply, variables, x)


def made_up(graph: jp.Graph) -> jp.Timings:
    """Milliseconds that are multiply-adds: linear in what is read and what is made."""
    grid = [np.array([8, 16, 24]), np.array([8, 16]), np.array([8, 24, 40])]
    return jp.Timings(
        "paper",
        (
            Product(
                ("a",),
                np.array([3]),
                grid[0],
                27.0 * grid[0][None],
                (3, {}),
                (0, {"a": 1}),
            ),
            Product(
                ("b",),
                np.array([3]),
                grid[1],
                3.0 * grid[1][None],
                (3, {}),
                (0, {"b": 1}),
            ),
            Product(
                ("d",),
                grid[2],
                np.array([5]),
                5.0 * grid[2][:, None],
                (0, {"a": 1, "b": 1}),
                (5, {}),
            ),
        ),
    )


def test_a_unit_of_the_path_saves_more_than_what_rounds() -> None:
    """Times are flat from 16 channels to 40: a unit goes to the first that save, 15."""
    x = np.ones((2, 4), np.float32)
    v = {"a": np.ones((4, 40)), "b": np.ones((40, 40)), "c": np.ones((40, 3))}
    graph = jp.trace(lambda v, x: jax.nn.relu(x @ v["a"] @ v["b"]) @ v["c"], v, x)
    first, second = graph.groups
    wide, ms = np.array([8, 16, 40]), np.array([0.0537, 0.1713, 0.1713])
    four, three = np.array([4]), np.array([3])
    grid = np.add.outer(ms, 1.3 * ms)
    table = jp.Timings(
        "made up",
        (
            Product(("a",), four, wide, ms[None], (4, {}), (0, {first: 1})),
            Product(("b",), wide, wide, grid, (0, {first: 1}), (0, {second: 1})),
            Product(("c",), wide, three, ms[:, None], (0, {second: 1}), (3, {})),
        ),
    )
    allowed = {name: np.arange(1, 41) for name in graph.groups}
    for a in range(17, 41):
        for kept in ([a, 40], [40, a]):
            now = float(budget.measure(graph, table, np.array(kept)))
            lower, saving = weakest._units(graph, np.array(kept), allowed, table, now)
            assert lower.tolist() == [15, 15]
            assert (saving > 1e-3).all()


def test_between_points_time_is_linear_and_below_them_in_proportion(net) -> None:
    graph = net[3]
    assert {n: g.size for n, g in graph.groups.items()} == {"a": 24, "b": 16}
    for a, b in ((24, 16), (13, 9), (3, 2), (1, 1)):
        found = made_up(graph).at(list(graph.groups), np.array([[a, b], [24, 16]]))
        want = 27 * a + 3 * b + 5 * (a + b)
        np.testing.assert_allclose(found, [want, 27 * 24 + 3 * 16 + 5 * 40], rtol=1e-12)


def test_a_budget_of_milliseconds_is_met(net) -> None:
    apply, variables, x, graph = net
    table = made_up(graph)
    scores = jp.score(jp.magnitude(), graph, variables)
    keep = jp.select(graph, scores, jp.latency(0.5, table))
    kept = np.array([k.sum() for k in keep.values()])
    dense = table.at(list(graph.groups), budget.sizes(graph))
    assert table.at(list(graph.groups), kept) <= 0.5 * dense
    assert table.ms(graph) == dense
    assert table.ms(graph, keep) == table.at(list(graph.groups), kept)
    for name in range(2):  # not one more fits
        more = kept + np.eye(2, dtype=int)[name]
        assert (
            more[name] > (24, 16)[name]
            or table.at(list(graph.groups), more) > 0.5 * dense
        )
    per_ms = jp.score(jp.chain(jp.magnitude(), jp.per_cost(table)), graph, variables)
    share = (27 + 5) / dense
    np.testing.assert_allclose(per_ms["a"], scores["a"] / share, rtol=1e-5)


def test_a_path_is_walked_in_milliseconds(net) -> None:
    apply, variables, x, graph = net
    table = made_up(graph)
    walked = jp.prune_path(
        graph,
        variables,
        lambda v, b: jnp.mean(apply(v, b) ** 2),
        [x],
        until=jp.latency(0.4, table),
        kind=table,
    )
    chosen = walked.select(jp.latency(0.6, table))
    counts = [int(k.sum()) for k in chosen.keep.values()]
    dense = table.at(list(graph.groups), budget.sizes(graph))
    assert table.at(list(graph.groups), counts) <= 0.6 * dense


def test_the_table_is_measured_and_kept(net, tmp_path) -> None:
    apply, variables, x, graph = net
    cache = tmp_path / "folder" / "times.json"
    more = {"cache": cache, "repeats": 1, "points": 2}
    found = jp.timings(apply, graph, variables, x, **more)
    assert [p.path[-2] for p in found.products] == ["a", "b", "c", "d"]
    assert [p.ms.shape for p in found.products] == [(1, 2), (1, 2), (1, 2), (2, 1)]
    depthwise = found.products[2]
    np.testing.assert_array_equal(depthwise.made, [16, 40])
    assert depthwise.reads == (1, {}) and depthwise.makes == (0, {"a": 1, "b": 1})
    for product in found.products:
        assert (product.ms > 0).all()
        assert (np.diff(product.ms, axis=0) >= 0).all()
        assert (np.diff(product.ms, axis=1) >= 0).all()
    # What is in the file is not measured again.
    known = json.loads(cache.read_text())
    assert len(known) == 8
    cache.write_text(json.dumps(dict.fromkeys(known, 7.0)))
    again = jp.timings(apply, graph, variables, jax.eval_shape(lambda: x), **more)
    np.testing.assert_allclose(again.at(list(graph.groups), budget.sizes(graph)), 28.0)


def test_depthwise_kernels_are_run_at_the_widths_of_the_grid(monkeypatch) -> None:
    """Of two filters a channel; each as a network of that width would run it."""

    class Two(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.Conv(12, (1, 1), name="a")(x)
            x = nn.Conv(24, (3, 3), feature_group_count=12, name="b")(x)
            return nn.Dense(5, name="c")(x.mean(axis=(1, 2)))

    x = jnp.ones((2, 6, 7, 3))
    variables = Two().init(jax.random.key(0), x)
    graph = jp.trace(Two().apply, variables, x)
    shapes = []

    def seconds(once: Any, count: int) -> float:
        run, features, kernel = once.func, *once.args
        shapes.append((features.shape, kernel.shape, run(features, kernel).shape))
        return 1e-3

    monkeypatch.setattr(sys.modules["jaxprune.latency"], "_seconds", seconds)
    table = jp.timings(
        Two().apply, graph, variables, x, points=3, multiple_of=8, repeats=1
    )
    read = {s for s in shapes if len(s[0]) == 4 and s[1][:2] == (3, 3)}
    assert read == {
        ((2, 6, 7, n // 2), (3, 3, 1, n), (2, 6, 7, n)) for n in (8, 16, 24)
    }
    np.testing.assert_allclose(table.at(list(graph.groups), [12]), 3.0)


def test_prune_measures_what_was_not(net, monkeypatch) -> None:
    apply, variables, x, graph = net

    def timed(reading: Any, features: Any, kernel: Any, repeats: int) -> float:
        return float(np.prod(kernel.shape))

    monkeypatch.setattr(sys.modules["jaxprune.latency"], "_timed", timed)
    pruned = jp.prune(apply, variables, x, budget=jp.latency(0.5))
    kernels = [
        sum(v["kernel"].size for v in tree["params"].values())
        for tree in (variables, pruned.variables)
    ]
    assert kernels[1] <= 0.5 * kernels[0]


def test_arguments_of_the_network_are_not_those_of_the_measurement(monkeypatch) -> None:
    def apply(variables: Any, x: Any, *, points: int) -> Any:
        return (x @ variables["a"])[:, :8] @ variables["b"] * points

    seen = []
    monkeypatch.setattr(
        sys.modules["jaxprune.latency"], "_timed", lambda *_: seen.append(1) or 1.0
    )
    variables = {"a": jnp.ones((3, 8)), "b": jnp.ones((8, 2))}
    x = jnp.ones((4, 3))
    pruned = jp.prune(apply, variables, x, budget=jp.latency(1.0), points=5)
    assert seen and pruned.apply(pruned.variables, x, points=5).shape == (4, 2)


def test_what_cannot_be_measured_is_said(net, tmp_path) -> None:
    apply, variables, x, graph = net
    with pytest.raises(BudgetError, match="jaxprune.timings"):
        jp.latency(0.5, 3.0)
    with pytest.raises(BudgetError, match="nothing is measured yet; pass latency"):
        jp.select(graph, jp.score(jp.magnitude(), graph, variables), jp.latency(0.5))
    with pytest.raises(BudgetError, match="latency on paper"):
        jp.latency(1.5, made_up(graph))
    scores = jp.score(jp.magnitude(), graph, variables)
    with pytest.raises(BudgetError, match="cannot be met"):
        jp.select(graph, scores, jp.latency(0.01, made_up(graph)))
    other = jp.trace(*networks.linen(networks.ResNet))
    with pytest.raises(GraphError, match="the group 'a', which this one lacks"):
        made_up(graph).at(list(other.groups), budget.sizes(other))
    cache = tmp_path / "times.json"
    cache.write_text("[1, 2")
    with pytest.raises(BudgetError, match="no cache of timings"):
        jp.timings(apply, graph, variables, x, cache=cache)
    with pytest.raises(DiskError, match="times.json/in: cannot be written"):
        jp.timings(apply, graph, variables, x, cache=cache / "in")
    with pytest.raises(GraphError, match="is the graph this function's"):
        jp.timings(apply, other, variables, x)
    for name in ("points", "multiple_of", "repeats"):
        with pytest.raises(ConfigError, match=f"{name}=0: a positive integer"):
            jp.timings(apply, graph, variables, x, **{name: 0})


def test_on_a_plateau_a_channel_costs_what_more_of_them_save() -> None:
    """Else it would never die, and all others at any price."""
    rng = np.random.default_rng(0)
    shapes = {"a": (4, 16), "b": (16, 16), "c": (16, 3)}
    v = {
        n: {"kernel": jnp.asarray(rng.normal(size=s) * 0.3, jnp.float32)}
        for n, s in shapes.items()
    }
    x = jnp.asarray(rng.normal(size=(32, 4)), jnp.float32)

    def apply(v: Any, x: Any) -> Any:
        y = jax.nn.relu(x @ v["a"]["kernel"])
        return jax.nn.relu(y @ v["b"]["kernel"]) @ v["c"]["kernel"]

    graph, grid = jp.trace(apply, v, x), np.array([4, 8, 12, 16])
    flat, falling = np.array([[1.0, 2, 4, 4]]), np.array([[0.2], [0.4], [0.6], [0.8]])
    found = jp.Timings(
        "toy",
        (
            Product(("a", "kernel"), np.array([4]), grid, flat, (4, {}), (0, {"a": 1})),
            Product(
                ("c", "kernel"), grid, np.array([3]), falling, (0, {"b": 1}), (3, {})
            ),
        ),
    )
    # Eight channels of a less save 2 ms, a quarter each; any of b's, a twentieth.
    share = budget.marginal(graph, found)
    np.testing.assert_allclose(share, [0.25 / 4.8, 0.05 / 4.8])
    each = {n: jnp.asarray(16) for n in "ab"}
    prices = jp.repriced(graph, found, gates=True)
    np.testing.assert_allclose(prices(each)["a"] / prices(each)["b"], 5, rtol=1e-5)
    y = apply(v, x)
    for weights in (jp.repriced(graph, found), jp.flops_weights(graph, found)):
        strength = jp.steer(graph, 0.6, kind=found, rate=1e-2, start=1e-2)
        tx = optax.chain(optax.sgd(1e-2), jp.proximal(graph, strength, weights))

        @jax.jit
        def train(v: Any, tx: Any = tx) -> Any:
            def step(carry: Any, _: Any) -> Any:
                v, state = carry
                grads = jax.grad(lambda v: jnp.mean((apply(v, x) - y) ** 2))(v)
                updates, state = tx.update(grads, state, v)
                return (optax.apply_updates(v, updates), state), None

            return jax.lax.scan(step, (v, tx.init(v)), None, length=1500)[0][0]

        kept = [int(k.sum()) for k in jp.dead(graph, train(v)).values()]
        assert 0.5 < found.at(list(graph.groups), kept) / 4.8 <= 0.6
