# SPDX-License-Identifier: Apache-2.0
"""2x2 max pooling that remembers where each maximum was, and its inverse (SegNet).

The location is a 2-bit code per window, 0..3 in row-major order, and is the only thing
that the derivative keeps. Channels are the last axis and are never mixed.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune import base

Size = tuple[int, int]


def max_pool(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """2x2 max pooling, stride 2, with the location of each maximum.

    Odd sizes round up, as caffe does: the windows at the edge are smaller. Of equal
    values the first in row-major order wins, and the gradient goes there alone. A NaN
    makes its window's maximum NaN.

    Args:
      x: float[..., H, W, C].

    Returns:
      `(y, code)`: y[..., ceil(H/2), ceil(W/2), C] of x's dtype, and code, uint8 of y's
      shape: 2 * row + column of the maximum within its window.

    Raises:
      DataError: x has fewer than three axes, or is not of a floating dtype.

    Reference: Badrinarayanan et al., "SegNet: A Deep Convolutional Encoder-Decoder
    Architecture for Image Segmentation", 2017, section 3.
    """
    if x.ndim < 3 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise base.DataError(
            f"max_pool: expected floats [..., H, W, C], got {x.dtype}{list(x.shape)}"
        )
    return _max_pool(x, (x.shape[-3], x.shape[-2]))


def unpool(y: jax.Array, code: jax.Array, size: Size) -> jax.Array:
    """Puts each value where its maximum was, zeros elsewhere.

    Args:
      y: float[..., ceil(H/2), ceil(W/2), C].
      code: uint8 of y's shape, as `max_pool` returns it.
      size: (H, W) of the result: the size that was pooled.

    Returns:
      [..., H, W, C] of y's dtype.

    Raises:
      DataError: the shapes of y and code differ, or they do not belong to `size`.
    """
    height, width = size
    if y.shape != code.shape:
        raise base.DataError(
            f"unpool: values {list(y.shape)} and locations {list(code.shape)} must have"
            " one shape; were both cut by the same channels?"
        )
    if y.ndim < 3 or y.shape[-3:-1] != (-(-height // 2), -(-width // 2)):
        raise base.DataError(
            f"unpool: size ({height}, {width}) pools to ({-(-height // 2)}, "
            f"{-(-width // 2)}), which does not fit values of shape {list(y.shape)}"
        )
    return _unpool(y, code, (height, width))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _max_pool(x: jax.Array, size: Size) -> tuple[jax.Array, jax.Array]:
    a, b, c, d = _quarters(_pad_even(x, size, -jnp.inf))
    top, bottom = jnp.maximum(a, b), jnp.maximum(c, d)
    in_top = jnp.where(b > a, jnp.uint8(1), jnp.uint8(0))
    in_bottom = jnp.where(d > c, jnp.uint8(3), jnp.uint8(2))
    code = jnp.where(bottom > top, in_bottom, in_top)
    return jnp.maximum(top, bottom), code


def _max_pool_fwd(x, size):
    y, code = _max_pool(x, size)
    return (y, code), code


def _max_pool_bwd(size, code, cotangents):
    return (_unpool(cotangents[0], code, size),)


_max_pool.defvjp(_max_pool_fwd, _max_pool_bwd)


# With XLA on CPUs this costs what writing the result does. So do interior padding and
# repeating the values against a table of positions, within noise: this is the simplest.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _unpool(y: jax.Array, code: jax.Array, size: Size) -> jax.Array:
    *lead, h, w, c = y.shape
    a, b, c_, d = (jnp.where(code == k, y, jnp.zeros((), y.dtype)) for k in range(4))
    rows = jnp.stack([a, b], axis=-2), jnp.stack([c_, d], axis=-2)
    full = jnp.stack(rows, axis=-4).reshape(*lead, 2 * h, 2 * w, c)
    if size == (2 * h, 2 * w):
        return full
    return full[..., : size[0], : size[1], :]


def _unpool_fwd(y, code, size):
    return _unpool(y, code, size), code


def _unpool_bwd(size, code, cotangent):
    return _pick(cotangent, code, size), None


_unpool.defvjp(_unpool_fwd, _unpool_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _pick(x: jax.Array, code: jax.Array, size: Size) -> jax.Array:
    """The value at each window's location: the transpose of `_unpool`."""
    a, b, c, d = _quarters(_pad_even(x, size, 0))
    top, bottom = jnp.where(code == 0, a, b), jnp.where(code == 2, c, d)
    return jnp.where(code < 2, top, bottom)


def _pick_fwd(x, code, size):
    return _pick(x, code, size), code


def _pick_bwd(size, code, cotangent):
    return _unpool(cotangent, code, size), None


_pick.defvjp(_pick_fwd, _pick_bwd)


def _pad_even(x: jax.Array, size: Size, value: float) -> jax.Array:
    odd_h, odd_w = size[0] % 2, size[1] % 2
    if not (odd_h or odd_w):
        return x
    lead = [(0, 0, 0)] * (x.ndim - 3)
    padding = [*lead, (0, odd_h, 0), (0, odd_w, 0), (0, 0, 0)]
    return lax.pad(x, jnp.asarray(value, x.dtype), padding)


def _quarters(x: jax.Array) -> list[jax.Array]:
    """The four corners of all 2x2 windows, row-major: each [..., H/2, W/2, C]."""
    lead, (height, width, channels) = x.ndim - 3, x.shape[-3:]
    stop = (*x.shape[:-3], height, width, channels)
    strides = (*[1] * lead, 2, 2, 1)
    return [
        lax.slice(x, (*[0] * lead, i, j, 0), stop, strides)
        for i in (0, 1)
        for j in (0, 1)
    ]
