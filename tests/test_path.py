# SPDX-License-Identifier: Apache-2.0
"""The path against brute force, and the laws that every path obeys."""

import itertools
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toygraphs
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune
from jaxprune import budget as budgets
from jaxprune.base import BudgetError, ConfigError, DataError
from jaxprune.budget import channels, flops, params
from jaxprune.criteria import Criterion
from jaxprune.measures import magnitude, random, taylor
from jaxprune.path import prune_path


def additive(graph, values):
    """A loss that grows by values[g][c] when channel c of g is cut, whatever else is.

    Linear in the biases, one entry a channel, so that first-order Taylor is exact.
    """
    layers = {}
    for leaf in graph.leaves:
        _, layer, name = leaf.path
        value = values.get(layer) if name == "bias" else None
        filler = np.ones(leaf.shape) if value is None else value
        layers.setdefault(layer, {})[name] = jnp.asarray(filler, jnp.float32)
    total = float(sum(np.sum(v) for v in values.values()))

    def loss(variables, batch):
        found = sum(jnp.sum(variables["params"][n]["bias"]) for n in values)
        return total - found + 0 * batch

    return loss, {"params": layers}


def lower_hull(graph, values, kind):
    """Brute force: for every alpha, the least of risk + alpha * cost over all keeps."""
    sizes = [g.size for g in graph.groups.values()]
    dense = budgets.measure(graph, kind, np.array(sizes))
    best = []
    for kept in itertools.product(*[range(1, n + 1) for n in sizes]):
        # Of all keeps with these counts, the best keeps the largest values.
        risk = sum(
            np.sort(v)[: len(v) - k].sum() for v, k in zip(values.values(), kept)
        )
        best.append((risk, budgets.measure(graph, kind, np.array(kept)) / dense, kept))
    return lambda alpha: min(best, key=lambda b: (b[0] + alpha * b[1], b[1]))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(0, 10**6))
def test_every_minimiser_of_the_cost_complexity_lies_on_the_path(widths, seed):
    """With additive loss and cost, weakest-link pruning is exact, as for trees."""
    graph = toygraphs.chain(*widths)
    rng = np.random.default_rng(seed)
    values = {n: rng.random(g.size) for n, g in graph.groups.items()}
    loss, variables = additive(graph, values)
    path = prune_path(
        graph,
        variables,
        loss,
        [jnp.zeros(())],
        criterion=taylor(1),
        block=0,
        kind="channels",
    )
    minimiser = lower_hull(graph, values, "channels")
    for alpha in np.geomspace(1e-2, 1e2, 40):
        risk, _, kept = minimiser(alpha)
        on_path = [s for s in path.steps if s.alpha <= alpha][-1]
        assert on_path.risk == pytest.approx(risk, abs=1e-5)
        assert [k.sum() for k in on_path.keep.values()] == list(kept)


def test_the_cheapest_ratio_goes_first_by_hand():
    # A channel of l0 saves 2 (3 + 4) FLOPs, one of l1 2 (5 + 20), at the dense network.
    graph = toygraphs.chain(5, 4, outputs=20)
    values = {"l0": np.array([0.3, 1, 1, 1, 1]), "l1": np.array([1, 1, 0.9, 1.0])}
    loss, variables = additive(graph, values)
    path = prune_path(
        graph, variables, loss, [jnp.zeros(())], criterion=taylor(1), block=0
    )
    first, second = path.steps[1:3]
    np.testing.assert_array_equal(first.keep["l1"], [1, 1, 0, 1])
    assert first.alpha == pytest.approx(0.9 * 230 / 50, rel=1e-5)
    # Then l0 saves 2 (3 + 3): 0.3 / 12 is less than 1 / 50; alpha takes the maximum.
    np.testing.assert_array_equal(second.keep["l0"], [1, 1, 1, 1, 1])
    assert second.alpha == pytest.approx(230 / 50, rel=1e-5)


@pytest.mark.parametrize("over", [14, 10])
def test_what_is_saved_beyond_the_budget_counts_for_nothing_by_hand(over):
    # As above, but 14 or 10 of 230 FLOPs are over: a channel of l0 saves 14 for 0.3.
    graph = toygraphs.chain(5, 4, outputs=20)
    values = {"l0": np.array([0.3, 1, 1, 1, 1]), "l1": np.array([1, 1, 0.9, 1.0])}
    loss, variables = additive(graph, values)
    path = prune_path(
        graph,
        variables,
        loss,
        [jnp.zeros(())],
        criterion=taylor(1),
        until=flops((230 - over) / 230),
    )
    np.testing.assert_array_equal(path.steps[-1].keep["l0"], [0, 1, 1, 1, 1])
    assert len(path.steps) == 2 and path.steps[-1].cost.flops == 216
    assert path.steps[-1].alpha == pytest.approx(0.3 * 230 / over, rel=1e-5)


GRAPH = toygraphs.chain(8, 8)
VARIABLES = toygraphs.variables(GRAPH)


def squares(variables, batch):
    x, y = batch
    return jnp.mean((toygraphs.apply(variables, x) - y) ** 2, axis=-1)


def loss(variables, batch):
    return jnp.mean(squares(variables, batch))


def make_batches(n=3, size=8):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return [(draw(size, 3), draw(size, 2)) for _ in range(n)]


@pytest.mark.parametrize(
    ("block", "multiple_of"), [(0, 1), (0.05, 1), (0.2, 2), (0.1, 4)]
)
def test_laws_of_a_path(block, multiple_of):
    batches = make_batches()
    path = prune_path(
        GRAPH,
        VARIABLES,
        loss,
        batches,
        risk=squares,
        block=block,
        multiple_of=multiple_of,
    )
    steps = path.steps
    assert all(k.all() for k in steps[0].keep.values()) and steps[0].alpha == 0
    for one, two in itertools.pairwise(steps):
        assert two.alpha >= one.alpha
        assert two.cost.flops < one.cost.flops
        assert all((one.keep[n] | ~two.keep[n]).all() for n in GRAPH.groups)
    for step in steps[1:-1]:
        assert all(k.sum() % multiple_of == 0 for k in step.keep.values())
    assert all(k.sum() == multiple_of for k in steps[-1].keep.values())
    if block:
        saved = [
            (one.cost.flops - two.cost.flops) / steps[0].cost.flops
            for one, two in itertools.pairwise(steps)
        ]
        assert min(saved[:-1]) >= block
    step = steps[len(steps) // 2]
    risks = np.concatenate(
        [squares(jaxprune.mask(GRAPH, step.keep, VARIABLES), b) for b in batches]
    ).astype(np.float64)
    assert step.risk == pytest.approx(risks.mean(), rel=1e-5)
    assert step.stderr == pytest.approx(risks.std(ddof=1) / np.sqrt(24), rel=1e-4)
    assert step.cost == jaxprune.cost(GRAPH, step.keep)


def test_masks_are_runtime_values():
    chex.clear_trace_counter()
    once = chex.assert_max_traces(loss, n=1)
    risk = chex.assert_max_traces(lambda v, b: squares(v, b), n=1)
    seen = []
    path = prune_path(
        GRAPH,
        VARIABLES,
        once,
        iter(make_batches()),
        risk=risk,
        validation=iter(make_batches(2)),
        on_step=seen.append,
    )
    assert len(path.steps) > 5 and list(path.steps) == seen


def test_images_that_do_not_count_and_the_default_risk():
    batches = make_batches()

    def half(variables, batch):
        risks = squares(variables, batch)
        return jnp.where(jnp.arange(8) < 4, risks, jnp.nan), jnp.arange(8) < 4

    options = {"until": flops(0.9)}
    path = prune_path(GRAPH, VARIABLES, loss, batches, risk=half, **options)
    risks = np.concatenate([squares(VARIABLES, b)[:4] for b in batches])
    assert path.steps[0].risk == pytest.approx(risks.mean(), rel=1e-5)
    plain = prune_path(GRAPH, VARIABLES, loss, batches, **options)
    means = np.array([loss(VARIABLES, b) for b in batches], np.float64)
    assert plain.steps[0].risk == pytest.approx(means.mean(), rel=1e-5)
    expected = means.std(ddof=1) / np.sqrt(3)
    assert plain.steps[0].stderr == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", [None, "flops"])
@pytest.mark.parametrize("budget", [flops(0.5), params(0.7), channels(0.25)])
def test_until_is_met_by_the_last_step_alone(budget, kind):
    path = prune_path(
        GRAPH, VARIABLES, loss, make_batches(), until=budget, block=0.1, kind=kind
    )
    graph_cost = [
        budgets.measure(
            GRAPH, budget.kind, np.array([k.sum() for k in s.keep.values()])
        )
        for s in path.steps
    ]
    ratios = np.array(graph_cost) / graph_cost[0]
    assert ratios[-1] <= budget.ratio and (ratios[:-1] > budget.ratio).all()
    assert list(path) == list(path.steps) and path[-1] is path.steps[len(path) - 1]


@pytest.mark.parametrize("kind", [None, "flops"])
def test_a_wide_block_ends_where_until_is_met(kind):
    """Within the most that one channel carries, whichever cost the blocks count."""
    for budget in (params(0.5), channels(0.5)):
        path = prune_path(
            GRAPH, VARIABLES, loss, make_batches(1), until=budget, block=0.9, kind=kind
        )
        sizes = budgets.sizes(GRAPH)
        each = budgets.marginal(GRAPH, budget.kind).max()
        kept = np.array([k.sum() for k in path[-1].keep.values()])
        ratio = budgets.measure(GRAPH, budget.kind, kept) / budgets.measure(
            GRAPH, budget.kind, sizes
        )
        assert budget.ratio - each < ratio <= budget.ratio


@pytest.mark.parametrize("kind", ["flops", "bytes"])
def test_activation_bytes_stay_within_the_budget(kind):
    path = prune_path(
        GRAPH,
        VARIABLES,
        loss,
        make_batches(1),
        risk=squares,
        until=jaxprune.bytes(0.5),
        kind=kind,
        block=0.1,
    )
    # Three layers write their outputs, in float32: the last has two, none is cut.
    written = [4 * (sum(k.sum() for k in s.keep.values()) + 2) for s in path.steps]
    assert written[0] == 72 and written[-1] <= 36 < written[-2]
    assert [s.cost.activation_bytes for s in path.steps] == written
    for ratio in (1.0, 0.8, 0.65, 0.5):
        within = [s for s, n in zip(path.steps, written) if n <= ratio * 72]
        chosen = path.select(jaxprune.bytes(ratio))
        assert any(chosen is step for step in within)
        assert chosen.risk == min(step.risk for step in within)
    with pytest.raises(BudgetError, match=r"no step of the path meets bytes\(0.3\)"):
        path.select(jaxprune.bytes(0.3))


@pytest.mark.parametrize("criterion", [magnitude(2), random()])
def test_other_criteria_and_kinds_of_cost(criterion):
    path = prune_path(
        GRAPH,
        VARIABLES,
        loss,
        make_batches(1),
        criterion=criterion,
        kind="params",
        min_channels=3,
        key=jax.random.key(0),
    )
    assert all(k.sum() == 3 for k in path.steps[-1].keep.values())


class Steps:
    """Milliseconds that only change by whole fours of channels."""

    def at(self, groups, kept):
        del groups
        return (np.asarray(kept) // 4).sum(axis=-1).astype(float)


@pytest.mark.parametrize("block", [0.0, 0.3])
def test_a_cost_that_is_flat_between_steps_is_cut_to_the_next(block):
    until = budgets.Budget(Steps(), 0.5)
    path = prune_path(
        GRAPH,
        VARIABLES,
        loss,
        make_batches(1),
        until=until,
        kind=until.kind,
        block=block,
    )
    kept = [np.array([k.sum() for k in s.keep.values()]) for s in path.steps]
    costs = [until.kind.at((), k) for k in kept]
    assert costs[-1] <= 0.5 * costs[0] < costs[-2]
    assert (np.diff(costs) < 0).all()


def test_a_network_that_breaks_is_named():
    broken = Criterion(
        lambda graph, variables: (),
        lambda s, state, e: ({**s, "l1": s["l1"] + jnp.inf}, state),
    )
    with pytest.raises(jaxprune.base.GraphError, match="'l1'.*not finite"):
        prune_path(GRAPH, VARIABLES, loss, make_batches(1), criterion=broken)


def test_a_recovery_may_donate_what_it_is_given():
    """The caller's variables stay, also where nothing of them is masked."""
    given = jax.tree.map(jnp.copy, VARIABLES)
    still = jax.jit(lambda v: jax.tree.map(lambda x: x + 0, v), donate_argnums=0)

    def recover(step, variables):
        after = still(variables)
        for x in jax.tree.leaves(variables):
            if not x.is_deleted():  # where the device does not donate
                x.delete()
        return after

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prune_path(
            GRAPH, given, loss, make_batches(1), recover=recover, until=flops(0.5)
        )
    chex.assert_trees_all_equal(given, VARIABLES)


@pytest.mark.parametrize(
    "bad", [lambda v, b: squares(v, b), lambda v, b: (loss(v, b), {"more": b})]
)
def test_a_loss_that_is_not_one_number_is_told(bad):
    with pytest.raises(ConfigError, match=r"the loss returns arrays of shape.*\(8,"):
        prune_path(GRAPH, VARIABLES, bad, make_batches(1), risk=loss)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"block": 1.0}, ConfigError, "block=1.0"),
        ({"kind": "time"}, BudgetError, "'time'"),
        ({"multiple_of": 0}, ConfigError, "multiple_of=0"),
        ({"validation": []}, DataError, "validation is empty"),
        ({"batches": []}, DataError, "batches is empty"),
        (
            {"risk": lambda v, b: (squares(v, b), jnp.zeros(8, bool))},
            DataError,
            "counts no image",
        ),
        (
            {"risk": lambda v, b: jnp.stack([squares(v, b)] * 5, axis=1)},
            ConfigError,
            r"risk is of shape \(8, 5\); it is one number an image",
        ),
        (
            {"risk": lambda v, b: (squares(v, b),) * 4},
            ConfigError,
            "risk is a tuple of 4; it is",
        ),
        ({"until": 0.5}, BudgetError, r"budget=0.5: say of what, by jaxprune.flops"),
    ],
)
def test_errors(options, error, words):
    options = {"batches": make_batches(1), **options}
    batches = options.pop("batches")
    with pytest.raises(error, match=words):
        prune_path(GRAPH, VARIABLES, loss, batches, **options)
