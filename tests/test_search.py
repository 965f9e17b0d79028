# SPDX-License-Identifier: Apache-2.0
"""Keeps found by trial, against all masks there are and the laws of resampling."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import toygraphs

import jaxprune as jp
from jaxprune import search
from jaxprune.base import BudgetError, ConfigError, DataError, GraphError

SMALL = toygraphs.chain(5, 4)
VARIABLES = toygraphs.variables(SMALL)
BATCH = np.random.default_rng(1).normal(size=(8, 3)).astype(np.float32)
KEY = jax.random.key(0)

WIDE = toygraphs.chain(16, 24, 12)


def loss(variables, batch):
    """How far the network's outputs lie from those of the dense one."""
    return jnp.mean(
        (toygraphs.apply(variables, batch) - toygraphs.apply(VARIABLES, batch)) ** 2
    )


def masked_loss(keep):
    """`loss` in float64 NumPy, the channels left out of the sums."""
    layers = {
        n: {k: np.float64(x) for k, x in v.items()}
        for n, v in VARIABLES["params"].items()
    }

    def run(keep):
        x, stays = np.float64(BATCH), np.ones(3, bool)
        for i, name in enumerate(("l0", "l1", "l2")):
            w, b = layers[name]["kernel"], layers[name]["bias"]
            x = (x if i == 0 else np.maximum(x, 0)) * stays @ w + b
            stays = keep.get(name, np.ones(2, bool))
        return x

    return np.mean((run(keep) - run(SMALL.full())) ** 2)


def test_the_best_of_many_masks_is_the_best_of_all():
    keep = search.best_of(
        SMALL, VARIABLES, loss, [BATCH], jp.channels(5 / 9), count=400, key=KEY
    )
    assert sum(k.sum() for k in keep.values()) == 5
    masks = [
        {"l0": np.array(m[:5]), "l1": np.array(m[5:])}
        for m in itertools.product([True, False], repeat=9)
        if sum(m) == 5 and any(m[:5]) and any(m[5:])
    ]
    best = min(masks, key=masked_loss)
    chex.assert_trees_all_equal(keep, best)


def saliencies(seed):
    rng = np.random.default_rng(seed)
    return {n: rng.exponential(size=g.size) for n, g in WIDE.groups.items()}


def rigged(values):
    """Variables and a loss: minus the sum of the values whose channels stay."""
    variables = toygraphs.variables(WIDE)
    for name, value in values.items():
        variables["params"][name]["bias"] = jnp.asarray(value, jnp.float32)

    def loss(variables, batch):
        return -sum(jnp.sum(variables["params"][n]["bias"]) for n in WIDE.groups)

    return variables, loss


def test_the_filter_finds_more_than_as_many_random_masks():
    found = {"best_of": [], "filter": []}
    budget = jp.channels(0.5)
    for seed in range(4):
        values, key = saliencies(seed), jax.random.key(seed)
        variables, loss = rigged(values)
        more = (WIDE, variables, loss, [0], budget)
        for name, keep in (
            ("best_of", search.best_of(*more, count=96, key=key)),
            ("filter", search.particle_filter(*more, particles=16, stages=6, key=key)),
        ):
            assert sum(k.sum() for k in keep.values()) == 26
            found[name].append(sum(values[n] @ keep[n] for n in keep))
    assert np.all(np.array(found["filter"]) >= found["best_of"])
    assert np.mean(found["filter"]) > 1.05 * np.mean(found["best_of"])


@pytest.mark.parametrize("perturb", [0.0, 0.3])
def test_every_stage_cuts_what_the_one_before_has_left(monkeypatch, perturb):
    seen = []
    whole = search.evaluator

    def spied(graph, risk):
        evaluate = whole(graph, risk)
        return lambda keep, *rest: (seen.append(keep), evaluate(keep, *rest))[1]

    monkeypatch.setattr(search, "evaluator", spied)
    variables, loss = rigged(saliencies(0))
    options = {"particles": 6, "stages": 3, "multiple_of": 4, "min_channels": 4}
    keep = search.particle_filter(
        WIDE, variables, loss, [0], jp.flops(0.3), key=KEY, perturb=perturb, **options
    )
    assert len(seen) == 18 and any(keep is k for k in seen[12:])
    dense, before, nested = jp.cost(WIDE).flops, [WIDE.full()], True
    for stage in (1, 2, 3):
        now = seen[6 * stage - 6 : 6 * stage]
        for k in now:
            assert jp.cost(WIDE, k).flops <= dense * 0.3 ** (stage / 3) * (1 + 1e-9)
            assert all(x.sum() % 4 == 0 and x.sum() >= 4 for x in k.values())
            nested &= any(all((p[n] | ~k[n]).all() for n in k) for p in before)
        before = now
    assert nested == (perturb == 0)


def test_keeps_follow_the_key_alone():
    more = (SMALL, VARIABLES, loss, [BATCH], jp.flops(0.5))
    for find in (
        lambda key: search.best_of(*more, count=1, key=key),
        lambda key: search.particle_filter(*more, particles=1, stages=2, key=key),
    ):
        one, again, *others = map(find, [KEY, KEY, *jax.random.split(KEY, 5)])
        chex.assert_trees_all_equal(one, again)
        different = [any((one[n] != o[n]).any() for n in one) for o in others]
        assert any(different)


def test_weights_are_boltzmanns():
    losses = np.array([1.0, 3.0, 2.0, np.inf])
    spread = 0.5 * np.std([1.0, 3.0, 2.0])
    expected = np.exp(-losses / spread) / np.exp(-losses / spread).sum()
    np.testing.assert_allclose(search.weights(losses, 0.5), expected)
    equal = search.weights(np.array([2.0, np.inf, 2.0]), 0.5)
    np.testing.assert_array_equal(equal, [0.5, 0, 0.5])


def test_resampling_is_in_proportion_to_the_weights():
    rng = np.random.default_rng(0)
    weights = np.array([0.05, 0.4, 0.0, 0.25, 0.13, 0.17])
    draws = np.array([search.resampled(weights, rng) for _ in range(3000)])
    counts = (draws[..., None] == np.arange(6)).sum(axis=1)
    assert (np.abs(counts - 6 * weights) < 1).all()
    # One place of each, so that the draws are independent.
    single = draws[np.arange(3000), rng.integers(0, 6, 3000)]
    seen, alive = np.bincount(single, minlength=6), weights > 0
    assert seen[2] == 0
    assert scipy.stats.chisquare(seen[alive], 3000 * weights[alive]).pvalue > 1e-3


def test_all_masks_are_one_program():
    chex.clear_trace_counter()
    traced = chex.assert_max_traces(loss, n=1)
    search.particle_filter(
        SMALL, VARIABLES, traced, [BATCH], jp.flops(0.4), particles=3, stages=3, key=KEY
    )


def test_masks_without_a_finite_loss_are_not_chosen():
    def fragile(variables, batch):  # NaN without the first channel
        return jnp.log(variables["params"]["l0"]["bias"][0] ** 2 - 1e-9)

    more = (SMALL, VARIABLES, fragile, [BATCH], jp.channels(0.5))
    assert search.best_of(*more, count=20, key=KEY)["l0"][0]
    with pytest.raises(GraphError, match="none of 3 masked networks has a finite loss"):
        search.best_of(
            SMALL,
            VARIABLES,
            lambda v, b: jnp.nan,
            [BATCH],
            jp.flops(0.5),
            count=3,
            key=KEY,
        )


@pytest.mark.parametrize(
    ("find", "more", "error", "words"),
    [
        (search.best_of, {"count": 0}, ConfigError, "best_of: count=0"),
        (search.particle_filter, {"stages": 1.5}, ConfigError, "stages=1.5"),
        (search.particle_filter, {"temperature": 0}, ConfigError, "temperature=0"),
        (search.particle_filter, {"perturb": 1}, ConfigError, "perturb=1"),
        (search.best_of, {"batches": []}, DataError, "batches is empty"),
        (search.best_of, {"budget": jp.flops(0.01)}, BudgetError, "has 0.1396 of the"),
        (search.best_of, {"budget": 0.5}, BudgetError, "budget=0.5: say of what"),
        (search.particle_filter, {"budget": 0.5}, BudgetError, "budget=0.5: say of"),
        (
            search.particle_filter,
            {"budget": jp.flops(0.01)},
            BudgetError,
            "has 0.1396 of the",
        ),
    ],
)
def test_errors(find, more, error, words):
    given = {"batches": [BATCH], "budget": jp.flops(0.5), **more}
    with pytest.raises(error, match=words):
        find(SMALL, VARIABLES, loss, key=KEY, **given)


@pytest.mark.parametrize("key", [0, np.int64(3)])
def test_a_seed_is_no_key(key):
    more = (SMALL, VARIABLES, loss, [BATCH])
    for call in (
        lambda: search.best_of(*more, jp.flops(0.5), key=key),
        lambda: search.particle_filter(*more, jp.flops(0.5), key=key),
        lambda: jp.prune_path(*more, key=key),
        lambda: jp.score(jp.random(), SMALL, VARIABLES, key=key),
    ):
        with pytest.raises(ConfigError, match=r"is no key; jax\.random\.key"):
            call()
    old = jax.random.PRNGKey(0)  # raw key data is fine
    np.testing.assert_equal(
        jp.score(jp.random(), SMALL, VARIABLES, key=old),
        jp.score(jp.random(), SMALL, VARIABLES, key=KEY),
    )
