# SPDX-License-Identifier: Apache-2.0
"""Gates scale a channel where it is read; their proximal step is soft-thresholding."""

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
from jaxprune.gates import (
    accelerated_gates,
    gate,
    gates_to_keep,
    init_gates,
    preconditioned_gates,
    proximal_gates,
)

SINGLE = toygraphs.chain(6)
GRAPH = toygraphs.chain(5, 4)
VARIABLES = toygraphs.variables(GRAPH)


def after(tx, params, updates=None):
    updates = jax.tree.map(jnp.zeros_like, params) if updates is None else updates
    updates, _ = tx.update(updates, tx.init(params), params)
    return optax.apply_updates(params, updates)


def test_gates_scale_each_channel_once_where_it_is_read():
    gates = {"l0": np.arange(1.0, 6), "l1": np.array([1, 0.5, 3, 2])}
    gated = gate(GRAPH, gates, VARIABLES)["params"]
    for i, name in enumerate(("l0", "l1")):
        reader = VARIABLES["params"][f"l{i + 1}"]["kernel"] * gates[name][:, None]
        np.testing.assert_allclose(gated[f"l{i + 1}"]["kernel"], reader)
    np.testing.assert_array_equal(
        gated["l0"]["kernel"], VARIABLES["params"]["l0"]["kernel"]
    )
    chex.assert_trees_all_equal(gate(GRAPH, init_gates(GRAPH), VARIABLES), VARIABLES)


def test_one_gate_may_be_for_all_of_a_group():
    gates = {"l0": 0.5, "l1": np.ones(4)}
    whole = {**gates, "l0": np.full(5, 0.5)}
    chex.assert_trees_all_equal(
        gate(GRAPH, gates, VARIABLES), gate(GRAPH, whole, VARIABLES)
    )


@pytest.mark.parametrize("make", [proximal_gates, accelerated_gates])
def test_gates_of_16_bits_keep_their_types(make):
    """Params and state, so that a step is traced once and may be a scan's carry."""
    gates = jax.tree.map(lambda g: g.astype(jnp.bfloat16), init_gates(GRAPH))
    tx = (
        make(jaxprune.steer(GRAPH, 0.5), momentum=lambda n: n / (n + 3.0))
        if (make is accelerated_gates)
        else make(jaxprune.steer(GRAPH, 0.5))
    )
    state = tx.init(gates)
    updates, new = tx.update(jax.tree.map(jnp.zeros_like, gates), state, gates)
    chex.assert_trees_all_equal_dtypes((gates, state), (updates, new))


def test_weights_of_jax_are_checked_as_any():
    for make in (
        lambda w: proximal_gates(0.1, w),
        lambda w: jaxprune.proximal(GRAPH, 0.1, w),
    ):
        with pytest.raises(GraphError, match="group 'l1' are negative"):
            make({"l0": jnp.ones(5), "l1": -jnp.ones(4)})


def test_binary_gates_mask():
    keep = {"l0": np.array([1, 0, 1, 0, 1], bool), "l1": np.array([0, 1, 1, 0], bool)}
    gates = {n: k.astype(np.float32) for n, k in keep.items()}
    x = jax.random.normal(jax.random.key(0), (7, 3))
    masked = toygraphs.apply(jaxprune.mask(GRAPH, keep, VARIABLES), x)
    gated = toygraphs.apply(gate(GRAPH, gates, VARIABLES), x)
    np.testing.assert_allclose(gated, masked, rtol=1e-5)
    chex.assert_trees_all_equal(gates_to_keep(gates), keep)


def test_a_group_that_nobody_reads_is_gated_where_it_is_made():
    group = SINGLE.groups["l0"]
    makers = tuple(s for s in group.slots if s.role == "out")
    unread = jaxprune.Graph(
        {"l0": type(group)("l0", 6, makers)}, (), SINGLE.leaves, SINGLE.terms
    )
    variables = toygraphs.variables(unread)
    gated = gate(unread, {"l0": np.arange(6.0)}, variables)["params"]["l0"]
    expected = jax.tree.map(lambda x: x * np.arange(6.0), variables["params"]["l0"])
    chex.assert_trees_all_close(gated, expected)


@pytest.mark.parametrize("names", [("kernel", "bias"), ("w", "b"), ("gamma", "beta")])
def test_queries_are_gated_where_they_are_made_with_their_bias(names):
    """With a norm behind the kernel where its parameters are named gamma and beta."""
    rng, (first, second) = np.random.default_rng(0), names

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    norm = first == "gamma"
    v = {"k": {"w": normal(4, 8)}, "o": {"w": normal(4, 3)}}
    if norm:
        v |= {"q": {"w": normal(4, 8)}, "n": {first: normal(8), second: normal(8)}}
    else:
        v |= {"q": {first: normal(4, 8), second: normal(8)}}

    def query(v, x):
        if norm:
            h = x @ v["q"]["w"]
            h = h / jnp.sqrt(1 + jnp.square(h).mean(axis=(0, 1)))
            return h * v["n"][first] + v["n"][second]
        return x @ v["q"][first] + v["q"][second]

    def attend(v, x):
        scores = query(v, x) @ (x @ v["k"]["w"]).swapaxes(-1, -2)
        return jax.nn.softmax(scores) @ (x @ v["o"]["w"])

    x = normal(2, 5, 4)
    graph = jaxprune.trace(attend, v, x)
    (name,) = graph.groups
    scale = rng.uniform(0.1, 2, graph.groups[name].size).astype(np.float32)
    gated = gate(graph, {name: scale}, v)
    # Either the queries are scaled, or the keys.
    made = [query(gated, x) / query(v, x), gated["k"]["w"] / v["k"]["w"]]
    kept = [np.allclose(m, 1, rtol=1e-5) for m in made]
    assert sorted(kept) == [False, True]
    changed = made[kept.index(False)]
    np.testing.assert_allclose(changed, np.broadcast_to(scale, changed.shape), 1e-4)


def test_gates_are_soft_thresholded():
    gates = {"l0": jnp.array([1.0, -1, 0.2, -0.2, 0, 3])}
    updates = {"l0": jnp.array([0.0, 0, 0, 0, 0.5, -3])}
    new = after(proximal_gates(0.25), gates, updates)
    np.testing.assert_allclose(new["l0"], [0.75, -0.75, 0, 0, 0.25, 0], atol=1e-6)
    np.testing.assert_array_equal(new["l0"] == 0, [0, 0, 1, 1, 0, 1])
    np.testing.assert_array_equal(gates_to_keep(new)["l0"], [1, 1, 0, 0, 1, 0])
    heavy = after(proximal_gates(0.25, {"l0": np.array([1, 2, 1, 1, 1, 0])}), gates)
    np.testing.assert_allclose(heavy["l0"], [0.75, -0.5, 0, 0, 0, 3], atol=1e-6)
    last = after(proximal_gates(9.0), gates)
    np.testing.assert_array_equal(last["l0"], [0, 0, 0, 0, 0, 3])


def normed(norm):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = norm()(nn.relu(nn.Dense(8)(x)))
            return nn.Dense(3)(h)

    return Net()


def elementwise(v, x):
    h = jax.nn.relu(x @ v["a"])
    return h @ v["b"] + (h * v["s"]).sum(-1, keepdims=True)


def case(name):
    """apply, variables, x of nets that read a channel other than through a kernel."""
    x = jax.random.normal(jax.random.key(0), (5, 4))
    if name == "elementwise":
        shapes = {"a": (4, 8), "b": (8, 3), "s": (8,)}
        rng = np.random.default_rng(0)
        v = {n: jnp.asarray(rng.normal(size=s), "float32") for n, s in shapes.items()}
        return elementwise, v, x
    norms = {"layer": nn.LayerNorm, "group": lambda: nn.GroupNorm(num_groups=1)}
    net = normed(norms[name])
    return net.apply, toygraphs.init(net, x), x


@pytest.mark.parametrize("name", ["layer", "group", "elementwise"])
def test_gates_of_0_and_1_mask_whatever_reads_the_channel(name):
    apply, variables, x = case(name)
    graph = jaxprune.trace(apply, variables, x)
    (group,) = graph.groups
    keep = {group: np.arange(8) % 3 > 0}
    gates = {group: jnp.asarray(keep[group], jnp.float32)}
    gated = jax.jit(lambda g, v: gate(graph, g, v))(gates, variables)
    want = apply(jaxprune.mask(graph, keep, variables), x)
    np.testing.assert_allclose(apply(gated, x), want, rtol=1e-5, atol=1e-6)
    # What is cut after training is what was trained, at gates in between too.
    gated = gate(graph, {group: gates[group] * jnp.arange(8) / 3}, variables)
    alive = gates_to_keep({group: gates[group] * jnp.arange(8)})
    slim = jaxprune.slim(apply, graph, alive)(jaxprune.shrink(graph, alive, gated), x)
    np.testing.assert_allclose(slim, apply(gated, x), rtol=1e-5, atol=1e-6)


def test_a_group_that_nobody_reads_is_scaled_once():
    v = {"e": jnp.ones((1, 8)), "s": jnp.arange(1.0, 9)}
    x = jnp.ones((2, 1))

    def apply(v, x):
        return (x @ v["e"] * v["s"]).sum(-1)

    graph = jaxprune.trace(apply, v, x)
    (group,) = graph.groups
    half = apply(gate(graph, {group: jnp.full(8, 0.5)}, v), x)
    np.testing.assert_allclose(half, 0.5 * apply(v, x), rtol=1e-6)


def test_gradients_of_gates_that_are_not_zero_are_the_weights_own():
    gates = {"l0": jnp.arange(5.0), "l1": jnp.array([1, 0.5, 0, 2])}
    x = jax.random.normal(jax.random.key(0), (7, 3))

    def loss(gates):
        return jnp.sum(toygraphs.apply(gate(GRAPH, gates, VARIABLES), x) ** 2)

    gradient, step = jax.grad(loss)(gates), 1e-2
    for name, c in (("l0", 2), ("l1", 1)):
        up, down = (
            loss({**gates, name: gates[name].at[c].add(s)}) for s in (step, -step)
        )
        np.testing.assert_allclose(gradient[name][c], (up - down) / 2 / step, rtol=1e-2)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"b": 1.0}, "weights name group 'b'"),
        ({}, "weights lack group 'a'"),
        ({"a": np.ones(2)}, "'a' has 3 channels"),
        ({"a": np.array([1.0, -0.1, 1.0])}, "'a' are negative"),
        (2.0, "weights=2.0: say of which group"),
    ],
)
def test_weights_that_do_not_fit_the_gates(weights, words):
    with pytest.raises(GraphError, match=words):
        after(proximal_gates(0.1, weights), {"a": jnp.ones(3)})


# Accelerated: least squares |A x - b|^2 / 2 under an L1 penalty.


def lasso(count=8, seed=0):
    """A [m, count], b, the largest curvature; of unequal curvatures."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(20, count)) * 10 ** np.linspace(-0.7, 0.3, count)
    b = a @ np.where(np.arange(count) % 2, rng.normal(size=count), 0)
    b = b + 0.1 * rng.normal(size=20)
    return a, b, np.linalg.eigvalsh(a.T @ a)[-1]


def soft(z, threshold):
    return np.sign(z) * np.maximum(np.abs(z) - threshold, 0)


def descended(make, eta, a, b, steps):
    """Every step's gates and state, behind plain gradients."""
    tx = optax.chain(optax.scale_by_learning_rate(eta), make)
    a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)

    def step(carry, _):
        gates, state = carry
        gradient = {"a": a.T @ (a @ gates["a"] - b)}
        updates, state = tx.update(gradient, state, gates)
        gates = optax.apply_updates(gates, updates)
        return (gates, state), (gates["a"], state[-1])

    start = {"a": jnp.ones(a.shape[1])}
    return jax.lax.scan(step, (start, tx.init(start)), None, steps)[1]


def test_the_accelerated_step_is_the_papers_recursion():
    a, b, largest = lasso()
    eta, gamma, mu = 0.5 / largest, 0.7, 0.9
    ahead, states = descended(accelerated_gates(eta * gamma), eta, a, b, 12)
    x, v = np.ones(8), np.zeros(8)
    for t in range(12):
        z = x - eta * a.T @ (a @ x - b)
        v = soft(z, eta * gamma) - x + mu * v
        x = soft(z, eta * gamma) + mu * v
        np.testing.assert_allclose(ahead[t], x, atol=1e-5)
        point = states.point["a"][t]
        np.testing.assert_allclose(point, soft(z, eta * gamma), atol=1e-5)


def test_a_rising_momentum_is_nesterovs():
    """The form with lambda alone that Huang & Wang begin with, k from 1."""
    a, b, largest = lasso()
    eta, gamma = 1 / largest, 0.7
    step = accelerated_gates(eta * gamma, momentum=lambda t: t / (t + 3))
    _, states = descended(step, eta, a, b, 12)
    before, now = np.ones(8), np.ones(8)
    for k in range(1, 13):
        d = now + max(k - 2, 0) / (k + 1) * (now - before)
        z = d - eta * a.T @ (a @ d - b)
        before, now = now, soft(z, eta * gamma)
        np.testing.assert_allclose(states.point["a"][k - 1], now, atol=1e-5)


def test_it_converges_to_the_lasso_and_sooner():
    a, b, largest = lasso()
    eta, gamma = 1 / largest, 0.7

    def cost(x):
        return np.sum((a @ x - b) ** 2) / 2 + gamma * np.abs(x).sum(-1)

    # As a quadratic program of positive and negative parts, by another solver.
    best = scipy.optimize.minimize(
        lambda p: np.sum((a @ (p[:8] - p[8:]) - b) ** 2) / 2 + gamma * p.sum(),
        np.ones(16),
        bounds=[(0, None)] * 16,
        tol=1e-14,
    ).x
    best = best[:8] - best[8:]
    plain, _ = descended(proximal_gates(eta * gamma), eta, a, b, 60)
    step = accelerated_gates(eta * gamma, momentum=lambda t: t / (t + 3))
    gates, states = descended(step, eta, a, b, 400)
    np.testing.assert_allclose(states.point["a"][-1], best, atol=2e-3)
    zero = np.abs(best) < 1e-4
    assert 0 < zero.sum() < 8
    np.testing.assert_array_equal(states.point["a"][-1] == 0, zero)
    np.testing.assert_array_equal(gates[-1] == 0, zero)  # exactly, momentum and all
    at = np.asarray(states.point["a"][59], np.float64)
    assert cost(at) - cost(best) < 0.5 * (cost(np.float64(plain[-1])) - cost(best))


def test_without_momentum_it_is_the_plain_step():
    a, b, largest = lasso()
    weights = {"a": np.linspace(0, 2, 8)}
    both = [
        descended(make, 0.5 / largest, a, b, 20)[0]
        for make in (
            proximal_gates(0.1, weights),
            accelerated_gates(0.1, weights, momentum=0.0),
        )
    ]
    np.testing.assert_allclose(*both, atol=1e-6)
    still = after(accelerated_gates(9.0), {"a": jnp.array([1.0, 3, 2])})
    assert still["a"][1] == 3  # no group is emptied


def test_behind_adam_gates_rest_where_the_penalty_and_the_loss_balance():
    """h (z - goal)^2 / 2 + lambda w |z|: the goal by lambda w / h nearer to 0."""
    curve = np.array([0.1, 0.3, 1, 3, 10, 30])
    goal, w = np.array([0.9, -0.9, 0.9, 0.2, -0.4, 0.9]), np.array([1, 1, 2, 3, 1, 0])
    rate, count = optax.cosine_decay_schedule(0.02, 4000), 4000
    tx = preconditioned_gates(
        optax.adam(rate),
        lambda t: 0.25 * rate(t),
        {"a": w},
        steps=jaxprune.adam_steps(),
    )

    def step(_, carry):
        gates, state = carry
        gradient = {"a": jnp.asarray(curve, "f") * (gates["a"] - goal)}
        updates, state = tx.update(gradient, state, gates)
        return optax.apply_updates(gates, updates), state

    start = {"a": jnp.ones(6)}
    run = jax.jit(lambda carry: jax.lax.fori_loop(0, count, step, carry))
    found = np.asarray(run((start, tx.init(start)))[0]["a"])
    wanted = soft(goal, 0.25 * w / curve)
    np.testing.assert_allclose(found, wanted, atol=5e-3)
    np.testing.assert_array_equal(found == 0, wanted == 0)
    assert 0 < (wanted == 0).sum() < 5


def test_gates_beside_other_params_take_the_same_step():
    """Of one optimiser, whose clipping sees them all."""
    gates = {"a": jnp.array([1.0, 0.5, 0.02])}
    gradients = {"a": jnp.array([3.0, -2.0, 0.5])}
    others, more = {"w": jnp.ones(2)}, {"w": jnp.array([30.0, 40.0])}
    both, slopes = (
        {"gates": g, "network": o} for g, o in ((gates, others), (gradients, more))
    )
    kind = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))
    steps = jaxprune.adam_steps()
    tx = preconditioned_gates(kind, 0.01, steps=steps, key="gates")
    updates, (inner, _) = tx.update(slopes, tx.init(both), both)
    plain, alone = kind.update(slopes, kind.init(both), both)
    chex.assert_trees_all_equal(inner, alone)
    chex.assert_trees_all_equal(updates["network"], plain["network"])
    z = np.asarray(gates["a"] + plain["gates"]["a"], np.float64)
    d = np.asarray(steps(alone, both)["gates"]["a"], np.float64)
    np.testing.assert_allclose(
        gates["a"] + updates["gates"]["a"], soft(z, 0.01 * d), rtol=1e-5, atol=1e-6
    )


def test_errors_of_the_step_behind_adam():
    steps = jaxprune.adam_steps()
    with pytest.raises(ConfigError, match="strength=-1"):
        preconditioned_gates(optax.adam(0.1), -1.0, steps=steps)
    with pytest.raises(ConfigError, match="needs the gates"):
        tx = preconditioned_gates(optax.adam(0.1), 0.1, steps=steps)
        tx.update({}, tx.init({}))


@pytest.mark.parametrize("make", [proximal_gates, accelerated_gates])
def test_gates_among_other_params(make):
    """As alone, in one optimiser, also behind optax.multi_transform."""
    gates, more = {"l0": jnp.array([0.1, 1.0, 0.5])}, {"w": jnp.ones((2, 3))}
    both = {"net": more, "z": gates}
    alone = optax.chain(optax.sgd(0.1), make(0.2))
    wanted, _ = alone.update(gates, alone.init(gates), gates)
    chained = optax.chain(optax.sgd(0.1), make(0.2, key="z"))
    parted = optax.multi_transform(
        {"z": chained, "net": optax.sgd(0.1)}, {"net": "net", "z": "z"}
    )
    for tx in (chained, parted):
        found, _ = jax.jit(tx.update)(both, tx.init(both), both)
        chex.assert_trees_all_close(found["z"], wanted)
        chex.assert_trees_all_close(found["net"]["w"], -0.1 * more["w"])
    with pytest.raises(ConfigError, match=f"{make.__name__}: the params have no 'y'"):
        make(0.2, key="y").init(both)
    tx = make(0.2)
    with pytest.raises(ConfigError, match=rf"{make.__name__}\(..., key=\)"):
        tx.update(both, tx.init(both), both)


def test_errors_of_the_accelerated_step():
    with pytest.raises(ConfigError, match="momentum=1.5"):
        accelerated_gates(0.1, momentum=1.5)
    with pytest.raises(ConfigError, match="strength=-1"):
        accelerated_gates(-1.0)
    with pytest.raises(ConfigError, match="needs the gates"):
        tx = accelerated_gates(0.1)
        tx.update({}, tx.init({}))
