# SPDX-License-Identifier: Apache-2.0
"""Low rank in what kernels answer: what is behind a product, the fits, the networks."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune import responses
from jaxprune.behind import Answers, behind

RNG = np.random.default_rng(1)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


class Net(nn.Module):
    """Convolutions with and without a ReLU behind what is affine by channel."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(6, (3, 3), name="normed", use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, name="norm")(x))
        x = jnp.maximum(nn.Conv(5, (3, 3), name="biased")(x) * 2, 0)
        x = nn.leaky_relu(nn.Conv(5, (1, 1), name="leaky")(x))
        y = nn.Conv(5, (1, 1), name="shared")(x)
        x = nn.relu(y) + y
        x = nn.relu(nn.Conv(5, (1, 1), name="gated")(x) * x)
        return nn.Dense(4, name="last")(x.mean(axis=(1, 2)))


def filled(net: nn.Module, x: np.ndarray) -> Any:
    """Variables of which none is constant."""
    shapes = jax.eval_shape(net.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda s: normal(*s.shape), shapes)
    if "batch_stats" in variables:
        stats = variables["batch_stats"]
        for norm in stats.values():
            norm["var"] = np.abs(norm["var"]) + 0.5
    return variables


def test_a_relu_is_found_behind_a_bias_and_a_batch_norm() -> None:
    net, x = Net(), normal(2, 5, 6, 3)
    variables = filled(net, x)
    parts: dict[Any, Any] = {}  # in the program's order

    def look(found: Answers) -> Any:
        parts[found.path] = found
        return found.answers, found.before

    out, seen = jax.jit(behind(net.apply, look))(variables, x)
    np.testing.assert_allclose(out, net.apply(variables, x), rtol=1e-5, atol=1e-5)
    names = [path[1] for path in parts]
    assert names == ["normed", "biased", "leaky", "shared", "gated", "last"]
    with_relu = {p[1] for p, f in parts.items() if f.before is not None}
    assert with_relu == {"normed", "biased"}
    p, stats = variables["params"], variables["batch_stats"]["norm"]
    got, before = seen["params", "normed", "kernel"]
    answers = nn.Conv(6, (3, 3), use_bias=False).apply({"params": p["normed"]}, x)
    np.testing.assert_allclose(got, answers, rtol=1e-4, atol=1e-4)
    want = (answers - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * p["norm"]["scale"]
    np.testing.assert_allclose(before, want + p["norm"]["bias"], rtol=1e-4, atol=1e-4)


def test_each_element_goes_where_its_cost_is_least() -> None:
    target, given = np.linspace(-2, 2, 9)[:, None], np.linspace(-2, 2, 11)[None]
    grid = np.linspace(-5, 5, 20001)
    for weight in (0.01, 1.0, 5.0):
        z = responses.nearest(target, given, weight)

        def cost(z: np.ndarray, weight: float = weight) -> np.ndarray:
            fit = np.maximum(target[..., None], 0) - np.maximum(z, 0)
            return fit**2 + weight * (z - given[..., None]) ** 2

        best = cost(grid).min(axis=-1)
        np.testing.assert_allclose(cost(z[..., None])[..., 0], best, atol=1e-6)


@pytest.mark.parametrize("biased", [True, False])
def test_a_fit_of_low_rank_is_the_whitened_svd(biased: bool) -> None:
    y = RNG.normal(size=(400, 7)) @ RNG.normal(size=(7, 7)) + RNG.normal(size=7)
    z = y @ RNG.normal(size=(7, 7)) + RNG.normal(size=(400, 7)) + 3.0
    fixed = None if biased else RNG.normal(size=7)
    fit = responses.reduced_rank(y, z, 3, fixed)
    means = (y.mean(axis=0), z.mean(axis=0)) if biased else (np.zeros(7), fixed)
    a, b = y - means[0], z - means[1]
    # The thin Q of a whitens it: the best fit of rank 3 is the SVD of Q^T b, cut.
    q, _ = np.linalg.qr(a)
    u, s, v = np.linalg.svd(q.T @ b)
    want = q @ (u[:, :3] * s[:3]) @ v[:3] + means[1]
    np.testing.assert_allclose(fit(y), want, atol=1e-5)


def answers(count: int) -> np.ndarray:
    """In half of the channels far below 0, where much happens that no ReLU shows."""
    rng = np.random.default_rng(count)
    hidden = rng.normal(size=(count, 8))
    mix = np.random.default_rng(5).normal(size=(8, 8))
    spread = np.where(np.arange(8) < 4, 6.0, 1.0)
    return hidden @ mix * spread - np.where(np.arange(8) < 4, 40.0, 0.0)


def test_through_the_relu_the_objective_falls_and_beats_the_linear_fit() -> None:
    seen, held = answers(2000), answers(1001)
    linear = responses.reduced_rank(seen, seen, 4)
    for fixed in (None, np.zeros(8)):
        fit, relaxed = responses.rectified(seen, seen, 4, fixed)
        for falls in (relaxed[:25], relaxed[25:]):  # as long as the weight stays
            assert np.all(np.diff(falls) <= 1e-9 * falls[0])

    def error(fit: responses.Fit) -> float:
        return float(np.mean((np.maximum(held, 0) - np.maximum(fit(held), 0)) ** 2))

    fit, _ = responses.rectified(seen, seen, 4)
    assert error(fit) < 0.7 * error(linear)


class Two(nn.Module):
    """Two convolutions with a ReLU between, the last without."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(16, (3, 3), name="a")(x)
        x = nn.BatchNorm(use_running_average=True, name="norm")(x)
        return nn.Conv(12, (3, 3), name="b")(nn.relu(x))


def test_a_network_is_fitted_through_its_relus_and_layer_after_layer() -> None:
    net, x = Two(), normal(4, 9, 9, 8)
    variables = filled(net, x)
    variables["params"]["norm"]["scale"] = np.linspace(-0.5, 1, 16, dtype=np.float32)
    graph = jp.trace(net.apply, variables, x)
    want = np.asarray(net.apply(variables, x))
    errors = {}
    for method in ("svd", "responses", "nonlinear", "asymmetric", "asymmetric3d"):
        more = {"batches": [x[:2], (x[2:],)], "positions": 1000}
        found = jp.factorize(
            net.apply, graph, variables, x, method=method, ratio=0.4, **more
        )
        errors[method] = np.mean((found.apply(found.variables, x) - want) ** 2)
        relus = {p: c.relu for p, c in found.chains.items()}
        fitted = method in ("nonlinear", "asymmetric", "asymmetric3d")
        assert relus == {"params/a/kernel": fitted, "params/b/kernel": False}
    shapes = [f.shape for f in found.variables["params"]["a"]["kernel"].values()]
    (kh, _, read, inner), (_, kw, _, rank), (*_, out) = shapes
    assert (kh, read, kw, out) == (3, 8, 3, 16) and shapes[2] == (1, 1, rank, 16)
    # The last layer has no ReLU: of all kernels of its rank, the asymmetric one is
    # nearest given what it reads.
    assert errors["asymmetric"] < errors["nonlinear"] < errors["responses"]
    assert errors["responses"] < errors["svd"]


def test_without_a_bias_the_answers_themselves_are_projected() -> None:
    x = normal(3, 6, 6, 8)
    net = nn.Conv(12, (1, 1), use_bias=False)
    variables = {"params": {"kernel": normal(1, 1, 8, 12)}}
    graph = jp.trace(net.apply, variables, x)
    more = {"method": "responses", "ratio": 0.5, "batches": [x]}
    found = jp.factorize(net.apply, graph, variables, x, **more)
    y = np.float64(net.apply(variables, x)).reshape(-1, 12)
    u, s, v = np.linalg.svd(y, full_matrices=False)
    want = (u[:, :2] * s[:2]) @ v[:2]
    got = np.asarray(found.apply(found.variables, x)).reshape(-1, 12)
    np.testing.assert_allclose(got, want, atol=1e-3)
