# SPDX-License-Identifier: Apache-2.0
"""`prune`: all of the core in one call."""

from __future__ import annotations

import jax
import networks
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.base import BudgetError


def test_prune_is_its_parts_in_one_call() -> None:
    apply, variables, x = networks.linen(networks.ResNet)
    pruned = jp.prune(apply, variables, x, budget=jp.flops(0.5), train=False)
    criterion = jp.chain(jp.magnitude(), jp.normalize())
    scores = jp.score(criterion, pruned.graph, variables)
    keep = jp.select(pruned.graph, scores, jp.flops(0.5))
    for name, line in keep.items():
        np.testing.assert_array_equal(line, pruned.keep[name])
    ratio = jp.cost(pruned.graph, keep).flops / jp.cost(pruned.graph).flops
    assert 0.3 < ratio <= 0.5
    want = jax.jit(apply)(jp.mask(pruned.graph, keep, variables), x)
    got = jax.jit(pruned.apply)(pruned.variables, x)
    np.testing.assert_allclose(want, got, rtol=1e-5, atol=1e-5)


def test_prune_takes_the_options_of_its_parts() -> None:
    apply, variables, x = networks.linen(networks.ResNet)
    pruned = jp.prune(
        apply,
        variables,
        x,
        budget=jp.params(0.6),
        criterion=jp.random(),
        key=jax.random.key(0),
        multiple_of=4,
        overrides={"Conv_0": True},
    )
    assert pruned.keep["Conv_0"].all()
    assert all(k.sum() % 4 == 0 for k in pruned.keep.values())


def test_a_budget_out_of_reach_says_what_is_least() -> None:
    apply, variables, x = networks.linen(networks.ResNet)
    with pytest.raises(BudgetError, match="must stay has 0.0258"):
        jp.prune(apply, variables, x, budget=jp.flops(0.001))
    with pytest.raises(BudgetError, match="budget=0.4: say of what"):
        jp.prune(apply, variables, x, budget=0.4)
