# SPDX-License-Identifier: Apache-2.0
"""The seven large networks in Flax: the same as in `big_torch`."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxprune import models

CLASSES, SIZE = 11, 64


def conv(x: Any, width: int, size: int = 3, **options: Any) -> Any:
    return nn.Conv(width, (size, size), **options)(x)


def normed(x: Any, width: int, size: int = 3, relu: bool = True, **more: Any) -> Any:
    x = nn.BatchNorm(True)(conv(x, width, size, use_bias=False, **more))
    return nn.relu(x) if relu else x


def halved(x: Any) -> Any:
    return nn.max_pool(x, (3, 3), (2, 2), "SAME")


def bottleneck(x: Any, width: int, stride: int, deep: bool) -> Any:
    outs = 4 * width if deep else width
    y = normed(x, width, 1) if deep else x
    y = normed(y, width, strides=stride)
    y = normed(y, outs, 1 if deep else 3, relu=False)
    if x.shape != y.shape:
        x = normed(x, outs, 1, relu=False, strides=stride)
    return nn.relu(x + y)


class ResNet(nn.Module):
    depths: Sequence[int]
    deep: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = halved(normed(x, 64, 7, strides=2))
        for s, depth in enumerate(self.depths):
            for i in range(depth):
                x = bottleneck(x, 64 * 2**s, 2 if s and i == 0 else 1, self.deep)
        return nn.Dense(CLASSES)(x.mean((1, 2)))


class DenseNet(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        def norm(x: Any) -> Any:
            return nn.relu(nn.BatchNorm(True)(x))

        x = halved(normed(x, 64, 7, strides=2))
        for s, depth in enumerate((6, 12, 24, 16)):
            for _ in range(depth):
                y = conv(normed(norm(x), 128, 1), 32, use_bias=False)
                x = jnp.concatenate([x, y], -1)
            if s < 3:
                x = conv(norm(x), x.shape[-1] // 2, 1, use_bias=False)
                x = nn.avg_pool(x, (2, 2), (2, 2))
        return nn.Dense(CLASSES)(norm(x).mean((1, 2)))


def norm_block(x: Any, width: int) -> Any:
    y = conv(nn.silu(nn.GroupNorm(8)(x)), width)
    y = conv(nn.silu(nn.GroupNorm(8)(y)), width)
    return (x if x.shape == y.shape else conv(x, width, 1)) + y


class VAE(nn.Module):
    widths: Sequence[int] = (64, 128, 256)

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = conv(x, self.widths[0])
        for width in (*self.widths[1:], self.widths[-1]):
            x = nn.avg_pool(norm_block(x, width), (2, 2), (2, 2))
        mean, spread = jnp.split(conv(x, 8), 2, -1)
        x = conv(mean + 0.1 * jnp.exp(0.5 * spread), self.widths[-1])
        for width in self.widths[::-1]:
            x = norm_block(x.repeat(2, 1).repeat(2, 2), width)
        return conv(nn.silu(nn.GroupNorm(8)(x)), 3)


def shuffle_block(x: Any, outs: int, stride: int, groups: int) -> Any:
    mid, new = outs // 4, outs - x.shape[-1] if stride == 2 else outs
    y = normed(x, mid, 1, feature_group_count=groups)
    y = y.reshape(*y.shape[:-1], 3, -1).swapaxes(-1, -2).reshape(y.shape)
    y = normed(y, mid, relu=False, strides=stride, feature_group_count=mid)
    y = normed(y, new, 1, relu=False, feature_group_count=3)
    if stride == 1:
        return nn.relu(x + y)
    return nn.relu(jnp.concatenate([nn.avg_pool(x, (3, 3), (2, 2), "SAME"), y], -1))


class ShuffleNet(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = halved(normed(x, 24, strides=2))
        for width, depth in ((240, 4), (480, 8), (960, 4)):
            for i in range(depth):
                groups = 1 if x.shape[-1] == 24 else 3
                x = shuffle_block(x, width, 2 if i == 0 else 1, groups)
        return nn.Dense(CLASSES)(x.mean((1, 2)))


BIG: dict[str, Callable[[], nn.Module]] = {
    "SegNet": lambda: models.SegNet(CLASSES),
    "U-Net": lambda: models.UNet(CLASSES),
    "ResNet-18": lambda: ResNet((2, 2, 2, 2), deep=False),
    "ResNet-50": lambda: ResNet((3, 4, 6, 3), deep=True),
    "DenseNet-121": DenseNet,
    "VAE with group norm": VAE,
    "ShuffleNet": ShuffleNet,
}


def network(name: str) -> tuple[nn.Module, jax.ShapeDtypeStruct]:
    """The module, and the shape and dtype of its input."""
    return BIG[name](), jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
