# SPDX-License-Identifier: Apache-2.0
"""The penalty, its proximal step and gates, against float64 NumPy and optimality."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
import toygraphs

import jaxprune
from jaxprune.base import ConfigError, GraphError
from jaxprune.gates import gate, proximal_gates
from jaxprune.pricing import flops_weights
from jaxprune.sparsity import dead, group_lasso, proximal

SINGLE = toygraphs.chain(6)
GRAPH = toygraphs.chain(5, 4)
VARIABLES = toygraphs.variables(GRAPH)


def zeros(tree):
    return jax.tree.map(jnp.zeros_like, tree)


def after(tx, params, updates=None, state=None):
    """What apply_updates makes of one update, under jit."""

    @jax.jit
    def step(params, updates, state):
        updates, state = tx.update(updates, state, params)
        return optax.apply_updates(params, updates)

    updates = zeros(params) if updates is None else updates
    return step(params, updates, tx.init(params) if state is None else state)


def blocks_of(graph, tree, name):
    """theta[g]: float64[C, n]."""
    size = graph.groups[name].size
    return np.stack([toygraphs.of(tree, graph, name, c) for c in range(size)])


def test_group_lasso_sums_weighted_norms():
    # theta of l0 has 3 + 1 + 4 entries a channel, of l1 5 + 1 + 2.
    expected = sum(
        np.sqrt(8) * np.linalg.norm(blocks_of(GRAPH, VARIABLES, n), axis=1).sum()
        for n in GRAPH.groups
    )
    np.testing.assert_allclose(group_lasso(GRAPH, VARIABLES), expected, rtol=1e-6)
    own = {"l0": 2.0, "l1": np.arange(4.0)}
    expected = sum(
        np.sum(own[n] * np.linalg.norm(blocks_of(GRAPH, VARIABLES, n), axis=1))
        for n in own
    )
    np.testing.assert_allclose(group_lasso(GRAPH, VARIABLES, own), expected, rtol=1e-6)


def test_group_lasso_of_the_makers_alone():
    params = VARIABLES["params"]
    expected = 0.0
    for n in GRAPH.groups:
        both = np.concatenate([params[n]["kernel"], params[n]["bias"][None]])
        expected += np.sqrt(len(both)) * np.linalg.norm(both, axis=0).sum()
    value = group_lasso(GRAPH, VARIABLES["params"], roles=("out",))
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_the_gradient_is_the_unit_vector_and_zero_at_zero():
    keep = SINGLE.full()
    keep["l0"][2] = False
    variables = jaxprune.mask(SINGLE, keep, toygraphs.variables(SINGLE))
    gradient = jax.grad(lambda v: group_lasso(SINGLE, v))(variables)
    theta = blocks_of(SINGLE, variables, "l0")
    norms = np.linalg.norm(theta, axis=1, keepdims=True)
    expected = np.sqrt(6) * theta / np.where(norms, norms, 1)
    np.testing.assert_allclose(blocks_of(SINGLE, gradient, "l0"), expected, rtol=1e-5)


def test_flops_weights_by_hand():
    # 3 -> 5 -> 4 -> 20: a channel of l0 costs 3 + 4, one of l1 5 + 20 multiply-adds.
    graph = toygraphs.chain(5, 4, outputs=20)
    weights = flops_weights(graph)
    mean = (5 * 7 + 4 * 25) / 9
    np.testing.assert_allclose(weights["l0"], np.sqrt(8) * 7 / mean)
    np.testing.assert_allclose(weights["l1"], np.sqrt(26) * 25 / mean)


def side_of(tree, roles):
    """theta of SINGLE's l0, float64[6, n]: what makes a channel, what reads it."""
    makes, reads = tree["params"]["l0"], tree["params"]["l1"]["kernel"]
    sides = {"out": [np.transpose(makes["kernel"]), makes["bias"][:, None]]}
    sides["in"] = [reads]
    parts = [part for role in roles for part in sides[role]]
    return np.concatenate(parts, axis=1).astype(np.float64)


@pytest.mark.parametrize("roles", [("out", "in"), ("out",), ("in",)])
@pytest.mark.parametrize("strength", [0.0, 0.1, 0.5, 1.2])
def test_proximal_solves_its_problem(strength, roles):
    """x minimises |x - v|^2 / 2 + s sum w |x_c|: the subgradient conditions.

    Of all that belongs to a channel, of its filter, or of what reads it (Wen et al.).
    """
    variables = toygraphs.variables(SINGLE)
    weights = {"l0": np.array([0.2, 1, 1, 1, 2, 3])}
    updates = toygraphs.variables(SINGLE, seed=1)
    tx = proximal(SINGLE, strength, weights, roles=roles)
    new = after(tx, variables, updates)
    arrived = jax.tree.map(lambda p, u: p + u, variables, updates)
    v, x = side_of(arrived, roles), side_of(new, roles)
    for role in {"out", "in"} - set(roles):
        np.testing.assert_array_equal(side_of(new, [role]), side_of(arrived, [role]))
    alive = np.linalg.norm(x, axis=1) > 0
    np.testing.assert_array_equal(dead(SINGLE, new, roles=roles)["l0"], alive)
    for c in range(6):
        norm, threshold = np.linalg.norm(x[c]), strength * weights["l0"][c]
        if norm:
            residual = x[c] - v[c] + threshold * x[c] / norm
            # What float32 rounds of x turns a short one the more.
            atol = 2e-6 * max(1, np.linalg.norm(v[c]) / norm)
            np.testing.assert_allclose(residual, 0, atol=atol)
        else:
            assert np.linalg.norm(v[c]) <= threshold
    np.testing.assert_array_equal(  # what belongs to no channel takes its plain update
        new["params"]["l1"]["bias"], arrived["params"]["l1"]["bias"]
    )


def test_a_channel_without_readers_may_still_be_seen():
    """As the docstring says: by a norm over the channels, here."""

    def apply(variables, x):
        x = x @ variables["a"]
        return (x / jnp.linalg.norm(x, axis=1, keepdims=True)) @ variables["b"]

    rng = np.random.default_rng(0)
    variables = {"a": rng.normal(size=(3, 4)), "b": rng.normal(size=(4, 2))}
    variables = jax.tree.map(jnp.float32, variables)
    variables["b"] = variables["b"].at[2].set(0)
    x = jnp.asarray(rng.normal(size=(5, 3)), "f")
    graph = jaxprune.trace(apply, variables, x)
    keep = dead(graph, variables, roles=("in",))
    (name,) = graph.groups
    np.testing.assert_array_equal(keep[name], [True, True, False, True])
    masked = apply(jaxprune.mask(graph, keep, variables), x)
    assert np.abs(masked - apply(variables, x)).max() > 0.01
    variables["a"] = variables["a"].at[:, 2].set(0)
    keep = dead(graph, variables, roles=("out",))
    masked = apply(jaxprune.mask(graph, keep, variables), x)
    np.testing.assert_allclose(masked, apply(variables, x), rtol=1e-6)


def test_by_default_a_side_weighs_its_own_entries():
    """sqrt(3 + 1) for a filter and its bias, sqrt(2) for what reads."""
    variables = toygraphs.variables(SINGLE)
    for role, count in (("out", 4), ("in", 2)):
        new = side_of(after(proximal(SINGLE, 0.2, roles=(role,)), variables), [role])
        v = side_of(variables, [role])
        norms = np.linalg.norm(v, axis=1, keepdims=True)
        factors = np.maximum(0, 1 - 0.2 * np.sqrt(count) / norms)
        np.testing.assert_allclose(new, factors * v, atol=1e-6)


def test_channels_within_a_block_by_two_steps_in_a_row():
    """Jenatton et al., 2011: of nested groups, the inner ones first."""
    variables = toygraphs.variables(SINGLE)
    weights, whole = {"l0": np.array([0.2, 1, 1, 1, 2, 3])}, {"l0": 1.0}
    tx = optax.chain(
        proximal(SINGLE, 0.3, weights),
        proximal(SINGLE, 0.4, whole, blocks={"branch": ["l0"]}),
    )
    found = blocks_of(SINGLE, after(tx, variables), "l0")
    v = blocks_of(SINGLE, variables, "l0")

    def objective(x):
        x = x.reshape(v.shape)
        penalty = 0.3 * np.sum(weights["l0"] * np.linalg.norm(x, axis=1))
        # A block weighs sqrt(sum w^2) over its six channels.
        penalty += 0.4 * np.sqrt(6) * np.linalg.norm(x)
        return np.sum((x - v) ** 2) / 2 + penalty

    best = scipy.optimize.minimize(objective, v.ravel() / 2, tol=1e-12)
    np.testing.assert_allclose(found, best.x.reshape(v.shape), atol=2e-3)
    assert objective(found.ravel()) <= best.fun + 1e-6
    assert (found == 0).all(axis=1).any() and found.any()


def test_proximal_agrees_with_a_general_minimiser():
    variables = toygraphs.variables(toygraphs.chain(1))
    graph, strength = toygraphs.chain(1), 0.3
    v = blocks_of(graph, variables, "l0")[0]

    def objective(x):
        return np.sum((x - v) ** 2) / 2 + strength * np.sqrt(len(v)) * np.linalg.norm(x)

    best = scipy.optimize.minimize(objective, v, tol=1e-12).x
    new = after(proximal(graph, strength), variables)
    np.testing.assert_allclose(blocks_of(graph, new, "l0")[0], best, atol=1e-4)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("mu", [0.0, 0.5, 0.9])
def test_with_momentum_it_rests_where_the_penalty_and_the_loss_balance(mu, nesterov):
    """|x - goal|^2 / 2 + lambda w |x|: the goal, shrunk by lambda w; s has 1 - mu."""
    lr, strength, weight = 0.01, 0.3, np.sqrt(6)  # 3 + 1 + 2 entries a channel
    variables, goal = (toygraphs.variables(SINGLE, seed) for seed in (0, 1))
    tx = optax.chain(
        optax.sgd(lr, mu or None, nesterov), proximal(SINGLE, lr * strength / (1 - mu))
    )

    def step(_, carry):
        tree, state = carry
        gradient = jax.tree.map(lambda x, g: x - g, tree, goal)
        updates, state = tx.update(gradient, state, tree)
        return optax.apply_updates(tree, updates), state

    run = jax.jit(lambda carry: jax.lax.fori_loop(0, 2000, step, carry))
    found = blocks_of(SINGLE, run((variables, tx.init(variables)))[0], "l0")
    wanted = blocks_of(SINGLE, goal, "l0")
    norms = np.linalg.norm(wanted, axis=1, keepdims=True)
    factors = np.maximum(0, 1 - strength * weight / norms)
    np.testing.assert_allclose(found, factors * wanted, atol=1e-4)
    assert (factors > 0.1).any()


def reference(graph, tree, strength):
    """The docstring's equation, entry by entry, in float64."""
    out = jax.tree.map(lambda x: np.array(x, np.float64), tree)
    for name, group in graph.groups.items():
        theta = blocks_of(graph, tree, name)
        norms = np.linalg.norm(theta, axis=1)
        factors = np.maximum(0, 1 - strength * np.sqrt(theta.shape[1]) / norms)
        for slot in group.slots:
            x = out["params"][slot.path[1]][slot.path[2]]
            x *= np.expand_dims(factors, tuple(set(range(x.ndim)) - {slot.axis}))
    return out


@pytest.mark.parametrize("seed", range(3))
def test_overlapping_blocks_multiply_factors_of_one_point(seed):
    variables = toygraphs.variables(GRAPH, seed)
    new = after(proximal(GRAPH, 0.9), variables)
    chex.assert_trees_all_close(new, reference(GRAPH, variables, 0.9), atol=1e-5)
    alone = after(proximal(GRAPH, 0.9), variables["params"])
    chex.assert_trees_all_equal(alone, new["params"])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("optimiser", [optax.adam(0.1), optax.sgd(0.1, momentum=0.9)])
def test_training_reaches_exact_zeros_that_dead_reads(dtype, optimiser):
    chex.clear_trace_counter()
    variables = jax.tree.map(lambda x: x.astype(dtype), VARIABLES)
    tx = optax.chain(optimiser, proximal(GRAPH, 0.05))
    inputs = jax.random.normal(jax.random.key(0), (16, 3), dtype)

    def loss(variables):
        return jnp.mean((toygraphs.apply(variables, inputs) - inputs[:, :2]) ** 2)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(variables, state):
        updates, state = tx.update(jax.grad(loss)(variables), state, variables)
        return optax.apply_updates(variables, updates), state

    state = tx.init(variables)
    for _ in range(60):
        variables, state = step(variables, state)
    keep = dead(GRAPH, variables)
    cut = sum((~k).sum() for k in keep.values())
    assert 0 < cut < GRAPH.channels
    chex.assert_trees_all_equal(jaxprune.mask(GRAPH, keep, variables), variables)
    chex.assert_trees_all_equal(keep, dead(GRAPH, variables["params"]))
    assert all(x.dtype == dtype for x in jax.tree.leaves(variables))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        for i, width in enumerate((12, 8, 8)):
            y = nn.Conv(width, (3, 3), name=f"conv{i}")(x)
            y = nn.BatchNorm(use_running_average=not train, name=f"bn{i}")(y)
            x = nn.relu(y + x if i == 2 else y)
        return nn.Conv(2, (1, 1), name="head")(x)


def test_cutting_the_dead_channels_of_a_trained_network_changes_nothing():
    net, images = Net(), jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    variables = toygraphs.init(net, images)
    graph = jaxprune.trace(net.apply, variables, images)
    tx = optax.chain(optax.adam(0.02), proximal(graph, 0.01))

    @jax.jit
    def step(variables, state):
        def loss(params):
            tree = {**variables, "params": params}
            out, new = net.apply(tree, images, train=True, mutable=["batch_stats"])
            return jnp.mean((out - images[..., :2]) ** 2), new

        params = variables["params"]
        gradients, new = jax.grad(loss, has_aux=True)(params)
        updates, state = tx.update(gradients, state, params)
        return {"params": optax.apply_updates(params, updates), **new}, state

    state = tx.init(variables["params"])
    for _ in range(50):
        variables, state = step(variables, state)
    keep = dead(graph, variables)
    assert sum(k.sum() for k in keep.values()) < graph.channels
    small = jaxprune.shrink(graph, keep, variables)
    np.testing.assert_allclose(
        jax.jit(jaxprune.slim(net.apply, graph, keep))(small, images),
        jax.jit(net.apply)(variables, images),
        atol=1e-5,
    )


def test_a_group_keeps_its_largest_channel_as_it_is():
    variables = toygraphs.variables(SINGLE)
    new = after(proximal(SINGLE, 100.0), variables)
    theta, left = blocks_of(SINGLE, variables, "l0"), blocks_of(SINGLE, new, "l0")
    largest = np.linalg.norm(theta, axis=1).argmax()
    np.testing.assert_array_equal(left[largest], theta[largest])
    assert not np.delete(left, largest, axis=0).any()
    np.testing.assert_array_equal(np.flatnonzero(dead(SINGLE, new)["l0"]), [largest])


def test_a_dead_channel_stays_dead_and_strength_zero_changes_nothing():
    keep = SINGLE.full()
    keep["l0"][:3] = False
    variables = jaxprune.mask(SINGLE, keep, toygraphs.variables(SINGLE))
    new = after(proximal(SINGLE, 0.1), variables)
    np.testing.assert_array_equal(dead(SINGLE, new)["l0"], keep["l0"])
    chex.assert_trees_all_equal(after(proximal(GRAPH, 0.0), VARIABLES), VARIABLES)


def test_dead_never_empties_a_group():
    keep = dead(GRAPH, zeros(VARIABLES))
    np.testing.assert_array_equal(keep["l0"], [1, 0, 0, 0, 0])
    # Too small to be squared in float32, but not zero.
    tiny = jax.tree.map(lambda x: jnp.full_like(x, 1e-30), VARIABLES)
    assert all(k.all() for k in dead(GRAPH, tiny).values())


def test_a_group_without_trained_weights_is_not_dead():
    graph, variables, _ = toygraphs.frozen_backbone()
    first, second = graph.groups
    keep = dead(graph, variables)
    assert keep[first].all() and keep[second].all()
    # The second one has a trained reader, but no trained maker.
    assert all(k.all() for k in dead(graph, variables, roles=("out",)).values())


@pytest.mark.parametrize("make", [lambda s: proximal(SINGLE, s), proximal_gates])
def test_strength_follows_a_schedule_of_the_step(make):
    schedule = optax.linear_schedule(0.0, 0.3, 3)
    gates = make is proximal_gates
    point = {"l0": jnp.arange(1.0, 7)} if gates else toygraphs.variables(SINGLE)
    state = make(schedule).init(point)
    for step in range(5):
        moving, _ = make(schedule).update(zeros(point), state, point)
        fixed, _ = make(min(step, 3) * 0.1).update(zeros(point), state, point)
        chex.assert_trees_all_close(moving, fixed, atol=1e-6)
        _, state = make(schedule).update(zeros(point), state, point)


def test_untrained_collections_are_left_alone():
    statistics = {"l0": {"mean": jnp.ones(6)}}
    variables = {**toygraphs.variables(SINGLE), "batch_stats": statistics}
    new = after(proximal(SINGLE, 100.0), variables)
    chex.assert_trees_all_equal(new["batch_stats"], statistics)


def test_blocks_die_as_one_and_count_once():
    """Norms and weights of a block by hand; the others go on by themselves."""
    graph = toygraphs.chain(5, 4, 3)
    variables, blocks = toygraphs.variables(graph), {"deep": ["l0", "l2"]}
    theta = {n: blocks_of(graph, variables, n) for n in graph.groups}
    joint = np.concatenate([theta["l0"].ravel(), theta["l2"].ravel()])
    # Channels of l0 hold 3 + 1 + 4 entries, of l1 5 + 1 + 3, of l2 4 + 1 + 2.
    weight = np.sqrt(5 * 8 + 3 * 7)
    alone = 3 * np.linalg.norm(theta["l1"], axis=1)
    expected = weight * np.linalg.norm(joint) + alone.sum()
    found = group_lasso(graph, variables, blocks=blocks)
    np.testing.assert_allclose(found, expected, rtol=1e-6)

    new = after(proximal(graph, 0.2, blocks=blocks), variables)["params"]
    factor = 1 - 0.2 * weight / np.linalg.norm(joint)
    np.testing.assert_allclose(
        new["l0"]["kernel"], factor * variables["params"]["l0"]["kernel"], rtol=1e-5
    )
    np.testing.assert_allclose(
        new["l1"]["bias"],
        np.maximum(0, 1 - 0.6 / (alone / 3)) * variables["params"]["l1"]["bias"],
        rtol=1e-5,
    )
    # All of the branch goes at one strength; what stays is a channel of zeros.
    own = {"l0": 1.0, "l1": 0.0, "l2": 1.0}
    gone = after(proximal(graph, 100.0, own, blocks=blocks), variables)
    assert not gone["params"]["l0"]["kernel"].any()
    assert not gone["params"]["l2"]["kernel"].any()
    keep = dead(graph, gone)
    assert [int(k.sum()) for k in keep.values()] == [1, 4, 1]


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.Dense(6, name="stem")(x)
        h = h + nn.Dense(6, name="b")(nn.relu(nn.Dense(5, name="a")(h)))
        return nn.Dense(2, name="head")(h)


def test_a_branch_that_dies_leaves_its_shortcut():
    net, x = Residual(), jax.random.normal(jax.random.key(0), (4, 3))
    variables = toygraphs.init(net, x)
    variables["params"]["b"]["bias"] = jnp.arange(6.0)
    graph = jaxprune.trace(net.apply, variables, x)
    weights = {n: float(n == "a") for n in graph.groups}
    assert sorted(weights.values()) == [0, 1]
    step = proximal(graph, 100.0, weights, blocks={"branch": ["a"]})
    new = after(step, variables)
    p = variables["params"]
    stream = x @ p["stem"]["kernel"] + p["stem"]["bias"] + jnp.arange(6.0)
    wanted = stream @ p["head"]["kernel"] + p["head"]["bias"]
    keep = dead(graph, new)
    assert keep["a"].sum() == 1 and all(k.all() for n, k in keep.items() if n != "a")
    small = jaxprune.shrink(graph, keep, new)
    found = jaxprune.slim(net.apply, graph, keep)(small, x)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: proximal(GRAPH, -1.0), ConfigError, "strength=-1.0"),
        (lambda: proximal_gates(-1.0), ConfigError, "strength=-1.0"),
        (lambda: proximal(GRAPH, np.float32(-1)), ConfigError, "not negative"),
        (lambda: proximal(GRAPH, np.nan), ConfigError, "strength=nan"),
        (lambda: proximal(GRAPH, 1.0, roles=("outt",)), ConfigError, "'outt'"),
        (lambda: proximal(GRAPH, 1.0, roles="in"), ConfigError, "roles='in'"),
        (lambda: proximal(GRAPH, 1.0, roles=()), ConfigError, r"roles=\(\): \('out'"),
        (
            lambda: proximal(GRAPH, 0.1, 2.0),
            GraphError,
            "weights=2.0: say of which group",
        ),
        (
            lambda: group_lasso(GRAPH, VARIABLES, {"l0": 1.0, "l1": np.nan}),
            GraphError,
            "weights of group 'l1' are negative, infinite, or no numbers",
        ),
        (
            lambda: proximal(GRAPH, 0.1).update(VARIABLES, None),
            ConfigError,
            "needs the params",
        ),
        (
            lambda: proximal_gates(0.1).update({}, None),
            ConfigError,
            "needs the gates",
        ),
        (
            lambda: group_lasso(GRAPH, VARIABLES, {"l0": 1.0}),
            GraphError,
            "weights lack group 'l1'",
        ),
        (
            lambda: proximal(GRAPH, 0.1, {"l0": 1.0, "l1": np.ones(3)}),
            GraphError,
            r"'l1' has 4 channels, its weights have shape \(3,\)",
        ),
        (
            lambda: proximal(GRAPH, 0.1, blocks={"b": ["l0", "l7"]}),
            GraphError,
            "block 'b' names group 'l7'",
        ),
        (
            lambda: proximal(GRAPH, 0.1, blocks={"b": ["l0"], "c": ["l0"]}),
            GraphError,
            "'l0' is in the blocks 'b' and 'c'",
        ),
        (
            lambda: gate(GRAPH, {"l5": np.ones(3)}, VARIABLES),
            GraphError,
            "gates name group 'l5'",
        ),
        (
            lambda: after(proximal(GRAPH, 0.1), toygraphs.variables(SINGLE)),
            GraphError,
            "l0/kernel|l0/bias",
        ),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()
