# SPDX-License-Identifier: Apache-2.0
"""ResNet's bottleneck stages, as a backbone of segmentation networks.

He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition", 2016; stages of
stride 1 are dilated instead, as in Chen et al., "Rethinking Atrous Convolution for
Semantic Image Segmentation", 2017.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax

from jaxprune import base
from jaxprune.models import layers

DEPTHS = (3, 4, 6, 3)  # ResNet-50
WIDTHS = (64, 256, 512, 1024, 2048)
RESIDUAL = "their outputs are added up"


def conv_names(depths: Sequence[int]) -> tuple[str, ...]:
    """Stem, then each block's three convolutions and each stage's projection."""
    names = ["stem_conv1"]
    for s, depth in enumerate(depths, 2):
        for b in range(1, depth + 1):
            names += [f"stage{s}_block{b}_conv{i}" for i in (1, 2, 3)]
        names.append(f"stage{s}_block1_conv4")
    return tuple(names)


def check_depths(net: str, depths: Sequence[int]) -> None:
    """Raises ConfigError unless there are four positive numbers of blocks."""
    numbers = [isinstance(d, int) and d > 0 for d in depths]
    if len(numbers) != 4 or not all(numbers):
        raise base.ConfigError(
            f"{net}: depths={depths!r}; must be four positive integers, the blocks of "
            "each stage"
        )


def ties(depths: Sequence[int]) -> dict[str, str]:
    """{last convolution of a block: its stage's projection}: they are added up."""
    return {
        f"stage{s}_block{b}_conv3": f"stage{s}_block1_conv4"
        for s, depth in enumerate(depths, 2)
        for b in range(1, depth + 1)
    }


def all_widths(widths: Sequence[int], depths: Sequence[int]) -> list[int]:
    """Of every convolution in `conv_names`, from those of the stem and four stages."""
    found = [widths[0]]
    for width, depth in zip(widths[1:], depths, strict=True):
        found += depth * [max(width // 4, 1), max(width // 4, 1), width]
        found.append(width)
    return found


def features(
    images: jax.Array,
    width: Mapping[str, int],
    depths: Sequence[int],
    *,
    strides: Sequence[int] = (1, 2, 2, 2),
    train: bool,
    dtype: Any = None,
) -> list[jax.Array]:
    """Of the four stages, at strides 4, 8, 16, 32; where one's is 1, it is dilated.

    From its second block on: what the stride would have left out is computed too, and
    all that it would not is the same, so that trained weights stay right. To be called
    inside a compact method. width: {name of a convolution: its features}.
    """

    def block(x, stage, index, **more):
        return layers.conv_bn(
            x,
            stage,
            index,
            width[f"{stage}_conv{index}"],
            train=train,
            dtype=dtype,
            **more,
        )

    x = block(images, "stem", 1, kernel=7, stride=2)
    x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    found, dilation = [], 1
    for s, (depth, stride) in enumerate(zip(depths, strides, strict=True), 2):
        first, dilation = dilation, dilation * (2 if s > 2 and stride == 1 else 1)
        for b in range(1, depth + 1):
            name, step = f"stage{s}_block{b}", stride if b == 1 else 1
            y = block(x, name, 1, kernel=1)
            y = block(y, name, 2, stride=step, dilation=first if b == 1 else dilation)
            y = block(y, name, 3, kernel=1, relu=False)
            if b == 1:
                x = block(x, name, 4, kernel=1, stride=step, relu=False)
            x = nn.relu(x + y)
        found.append(x)
    return found
