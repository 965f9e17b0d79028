# SPDX-License-Identifier: Apache-2.0
"""Ranks within a budget of all kernels together, against brute force."""

from __future__ import annotations

import itertools
import math

import flax.linen as nn
import jax
import numpy as np
import pytest

import jaxprune as jp
from jaxprune import ranks
from jaxprune.base import BudgetError
from jaxprune.ranks import Choice


def table(rng: np.random.Generator, costs: tuple[float, ...]) -> list[list[Choice]]:
    """Of each kernel the whole one, and ranks 1 to 6 of falling energies."""
    found = []
    for cost in costs:
        spectrum = np.sort(rng.exponential(size=8))[::-1] ** 2
        kept = ranks.energies(spectrum, range(1, 7))
        low = [Choice(r, r * cost, e) for r, e in zip(range(1, 7), kept, strict=True)]
        found.append([Choice(0, 7 * cost, 1.0), *low])
    return found


def best(choices: list[list[Choice]], limit: float) -> float:
    """The largest product of energies within the limit, by trying everything."""
    return max(
        math.prod(c.energy for c in some)
        for some in itertools.product(*choices)
        if sum(c.cost for c in some) <= limit
    )


def test_energies_are_shares_of_the_spectrum() -> None:
    np.testing.assert_allclose(
        ranks.energies(np.array([6.0, 3.0, 1.0]), [1, 2, 3]), [0.6, 0.9, 1.0]
    )


def test_greedy_ranks_are_the_best_where_all_cost_alike() -> None:
    rng = np.random.default_rng(0)
    for _ in range(10):
        choices = table(rng, (5.0, 5.0, 5.0))
        for limit in (15.0, 40.0, 62.0, 105.0):
            found = ranks.greedily(choices, limit)
            assert sum(c.cost for c in found) <= limit
            product = math.prod(c.energy for c in found)
            np.testing.assert_allclose(product, best(choices, limit), rtol=1e-12)


def test_greedy_ranks_are_near_the_best_where_costs_differ() -> None:
    rng, ratios = np.random.default_rng(1), []
    for _ in range(20):
        choices = table(rng, (2.0, 3.0, 7.0))
        limit = rng.uniform(20, 70)
        found = ranks.greedily(choices, limit)
        assert sum(c.cost for c in found) <= limit
        product = math.prod(c.energy for c in found)
        ratios.append(product / best(choices, limit))
        # As close as ranks allow: no kernel could have more.
        left = limit - sum(c.cost for c in found)
        for now, more in zip(found, choices, strict=True):
            assert not any(0 < c.cost - now.cost <= left for c in more)
    # Six ranks each are coarse, and greedy is not exact.
    assert np.mean(ratios) > 0.97 and min(ratios) > 0.8
    assert ranks.greedily(choices, 11.9) is None  # rank 1 of each costs 12


def test_even_ranks_have_one_ratio() -> None:
    choices = [
        [Choice(0, 100.0, 1.0), *(Choice(r, 10.0 * r, 1.0) for r in range(1, 10))],
        [Choice(0, 50.0, 1.0), *(Choice(r, 5.0 * r, 1.0) for r in range(1, 10))],
    ]
    assert [c.rank for c in ranks.evenly(choices, 75.0)] == [5, 5]
    assert [c.rank for c in ranks.evenly(choices, 80.0)] == [5, 6]
    assert ranks.evenly(choices, 14.0) is None


class Three(nn.Module):
    """A strided, a dilated and a transposed convolution, and a dense layer."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(12, (3, 3), (2, 2), name="a")(x))
        x = nn.relu(nn.Conv(10, (3, 5), kernel_dilation=2, name="b")(x))
        x = nn.relu(nn.ConvTranspose(10, (4, 4), (2, 2), name="c")(x))
        return nn.Dense(8, name="d")(x)


NET, IMAGES = Three(), np.zeros((2, 12, 11, 8), np.float32)
VARIABLES = NET.init(jax.random.key(0), IMAGES)
GRAPH = jp.trace(NET.apply, VARIABLES, IMAGES)
BATCHES = [np.random.default_rng(0).normal(size=IMAGES.shape).astype(np.float32)]


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("svd", "flops"),
        ("separable", "params"),
        ("cp", "flops"),
        ("asymmetric3d", "flops"),
    ],
)
def test_the_whole_network_meets_its_budget(method: str, kind: str) -> None:
    budget = jp.Budget(kind, 0.55)
    more = {"batches": BATCHES} if method == "asymmetric3d" else {}
    found = jp.factorize(
        NET.apply, GRAPH, VARIABLES, IMAGES, method=method, budget=budget, **more
    )
    thin = jp.trace(found.apply, found.variables, IMAGES)
    share = getattr(jp.cost(thin), kind) / getattr(jp.cost(GRAPH), kind)
    assert 0.5 < share <= 0.55


def test_the_budget_is_that_of_the_inputs_whatever_the_graph_was_traced_with() -> None:
    """Three images, where the graph has seen as many as IMAGES, and others' sizes."""
    ranks = set()
    for images in (np.repeat(IMAGES[:1], 3, axis=0), IMAGES):
        found = jp.factorize(NET.apply, GRAPH, VARIABLES, images, budget=jp.flops(0.55))
        whole = jp.cost(jp.trace(NET.apply, VARIABLES, images))
        thin = jp.cost(jp.trace(found.apply, found.variables, images))
        assert 0.5 < thin.flops / whole.flops <= 0.55
        ranks.add(tuple(chain.rank for chain in found.chains.values()))
    assert len(ranks) == 1


def test_ranks_are_multiples_and_budgets_out_of_reach_are_named() -> None:
    def cut(**more: object) -> jp.Factorized:
        return jp.factorize(NET.apply, GRAPH, VARIABLES, IMAGES, **more)

    found = cut(budget=jp.flops(0.6), multiple_of=3)
    assert found.chains
    assert all(c.rank % 3 == 0 for c in found.chains.values())
    with pytest.raises(BudgetError, match="lowest ranks leave 0.[0-9]*") as error:
        cut(budget=jp.flops(0.001))
    least = float(str(error.value).split()[-1])
    lowest = cut(budget=jp.flops(least))
    assert all(c.rank == 1 for c in lowest.chains.values())
    whole = cut(budget=jp.flops(1.0))
    assert not whole.chains and whole.variables is VARIABLES
    with pytest.raises(BudgetError, match="budget=0.5: say of what"):
        cut(budget=0.5)
    with pytest.raises(BudgetError, match="flops.r. or jp.params"):
        cut(budget=jp.bytes(0.5))
    with pytest.raises(jp.base.ConfigError, match="a ratio for each kernel or a bud"):
        cut(budget=jp.flops(0.5), ratio=0.5)
