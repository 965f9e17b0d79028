# SPDX-License-Identifier: Apache-2.0
"""The zoo's networks: what lies between the images and a head of three channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.models import pooling


class Whole(nn.Module):
    """A body with a head of three channels, which are the network's output."""

    body: Callable[[nn.Module, Any], Any]

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(3, name="head")(self.body(self, x))


def conv(x: Any, width: int, name: str, size: int = 3, **kw: Any) -> Any:
    return nn.relu(nn.Conv(width, (size, size), name=name, **kw)(x))


def dense(x: Any, width: int, name: str) -> Any:
    return nn.Dense(width, name=name)(x)


def param(m: nn.Module, name: str, *shape: int, dtype: Any = jnp.float32) -> Any:
    return m.param(name, lambda _: jnp.zeros(shape, dtype))


def transposed(m: nn.Module, x: Any) -> Any:
    x = nn.ConvTranspose(5, (4, 4), (2, 2), name="b")(conv(x, 6, "a"))
    return nn.ConvTranspose(4, (3, 3), transpose_kernel=True, name="c")(x)


def linear_transposed(m: nn.Module, x: Any) -> Any:
    """The other lowering: the gradient of a convolution by its image."""
    x, kernel = conv(x, 6, "a"), param(m, "w", 3, 3, 5, 6)
    image = jax.ShapeDtypeStruct((*x.shape[:3], 5), x.dtype)
    back = jax.linear_transpose(
        lambda y: lax.conv_general_dilated(
            y, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        image,
    )
    return back(x)[0]


def grouped_transposed(m: nn.Module, x: Any) -> Any:
    return lax.conv_general_dilated(
        conv(x, 12, "a"),
        param(m, "w", 3, 3, 6, 10),
        (1, 1),
        [(2, 1), (2, 1)],
        lhs_dilation=(2, 2),
        feature_group_count=2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def batch_grouped(m: nn.Module, x: Any) -> Any:
    return lax.conv_general_dilated(
        conv(x, 5, "a"),
        param(m, "w", 3, 3, 5, 12),
        (1, 1),
        "SAME",
        batch_group_count=2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def channels_first(m: nn.Module, x: Any) -> Any:
    x = jnp.moveaxis(x, -1, 1)
    for name, ins, outs in (("w", 3, 6), ("v", 6, 5)):
        x = nn.relu(lax.conv(x, param(m, name, outs, ins, 3, 3), (1, 1), "SAME"))
    return jnp.moveaxis(x, 1, -1)


def blurred(m: nn.Module, x: Any) -> Any:
    """The same kernel for every channel."""
    kernel = jnp.tile(jnp.ones((3, 3, 1, 1)) / 9, (1, 1, 1, 6))
    return lax.conv_general_dilated(
        conv(x, 6, "a"),
        kernel.astype(x.dtype),
        (2, 2),
        "SAME",
        feature_group_count=6,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def kernel_per_image(m: nn.Module, x: Any) -> Any:
    """JAX makes one grouped convolution of the batch."""
    kernels = param(m, "w", 2, 3, 3, 3, 6)
    return jax.vmap(
        lambda image, kernel: lax.conv_general_dilated(
            image[None],
            kernel,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )[0]
    )(x, kernels)


def downhill(m: nn.Module, x: Any) -> Any:
    """A gradient within the network: the transpose of a grouped convolution."""
    layer = nn.Conv(10, (3, 3), feature_group_count=2, name="b")
    x = conv(x, 12, "a")
    start = layer(x)
    y, back = nn.vjp(lambda f, x: jnp.sum(jnp.tanh(f(x))), layer, x)
    return x - 0.1 * back(y)[1] + start.mean()


def separable(m: nn.Module, x: Any) -> Any:
    x = conv(x, 6, "a")
    x = conv(x, 12, "b", feature_group_count=6)
    return conv(x, 5, "c", 1)


def residual(m: nn.Module, x: Any) -> Any:
    x = conv(x, 6, "a")
    return x + conv(conv(x, 5, "b"), 6, "c")


def concatenated(m: nn.Module, x: Any) -> Any:
    both = jnp.concatenate([conv(x, 4, "a"), conv(x, 5, "b")], -1)
    return conv(both, 6, "c")


def chunked(m: nn.Module, x: Any) -> Any:
    left, right = jnp.split(conv(x, 8, "a"), 2, axis=-1)
    return jnp.concatenate([right, conv(left, 5, "b")], -1)


def with_itself(m: nn.Module, x: Any) -> Any:
    x = conv(x, 6, "a")
    return jnp.concatenate([x, x], -1)


def flattened(m: nn.Module, x: Any) -> Any:
    return nn.relu(dense(conv(x, 6, "a").reshape(len(x), -1), 7, "b"))


def unflattened(m: nn.Module, x: Any) -> Any:
    x = dense(x.mean((1, 2)), 2 * 2 * 6, "a").reshape(-1, 2, 2, 6)
    return nn.ConvTranspose(5, (2, 2), (2, 2), name="b")(x)


def short_rows(m: nn.Module, x: Any) -> Any:
    """Fewer channels than rows and columns."""
    x = dense(x.mean((1, 2)), 4 * 4 * 3, "a").reshape(-1, 4, 4, 3)
    return conv(x, 5, "b")


def normed_and_joined(m: nn.Module, x: Any) -> Any:
    """Norms over 4 groups of 3, of 6, and of 9 channels."""
    x = [
        nn.GroupNorm(4)(conv(x, width, name)) for width, name in ((12, "a"), (24, "b"))
    ]
    return nn.GroupNorm(4)(jnp.concatenate(x, -1))


def padded_shortcut(m: nn.Module, x: Any) -> Any:
    """The images themselves go on, with zeros for the channels that they lack."""
    more = 8 - x.shape[-1]
    return nn.relu(conv(x, 8, "a") + jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, more))))


def tokens(x: Any, name: str = "a") -> Any:
    return conv(x, 6, name, strides=(4, 4)).reshape(len(x), 4, 6)


def attention(m: nn.Module, x: Any) -> Any:
    attend = nn.MultiHeadDotProductAttention(2, qkv_features=8, out_features=7)
    return attend.clone(name="att", parent=m)(tokens(x))


def shared_heads(m: nn.Module, x: Any) -> Any:
    """Grouped queries: two query heads read each head of keys and values."""
    x = tokens(x)
    q = nn.DenseGeneral((4, 5), name="q")(x)
    k = jnp.repeat(nn.DenseGeneral((2, 5), name="k")(x), 2, axis=-2)
    v = jnp.repeat(nn.DenseGeneral((2, 7), name="v")(x), 2, axis=-2)
    weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
    x = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
    return nn.DenseGeneral(6, axis=(-2, -1), name="out")(x)


def heads_by_reshape(m: nn.Module, x: Any) -> Any:
    x = tokens(x)
    q, k, v = (dense(x, 10, n).reshape(*x.shape[:2], 2, 5) for n in "qkv")
    x = nn.dot_product_attention(q, k, v)
    return x.reshape(*x.shape[:2], 10)


def fused_heads(m: nn.Module, x: Any) -> Any:
    """Queries, keys and values of a head side by side, head by head."""
    x = tokens(x)
    y = dense(x, 2 * 3 * 5, "qkv").reshape(*x.shape[:2], 2, 15)
    q, k, v = jnp.split(y, 3, -1)
    return nn.dot_product_attention(q, k, v).reshape(*x.shape[:2], 10)


def windows(m: nn.Module, x: Any) -> Any:
    """Attention within shifted windows, with a table of relative positions."""
    x = conv(x, 6, "a")
    b, h, w, c = x.shape
    y = jnp.roll(x, (-1, -1), (1, 2)).reshape(b, h // 2, 2, w // 2, 2, c)
    y = y.transpose(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
    q, k, v = (nn.DenseGeneral((2, 5), name=n)(y) for n in "qkv")
    table = param(m, "table", 7, 2)[np.arange(4)[:, None] - np.arange(4) + 3]
    weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) + table.transpose(2, 0, 1))
    y = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
    y = nn.DenseGeneral(c, axis=(-2, -1), name="out")(y)
    y = y.reshape(b, h // 2, w // 2, 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
    return x + jnp.roll(y.reshape(b, h, w, c), (1, 1), (1, 2))


def rotary(m: nn.Module, x: Any) -> Any:
    x = tokens(x)
    q, k, v = (nn.DenseGeneral((2, 6), name=n)(x) for n in "qkv")
    angle = jnp.arange(4.0)[:, None, None] * jnp.array([1.0, 0.1, 0.01])

    def turned(x: Any) -> Any:
        left, right = jnp.split(x, 2, -1)
        parts = left * jnp.cos(angle) - right * jnp.sin(angle)
        return jnp.concatenate(
            [parts, right * jnp.cos(angle) + left * jnp.sin(angle)], -1
        )

    x = nn.dot_product_attention(turned(q), turned(k), v)
    return nn.DenseGeneral(6, axis=(-2, -1), name="out")(x)


def to_space(m: nn.Module, x: Any) -> Any:
    b, h, w, _ = x.shape
    x = conv(x, 24, "a").reshape(b, h, w, 2, 2, 6)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, 6)


def to_depth(m: nn.Module, x: Any) -> Any:
    b, h, w, _ = x.shape
    x = conv(x, 5, "a").reshape(b, h // 2, 2, w // 2, 2, 5)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // 2, w // 2, 20)
    return conv(x, 6, "b")


def shuffled(x: Any) -> Any:
    return x.reshape(*x.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(x.shape)


def shuffle(m: nn.Module, x: Any) -> Any:
    x = conv(conv(x, 12, "a"), 12, "b", feature_group_count=2)
    return conv(shuffled(x), 12, "c", feature_group_count=2)


def unpooled(m: nn.Module, x: Any) -> Any:
    y, code = pooling.max_pool(conv(x, 6, "a"))
    return pooling.unpool(conv(conv(y, 5, "b"), 6, "c"), code, x.shape[1:3])


def whole_numbers(x: Any) -> Any:
    return jnp.abs(5 * x[..., 0]).astype(int) % 11


def tied_embedding(m: nn.Module, x: Any) -> Any:
    table = nn.Embed(11, 6, name="emb")
    x = table(whole_numbers(x))
    return table.attend(dense(nn.relu(dense(x, 5, "b")), 6, "c"))


def shared(m: nn.Module, x: Any) -> Any:
    layer = nn.Conv(6, (3, 3), name="s")
    return layer(nn.relu(layer(conv(x, 6, "a"))))


def gated(m: nn.Module, x: Any) -> Any:
    x = conv(x, 6, "a")
    return x * nn.sigmoid(lax.stop_gradient(dense(x, 6, "b")))


def squeezed(m: nn.Module, x: Any) -> Any:
    x = conv(x, 6, "a")
    gate = nn.relu(dense(x.mean((1, 2), keepdims=True), 4, "b"))
    return x * nn.sigmoid(dense(gate, 6, "c"))


def resized(m: nn.Module, x: Any) -> Any:
    x = conv(x, 6, "a")
    big = jax.image.resize(x, (2, 11, 5, 6), "bilinear")
    return jax.image.resize(big, (2, 7, 7, 6), "nearest")


def summed_up(m: nn.Module, x: Any) -> Any:
    x = conv(x, 6, "a")
    return jnp.cumsum(x, 1) + lax.cummax(x, 2) + lax.cumprod(0.1 * x, 1)


def sorted_over_space(m: nn.Module, x: Any) -> Any:
    x = conv(x, 6, "a")
    best, where = lax.top_k(jnp.moveaxis(x, 1, -1), 3)
    largest = jnp.moveaxis(best + 0.1 * where, -1, 1)
    order = jnp.argsort(x, axis=1) + jnp.sort(x, axis=2)
    return order + largest.sum(1, keepdims=True)


def place(x: Any) -> Any:
    """An index that is known only when the network runs."""
    return jnp.argmax(x[0, :4, 0, 0])


def dynamic(m: nn.Module, x: Any) -> Any:
    y, i = conv(x, 6, "a"), place(x)
    part = lax.dynamic_slice_in_dim(y, i, 3, axis=1)
    return lax.dynamic_update_slice_in_dim(y, 2 * part, i, axis=1)


def scattered(m: nn.Module, x: Any) -> Any:
    y, i = conv(x, 6, "a"), place(x)
    y = y.at[:, i].add(conv(x, 6, "b")[:, 0]).at[:, :, i + 1].set(0.0)
    return y.at[:, jnp.array([1, 3])].multiply(2.0).at[0, i, i].max(0.5 * y[0, 1, 1])


def spectral(m: nn.Module, x: Any) -> Any:
    """Fourier modes, mixed by complex weights."""
    modes = jnp.fft.rfft2(conv(x, 6, "a"), axes=(1, 2))
    weights = param(m, "w", 3, 3, 6, 5) * (1 + 0.5j)
    low = jnp.einsum("bxyi,xyio->bxyo", modes[:, :3, :3], weights)
    mixed = jnp.zeros((*modes.shape[:3], 5), modes.dtype).at[:, :3, :3].set(low)
    return jnp.fft.irfft2(mixed, s=(8, 8), axes=(1, 2))


def unfolded(m: nn.Module, x: Any) -> Any:
    """Nine taps of every channel, gathered by a constant convolution."""
    taps = lax.conv_general_dilated_patches(
        conv(x, 6, "a"),
        (3, 3),
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return nn.relu(dense(taps, 5, "b"))


def gathered(m: nn.Module, x: Any) -> Any:
    y = conv(x, 6, "a")
    first = jnp.take(y, jnp.argsort(x[0, :, 0, 0]), axis=1)
    return first + jnp.take_along_axis(y, jnp.argsort(y, 2), axis=2)


def standardised(m: nn.Module, x: Any) -> Any:
    x, kernel = conv(x, 6, "a"), param(m, "w", 3, 3, 6, 5)
    mean, std = kernel.mean((0, 1, 2)), kernel.std((0, 1, 2))
    kernel = (kernel - mean) / (std + 1e-3)
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=numbers
    )


def two_pass(m: nn.Module, x: Any) -> Any:
    """Variances around means; the second of groups, without a scale of its own."""
    x = nn.relu(nn.LayerNorm(use_fast_variance=False)(conv(x, 6, "a")))
    norm = nn.GroupNorm(2, use_fast_variance=False, use_scale=False, use_bias=False)
    return nn.relu(norm(conv(x, 8, "b")))


def attended(m: nn.Module, x: Any) -> Any:
    """Attention over space, from the largest and the mean channel."""
    x = nn.relu(conv(x, 6, "a"))
    both = jnp.stack([x.max(-1), nn.sigmoid(x).mean(-1)], axis=-1)
    return x * nn.sigmoid(conv(both, 1, "gate"))


def quantised(m: nn.Module, x: Any) -> Any:
    for name, ins, outs in (("p", 3, 6), ("q", 6, 5)):
        whole = param(m, name, ins, outs, dtype=jnp.int8)
        kernel = whole.astype(x.dtype) * param(m, f"{name}_scale", outs)
        x = nn.relu(x @ kernel)
    return x


def halved(m: nn.Module, x: Any) -> Any:
    x = conv(x.astype(jnp.bfloat16), 6, "a", dtype=jnp.bfloat16)
    return conv(x, 5, "b", dtype=jnp.bfloat16).astype(jnp.float32)


CONSTANT = np.random.default_rng(0).normal(size=(6, 7)).astype(np.float32)


def with_constants(m: nn.Module, x: Any) -> Any:
    return (conv(x, 6, "a") * CONSTANT[:, 0]) @ CONSTANT + CONSTANT[0]


def masked_by_position(m: nn.Module, x: Any) -> Any:
    rows = jax.nn.one_hot(place(x), 8)[:, None, None]
    x = conv(x, 6, "a") * (jnp.arange(6) != 2)
    return x * (1 + rows) + jax.nn.one_hot(3, 6)


def normalised(layer: nn.Module, width: int = 6) -> Callable[..., Any]:
    return lambda m, x: layer.clone(parent=m, name="n")(conv(x, width, "a"))
