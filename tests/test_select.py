# SPDX-License-Identifier: Apache-2.0
"""What stays: the budget is met from below, and nothing more would have fitted."""

import itertools

import numpy as np
import pytest
import toygraphs
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprune import budget as budgets
from jaxprune.base import BudgetError, ConfigError, GraphError
from jaxprune.budget import Budget, channels, flops, params
from jaxprune.select import alignment, allowed_counts, select

KINDS = ("flops", "params", "channels", "bytes")


def counts(keep):
    return np.array([k.sum() for k in keep.values()])


def cost_of(graph, kind, keep):
    return budgets.measure(graph, kind, counts(keep))


def random_scores(graph, seed, ties=False):
    rng = np.random.default_rng(seed)
    draw = (lambda n: rng.integers(0, 3, n)) if ties else (lambda n: rng.random(n))
    return {n: draw(g.size).astype(float) for n, g in graph.groups.items()}


@settings(max_examples=150, deadline=None)
@given(
    toygraphs.chains(),
    st.integers(0, 10**6),
    st.sampled_from(KINDS),
    st.floats(0.05, 1),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(1, 3),
    st.sampled_from(["global", "local"]),
    st.booleans(),
)
def test_laws(graph, seed, kind, ratio, multiple_of, min_channels, scope, ties):
    scores = random_scores(graph, seed, ties)
    options = {"multiple_of": multiple_of, "min_channels": min_channels, "scope": scope}
    dense = budgets.measure(graph, kind, budgets.sizes(graph))
    allowed = allowed_counts(graph, multiple_of, min_channels)
    least = np.array([c[0] for c in allowed.values()])
    if budgets.measure(graph, kind, least) > ratio * dense * (1 + 1e-12):
        with pytest.raises(BudgetError, match="Ask for"):
            select(graph, scores, Budget(kind, ratio), **options)
        return
    keep = select(graph, scores, Budget(kind, ratio), **options)
    assert cost_of(graph, kind, keep) <= ratio * dense * (1 + 1e-12)
    for i, (name, group) in enumerate(graph.groups.items()):
        kept = int(keep[name].sum())
        assert kept == group.size or kept % multiple_of == 0 and kept >= min_channels
        assert kept > 0
        # The best of the group stay, and one block more would not have fitted.
        if kept < group.size:
            assert scores[name][keep[name]].min() >= scores[name][~keep[name]].max()
            more = counts(keep)
            more[i] = allowed[name][allowed[name] > kept][0]
            assert budgets.measure(graph, kind, more) > ratio * dense
    again = select(graph, scores, Budget(kind, ratio), **options)
    for name in keep:
        np.testing.assert_array_equal(keep[name], again[name])


@settings(max_examples=50, deadline=None)
@given(toygraphs.chains(), st.integers(0, 10**6), st.floats(0.3, 1), st.floats(0.3, 1))
def test_a_smaller_budget_of_channels_keeps_a_subset(graph, seed, one, other):
    small, large = sorted([one, other])
    if small * graph.channels < len(graph.groups):
        return
    scores = random_scores(graph, seed)
    less = select(graph, scores, channels(small))
    more = select(graph, scores, channels(large))
    assert all((more[n] | ~less[n]).all() for n in less)


@settings(max_examples=40, deadline=None)
@given(toygraphs.chains(3, 4), st.integers(0, 10**6), st.floats(0.3, 1))
def test_global_by_channels_has_the_highest_total_score(graph, seed, ratio):
    # With unit costs the knapsack is solved exactly.
    scores = random_scores(graph, seed)
    most = int(ratio * graph.channels * (1 + 1e-12))
    if most < len(graph.groups):
        return
    keep = select(graph, scores, channels(ratio))
    best = max(
        sum(sum(sorted(scores[n])[::-1][:k]) for n, k in zip(scores, kept))
        for kept in itertools.product(
            *[range(1, g.size + 1) for g in graph.groups.values()]
        )
        if sum(kept) <= most
    )
    assert sum(scores[n][keep[n]].sum() for n in keep) == pytest.approx(best)


def test_local_keeps_one_fraction_everywhere():
    graph = toygraphs.chain(8, 16, 32)
    keep = select(graph, random_scores(graph, 0), channels(0.5), scope="local")
    np.testing.assert_array_equal(counts(keep), [4, 8, 16])


def test_local_ignores_the_scale_of_a_group():
    graph = toygraphs.chain(8, 8)
    scores = random_scores(graph, 0)
    scaled = scores | {"l1": scores["l1"] * 1e6}
    for name, stays in select(graph, scores, flops(0.4), scope="local").items():
        again = select(graph, scaled, flops(0.4), scope="local")
        np.testing.assert_array_equal(stays, again[name])


def test_global_by_hand():
    # Blocks of two by mean score: l0 {3,2} 6.5; l1 {0,1} 5; l0 {0,1} 1; l1 {2,3} 0.5.
    graph = toygraphs.chain(4, 4)
    scores = {"l0": np.array([2.0, 0, 6, 7]), "l1": np.array([4.0, 6, 1, 0])}
    keep = select(graph, scores, channels(0.75), multiple_of=2)
    np.testing.assert_array_equal(keep["l0"], [1, 1, 1, 1])
    np.testing.assert_array_equal(keep["l1"], [1, 1, 0, 0])


def test_ties_go_by_group_then_channel():
    graph = toygraphs.chain(4, 4)
    keep = select(graph, {n: np.ones(4) for n in graph.groups}, channels(0.625))
    np.testing.assert_array_equal(keep["l0"], [1, 1, 1, 1])
    np.testing.assert_array_equal(keep["l1"], [1, 0, 0, 0])


def test_the_whole_budget_keeps_all_and_exact_fractions_are_reached():
    graph = toygraphs.chain(10, 100)
    scores = random_scores(graph, 0)
    for kind in KINDS:
        assert all(k.all() for k in select(graph, scores, Budget(kind, 1.0)).values())
    # 0.29 * 100 is 28.999999999999996 in floats.
    single = toygraphs.chain(100)
    assert counts(select(single, random_scores(single, 0), channels(0.29))) == [29]


def test_a_size_that_is_no_multiple_stays_whole_or_a_multiple():
    graph = toygraphs.chain(10)
    scores = random_scores(graph, 0)
    reached = {
        int(counts(select(graph, scores, channels(r), multiple_of=4))[0])
        for r in (0.4, 0.7, 0.8, 0.95, 1.0)
    }
    assert reached == {4, 8, 10}


def test_overrides():
    graph = toygraphs.chain(8, 8, 8, 8)
    scores = random_scores(graph, 0)
    overrides = {"l[01]": True, "l1": 0.5, "l3": 0.01}
    keep = select(graph, scores, flops(0.6), overrides=overrides)
    kept = dict(zip(keep, counts(keep)))
    assert kept["l0"] == 8 and kept["l1"] == 4 and kept["l3"] == 1
    thirds = toygraphs.chain(6)
    keep = select(thirds, random_scores(thirds, 0), params(1), overrides={"l0": 1 / 3})
    assert counts(keep) == [2]


@pytest.mark.parametrize("ratio", [0, -0.1, 1.5, float("nan"), "0.4", None, True])
@pytest.mark.parametrize("kind", KINDS)
def test_bad_ratios(kind, ratio):
    with pytest.raises(BudgetError, match=r"\(0, 1\]"):
        getattr(budgets, kind)(ratio)


def test_bad_kind():
    with pytest.raises(BudgetError, match="flops, params, channels, bytes"):
        Budget("latency", 0.5)  # type: ignore[arg-type]


def test_the_least_reachable_ratio_is_named_and_reachable():
    graph = toygraphs.chain(8, 8)
    scores = random_scores(graph, 0)
    with pytest.raises(BudgetError) as error:
        select(graph, scores, flops(0.01), multiple_of=2)
    ratio = float(str(error.value).split("has ")[1].split()[0])
    np.testing.assert_array_equal(
        counts(select(graph, scores, flops(ratio), multiple_of=2)), [2, 2]
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("l1"), "lack group 'l1'"),
        (lambda s: s.update(l1=np.ones(3)), "'l1' has 4 channels"),
        (
            lambda s: s.update(l1=np.array([1, np.nan, 1, 1])),
            "'l1'.*not finite.*channel 1",
        ),
        (lambda s: s.update(l9=np.ones(3)), "'l9', which the graph lacks"),
    ],
)
def test_bad_scores(change, words):
    graph = toygraphs.chain(4, 4)
    scores = random_scores(graph, 0)
    change(scores)
    with pytest.raises(GraphError, match=words):
        select(graph, scores, flops(0.5))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, bool])
def test_scores_may_be_integers(dtype):
    """Of uint8 the negative wraps, of int8 that of -128, of bool there is none."""
    graph = toygraphs.chain(8)
    order = np.array([3, 1, 0, 2, 2, 1, 0, 3])
    values = {np.uint8: order, np.int8: order * 64 - 128, bool: order > 1}[dtype]
    scores = {"l0": values.astype(dtype)}
    real = {"l0": values.astype(float)}
    np.testing.assert_array_equal(
        select(graph, scores, flops(0.5))["l0"], select(graph, real, flops(0.5))["l0"]
    )


def test_one_great_score_does_not_hide_the_others():
    """Their mean is not the difference of sums that begin with it."""
    graph = toygraphs.chain(8, 8)
    low = {"l0": np.full(8, 5e-6), "l1": np.full(8, 1e-6)}
    high = {**low, "l0": np.concatenate([[1e12], low["l0"][1:]])}
    wanted, found = (counts(select(graph, s, flops(0.5))) for s in (low, high))
    np.testing.assert_array_equal(found, wanted)
    assert wanted[0] == 8 > wanted[1]


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_a_budget_may_be_a_scalar_of_numpy(kind):
    """A half times so many FLOPs would be infinite in float16."""
    graph = toygraphs.chain(64, 64)
    scores = random_scores(graph, 0)
    found = select(graph, scores, flops(kind(0.25)))
    np.testing.assert_array_equal(
        counts(found), counts(select(graph, scores, flops(0.25)))
    )


def test_auto_is_a_multiple_that_suits_the_device():
    graph = toygraphs.chain(32, 20)
    by_hand = select(graph, random_scores(graph, 0), flops(0.5), multiple_of=8)
    keep = select(graph, random_scores(graph, 0), flops(0.5), multiple_of="auto")
    np.testing.assert_array_equal(counts(keep), counts(by_hand))
    assert {p: alignment(p) for p in ("tpu", "gpu", "cpu")} == {
        "tpu": 128,
        "gpu": 8,
        "cpu": 8,
    }


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"overrides": {"l7": 0.5}}, GraphError, "'l7', which matches no group.*'?l0"),
        ({"overrides": {"l1": 0.0}}, ConfigError, r"overrides\['l1'\]"),
        ({"overrides": {"l1": False}}, ConfigError, r"overrides\['l1'\]"),
        ({"multiple_of": 0}, ConfigError, "multiple_of=0"),
        ({"multiple_of": "all"}, ConfigError, "multiple_of='all'"),
        ({"min_channels": 1.5}, ConfigError, "min_channels=1.5"),
        ({"scope": "everywhere"}, ConfigError, "'global' or 'local'"),
    ],
)
def test_bad_options(options, error, words):
    graph = toygraphs.chain(4, 4)
    with pytest.raises(error, match=words):
        select(graph, random_scores(graph, 0), flops(0.5), **options)
