# SPDX-License-Identifier: Apache-2.0
"""The path with measured rises against searches written in NumPy, and enumeration."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toygraphs
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune.base import DataError, GraphError
from jaxprune.criteria import stateless
from jaxprune.measures import measured
from jaxprune.path import prune_path

SIZES = (6, 4)
GRAPH = toygraphs.chain(*SIZES)
VARIABLES = toygraphs.variables(GRAPH)
RNG = np.random.default_rng(1)
BATCHES = [
    (
        RNG.normal(size=(8, 3)).astype(np.float32),
        RNG.normal(size=(8, 2)).astype(np.float32),
    )
    for _ in range(2)
]


def loss(variables, batch):
    x, y = batch
    return jnp.mean((toygraphs.apply(variables, x) - y) ** 2)


# The reference: loops over float64 arrays; a keep is a pair of sets of channels.


def numpy_loss(keep):
    layers = VARIABLES["params"]
    total = 0.0
    for x, y in BATCHES:
        h = np.asarray(x, np.float64)
        for i in range(3):
            kernel = np.asarray(layers[f"l{i}"]["kernel"], np.float64)
            h = h @ kernel + np.asarray(layers[f"l{i}"]["bias"], np.float64)
            if i < 2:
                h = np.maximum(h, 0)
                for c in range(SIZES[i]):
                    if c not in keep[i]:
                        h[:, c] = 0
        total += np.mean((h - y) ** 2) / len(BATCHES)
    return total


def numpy_flops(keep):
    a, b = len(keep[0]), len(keep[1])
    return 2 * (3 * a + a * b + b * 2)


def weakest_link(unit):
    """[(alpha, keep, risk)]: the search by hand, one unit at a time."""
    keep = tuple(frozenset(range(n)) for n in SIZES)
    dense, alpha = numpy_flops(keep), 0.0
    found = [(0.0, keep, numpy_loss(keep))]
    while True:
        candidates = []
        for group in (0, 1):
            if len(keep[group]) <= unit:
                continue

            def without(channels, group=group, keep=keep):
                return tuple(
                    k - channels if i == group else k for i, k in enumerate(keep)
                )

            ranked = sorted(
                keep[group], key=lambda c: numpy_loss(without(frozenset([c])))
            )
            smaller = without(frozenset(ranked[:unit]))
            rise = numpy_loss(smaller) - numpy_loss(keep)
            saved = (numpy_flops(keep) - numpy_flops(smaller)) / dense
            candidates.append((rise / saved, smaller))
        if not candidates:
            return found
        ratio, keep = min(candidates, key=lambda pair: pair[0])
        alpha = max(alpha, ratio)
        found.append((alpha, keep, numpy_loss(keep)))


@pytest.mark.parametrize(
    ("unit", "options"),
    [
        (1, {}),
        (1, {"measured": True}),
        (2, {"measured": True}),
    ],
)
def test_a_measured_path_is_the_weakest_link_search(unit, options):
    path = prune_path(
        GRAPH,
        VARIABLES,
        loss,
        BATCHES,
        criterion=measured(),
        block=0,
        multiple_of=unit,
        **options,
    )
    expected = weakest_link(unit)
    assert len(path.steps) == len(expected)
    for step, (alpha, keep, risk) in zip(path.steps, expected, strict=True):
        kept = tuple(frozenset(map(int, np.flatnonzero(k))) for k in step.keep.values())
        assert kept == keep
        assert step.risk == pytest.approx(risk, rel=1e-4)
        assert step.alpha == pytest.approx(alpha, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("at_once", [1, 4])
def test_measured_scores_are_the_losses_differences(at_once):
    whole = tuple(frozenset(range(n)) for n in SIZES)
    scores = jp.score(measured(at_once), GRAPH, VARIABLES, loss=loss, batches=BATCHES)
    for i, values in enumerate(scores.values()):
        for c, value in enumerate(values):
            less = tuple(k - {c} if g == i else k for g, k in enumerate(whole))
            rise = numpy_loss(less) - numpy_loss(whole)
            assert value == pytest.approx(rise, rel=1e-3, abs=1e-5)


def separable(seed, widths=(5, 3)):
    """A linear network of two branches whose channels add independent risks.

    Orthonormal inputs and first kernels: cutting channel c adds ||second[c]||^2 over
    the number of outputs to the mean squared error, whatever else is cut.
    """
    rng = np.random.default_rng(seed)
    inputs, outputs = (6, 9), 2

    def orthonormal(n, m):
        return np.linalg.qr(rng.normal(size=(n, m)))[0]

    variables = {
        name: {
            "first": jnp.asarray(orthonormal(n, c), jnp.float32),
            "second": jnp.asarray(rng.normal(size=(c, outputs)), jnp.float32),
        }
        for name, n, c in zip("ab", inputs, widths)
    }
    x = np.sqrt(20) * orthonormal(20, sum(inputs))
    x = np.split(x.astype(np.float32), [inputs[0]], axis=1)

    def apply(variables, a, b):
        return sum(
            x @ variables[n]["first"] @ variables[n]["second"]
            for n, x in zip("ab", (a, b))
        )

    graph = jp.trace(apply, variables, *x)
    target = apply(variables, *x)

    def error(variables, batch):
        return jnp.mean((apply(variables, *batch) - target) ** 2)

    return graph, variables, error, x


def test_where_risks_are_separable_the_path_is_the_best_of_all_keeps():
    graph, variables, error, x = separable(0)
    names, sizes = list(graph.groups), [g.size for g in graph.groups.values()]
    assert sorted(sizes) == [3, 5]
    path = prune_path(
        graph, variables, error, [x], criterion=measured(), measured=True, block=0
    )
    choices = [
        [np.array(k) for k in itertools.product([False, True], repeat=n) if any(k)]
        for n in sizes
    ]
    keeps = [dict(zip(names, pair)) for pair in itertools.product(*choices)]
    assert len(keeps) == 31 * 7
    stacked = {n: np.stack([k[n] for k in keeps]) for n in names}
    risks = jax.jit(jax.vmap(lambda keep: error(jp.mask(graph, keep, variables), x)))(
        stacked
    )
    risks = np.asarray(risks, np.float64)
    dense = jp.cost(graph).flops
    costs = np.array([jp.cost(graph, k).flops for k in keeps]) / dense
    for one, two in itertools.pairwise(path.steps):
        if two.alpha - one.alpha < 1e-6:
            continue
        # Between two critical alphas the step minimises the cost complexity.
        alpha = (one.alpha + two.alpha) / 2
        mine = one.risk + alpha * one.cost.flops / dense
        assert mine == pytest.approx((risks + alpha * costs).min(), abs=1e-5)
    for step in path.steps:
        # No cheaper keep has less risk: each step is on the frontier's lower hull.
        cheaper = costs <= step.cost.flops / dense + 1e-9
        hull = risks[cheaper].min()
        assert step.risk >= hull - 1e-5
    # CART's critical alphas: the slopes of the lower hull of (cost, least risk).
    corners = [0]
    order = np.lexsort((risks, -costs))
    points = list(zip(costs[order], risks[order]))
    slopes = []
    while True:
        c, r = points[corners[-1]]
        further = [
            ((r2 - r) / (c - c2), -c + c2, i)
            for i, (c2, r2) in enumerate(points)
            if c2 < c - 1e-9
        ]
        if not further:
            break
        slope, _, best = min(further)
        slopes.append(slope)
        corners.append(best)
    alphas = np.array([s.alpha for s in path.steps[1:]])
    gaps = np.abs(alphas[:, None] - np.array(slopes))
    assert len(slopes) > 4
    assert gaps.min(axis=0).max() < 1e-4 and gaps.min(axis=1).max() < 1e-4


@settings(max_examples=5, deadline=None)
@given(
    toygraphs.chains(max_layers=3, max_width=9),
    st.sampled_from([0.0, 0.1, 0.4]),
    st.integers(1, 3),
    st.booleans(),
    st.integers(0, 99),
)
def test_every_path_is_nested_and_its_alphas_never_fall(
    graph, block, multiple_of, measure, seed
):
    variables = toygraphs.variables(graph, seed)
    first = graph.leaves[1].shape[0]
    x = np.random.default_rng(seed).normal(size=(4, first)).astype(np.float32)
    path = prune_path(
        graph,
        variables,
        lambda v, b: jnp.mean(toygraphs.apply(v, b) ** 2),
        [x],
        block=block,
        multiple_of=multiple_of,
        measured=measure,
        criterion=jp.random(),
        key=jax.random.key(seed),
    )
    for one, two in itertools.pairwise(path.steps):
        assert 0 <= one.alpha <= two.alpha
        assert two.cost.flops < one.cost.flops
        assert all((one.keep[n] | ~two.keep[n]).all() for n in graph.groups)
    for name, group in graph.groups.items():
        least = multiple_of if group.size > multiple_of else group.size
        assert path.steps[-1].keep[name].sum() == least


def test_a_unit_that_breaks_the_network_stays():
    """Channel 2 of l0 divides: without it the loss is infinite."""

    def broken(variables, batch):
        weight = variables["params"]["l0"]["bias"][2]
        return loss(variables, batch) + 1 / weight**2

    with pytest.raises(GraphError, match="'l0'.*not finite, the first is channel 2"):
        prune_path(GRAPH, VARIABLES, broken, BATCHES, criterion=measured())
    # Ranked as the weakest, it would be the first to go.
    ranks = stateless(
        lambda scores, _: {n: abs(jnp.arange(len(s)) - 2.0) for n, s in scores.items()}
    )
    path = prune_path(
        GRAPH, VARIABLES, broken, BATCHES, criterion=ranks, measured=True, block=0
    )
    assert path.steps[-1].keep["l0"].all()  # nothing in front of it can go
    assert path.steps[-1].keep["l1"].sum() == 1
    assert all(np.isfinite(s.risk) and np.isfinite(s.alpha) for s in path.steps)


def test_a_network_whose_loss_is_not_finite_measures_nothing():
    with pytest.raises(DataError, match="the loss on batches is inf"):
        prune_path(
            GRAPH,
            VARIABLES,
            lambda v, b: loss(v, b) + jnp.inf,
            BATCHES,
            risk=loss,
            criterion=jp.magnitude(),
            measured=True,
        )
