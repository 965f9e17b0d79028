# SPDX-License-Identifier: Apache-2.0
"""The four classifiers among the large networks, as nnx modules: as in `big_torch`."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

CLASSES = 11


def norm(width: int) -> nnx.BatchNorm:
    return nnx.BatchNorm(width, use_running_average=True, rngs=nnx.Rngs(0))


def conv(ins: int, outs: int, size: int, **options: Any) -> nnx.Conv:
    return nnx.Conv(
        ins, outs, (size, size), use_bias=False, rngs=nnx.Rngs(0), **options
    )


def halved(x: Any) -> Any:
    return nnx.max_pool(x, (3, 3), (2, 2), "SAME")


class ConvNorm(nnx.Module):
    """Convolution, batch norm and, unless told not to, ReLU."""

    def __init__(
        self, ins: int, outs: int, size: int = 3, relu: bool = True, **options: Any
    ) -> None:
        self.conv, self.norm = conv(ins, outs, size, **options), norm(outs)
        self.relu = relu

    def __call__(self, x: Any) -> Any:
        x = self.norm(self.conv(x))
        return nnx.relu(x) if self.relu else x


class Block(nnx.Module):
    """Residual: two 3x3, or 1x1, 3x3, 1x1 to four times the width."""

    def __init__(self, ins: int, width: int, stride: int, deep: bool) -> None:
        outs = 4 * width if deep else width
        first = [ConvNorm(ins, width, 1)] if deep else []
        middle = ConvNorm(width if deep else ins, width, strides=stride)
        last = ConvNorm(width, outs, 1 if deep else 3, relu=False)
        self.body = nnx.Sequential(*first, middle, last)
        same = ins == outs and stride == 1
        skip = None if same else ConvNorm(ins, outs, 1, False, strides=stride)
        self.skip = skip

    def __call__(self, x: Any) -> Any:
        return nnx.relu(self.body(x) + (x if self.skip is None else self.skip(x)))


class ResNet(nnx.Module):
    """ResNet-18 and -50."""

    def __init__(self, depths: Sequence[int], deep: bool) -> None:
        self.stem, ins, blocks = ConvNorm(3, 64, 7, strides=2), 64, []
        for s, depth in enumerate(depths):
            for i in range(depth):
                stride = 2 if s and i == 0 else 1
                blocks.append(Block(ins, 64 * 2**s, stride, deep))
                ins = 64 * 2**s * (4 if deep else 1)
        self.blocks = nnx.Sequential(*blocks)
        self.head = nnx.Linear(ins, CLASSES, rngs=nnx.Rngs(0))

    def __call__(self, x: Any) -> Any:
        return self.head(self.blocks(halved(self.stem(x))).mean((1, 2)))


class Dense(nnx.Module):
    """Norm, 1x1, norm, 3x3; the input and 32 more channels."""

    def __init__(self, ins: int) -> None:
        self.norm, self.narrow = norm(ins), ConvNorm(ins, 128, 1)
        self.conv = conv(128, 32, 3)

    def __call__(self, x: Any) -> Any:
        y = self.conv(self.narrow(nnx.relu(self.norm(x))))
        return jnp.concatenate([x, y], -1)


class Halve(nnx.Module):
    """Norm, 1x1 to half the channels, mean pooling."""

    def __init__(self, ins: int) -> None:
        self.norm, self.conv = norm(ins), conv(ins, ins // 2, 1)

    def __call__(self, x: Any) -> Any:
        return nnx.avg_pool(self.conv(nnx.relu(self.norm(x))), (2, 2), (2, 2))


class DenseNet(nnx.Module):
    """DenseNet-121."""

    def __init__(self) -> None:
        self.stem, width, layers = ConvNorm(3, 64, 7, strides=2), 64, []
        for s, depth in enumerate((6, 12, 24, 16)):
            for _ in range(depth):
                layers.append(Dense(width))
                width += 32
            if s < 3:
                layers.append(Halve(width))
                width //= 2
        self.layers, self.norm = nnx.Sequential(*layers), norm(width)
        self.head = nnx.Linear(width, CLASSES, rngs=nnx.Rngs(0))

    def __call__(self, x: Any) -> Any:
        x = self.layers(halved(self.stem(x)))
        return self.head(nnx.relu(self.norm(x)).mean((1, 2)))


class Shuffle(nnx.Module):
    """ShuffleNet v1's block of three groups: 1x1, shuffle, depthwise, 1x1."""

    def __init__(self, ins: int, outs: int, stride: int, groups: int) -> None:
        self.stride, new, mid = stride, outs - ins if stride == 2 else outs, outs // 4
        self.a = ConvNorm(ins, mid, 1, feature_group_count=groups)
        deep = {"strides": stride, "feature_group_count": mid}
        self.b = ConvNorm(mid, mid, 3, False, **deep)
        self.c = ConvNorm(mid, new, 1, False, feature_group_count=3)

    def __call__(self, x: Any) -> Any:
        y = self.a(x)
        y = y.reshape(*y.shape[:-1], 3, -1).swapaxes(-1, -2).reshape(y.shape)
        y = self.c(self.b(y))
        if self.stride == 1:
            return nnx.relu(x + y)
        x = nnx.avg_pool(x, (3, 3), (2, 2), "SAME")
        return nnx.relu(jnp.concatenate([x, y], -1))


class ShuffleNet(nnx.Module):
    """ShuffleNet v1 of three groups: 240, 480, 960 channels."""

    def __init__(self) -> None:
        self.stem, ins, blocks = ConvNorm(3, 24, strides=2), 24, []
        for width, depth in ((240, 4), (480, 8), (960, 4)):
            for i in range(depth):
                groups = 1 if ins == 24 else 3
                blocks.append(Shuffle(ins, width, 2 if i == 0 else 1, groups))
                ins = width
        self.blocks = nnx.Sequential(*blocks)
        self.head = nnx.Linear(ins, CLASSES, rngs=nnx.Rngs(0))

    def __call__(self, x: Any) -> Any:
        return self.head(self.blocks(halved(self.stem(x))).mean((1, 2)))
