# SPDX-License-Identifier: Apache-2.0
"""Single weights cut by magnitude: which go, what is counted, and that they stay 0."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toygraphs

import jaxprune as jp
from jaxprune.base import BudgetError, ConfigError, GraphError


class Net(nn.Module):
    """Convolutions whose taps all lie on the image, one of them in groups; a head."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), padding="VALID", name="one")(x))
        x = nn.relu(nn.Conv(4, (2, 3), (2, 1), padding="VALID", name="two")(x))
        x = nn.Conv(4, (1, 1), feature_group_count=2, name="grouped")(x)
        return nn.Dense(3, name="head")(x.mean(axis=(1, 2)))


IMAGES = jnp.ones((1, 9, 8, 3))
VARIABLES = jax.tree.map(np.asarray, toygraphs.init(Net(), IMAGES))
PLAIN = ("one", "two", "head")


def kernels(variables):
    return {n: np.float64(v["kernel"]) for n, v in variables["params"].items()}


def by_counting(variables):
    """Multiply-adds of each layer: the sum of its outputs of ones by indicators."""
    marks = {n: jnp.float32(k != 0) for n, k in kernels(variables).items()}
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "padding": "VALID"}
    counts = {}
    x = jnp.ones((1, 9, 8, 3))
    for name, strides, groups in (
        ("one", (1, 1), 1),
        ("two", (2, 1), 1),
        ("grouped", (1, 1), 2),
    ):
        y = jax.lax.conv_general_dilated(
            x, marks[name], strides, **options, feature_group_count=groups
        )
        counts[name], x = int(y.sum()), jnp.ones_like(y)
    counts["head"] = int((jnp.ones((1, 4)) @ marks["head"]).sum())
    return counts


def test_costs_are_counted_by_hand():
    dense = jp.cost(jp.trace(Net().apply, VARIABLES, IMAGES))
    assert jp.nonzero_cost(Net().apply, VARIABLES, IMAGES) == dense
    assert dense.flops == 2 * sum(by_counting(VARIABLES).values())
    rng = np.random.default_rng(0)
    holes = jax.tree.map(lambda x: x * (rng.random(x.shape) < 0.4), VARIABLES)
    found = jp.nonzero_cost(Net().apply, holes, IMAGES)
    counts = by_counting(holes)
    whole = by_counting(VARIABLES)["grouped"]  # whose zeros nobody is said to skip
    assert found.flops == 2 * (sum(counts[n] for n in PLAIN) + whole)
    zeros = sum(np.sum(k == 0) for k in kernels(holes).values())
    assert found.params == dense.params - zeros
    assert found.activation_bytes == dense.activation_bytes


@pytest.mark.parametrize("budget", [jp.flops(0.4), jp.params(0.4)], ids=str)
def test_one_threshold_in_standard_deviations(budget):
    thin = jp.prune_weights(Net().apply, VARIABLES, IMAGES, budget=budget)
    field = budget.kind
    dense = getattr(jp.nonzero_cost(Net().apply, VARIABLES, IMAGES), field)
    found = getattr(jp.nonzero_cost(Net().apply, thin, IMAGES), field)
    # The dearest weight has a part in 2 * 7 * 6 FLOPs: two more would be too many.
    dearest = 2 * 7 * 6 if field == "flops" else 1
    assert 0.4 * dense - dearest < found <= 0.4 * dense
    stays, goes = [], []
    for name, kernel in kernels(VARIABLES).items():
        gone = kernels(thin)[name] == 0
        np.testing.assert_array_equal(kernels(thin)[name][~gone], kernel[~gone])
        size = np.abs(kernel) / kernel.std()
        if field == "flops" and name == "grouped":
            assert not gone.any()
            continue
        stays.append(size[~gone].min())
        goes.append(size[gone].max())
    assert max(goes) <= min(stays) * (1 + 1e-5)
    for name, layer in VARIABLES["params"].items():
        np.testing.assert_array_equal(thin["params"][name]["bias"], layer["bias"])


def test_local_cuts_the_same_fraction_of_each_kernel():
    thin = jp.prune_weights(
        Net().apply, VARIABLES, IMAGES, budget=jp.params(0.5), scope="local"
    )
    shares = {n: np.mean(k != 0) for n, k in kernels(thin).items()}
    for name, kernel in kernels(VARIABLES).items():
        gone = kernels(thin)[name] == 0
        assert np.abs(kernel[gone]).max() <= np.abs(kernel[~gone]).min()
        assert abs(shares[name] - shares["one"]) <= 1 / kernel.size + 1 / 162


def test_what_is_cut_stays_cut_in_training_and_in_the_next_round():
    """SGD by hand, w <- (w - rate * gradient) * mask; Adam holds the zeros, too."""
    x = np.random.default_rng(0).normal(size=(2, 9, 8, 3)).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda v: jnp.mean((Net().apply(v, x) - 1) ** 2)))

    def trained(tx, variables, steps):
        @jax.jit
        def step(variables, state):
            updates, state = tx.update(gradient(variables), state, variables)
            return optax.apply_updates(variables, updates), state

        state = tx.init(variables)
        for _ in range(steps):
            variables, state = step(variables, state)
        return jax.tree.map(np.asarray, variables)

    cut = jp.prune_weights(Net().apply, VARIABLES, IMAGES, budget=jp.flops(0.5))
    masks = jax.tree.map(lambda v: (v != 0) | (v.ndim < 2), cut)
    by_hand = cut
    for _ in range(3):
        grads = jax.tree.map(np.asarray, gradient(by_hand))
        by_hand = jax.tree.map(lambda w, g, m: (w - 0.1 * g) * m, by_hand, grads, masks)
    ours = trained(optax.chain(optax.sgd(0.1), jp.keep_zeros()), cut, 3)
    chex.assert_trees_all_close(ours, by_hand, rtol=1e-5, atol=1e-6)

    after = trained(optax.chain(optax.adamw(1e-2), jp.keep_zeros()), cut, 1)
    again = jp.prune_weights(Net().apply, after, IMAGES, budget=jp.flops(0.3))
    for name, kernel in kernels(cut).items():
        np.testing.assert_array_equal(kernels(after)[name] == 0, kernel == 0)
        assert (kernels(again)[name][kernel == 0] == 0).all()
    assert np.abs(after["params"]["one"]["bias"]).min() > 0
    final = jp.nonzero_cost(Net().apply, again, IMAGES).flops
    assert final <= 0.3 * jp.nonzero_cost(Net().apply, VARIABLES, IMAGES).flops
    same = jp.prune_weights(Net().apply, again, IMAGES, budget=jp.flops(0.35))
    assert same is again


class Up(nn.Module):
    """A transposed convolution that makes 10 x 10 of 5 x 5, between two others."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (1, 1), name="one")(x))
        x = nn.relu(nn.ConvTranspose(6, (3, 2), (2, 2), name="up")(x))
        return nn.Conv(2, (1, 1), name="two")(x)


def test_a_transposed_convolution_counts_at_each_of_its_inputs():
    x = jnp.ones((3, 5, 5, 3))
    variables = jax.tree.map(np.asarray, toygraphs.init(Up(), x))
    by_hand = {"one": 75 * 3 * 4, "up": 75 * 3 * 2 * 4 * 6, "two": 300 * 6 * 2}
    dense = jp.nonzero_cost(Up().apply, variables, x)
    assert dense == jp.cost(jp.trace(Up().apply, variables, x))
    assert dense.flops == 2 * sum(by_hand.values())
    for name, products in by_hand.items():
        others = jax.tree.map(np.copy, variables)
        others["params"][name]["kernel"][:] = 0
        found = jp.nonzero_cost(Up().apply, others, x).flops
        assert dense.flops - found == 2 * products
    cut = jp.prune_weights(Up().apply, variables, x, budget=jp.flops(0.3))
    left = sum(n * np.mean(cut["params"][k]["kernel"] != 0) for k, n in by_hand.items())
    assert 0.29 < left / sum(by_hand.values()) <= 0.3


def test_stacked_biases_are_no_kernels():
    tree = {"bias": jnp.zeros((2, 3)), "kernel": jnp.zeros((2, 3)), "b": jnp.zeros(3)}
    ones = jax.tree.map(jnp.ones_like, tree)
    updates, _ = jp.keep_zeros().update(ones, optax.EmptyState(), tree)
    assert {n: float(u.sum()) for n, u in updates.items()} == {
        "bias": 6,
        "kernel": 0,
        "b": 3,
    }


def test_errors():
    def pruned(variables=VARIABLES, **more):
        given = {"budget": jp.flops(0.5), **more}
        return jp.prune_weights(Net().apply, variables, IMAGES, **given)

    with pytest.raises(BudgetError, match=r"save no channels; ask for flops"):
        pruned(budget=jp.channels(0.5))
    with pytest.raises(BudgetError, match="budget=0.5: say of what"):
        pruned(budget=0.5)
    with pytest.raises(ConfigError, match="scope='layer'"):
        pruned(scope="layer")
    # Biases are 6 + 4 + 4 + 3 of 162 + 144 + 8 + 12 + 17 numbers, 0.0496.
    with pytest.raises(BudgetError, match=r"has 0\.0496 of .* params\(0\.0496\) or mo"):
        pruned(budget=jp.params(0.01))
    pruned(budget=jp.params(0.0496))
    counts = by_counting(VARIABLES)
    least = np.ceil(counts["grouped"] / sum(counts.values()) * 1e4) / 1e4
    with pytest.raises(BudgetError, match=f"has {least:.4f} of"):
        pruned(budget=jp.flops(1e-3))
    broken = jax.tree.map(np.copy, VARIABLES)
    broken["params"]["two"]["kernel"][0, 0, 0, 0] = np.nan
    with pytest.raises(GraphError, match="params/two/kernel holds numbers"):
        pruned(broken)
    with pytest.raises(GraphError, match="no trained leaf has two axes"):
        jp.prune_weights(
            lambda v, x: v["a"] * x,
            {"a": IMAGES[0, 0, 0]},
            IMAGES,
            budget=jp.flops(0.5),
        )
    with pytest.raises(ConfigError, match="keep_zeros needs the params"):
        jp.keep_zeros().update(VARIABLES, optax.EmptyState())
