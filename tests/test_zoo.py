# SPDX-License-Identifier: Apache-2.0
"""A zoo: one small network a construct, each with the groups that it must have.

The groups are counted by hand, beside the network. So neither a wrong answer nor
"everything is frozen" passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from flax import nnx
from jax import lax

import jaxprune as jp
from jaxprune.models import pooling


class Net(NamedTuple):
    """`body(module, images)` between the input and a head, and its groups' sizes."""

    body: Callable[[nn.Module, Any], Any]
    groups: dict[str, int]
    tolerance: float = 1e-10
    rngs: tuple[str, ...] = ()


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


ZOO = {
    "convolution": Net(lambda m, x: conv(conv(x, 6, "a"), 5, "b"), {"a": 6, "b": 5}),
    "strided": Net(lambda m, x: conv(x, 6, "a", strides=(2, 2)), {"a": 6}),
    "dilated": Net(lambda m, x: conv(x, 6, "a", kernel_dilation=2), {"a": 6}),
    "transposed": Net(transposed, {"a": 6, "b": 5, "c": 4}),
    "transposed, the other way": Net(linear_transposed, {"a": 6, "w": 5}),
    # Of 12 channels in 2 groups, 6 pairs read and 6 pairs made; else 2 groups.
    "grouped": Net(
        lambda m, x: conv(conv(x, 12, "a"), 12, "b", feature_group_count=2),
        {"a": 6, "b": 6},
    ),
    # 2 read and 2 made are no more than the 4 groups, which go whole.
    "grouped, whole": Net(
        lambda m, x: conv(conv(x, 8, "a"), 8, "b", feature_group_count=4), {"a": 4}
    ),
    # Of the input nothing can be cut; of 4 channels a group, all.
    "grouped input": Net(
        lambda m, x: conv(x, 12, "a", feature_group_count=3), {"a": 4}
    ),
    "grouped transposed": Net(grouped_transposed, {"a": 6, "w": 5}),
    "batch groups": Net(batch_grouped, {"a": 5, "w": 6}),
    "blur": Net(blurred, {"a": 6}),
    "a kernel an image": Net(kernel_per_image, {"w": 6}),
    "gradient of a grouped convolution": Net(downhill, {"a": 6, "b": 5}),
    # The depthwise layer's two channels an input go with it.
    "depthwise": Net(separable, {"a": 6, "c": 5}),
    "channels first": Net(channels_first, {"w": 6, "v": 5}),
    "dense": Net(lambda m, x: nn.tanh(dense(x, 7, "a")), {"a": 7}),
    "batch norm": Net(normalised(nn.BatchNorm(use_running_average=True)), {"a": 6}),
    "layer norm": Net(normalised(nn.LayerNorm()), {"a": 6}),
    # Two groups of four: the same channel of both.
    "group norm": Net(normalised(nn.GroupNorm(2), 8), {"a": 4}),
    "instance norm": Net(
        normalised(nn.GroupNorm(num_groups=None, group_size=1)), {"a": 6}
    ),
    "residual": Net(residual, {"a": 6, "b": 5}),
    "concatenation": Net(concatenated, {"a": 4, "b": 5, "c": 6}),
    "chunks": Net(chunked, {"a": 4, "a#2": 4, "b": 5}),
    # What the slice leaves out can go too, by itself.
    "slice": Net(lambda m, x: conv(x, 8, "a")[..., 2:6], {"a": 4, "a#2": 4}),
    "concatenation with itself": Net(with_itself, {"a": 6}),
    "flatten": Net(flattened, {"a": 6, "b": 7}),
    "reshape to an image": Net(unflattened, {"a": 6, "b": 5}),
    # Heads; what queries and keys share; what values and the output share.
    "attention": Net(
        attention,
        {"a": 6, "att/query": 2, "att/query#2": 4, "att/value": 4, "att/out": 7},
    ),
    "grouped queries": Net(shared_heads, {"a": 6, "q": 2, "q#2": 5, "v": 7, "out": 6}),
    # Of each head the same channels go.
    "attention, heads by reshape": Net(heads_by_reshape, {"a": 6, "q": 5, "v": 5}),
    # The output goes with what it is added to.
    "windowed attention": Net(windows, {"a": 6, "q": 2, "q#2": 5, "v": 5}),
    # Of queries and keys, pairs that are turned together.
    "rotary positions": Net(rotary, {"a": 6, "q": 2, "q#2": 3, "v": 6, "out": 6}),
    "maxout": Net(
        lambda m, x: conv(x, 12, "a").reshape(2, 8, 8, 6, 2).max(-1), {"a": 6}
    ),
    "depth to space": Net(to_space, {"a": 6}),
    "space to depth": Net(to_depth, {"a": 5, "b": 6}),
    # Of b's 6 pairs the shuffle lays the first three beside the last three.
    "channel shuffle": Net(shuffle, {"a": 6, "b": 3, "c": 6}),
    "un-pooling": Net(unpooled, {"a": 6, "b": 5}),
    "tied embedding": Net(tied_embedding, {"emb": 6, "b": 5}),
    "weight sharing": Net(shared, {"a": 6}),
    "free parameter": Net(lambda m, x: nn.relu(x @ param(m, "w", 3, 6)), {"w": 6}),
    "einsum": Net(
        lambda m, x: jnp.einsum(
            "bchw,dc->bhwd", jnp.moveaxis(x, 3, 1), param(m, "w", 6, 3)
        ),
        {"w": 6},
    ),
    "stopped gradient": Net(gated, {"a": 6}),
    "squeeze and excite": Net(squeezed, {"a": 6, "b": 4}),
    "gated linear unit": Net(lambda m, x: nn.glu(conv(x, 12, "a")), {"a": 6}),
    "resize": Net(resized, {"a": 6}),
    "cumulative sum": Net(summed_up, {"a": 6}),
    "sort": Net(sorted_over_space, {"a": 6}),
    "dynamic slices": Net(dynamic, {"a": 6}),
    "scatter": Net(scattered, {"a": 6}),
    "gather": Net(gathered, {"a": 6}),
    "spectral": Net(spectral, {"a": 6, "w": 5}),
    "patches": Net(unfolded, {"a": 6, "b": 5}),
    "reflection": Net(
        lambda m, x: jnp.pad(
            conv(x, 6, "a"), ((0, 0), (1, 1), (2, 1), (0, 0)), mode="reflect"
        ),
        {"a": 6},
    ),
    # Without a's channels the standardised kernel would be another one.
    "weight standardisation": Net(standardised, {"w": 5}),
    "quantised weights": Net(quantised, {"p": 6, "q": 5}),
    "half precision": Net(halved, {"a": 6, "b": 5}, 0.05),
    # The head's inputs go with the constant's columns.
    "constants": Net(with_constants, {"a": 6, "head": 7}),
    "positions": Net(masked_by_position, {"a": 6}),
    "dropout": Net(
        lambda m, x: nn.Dropout(0.5, deterministic=False)(conv(x, 6, "a")),
        {"a": 6},
        rngs=("dropout",),
    ),
}


class NnxZoo(nnx.Module):
    """Convolutions, depthwise and grouped, group norm, attention, a head."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.a = nnx.Conv(3, 6, (3, 3), rngs=rngs)
        self.b = nnx.Conv(6, 6, (3, 3), feature_group_count=6, rngs=rngs)
        self.c = nnx.Conv(6, 12, (1, 1), rngs=rngs)
        self.d = nnx.Conv(12, 10, (3, 3), (4, 4), feature_group_count=2, rngs=rngs)
        self.norm = nnx.GroupNorm(10, num_groups=2, rngs=rngs)
        self.att = nnx.MultiHeadAttention(2, 10, 8, rngs=rngs, decode=False)
        self.head = nnx.Linear(10, 3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = nnx.relu(self.c(nnx.relu(self.b(self.a(x)))))
        x = self.norm(self.d(x)).reshape(len(x), 4, 10)
        return self.head(self.att(x))


# Convolution d: 6 pairs read, 5 made, which the norm ties no more than they are.
NNX_GROUPS = {"a": 6, "c": 6, "d": 5, "att/query": 2, "att/query#2": 4}
NNX_GROUPS |= {"att/value": 4, "att/out": 10}


def randomised(shapes: Any) -> Any:
    """Variables at which nothing is accidentally zero; integers where they are."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda a, x: rng.integers(1, 9, x.shape, x.dtype) if x.dtype == "int8" else a,
        networks.randomised(shapes, 0),
        shapes,
    )


def half(graph: jp.Graph) -> dict[str, np.ndarray]:
    """Of every group, half the channels at random."""
    rng = np.random.default_rng(2)
    return {n: rng.permutation(g.size) >= g.size // 2 for n, g in graph.groups.items()}


def check_law(
    apply: Any, graph: jp.Graph, variables: Any, x: Any, tolerance: float, **kw: Any
) -> None:
    """Slim's law in float64, on a masked network that depends on its input."""
    with jax.enable_x64(True):

        def double(a: Any) -> Any:
            return a if a.dtype == "int8" else np.asarray(a, np.float64)

        keep, variables, x = half(graph), jax.tree.map(double, variables), double(x)
        masked = jax.jit(lambda v, x: apply(v, x, **kw))
        slim = jax.jit(lambda v, x: jp.slim(apply, graph, keep)(v, x, **kw))
        zeroed = jp.mask(graph, keep, variables)
        want = np.asarray(masked(zeroed, x))
        got = np.asarray(slim(jp.shrink(graph, keep, variables), x))
        other = np.asarray(masked(zeroed, 1.5 * x + 0.3))
    scale = np.abs(want).max()
    assert np.abs(want - other).max() > 1e-3 * scale
    assert np.abs(want - got).max() < tolerance * scale


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo(name: str) -> None:
    net = ZOO[name]
    module, x = Whole(net.body), networks.images(0)
    rngs = {r: jax.random.key(3) for r in net.rngs}
    shapes = jax.eval_shape(module.init, {"params": jax.random.key(0), **rngs}, x)
    variables = randomised(shapes)
    kw = {"rngs": rngs} if rngs else {}
    graph = jp.trace(module.apply, variables, x, **kw)
    assert {n: g.size for n, g in graph.groups.items()} == net.groups, str(graph)
    check_law(module.apply, graph, variables, x, net.tolerance, **kw)


def test_the_zoo_in_nnx() -> None:
    definition, state = nnx.split(NnxZoo(nnx.Rngs(0)))

    def apply(state: Any, x: Any) -> Any:
        return nnx.merge(definition, state)(x)

    variables, x = networks.randomised(state, 0), networks.images(0)
    graph = jp.trace(apply, variables, x)
    assert {n: g.size for n, g in graph.groups.items()} == NNX_GROUPS, str(graph)
    check_law(apply, graph, variables, x, 1e-10)


def test_weight_standardisation_can_be_asked_for() -> None:
    module, x = Whole(standardised), networks.images(0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    graph = jp.trace(module.apply, shapes, x, exact=False)
    found = {n: (g.size, g.exact) for n, g in graph.groups.items()}
    assert found == {"a": (6, False), "w": (5, True)}


@pytest.mark.parametrize(("width", "groups"), [(12, 2), (8, 4)])
def test_a_cut_grouped_convolution_costs_what_a_small_one_does(
    width: int, groups: int
) -> None:
    """Half the channels of every group, or half the groups."""

    def cost(width: int, groups: int, cut: bool = False) -> jp.Cost:
        def body(m: nn.Module, x: Any) -> Any:
            x = conv(x, width, "a")
            return conv(x, width, "b", feature_group_count=groups)

        module, x = Whole(body), networks.images(0)
        shapes = jax.eval_shape(module.init, jax.random.key(0), x)
        graph = jp.trace(module.apply, shapes, x)
        return jp.cost(graph, half(graph) if cut else None)

    small = (width // 2, groups if width == 12 else groups // 2)
    assert cost(width, groups, cut=True) == cost(*small)
