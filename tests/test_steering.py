# SPDX-License-Identifier: Apache-2.0
"""Lambda is steered to a cost: the law by hand, the landing, a network that trains."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toygraphs

import jaxprune as jp
from jaxprune import steering
from jaxprune.base import BOTH, BudgetError, ConfigError
from jaxprune.steering import SteeredState

GRAPH = toygraphs.chain(5, 4)
WIDE = toygraphs.chain(24, 16)
INPUTS = jax.random.normal(jax.random.key(0), (64, 3))


def fraction(keep):
    """Of WIDE's dense FLOPs, by multiply-adds: 3 a + a b + 2 b."""
    a, b = (np.sum(k) for k in keep.values())
    return (3 * a + a * b + 2 * b) / (3 * 24 + 24 * 16 + 2 * 16)


def trained(tx, variables, steps):
    """Variables, state and every step's cost, of a small regression."""

    def loss(variables):
        return jnp.mean((toygraphs.apply(variables, INPUTS) - INPUTS[:, :2]) ** 2)

    def step(carry, _):
        variables, state = carry
        updates, state = tx.update(jax.grad(loss)(variables), state, variables)
        return (optax.apply_updates(variables, updates), state), state[-1].cost

    @jax.jit
    def run(variables):
        return jax.lax.scan(step, (variables, tx.init(variables)), None, steps)

    (variables, state), costs = run(variables)
    return variables, state, np.asarray(costs)


@pytest.mark.parametrize("power", [1, 4])
def test_it_lands_where_strengths_of_death_lie_decades_apart(power):
    """No step leaves less than the plan, but for a channel's cost."""
    rng = np.random.default_rng(0)
    scores = {n: 10 ** -rng.uniform(0, 6, g.size) for n, g in WIDE.groups.items()}
    weights = jp.adaptive(WIDE, scores, jp.flops_weights(WIDE), power=power)
    plan = optax.linear_schedule(1.0, 0.4, 100)
    tx = jp.proximal(WIDE, jp.steer(WIDE, plan, rate=0.1, start=0.1), weights)

    @jax.jit
    def step(variables, state):
        none = jax.tree.map(jnp.zeros_like, variables)
        updates, state = tx.update(none, state, variables)
        return optax.apply_updates(variables, updates), state

    variables, costs = toygraphs.variables(WIDE), []
    state = tx.init(variables)
    for _ in range(60):
        variables, state = step(variables, state)
        costs.append(fraction(jp.dead(WIDE, variables)))
    assert costs[-1] < 0.7
    # A channel of l0 carries 3 + 16 of 488 multiply-adds, one of l1 24 + 2.
    assert all(c > 1 - 0.6 * t / 100 - 26 / 488 for t, c in enumerate(costs))


@pytest.mark.parametrize(("start", "metric"), [(1e-3, False), (1.0, True)])
def test_it_reaches_the_target_and_holds_it(start, metric):
    """From a lambda far too small and one far too large, behind Adam."""
    plan = optax.linear_schedule(1.0, 0.35, 200)
    strength = jp.steer(WIDE, plan, rate=0.01, start=start, gain=0.05)
    if metric:
        adam = optax.adam(0.01)
        tx = jp.preconditioned(adam, WIDE, strength, steps=jp.adam_steps())
    else:
        tx = optax.chain(optax.adam(0.01), jp.proximal(WIDE, strength))
    variables, state, costs = trained(tx, toygraphs.variables(WIDE), 400)
    keep = jp.dead(WIDE, variables)
    # A channel of l0 carries 3 + 16 of 488 multiply-adds, one of l1 24 + 2.
    assert 0.35 - 26 / 488 < fraction(keep) <= 0.35 + 1e-6
    np.testing.assert_allclose(costs[-1], fraction(keep), rtol=1e-5)
    # It falls by degrees, and is held over the last quarter.
    assert costs[60] > 0.6 and (costs[300:] == costs[-1]).all()
    assert state[-1].steps == 400


@pytest.mark.parametrize("metric", [False, True])
@pytest.mark.parametrize(
    ("name", "roles"), [("sgd", BOTH), ("adam", BOTH), ("adam", ("in",))]
)
def test_it_is_held_for_thousands_of_steps(name, roles, metric):
    """Momentum revives the dead by less and less, until their squares underflow.

    With roles ('in',) what makes a dead channel lives, and revives it with every step.
    """
    tx = optax.adam(3e-3) if name == "adam" else optax.sgd(2e-3, momentum=0.9)
    rate = 3e-3 if name == "adam" else 0.02
    strength = jp.steer(WIDE, 0.5, rate=rate)
    if metric:
        steps = jp.adam_steps() if name == "adam" else ones
        tx = jp.preconditioned(tx, WIDE, strength, steps=steps, roles=roles)
    else:
        tx = optax.chain(tx, jp.proximal(WIDE, strength, roles=roles))
    variables, _, costs = trained(tx, toygraphs.variables(WIDE), 3000)
    met = np.argmax(costs <= 0.5)
    assert 0 < met < 1500 and costs[met:].max() <= 0.5 + 1e-6
    left = fraction(jp.dead(WIDE, variables, roles=roles))
    np.testing.assert_allclose(left, costs[-1], rtol=1e-5)


def ones(state, params):
    return jax.tree.map(jnp.ones_like, params)


def test_lambda_falls_while_the_plan_does():
    """Behind it, a strength of 0 is no sign that lambda is too large."""
    deaths = {"l0": jnp.zeros(5), "l1": jnp.array([9.0, 0, 0, 0])}
    plan = optax.linear_schedule(1.0, 0.5, 10)
    strength = jp.steer(GRAPH, plan, kind="channels", gain=0.3)
    for steps, factor in ((9, np.exp(-0.3)), (10, 1), (20, 1)):
        state = SteeredState(jnp.int32(steps), jnp.float32(1e-3), jnp.float32(1))
        s, state = strength.update(state, deaths)
        assert s == 0
        np.testing.assert_allclose(state.level, 1e-3 * factor, rtol=1e-6)


def test_the_law_by_hand():
    strength = jp.steer(GRAPH, 0.77, kind="channels", rate=0.1, start=2.0, gain=0.3)
    state = SteeredState(jnp.int32(7), jnp.float32(2), jnp.float32(1))
    deaths = {"l0": jnp.array([5.0, 0.1, 6, 7, 8]), "l1": jnp.array([9.0, 9, 9, 0.15])}
    s, state = strength.update(state, deaths)
    # 0.2 kills two of nine, which is not yet the target.
    np.testing.assert_allclose(s, 0.2, rtol=1e-6)
    np.testing.assert_allclose(state.cost, 7 / 9, rtol=1e-6)
    change = np.exp(0.3 * 20 * (7 / 9 / 0.77 - 1))
    np.testing.assert_allclose(state.level, 2 * change, rtol=1e-6)
    assert state.steps == 8


def test_it_lands_on_the_target():
    """lambda is far too large: no more channels die than must, the faintest ones."""
    strength = jp.steer(GRAPH, 0.5, kind="channels", start=1e12)
    deaths = {"l0": jnp.array([5.0, 0.1, 6, 7, 8]), "l1": jnp.array([9.0, 3, 4, 0.2])}
    s, state = strength.update(strength.init(), deaths)
    np.testing.assert_allclose(s, 5, rtol=1e-4)  # 0.1, 0.2, 3, 4 and 5 are dead
    assert s >= 5
    np.testing.assert_allclose(state.cost, 4 / 9, rtol=1e-6)
    # What is dead has a death at 0: the target is met, and nothing more is asked.
    alive = {n: jnp.where(d > 5, d, 0) for n, d in deaths.items()}
    s, state = strength.update(state, alive)
    assert s == 0
    np.testing.assert_allclose(state.cost, 4 / 9, rtol=1e-6)


def test_activation_bytes_are_steered_as_well():
    """Numbers that the layers write: 24 and 16 that may go, and 2 of the last."""
    variables = toygraphs.variables(WIDE)

    def left(kind):
        tx = jp.proximal(WIDE, jp.steer(WIDE, 0.6, kind=kind, start=1e6))

        @jax.jit
        def step(variables):
            still = jax.tree.map(jnp.zeros_like, variables)
            updates, state = tx.update(still, tx.init(variables), variables)
            return optax.apply_updates(variables, updates), state.cost

        shrunk, cost = step(variables)
        return sum(int(k.sum()) for k in jp.dead(WIDE, shrunk).values()) + 2, cost

    written, cost = left("bytes")
    assert written == 25  # of 42: the most that are 0.6 of them
    np.testing.assert_allclose(cost, written / 42, rtol=1e-6)
    assert left("flops")[0] > written


def test_gates_are_steered_too():
    gates = {"l0": jnp.linspace(0.1, 1, 24), "l1": jnp.linspace(0.2, 1, 16)}
    tx = jp.proximal_gates(jp.steer(WIDE, 0.5, start=10.0))
    still = jax.tree.map(jnp.zeros_like, gates)
    updates, _ = jax.jit(tx.update)(still, tx.init(gates), gates)
    keep = jp.gates_to_keep(optax.apply_updates(gates, updates))
    assert 0.5 - 26 / 488 < fraction(keep) <= 0.5


def test_accelerated_gates_are_steered_and_come_to_rest_at_the_target():
    gates = {"l0": jnp.linspace(0.1, 1, 24), "l1": jnp.linspace(0.2, 1, 16)}
    tx = jp.accelerated_gates(jp.steer(WIDE, 0.5, start=10.0))
    still = jax.tree.map(jnp.zeros_like, gates)

    @jax.jit
    def step(gates, state):
        updates, state = tx.update(still, state, gates)
        return optax.apply_updates(gates, updates), state

    state = tx.init(gates)
    for _ in range(40):
        gates, state = step(gates, state)
        # What converges is at the target from the first step on.
        now = fraction(jp.gates_to_keep(state.point))
        assert 0.5 - 26 / 488 < now <= 0.5
        np.testing.assert_allclose(state.proximal.cost, now, rtol=1e-5)
    # Momentum carries the gates past 0; they are at rest behind it.
    assert fraction(jp.gates_to_keep(gates)) == now


def test_it_stays_in_the_graph_and_is_traced_once():
    chex.clear_trace_counter()
    tx = jp.proximal(WIDE, jp.steer(WIDE, 0.5), jp.repriced(WIDE))
    variables = toygraphs.variables(WIDE)
    state, still = tx.init(variables), jax.tree.map(jnp.zeros_like, variables)
    step = jax.jit(chex.assert_max_traces(tx.update, n=1))
    for _ in range(2):
        _, state = step(still, state, variables)
    text = step.lower(still, state, variables).compile().as_text()
    for word in ("callback", "outfeed", "infeed", "send("):
        assert word not in text
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: jp.steer(GRAPH, 0.0), BudgetError, r"target=0.0.* in \(0, 1\]"),
        (lambda: jp.steer(GRAPH, 0.05, kind="channels"), BudgetError, "0.2223 of the"),
        (lambda: jp.steer(GRAPH, 0.5, start=0), ConfigError, "start=0: must be pos"),
        (lambda: jp.steer(GRAPH, 0.5, gain=-1), ConfigError, "gain=-1: must be pos"),
        (lambda: jp.steer(GRAPH, 0.5, kind="flop"), BudgetError, "no budget kind"),
        # Of 43 multiply-adds 3 a + a b + 2 b, those of a = 5 and b = 1 are 22.
        (
            lambda: jp.proximal(
                GRAPH, jp.steer(GRAPH, 0.5), {"l0": 0.0, "l1": np.ones(4)}
            ),
            BudgetError,
            "target=0.5: what cannot die of l0 costs more, 0.5117 of the dense flops",
        ),
        (
            lambda: jp.proximal_gates(
                jp.steer(GRAPH, 0.5), {"l0": np.zeros(5), "l1": 1.0}
            ),
            BudgetError,
            "what cannot die of l0",
        ),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_a_network_without_groups_is_left_as_it_is():
    params = {"head": {"kernel": jnp.ones((3, 2))}}
    graph = jp.trace(lambda v, x: x @ v["head"]["kernel"], params, INPUTS)
    assert not graph.groups and jp.adaptive(graph, {}) == {}
    tx = jp.proximal(graph, jp.steer(graph, 1.0), jp.repriced(graph))
    updates, state = tx.update(params, tx.init(params), params)
    chex.assert_trees_all_equal(updates, params)
    assert int(state.steps) == 1
    with pytest.raises(BudgetError, match="target=0.5: one channel a group costs more"):
        jp.steer(graph, 0.5)


def test_weights_that_leave_the_target_in_reach_are_accepted():
    for weights in ({"l0": 1.0, "l1": 0.0}, {"l0": np.eye(5)[0], "l1": 1.0}):
        jp.proximal(GRAPH, jp.steer(GRAPH, 0.82), weights)
        jp.proximal_gates(jp.steer(GRAPH, 0.82), weights)


def test_an_even_start_gets_there_if_nothing_resists():
    """Steps of `proximal` alone, as many as were counted on: not one less will do."""
    variables, steps = toygraphs.variables(WIDE), 40
    rate = optax.cosine_decay_schedule(0.1, 50)
    total = sum(float(rate(n)) for n in range(steps))
    # Kernels lie between groups, and what both shrink falls faster: one is penalised.
    weights = {**jp.flops_weights(WIDE), "l1": np.zeros(16)}
    deaths = jp.sparsity.deaths(WIDE, variables, weights)
    start = steering.even_start(WIDE, deaths, 0.5, total)
    tx = jp.proximal(WIDE, lambda n: start * rate(n), weights)
    state, zeros = tx.init(variables), jax.tree.map(jnp.zeros_like, variables)
    costs = []
    for _ in range(steps):
        updates, state = tx.update(zeros, state, variables)
        variables = optax.apply_updates(variables, updates)
        costs.append(fraction(jp.dead(WIDE, variables)))
    assert costs[-1] <= 0.5 < costs[-2]
    with pytest.raises(BudgetError, match="target=0.01"):
        steering.even_start(WIDE, deaths, 0.01, total)


def test_an_optimiser_can_be_made_within_jit():
    """As optax.inject_hyperparams does, and init under jit or eval_shape."""
    variables = toygraphs.variables(GRAPH)

    def make(rate, controller=None):
        controller = controller or jp.steer(GRAPH, 0.5, rate=rate)
        return optax.chain(optax.sgd(rate), jp.proximal(GRAPH, controller))

    for more in ({}, {"controller": jp.steer(GRAPH, 0.5, rate=0.01)}):
        tx = optax.inject_hyperparams(make, static_args="controller")(rate=0.01, **more)
        state, plain = tx.init(variables), make(0.01)
        found, _ = jax.jit(tx.update)(variables, state, variables)
        wanted, _ = jax.jit(plain.update)(variables, plain.init(variables), variables)
        chex.assert_trees_all_close(found, wanted, rtol=1e-6)
    assert jax.eval_shape(lambda v: make(0.01).init(v), variables)
    with pytest.raises(BudgetError, match="target=0.01"):
        jax.jit(lambda v: jp.proximal(GRAPH, jp.steer(GRAPH, 0.01)).init(v))(variables)


@pytest.mark.parametrize("name", ["gain", "start"])
def test_the_state_keeps_its_types(name):
    """As a carry of lax.scan must, also with 64 bits enabled and given."""
    value = np.float64({"gain": 0.02, "start": 1e-3}[name])
    with jax.enable_x64(True):
        controller = jp.steer(GRAPH, 0.5, **{name: value})
        deaths = {n: jnp.ones(g.size) for n, g in GRAPH.groups.items()}
        state = controller.init()
        _, after = controller.update(state, deaths)
        chex.assert_trees_all_equal_dtypes(state, after)


def test_deaths_are_the_least_strengths_that_make_zeros():
    variables, weights = toygraphs.variables(WIDE), jp.flops_weights(WIDE)
    deaths = jp.sparsity.deaths(WIDE, variables, weights)
    zeros = jax.tree.map(jnp.zeros_like, variables)
    every = np.concatenate(list(deaths.values()))
    for strength in np.quantile(every, [0.2, 0.7]) * [1 - 1e-4, 1 + 1e-4]:
        tx = jp.proximal(WIDE, float(strength), weights)
        updates, _ = tx.update(zeros, tx.init(variables), variables)
        keep = jp.dead(WIDE, optax.apply_updates(variables, updates))
        for name, at in deaths.items():
            lives = np.asarray(at) > strength
            lives |= ~lives.any() & (at == at.max())  # none is emptied
            np.testing.assert_array_equal(keep[name], lives)
