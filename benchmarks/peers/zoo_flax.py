# SPDX-License-Identifier: Apache-2.0
"""The zoo in Flax: one tiny network a construct, with a head that stays whole."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxprune.models import pooling

IMAGE, SEQUENCE = (2, 8, 8, 3), (2, 6, 3)


class Net(nn.Module):
    """What lies between the input and a head of three outputs."""

    body: Callable[[nn.Module, Any], Any]

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(3, name="head")(self.body(self, x))


def conv(x: Any, width: int = 8, size: int = 3, **options: Any) -> Any:
    return nn.relu(nn.Conv(width, (size, size), **options)(x))


def dense(x: Any, width: int = 8) -> Any:
    return nn.Dense(width)(x)


def free(m: nn.Module, *shape: int) -> Any:
    return m.param("w", lambda _: jnp.zeros(shape, jnp.float32))


def normalised(norm: Callable[[], nn.Module]) -> Callable[..., Any]:
    return lambda m, x: conv(norm()(conv(x)))


def transposed(m: nn.Module, x: Any) -> Any:
    return nn.relu(nn.ConvTranspose(6, (4, 4), (2, 2))(conv(x)))


def grouped_transposed(m: nn.Module, x: Any) -> Any:
    return lax.conv_general_dilated(
        conv(x),
        free(m, 4, 4, 4, 8),
        (1, 1),
        [(2, 2), (2, 2)],
        lhs_dilation=(2, 2),
        feature_group_count=2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def residual(m: nn.Module, x: Any) -> Any:
    x = conv(x)
    return x + conv(conv(x, 6))


def concatenated(m: nn.Module, x: Any) -> Any:
    return conv(jnp.concatenate([conv(x), conv(x, 6)], -1))


def chunked(m: nn.Module, x: Any) -> Any:
    left, right = jnp.split(conv(x), 2, -1)
    return jnp.concatenate([right, conv(left, 6)], -1)


def with_itself(m: nn.Module, x: Any) -> Any:
    x = conv(x)
    return jnp.concatenate([x, x], -1)


def flattened(m: nn.Module, x: Any) -> Any:
    return nn.relu(dense(conv(x).reshape(len(x), -1)))


def to_image(m: nn.Module, x: Any) -> Any:
    x = dense(x.mean((1, 2)), 2 * 2 * 8).reshape(-1, 2, 2, 8)
    return nn.relu(nn.ConvTranspose(6, (2, 2), (2, 2))(x))


def attention(m: nn.Module, x: Any) -> Any:
    x = dense(x)
    q, k, v = (dense(x).reshape(*x.shape[:2], 2, 4) for _ in range(3))
    weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2)
    return dense(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape))


def grouped_queries(m: nn.Module, x: Any) -> Any:
    """Two query heads read each head of keys and values."""
    x = dense(x)
    q = dense(x, 16).reshape(*x.shape[:2], 4, 4)
    k, v = (dense(x, 8).reshape(*x.shape[:2], 2, 4) for _ in range(2))
    k, v = (jnp.repeat(y, 2, axis=-2) for y in (k, v))
    weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2)
    return dense(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*x.shape[:2], 16))


def pixel_shuffle(m: nn.Module, x: Any) -> Any:
    b, h, w, _ = x.shape
    x = conv(x, 32).reshape(b, h, w, 8, 2, 2).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(b, 2 * h, 2 * w, 8)


def channel_shuffle(m: nn.Module, x: Any) -> Any:
    x = conv(conv(x), feature_group_count=2)
    x = x.reshape(*x.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(x.shape)
    return conv(x, feature_group_count=2)


def unpooled(m: nn.Module, x: Any) -> Any:
    y, code = pooling.max_pool(conv(x))
    return conv(pooling.unpool(conv(conv(y, 6)), code, x.shape[1:3]))


def tied_embedding(m: nn.Module, x: Any) -> Any:
    table = nn.Embed(11, 8)
    return table.attend(dense(nn.relu(dense(table(x), 6))))


def shared(m: nn.Module, x: Any) -> Any:
    layer = nn.Conv(8, (3, 3))
    return layer(nn.relu(layer(conv(x))))


def gated(m: nn.Module, x: Any) -> Any:
    x = conv(x)
    return x * nn.sigmoid(lax.stop_gradient(nn.Conv(8, (1, 1))(x)))


def squeezed(m: nn.Module, x: Any) -> Any:
    x = conv(x)
    gate = nn.relu(dense(x.mean((1, 2), keepdims=True), 4))
    return x * nn.sigmoid(dense(gate))


def recurrent(cell: Callable[..., Any]) -> Callable[..., Any]:
    def start(key: Any, shape: Any, dtype: Any) -> Any:
        del key, dtype
        return jnp.zeros(shape)

    return lambda m, x: nn.RNN(cell(8, carry_init=start))(dense(x))


def loop(m: nn.Module, x: Any) -> Any:
    """The same layer three times, in a loop of the program."""
    w = free(m, 8, 8)
    return lax.fori_loop(0, 3, lambda _, y: y + jnp.tanh(y @ w), dense(x))


ZOO: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "convolution": (lambda m, x: conv(conv(x)), IMAGE),
    "strided": (lambda m, x: conv(conv(x, strides=(2, 2))), IMAGE),
    "dilated": (lambda m, x: conv(conv(x, kernel_dilation=2)), IMAGE),
    "transposed": (transposed, IMAGE),
    "grouped": (lambda m, x: conv(conv(x), feature_group_count=2), IMAGE),
    "grouped transposed": (grouped_transposed, IMAGE),
    "depthwise": (lambda m, x: conv(conv(x), feature_group_count=8), IMAGE),
    "dense": (lambda m, x: nn.relu(dense(nn.relu(dense(x)))), SEQUENCE),
    "batch norm": (normalised(lambda: nn.BatchNorm(True)), IMAGE),
    "layer norm": (normalised(nn.LayerNorm), IMAGE),
    "group norm": (normalised(lambda: nn.GroupNorm(2)), IMAGE),
    "instance norm": (normalised(nn.InstanceNorm), IMAGE),
    "residual": (residual, IMAGE),
    "concatenation": (concatenated, IMAGE),
    "chunk and concatenation": (chunked, IMAGE),
    "slice": (lambda m, x: conv(x)[..., 2:6], IMAGE),
    "concatenation with itself": (with_itself, IMAGE),
    "flatten": (flattened, IMAGE),
    "reshape before a transposed convolution": (to_image, IMAGE),
    "attention": (attention, SEQUENCE),
    "attention, told its heads": (attention, SEQUENCE),
    "grouped queries": (grouped_queries, SEQUENCE),
    "pixel shuffle": (pixel_shuffle, IMAGE),
    "channel shuffle": (channel_shuffle, IMAGE),
    "max un-pooling": (unpooled, IMAGE),
    "tied embedding": (tied_embedding, (2, 6)),
    "weight sharing": (shared, IMAGE),
    "free parameter, matmul": (lambda m, x: nn.relu(x @ free(m, 3, 8)), SEQUENCE),
    "free parameter, einsum": (
        lambda m, x: nn.relu(jnp.einsum("btc,cd->btd", x, free(m, 3, 8))),
        SEQUENCE,
    ),
    "stop-gradient gate": (gated, IMAGE),
    "squeeze and excite": (squeezed, IMAGE),
    "gated linear unit": (lambda m, x: nn.glu(conv(x, 16)), IMAGE),
    "LSTM": (recurrent(nn.OptimizedLSTMCell), SEQUENCE),
    "GRU": (recurrent(nn.GRUCell), SEQUENCE),
    "loop": (loop, SEQUENCE),
}


def network(name: str) -> tuple[Callable[..., Any], Any, jax.ShapeDtypeStruct]:
    """The function, and shapes and dtypes of its variables and of its input."""
    body, shape = ZOO[name]
    dtype = jnp.int32 if name == "tied embedding" else jnp.float32
    net, like = Net(body), jax.ShapeDtypeStruct(shape, dtype)
    return net.apply, jax.eval_shape(net.init, jax.random.key(0), like), like
