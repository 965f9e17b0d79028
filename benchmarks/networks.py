# SPDX-License-Identifier: Apache-2.0
"""Three well-known classifiers, written plainly, to measure on; images `[B, H, W, 3]`.

ResNet-50 (He et al., 2016, with the stride in the 3x3 convolution), DenseNet-121 (Huang
et al., 2017), EfficientNet-B0 (Tan and Le, 2019); 1000 classes.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

# Trained parameters, as published.
PARAMETERS = {
    "ResNet-50": 25_557_032,
    "DenseNet-121": 7_978_856,
    "EfficientNet-B0": 5_288_548,
}


def _norm(x: Any, train: bool) -> Any:
    return nn.BatchNorm(use_running_average=not train)(x)


class ResNet50(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        x = nn.Conv(64, (7, 7), (2, 2), use_bias=False)(x)
        x = nn.max_pool(nn.relu(_norm(x, train)), (3, 3), (2, 2), "SAME")
        for stage, blocks in enumerate((3, 4, 6, 3)):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                x = _bottleneck(x, 64 * 2**stage, stride, train)
        return nn.Dense(1000)(x.mean(axis=(1, 2)))


def _bottleneck(x: Any, width: int, stride: int, train: bool) -> Any:
    y = nn.relu(_norm(nn.Conv(width, (1, 1), use_bias=False)(x), train))
    y = nn.Conv(width, (3, 3), (stride, stride), use_bias=False)(y)
    y = nn.relu(_norm(y, train))
    y = _norm(nn.Conv(4 * width, (1, 1), use_bias=False)(y), train)
    if x.shape != y.shape:
        x = nn.Conv(4 * width, (1, 1), (stride, stride), use_bias=False)(x)
        x = _norm(x, train)
    return nn.relu(x + y)


class DenseNet121(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        x = nn.Conv(64, (7, 7), (2, 2), use_bias=False)(x)
        x = nn.max_pool(nn.relu(_norm(x, train)), (3, 3), (2, 2), "SAME")
        for stage, layers in enumerate((6, 12, 24, 16)):
            if stage:
                x = nn.relu(_norm(x, train))
                x = nn.Conv(x.shape[-1] // 2, (1, 1), use_bias=False)(x)
                x = nn.avg_pool(x, (2, 2), (2, 2))
            for _ in range(layers):
                y = nn.relu(_norm(x, train))
                y = nn.Conv(128, (1, 1), use_bias=False)(y)
                y = nn.relu(_norm(y, train))
                y = nn.Conv(32, (3, 3), use_bias=False)(y)
                x = jnp.concatenate([x, y], axis=-1)
        return nn.Dense(1000)(nn.relu(_norm(x, train)).mean(axis=(1, 2)))


# Expansion, channels, blocks, stride, window.
_STAGES = (
    *((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3)),
    *((6, 112, 3, 1, 5), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3)),
)


class EfficientNetB0(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        x = nn.Conv(32, (3, 3), (2, 2), use_bias=False)(x)
        x = nn.silu(_norm(x, train))
        for expansion, width, blocks, first, window in _STAGES:
            for block in range(blocks):
                stride = 1 if block else first
                x = _mobile(x, expansion, width, stride, window, train)
        x = nn.silu(_norm(nn.Conv(1280, (1, 1), use_bias=False)(x), train))
        return nn.Dense(1000)(x.mean(axis=(1, 2)))


def _mobile(
    x: Any, expansion: int, width: int, stride: int, window: int, train: bool
) -> Any:
    y, wide = x, expansion * x.shape[-1]
    if expansion > 1:
        y = nn.silu(_norm(nn.Conv(wide, (1, 1), use_bias=False)(y), train))
    y = nn.Conv(
        wide,
        (window, window),
        (stride, stride),
        feature_group_count=wide,
        use_bias=False,
    )(y)
    y = nn.silu(_norm(y, train))
    gate = nn.silu(nn.Conv(x.shape[-1] // 4, (1, 1))(y.mean((1, 2), keepdims=True)))
    y = y * nn.sigmoid(nn.Conv(wide, (1, 1))(gate))
    y = _norm(nn.Conv(width, (1, 1), use_bias=False)(y), train)
    return x + y if x.shape == y.shape else y
