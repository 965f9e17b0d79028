# SPDX-License-Identifier: Apache-2.0
"""Costs and weights in the graph are those of the network that is cut to what lives."""

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
import toygraphs

import jaxprune as jp
from jaxprune import pricing
from jaxprune.base import BudgetError, ConfigError, GraphError
from jaxprune.latency import Product


def timed(graph):
    """Milliseconds of products between a chain's groups, growing by uneven steps."""
    rng = np.random.default_rng(0)
    products = []
    for before, after in (("l0", "l1"), ("l1", "l2")):
        read, made = graph.groups[before].size, graph.groups[after].size
        grid = np.array([4, read]), np.array([2, 5, made])
        ms = np.cumsum(np.cumsum(rng.uniform(0.1, 1, (2, 3)), 0), 1)
        products.append(Product((after,), *grid, ms, (0, {before: 1}), (0, {after: 1})))
    return jp.Timings("paper", tuple(products))


def shipped():
    apply, variables, x = networks.linen(networks.ResNet)
    graph = jp.trace(apply, variables, x)
    return graph, networks.random_keep(graph, 1)


def chain():
    graph = toygraphs.chain(9, 7, 8)
    rng = np.random.default_rng(3)
    keep = {n: rng.random(g.size) < 0.6 for n, g in graph.groups.items()}
    for k in keep.values():
        k[0] = True
    return graph, keep


CASES = [
    (shipped, "flops"),
    *((chain, k) for k in ("flops", "params", "bytes", "channels", "timings")),
]


@pytest.mark.parametrize(("make", "kind"), CASES)
def test_live_costs_and_prices_are_those_of_the_cut_network(make, kind):
    graph, keep = make()
    kind = timed(graph) if kind == "timings" else kind
    counts = {n: jnp.sum(k) for n, k in keep.items()}
    kept = np.array([k.sum() for k in keep.values()])
    full = np.array([g.size for g in graph.groups.values()])
    measured = jp.budget.measure(graph, kind, kept)
    dense = jp.budget.measure(graph, kind, full)
    found = jax.jit(pricing.live_cost(graph, kind))(counts)
    np.testing.assert_allclose(found, measured / dense, rtol=1e-5)

    small = jp.shrink_graph(graph, keep)
    wanted = jp.flops_weights(small, kind)
    weights = jax.jit(jp.repriced(graph, kind))(counts)
    for name, line in wanted.items():
        np.testing.assert_allclose(
            np.full(line.shape, weights[name]), line, rtol=2e-4, atol=1e-6
        )
    sizes = jax.jit(jp.repriced(graph, None, roles=("out",)))(counts)
    entries = jp.trees.channel_count(small, roles=("out",))
    for name, line in entries.items():
        np.testing.assert_allclose(sizes[name] ** 2, line[0], rtol=1e-5)


def test_prices_by_hand():
    # 3 -> 5 -> 4 -> 20, of which 2 and 3 live: 3 + 3 multiply-adds, and 2 + 20.
    graph = toygraphs.chain(5, 4, outputs=20)
    weights = jp.repriced(graph)({"l0": 2, "l1": 3})
    mean = (2 * 6 + 3 * 22) / 5
    np.testing.assert_allclose(weights["l0"], np.sqrt(7) * 6 / mean, rtol=1e-6)
    np.testing.assert_allclose(weights["l1"], np.sqrt(23) * 22 / mean, rtol=1e-6)


def test_a_gate_pays_for_its_channel_and_not_for_its_number_of_weights():
    graph = toygraphs.chain(5, 4, outputs=20)
    weights = jp.repriced(graph, gates=True)({"l0": 2, "l1": 3})
    mean = (2 * 6 + 3 * 22) / 5
    np.testing.assert_allclose(weights["l0"], 6 / mean, rtol=1e-6)
    np.testing.assert_allclose(weights["l1"], 22 / mean, rtol=1e-6)
    alike = jp.repriced(graph, None, gates=True)({"l0": 2, "l1": 3})
    assert [float(w) for w in alike.values()] == [1.0, 1.0]
    dense = jp.flops_weights(graph, gates=True)
    mean = (5 * (3 + 4) + 4 * (5 + 20)) / 9
    np.testing.assert_allclose(dense["l0"], np.full(5, 7 / mean))
    np.testing.assert_allclose(dense["l1"], np.full(4, 25 / mean))


def test_a_penalty_that_is_repriced_follows_the_zeros():
    """A masked network is penalised as the cut one is, with no keep at hand."""
    graph, keep = chain()
    variables = toygraphs.variables(graph)
    masked, small = jp.mask(graph, keep, variables), jp.shrink(graph, keep, variables)
    cut = jp.shrink_graph(graph, keep)
    weights = jp.repriced(graph)
    penalty = jax.jit(lambda v: jp.group_lasso(graph, v, weights))(masked)
    np.testing.assert_allclose(
        penalty, jp.group_lasso(cut, small, jp.flops_weights(cut)), rtol=1e-4
    )
    tx = jp.proximal(graph, 0.05, weights)
    still = jax.tree.map(jnp.zeros_like, masked)
    updates, _ = jax.jit(tx.update)(still, tx.init(masked), masked)
    tx = jp.proximal(cut, 0.05, jp.flops_weights(cut))
    still = jax.tree.map(jnp.zeros_like, small)
    wanted, _ = tx.update(still, tx.init(small), small)
    for a, b in zip(
        jax.tree.leaves(jp.shrink(graph, keep, updates)),
        jax.tree.leaves(wanted),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_cost_that_there_is_none_of():
    with pytest.raises(BudgetError, match="flop"):
        jp.repriced(toygraphs.chain(3), "flop")
    with pytest.raises(GraphError, match="group 'l0' are negative, infinite"):
        jp.proximal(toygraphs.chain(3), 0.0, {"l0": np.inf})
    with pytest.raises(ConfigError, match="roles='in'"):
        jp.repriced(toygraphs.chain(3), roles="in")
    one = toygraphs.chain(3)
    both = r"roles=\(\): \('out',\), \('in',\) or \('out', 'in'\)"
    with pytest.raises(ConfigError, match=both):
        jp.group_lasso(one, toygraphs.variables(one), roles=())
    graph, _, _ = toygraphs.frozen_backbone()
    with pytest.raises(BudgetError, match="has no flops"):
        pricing.live_cost(graph, "flops")


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ({"b": ["l7"]}, "block 'b' names group 'l7'"),
        ({"b": ["l0"], "c": ["l0"]}, "'l0' is in the blocks 'b' and 'c'"),
        ({"b": "l0"}, r"block 'b'='l0': a list, \['l0'\]"),
        ([["l0"]], r"blocks=\[\['l0'\]\]: {name"),
    ],
)
def test_blocks_are_those_of_the_graph(blocks, words):
    graph = toygraphs.chain(3)
    for call in (
        lambda: jp.group_lasso(graph, toygraphs.variables(graph), blocks=blocks),
        lambda: jp.proximal(graph, 0.1, blocks=blocks),
    ):
        with pytest.raises(GraphError, match=words):
            call()


def test_what_is_no_strength_and_no_target():
    with pytest.raises(ConfigError, match="strength='l0': one number"):
        jp.proximal(toygraphs.chain(3), "l0")
    with pytest.raises(BudgetError, match=r"steer\(graph, 0.5, kind='flops'\)"):
        jp.steer(toygraphs.chain(3), jp.flops(0.5))


def test_adaptive_weights_by_hand():
    """Zou (2006), eq. 4: w over |beta|^gamma, |beta| here relative to its mean."""
    graph = toygraphs.chain(4, 2)
    scores = {"l0": np.array([1.0, 2.0, 4.0, 0.0]), "l1": np.array([0.5, 4.5])}
    weights = {"l0": 3.0, "l1": np.array([1.0, 2.0])}
    found = jp.adaptive(graph, scores, weights, power=0.5)
    np.testing.assert_allclose(found["l0"], 3 / np.sqrt([0.5, 1, 2, 1e-6]))
    np.testing.assert_allclose(found["l1"], [1 / np.sqrt(0.25), 2 / np.sqrt(2.25)])
    plain = jp.adaptive(graph, scores, power=0)
    for name, count in jp.trees.channel_count(graph).items():
        np.testing.assert_allclose(plain[name], np.sqrt(count))
    later = jp.adaptive(graph, scores, jp.repriced(graph))
    live = {"l0": 2, "l1": 1}
    for name, price in jp.repriced(graph)(live).items():
        np.testing.assert_allclose(
            later(live)[name],
            price / np.maximum(scores[name] / 2, 1e-6),
            rtol=1e-6,
        )


@pytest.mark.parametrize(
    ("scores", "more", "error", "match"),
    [
        ({"l0": [1, -1], "l1": [1]}, {}, GraphError, "must not be negative"),
        ({"l0": [0, 0], "l1": [0]}, {}, GraphError, "all 0"),
        ({"l0": [1, 1]}, {}, GraphError, "lack group 'l1'"),
        ({"l0": [1, 1], "l1": [1]}, {"power": -1}, ConfigError, "power=-1 must be in"),
    ],
)
def test_what_cannot_be_an_importance_is_told(scores, more, error, match):
    scores = {n: np.asarray(s, float) for n, s in scores.items()}
    with pytest.raises(error, match=match):
        jp.adaptive(toygraphs.chain(2, 1), scores, **more)
