# SPDX-License-Identifier: Apache-2.0
"""Norms of kernels alone: what stands behind a filter does not count."""

import flax.linen as nn
import jax
import numpy as np
import pytest
import scipy.spatial

import jaxprune as jp
from jaxprune.measures import geometric_median, lamp, magnitude


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3), name="a")(x)
        x = nn.BatchNorm(use_running_average=True, name="bn")(x)
        x = nn.LayerNorm(name="last")(nn.relu(x))
        return nn.Dense(2, name="head")(x * self.param("free", nn.initializers.ones, 6))


@pytest.fixture(scope="module")
def traced():
    """Scales, biases and a free vector of any size, and the filters [C, n]."""
    images = np.zeros((1, 8, 8, 3), np.float32)
    variables = Net().init(jax.random.key(0), images)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda x: x if x.ndim > 1 else 9 * rng.normal(size=x.shape).astype(x.dtype),
        variables,
    )
    kernel = np.asarray(variables["params"]["a"]["kernel"], np.float64)
    return jp.trace(Net().apply, variables, images), variables, kernel.reshape(-1, 6).T


@pytest.mark.parametrize("array", [np.asarray, jax.numpy.asarray])
@pytest.mark.parametrize("p", [1, 2])
def test_the_norm_of_the_filter(traced, p, array):
    graph, variables, filters = traced
    variables = jax.tree.map(array, variables)
    (scores,) = jp.score(magnitude(p, kernels=True), graph, variables).values()
    expected = np.linalg.norm(filters, ord=p, axis=1)
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    (scores,) = jp.score(magnitude(p), graph, variables).values()
    assert (scores > 2 * expected).any()


def test_distances_of_filters(traced):
    graph, variables, filters = traced
    criterion = geometric_median(kernels=True)
    (scores,) = jp.score(criterion, graph, variables).values()
    expected = scipy.spatial.distance.cdist(filters, filters).sum(1)
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_lamp_of_filters(traced):
    graph, variables, filters = traced
    (scores,) = jp.score(lamp(kernels=True), graph, variables).values()
    squares = np.sum(filters**2, axis=1)
    expected = [s / squares[squares >= s].sum() for s in squares]
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_a_group_without_a_kernel_is_measured_by_what_it_has():
    """A free vector makes it; roles=('in',) of it is nothing, too."""

    def apply(variables, x):
        return (x[..., None] * variables["scale"]) @ variables["head"]

    variables = {"scale": np.array([1.0, -2, 3]), "head": np.eye(3, 2)}
    graph = jp.trace(apply, variables, np.ones(4))
    for p in (1, 2):
        (scores,) = jp.score(magnitude(p, kernels=True), graph, variables).values()
        whole = np.concatenate([variables["scale"][:, None], variables["head"]], axis=1)
        np.testing.assert_allclose(scores, np.linalg.norm(whole, ord=p, axis=1))
