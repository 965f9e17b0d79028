# SPDX-License-Identifier: Apache-2.0
"""Pooling with locations against explicit float64 loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import base
from jaxprune.models import pooling

SIZES = [(1, 1), (1, 6), (5, 1), (5, 7), (4, 7), (7, 4), (6, 8)]


def pool_loops(x):
    """Maximum, location and flat source row and column of every window."""
    batch, height, width, channels = x.shape
    shape = (batch, -(-height // 2), -(-width // 2), channels)
    y, code = np.full(shape, -np.inf), np.zeros(shape, np.uint8)
    for b, r, c, k in np.ndindex(shape):
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
            row, column = 2 * r + i, 2 * c + j
            inside = row < height and column < width
            if inside and x[b, row, column, k] > y[b, r, c, k]:
                y[b, r, c, k], code[b, r, c, k] = x[b, row, column, k], 2 * i + j
    return y, code


def unpool_loops(y, code, size):
    out = np.zeros((y.shape[0], *size, y.shape[3]))
    for b, r, c, k in np.ndindex(y.shape):
        row, column = 2 * r + code[b, r, c, k] // 2, 2 * c + code[b, r, c, k] % 2
        if row < size[0] and column < size[1]:
            out[b, row, column, k] = y[b, r, c, k]
    return out


def pick_loops(x, code):
    """The transpose of `unpool_loops`."""
    out = np.zeros(code.shape)
    for b, r, c, k in np.ndindex(code.shape):
        row, column = 2 * r + code[b, r, c, k] // 2, 2 * c + code[b, r, c, k] % 2
        if row < x.shape[1] and column < x.shape[2]:
            out[b, r, c, k] = x[b, row, column, k]
    return out


def image(size, *, ties, seed=0):
    rng = np.random.default_rng(seed)
    shape = (2, *size, 3)
    values = rng.integers(-1, 2, shape) if ties else rng.normal(size=shape)
    return values.astype(np.float32)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_pool_and_unpool_match_loops(size, ties):
    x = image(size, ties=ties)
    want_y, want_code = pool_loops(x.astype(np.float64))
    y, code = pooling.max_pool(jnp.asarray(x))
    assert code.dtype == jnp.uint8
    np.testing.assert_array_equal(y, want_y)
    np.testing.assert_array_equal(code, want_code)
    back = pooling.unpool(y, code, size)
    np.testing.assert_array_equal(back, unpool_loops(want_y, want_code, size))


@pytest.mark.parametrize("size", SIZES)
def test_gradient_of_pool_goes_to_the_first_maximum_alone(size):
    x = image(size, ties=True)
    y, code = pool_loops(x)
    weights = image(y.shape[1:3], ties=False, seed=1)
    grad = jax.jit(jax.grad(lambda x: jnp.sum(pooling.max_pool(x)[0] * weights)))(x)
    np.testing.assert_array_equal(grad, unpool_loops(weights, code, size))


@pytest.mark.parametrize("size", SIZES)
def test_gradient_of_unpool_reads_back_the_locations(size):
    # Every code, those too that point outside an odd size: their values are dropped.
    small = (-(-size[0] // 2), -(-size[1] // 2))
    y = image(small, ties=False)
    code = np.random.default_rng(2).integers(0, 4, y.shape).astype(np.uint8)
    weights = image(size, ties=False, seed=1)
    out = pooling.unpool(y, code, size)
    np.testing.assert_array_equal(out, unpool_loops(y, code, size))
    grad = jax.jit(
        jax.grad(lambda y: jnp.sum(pooling.unpool(y, code, size) * weights))
    )(y)
    np.testing.assert_array_equal(grad, pick_loops(weights, code))


def there_and_back(x):
    y, code = pooling.max_pool(x)
    return pooling.unpool(jnp.tanh(y), code, x.shape[-3:-1])


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (6, 8)])
def test_gradient_of_both_composed(size):
    x = image(size, ties=True)
    weights = image(size, ties=False, seed=1).astype(np.float64)
    grad = jax.jit(jax.grad(lambda x: jnp.sum(there_and_back(x) * weights)))(x)
    y, code = pool_loops(x.astype(np.float64))
    inner = pick_loops(weights, code) * (1 - np.tanh(y) ** 2)
    np.testing.assert_allclose(grad, unpool_loops(inner, code, size), atol=1e-6)


def test_second_derivative():
    x = image((5, 6), ties=False)

    def loss(x):
        return jnp.sum(there_and_back(x) ** 2)

    # loss = sum over windows of tanh(m)^2: the Hessian is diagonal at the maxima.
    product = jax.jit(jax.grad(lambda x: jnp.sum(jax.grad(loss)(x))))(x)
    y, code = pool_loops(x.astype(np.float64))
    t = np.tanh(y)
    want = unpool_loops(2 * (1 - t**2) * (1 - 3 * t**2), code, (5, 6))
    np.testing.assert_allclose(product, want, atol=1e-5)


def test_bfloat16_is_kept():
    x = jnp.asarray(image((5, 7), ties=True), jnp.bfloat16)
    y, code = pooling.max_pool(x)
    back = pooling.unpool(y, code, (5, 7))
    assert y.dtype == back.dtype == jnp.bfloat16
    grad = jax.grad(lambda x: there_and_back(x).astype(jnp.float32).sum())(x)
    assert grad.dtype == jnp.bfloat16
    want_y, want_code = pool_loops(np.asarray(x, np.float64))
    np.testing.assert_array_equal(np.asarray(y, np.float64), want_y)
    np.testing.assert_array_equal(code, want_code)


def test_jit_vmap_and_leading_axes_agree():
    x = jnp.stack([image((5, 7), ties=True, seed=s) for s in range(3)])
    want = there_and_back(x)
    for seen in (
        jax.jit(there_and_back)(x),
        jax.vmap(there_and_back)(x),
        jnp.stack([jnp.stack([there_and_back(v) for v in batch]) for batch in x]),
    ):
        np.testing.assert_allclose(seen, want, rtol=1e-6)
    grad = jax.grad(lambda x: there_and_back(x).sum())
    np.testing.assert_allclose(jax.jit(jax.vmap(grad))(x), grad(x), rtol=1e-6)


def test_nan_shows_in_its_own_window_only():
    x = image((4, 4), ties=False)
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        y, code = pooling.max_pool(jnp.asarray(x).at[0, i, j, 0].set(jnp.nan))
        back = pooling.unpool(y, code, (4, 4))
        assert np.argwhere(np.isnan(y)).tolist() == [[0, 0, 0, 0]]
        assert np.isnan(back).sum() == np.isnan(back[0, :2, :2, 0]).sum() == 1


def test_windows_of_minus_infinity():
    x = jnp.full((1, 3, 3, 1), -jnp.inf)
    y, code = pooling.max_pool(x)
    assert not code.any()
    np.testing.assert_array_equal(y, jnp.full((1, 2, 2, 1), -jnp.inf))


def test_the_only_residual_is_the_code():
    x = jnp.zeros((1, 8, 8, 4))
    _, pull = jax.vjp(pooling.max_pool, x)
    kept = [leaf for leaf in jax.tree.leaves(pull) if leaf.size > 1]
    assert [(leaf.shape, leaf.dtype) for leaf in kept] == [((1, 4, 4, 4), jnp.uint8)]


def test_bad_shapes_are_named():
    x = jnp.zeros((1, 5, 7, 2))
    y, code = pooling.max_pool(x)
    with pytest.raises(base.DataError, match=r"size \(8, 7\) pools to \(4, 4\)"):
        pooling.unpool(y, code, (8, 7))
    with pytest.raises(base.DataError, match="must have one shape"):
        pooling.unpool(y, code[..., :1], (5, 7))
    with pytest.raises(base.DataError, match=r"got float32\[5, 7\]"):
        pooling.max_pool(x[0, ..., 0])
    with pytest.raises(base.DataError, match="expected floats"):
        pooling.max_pool(x.astype(jnp.int32))
