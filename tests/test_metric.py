# SPDX-License-Identifier: Apache-2.0
"""The proximal step in a diagonal metric: optimality, other solvers, fixed points."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
import toygraphs

import jaxprune as jp
from jaxprune.base import ConfigError

SINGLE = toygraphs.chain(6)
GRAPH = toygraphs.chain(5, 4)


def scales(graph, spread, seed=5):
    """Positive steps per coordinate, over `spread` powers of ten."""
    tree = toygraphs.variables(graph, seed)
    rng = np.random.default_rng(seed)

    def of(x):
        return jnp.asarray(10 ** rng.uniform(-spread / 2, spread / 2, x.shape), "f")

    return jax.tree.map(of, tree)


def stepping(graph, weights=None, **kwargs):
    """(strength, variables, d) -> where a step with zero gradients leads; jitted."""

    @jax.jit
    def step(strength, variables, d):
        tx = jp.preconditioned(
            optax.sgd(1.0), graph, strength, weights, steps=lambda s, p: d, **kwargs
        )
        still = jax.tree.map(jnp.zeros_like, variables)
        updates, _ = tx.update(still, tx.init(variables), variables)
        return optax.apply_updates(variables, updates)

    return step


WEIGHTS = {"l0": np.array([0.2, 1, 1, 1, 2, 0])}
weighted, plain, whole = stepping(SINGLE, WEIGHTS), stepping(GRAPH), stepping(SINGLE)
branch = stepping(SINGLE, blocks={"branch": ["l0"]})


def rows(graph, tree, name):
    size = graph.groups[name].size
    return np.stack([toygraphs.of(tree, graph, name, c) for c in range(size)])


@pytest.mark.parametrize("spread", [0, 2, 6, 10])
@pytest.mark.parametrize("strength", [0.01, 0.3, 2.0])
def test_it_solves_its_problem(spread, strength):
    """P (x - v) + s w x / |x| = 0, or |P v| <= s w where x = 0; P = 1 / d."""
    variables, d = toygraphs.variables(SINGLE), scales(SINGLE, spread)
    new = weighted(strength, variables, d)
    v, x, d = (rows(SINGLE, t, "l0") for t in (variables, new, d))
    dead = 0
    for c in range(6):
        threshold, norm = strength * WEIGHTS["l0"][c], np.linalg.norm(x[c])
        if norm:
            # Beside what x = v + (x - v) rounds.
            left = (x[c] - v[c]) / d[c] + threshold * x[c] / norm
            size = np.abs(v[c]) * (1 / d[c] + threshold / norm)
            np.testing.assert_allclose(left / size, 0, atol=1e-6)
        else:
            dead += 1
            assert np.linalg.norm(v[c] / d[c]) <= threshold * (1 + 1e-5)
    assert dead < 6
    np.testing.assert_array_equal(x[5], v[5])  # of weight 0


def test_it_agrees_with_a_general_minimiser():
    variables, d = toygraphs.variables(SINGLE), scales(SINGLE, 1)
    v, p = rows(SINGLE, variables, "l0")[2], 1 / rows(SINGLE, d, "l0")[2]

    def objective(x):
        return np.sum(p * (x - v) ** 2) / 2 + 0.3 * np.sqrt(len(v)) * np.linalg.norm(x)

    best = scipy.optimize.minimize(objective, v, tol=1e-12).x
    new = whole(0.3, variables, d)
    np.testing.assert_allclose(rows(SINGLE, new, "l0")[2], best, atol=2e-4)


@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0, 50.0])
def test_equal_steps_are_the_plain_proximal_step(strength):
    """Overlapping blocks, the last channel of a group and all."""
    variables = toygraphs.variables(GRAPH)
    d = jax.tree.map(lambda x: jnp.full_like(x, 0.5), variables)
    new = plain(2 * strength, variables, d)
    tx = jp.proximal(GRAPH, strength)
    still = jax.tree.map(jnp.zeros_like, variables)
    updates, _ = tx.update(still, tx.init(variables), variables)
    chex.assert_trees_all_close(
        new, optax.apply_updates(variables, updates), rtol=1e-5, atol=1e-6
    )
    chex.assert_trees_all_equal(jp.dead(GRAPH, new), jp.dead(GRAPH, new["params"]))


def test_overlapping_blocks_multiply_the_factors_of_one_point():
    variables, d = toygraphs.variables(GRAPH), scales(GRAPH, 2)
    new = plain(0.2, variables, d)
    factors = {}
    for name in GRAPH.groups:
        v, steps = rows(GRAPH, variables, name), rows(GRAPH, d, name)
        t = 0.2 * np.sqrt(v.shape[1]) * steps
        factors[name] = [
            scipy.optimize.brentq(
                lambda r, a=a, b=b: np.sum((a / (r + b)) ** 2) - 1, 0, 1e3
            )
            if np.sum((a / b) ** 2) > 1
            else 0.0
            for a, b in zip(v, t, strict=True)
        ]
    kernel = np.asarray(variables["params"]["l1"]["kernel"], np.float64)
    each = np.asarray(d["params"]["l1"]["kernel"], np.float64)
    for name, axis, n in (("l0", 1, 8), ("l1", 0, 8)):
        r = np.expand_dims(factors[name], axis)
        kernel = kernel * r / (r + 0.2 * np.sqrt(n) * each)
    np.testing.assert_allclose(new["params"]["l1"]["kernel"], kernel, atol=1e-5)


def regression(seed=0):
    """A least-squares loss of `chain(6)`'s l0 alone, its curvatures far apart."""
    rng = np.random.default_rng(seed)
    graph = toygraphs.chain(6)
    start = toygraphs.variables(graph, 3)
    curve = jax.tree.map(
        lambda x: jnp.asarray(10 ** rng.uniform(-1, 1, x.shape), "f"), start
    )
    goal = toygraphs.variables(graph, 4)

    def loss(tree):
        terms = jax.tree.map(lambda x, g, c: c * (x - g) ** 2, tree, goal, curve)
        return 0.5 * sum(jnp.sum(t) for t in jax.tree.leaves(terms))

    return graph, start, loss, curve, goal


def optimum(graph, curve, goal, strength):
    """argmin of the separable problem, channel by channel, in float64."""
    g, c = rows(graph, goal, "l0"), rows(graph, curve, "l0")
    threshold = strength * np.sqrt(g.shape[1])
    out = np.zeros_like(g)
    for i in range(len(g)):
        if np.linalg.norm(c[i] * g[i]) > threshold:
            t = threshold / c[i]
            r = scipy.optimize.brentq(
                lambda r, i=i, t=t: np.sum((g[i] / (r + t)) ** 2) - 1, 0, 1e3
            )
            out[i] = g[i] * r / (r + t)
    return out


def test_behind_adam_it_rests_where_the_penalty_and_the_loss_balance():
    graph, start, loss, curve, goal = regression()
    pulls = rows(graph, curve, "l0") * rows(graph, goal, "l0")
    strength = np.median(np.linalg.norm(pulls, axis=1)) / np.sqrt(6)
    best = optimum(graph, curve, goal, strength)
    assert (np.abs(best).sum(1) == 0).sum() == 3
    rate = optax.cosine_decay_schedule(0.05, 600)

    def s(n):
        return strength * rate(n)

    def trained(tx):
        def body(_, carry):
            tree, state = carry
            updates, state = tx.update(jax.grad(loss)(tree), state, tree)
            return optax.apply_updates(tree, updates), state

        run = jax.jit(lambda t: jax.lax.fori_loop(0, 600, body, (t, tx.init(t))))
        return run(start)[0]

    adam = optax.adam(rate)
    right = trained(jp.preconditioned(adam, graph, s, steps=jp.adam_steps()))
    np.testing.assert_allclose(rows(graph, right, "l0"), best, atol=0.02)
    alive = np.abs(best).sum(1) > 0
    np.testing.assert_array_equal(jp.dead(graph, right)["l0"], alive)
    other = trained(optax.chain(adam, jp.proximal(graph, s)))
    assert np.abs(rows(graph, other, "l0") - best).max() > 0.2


def test_adams_steps_by_hand():
    params = {"a": jnp.array([1.0, 2.0])}
    tx = optax.chain(optax.clip_by_global_norm(1e9), optax.adamw(0.1, b2=0.9))
    state, grads = tx.init(params), [np.array([1.0, -3.0]), np.array([0.5, 0.1])]
    nu = np.zeros(2)
    for g in grads:
        _, state = tx.update({"a": jnp.asarray(g, "f")}, state, params)
        nu = 0.9 * nu + 0.1 * g**2
    found = jp.adam_steps(0.9, 1e-3)(state, params)["a"]
    np.testing.assert_allclose(found, 1 / (np.sqrt(nu / (1 - 0.9**2)) + 1e-3), 1e-5)
    with pytest.raises(ConfigError, match="holds 0 Adams"):
        jp.adam_steps()(optax.sgd(0.1).init(params), params)
    masked = optax.masked(optax.adam(0.1), {"a": False})
    with pytest.raises(ConfigError, match="1 Adams, of which 0"):
        jp.adam_steps()(masked.init(params), params)


@pytest.mark.parametrize("spread", [0, 2])
def test_blocks_die_as_one(spread):
    """By a general minimiser; and all to 0 where the strength is too much."""
    variables, d = toygraphs.variables(SINGLE), scales(SINGLE, spread)
    v, p = rows(SINGLE, variables, "l0").ravel(), 1 / rows(SINGLE, d, "l0").ravel()

    def objective(x):
        return np.sum(p * (x - v) ** 2) / 2 + 0.1 * np.sqrt(len(v)) * np.linalg.norm(x)

    best = scipy.optimize.minimize(objective, v, tol=1e-12).x
    new = branch(0.1, variables, d)
    np.testing.assert_allclose(rows(SINGLE, new, "l0").ravel(), best, atol=1e-3)
    gone = branch(1e4, variables, d)
    assert not rows(SINGLE, gone, "l0").any()
    np.testing.assert_array_equal(jp.dead(SINGLE, gone)["l0"], np.arange(6) == 0)


@pytest.mark.parametrize("spread", [None, 0, 2])
def test_an_entry_between_two_groups_of_a_block_belongs_to_it_once(spread):
    """All but the last bias is one vector: its closed form, or a general minimiser."""
    graph, weights = toygraphs.chain(3, 2), {"l0": 1.0, "l1": np.array([0.5, 2])}
    variables, blocks = toygraphs.variables(graph), {"branch": ["l0", "l1"]}

    def vector(tree):
        flat = jax.tree.leaves({**tree["params"], "l2": tree["params"]["l2"]["kernel"]})
        return np.concatenate([np.ravel(x) for x in flat], dtype=np.float64)

    v, w = vector(variables), np.sqrt(3 + 0.25 + 4)
    penalty = jp.group_lasso(graph, variables, weights, blocks=blocks)
    np.testing.assert_allclose(penalty, w * np.linalg.norm(v), rtol=1e-6)
    if spread is None:
        tx = jp.proximal(graph, 0.2, weights, blocks=blocks)
        still = jax.tree.map(jnp.zeros_like, variables)
        updates, _ = tx.update(still, tx.init(variables), variables)
        new = optax.apply_updates(variables, updates)
        best = (1 - 0.2 * w / np.linalg.norm(v)) * v
        np.testing.assert_allclose(vector(new), best, rtol=1e-5)
        return
    d = scales(graph, spread)
    p = 1 / vector(d)

    def objective(x):
        return np.sum(p * (x - v) ** 2) / 2 + 0.2 * w * np.linalg.norm(x)

    best = scipy.optimize.minimize(objective, v, tol=1e-12).x
    found = vector(stepping(graph, weights, blocks=blocks)(0.2, variables, d))
    np.testing.assert_allclose(found, best, atol=1e-3)
    assert objective(found) <= objective(best) + 1e-6


def test_nothing_is_shrunk_before_adam_has_seen_a_gradient():
    """Between the steps of optax.MultiSteps, and where all that came was 0."""
    variables = toygraphs.variables(GRAPH)
    still = jax.tree.map(jnp.zeros_like, variables)
    ones = jax.tree.map(jnp.ones_like, variables)
    adam = optax.adam(1e-3)
    late = optax.MultiSteps(adam, 3).gradient_transformation()
    for inner, gradients in ((late, ones), (adam, still)):
        tx = jp.preconditioned(inner, GRAPH, 0.1, steps=jp.adam_steps())
        updates, state = tx.update(gradients, tx.init(variables), variables)
        after = optax.apply_updates(variables, updates)
        chex.assert_trees_all_close(after, variables, rtol=1e-6)
    updates, _ = tx.update(ones, state, variables)
    after = optax.apply_updates(variables, updates)
    assert np.linalg.norm(rows(GRAPH, after, "l0")) < 0.9 * np.linalg.norm(
        rows(GRAPH, variables, "l0")
    )


def test_no_params_is_an_error():
    tx = jp.preconditioned(optax.adam(0.1), SINGLE, 0.1, steps=jp.adam_steps())
    with pytest.raises(ConfigError, match="preconditioned needs the params"):
        tx.update({}, tx.init(toygraphs.variables(SINGLE)))
