# SPDX-License-Identifier: Apache-2.0
"""Fully convolutional networks on VGG-16.

Long, Shelhamer and Darrell, "Fully Convolutional Networks for Semantic Segmentation",
2015.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxprune import base
from jaxprune.models import layers

DEPTHS = (2, 2, 3, 3, 3)
WIDTHS = (64, 128, 256, 512, 512, 4096, 4096)
_STAGES = [(s, i) for s, depth in enumerate(DEPTHS, 1) for i in range(1, depth + 1)]
# Which stages are scored beside the last layer.
_SKIPS = {32: (), 16: (4,), 8: (4, 3)}


def conv_names() -> tuple[str, ...]:
    """The 15 convolutions before the scores, in the order of `FCN.widths`."""
    return (*(f"encoder{s}_conv{i}" for s, i in _STAGES), "fc_conv6", "fc_conv7")


class FCN(nn.Module):
    """FCN-8s, -16s or -32s, `[B, H, W, 3]` in [0, 1] -> float32 `[B, H, W, K]`.

    Unlike the paper's, convolutions keep the size (the paper pads the image by 100 and
    crops), each but the scores has batch norm, and scores are sampled up bilinearly,
    which is where the paper's learned ones begin. Any size; pooling rounds up.

    Attributes:
      num_classes: K, number of classes.
      widths: of the 5 stages, fc6 and fc7; or of all 15 convolutions, in the order of
        `conv_names()`, as a pruned network has them.
      stride: 8, 16 or 32, of the finest features that are scored.
      dropout: rate behind fc6 and fc7 (the paper: 0.5); needs the rng 'dropout' in
        training, and with `sample=True`.
      dtype: of the computation; parameters, statistics and logits stay float32.

    Raises:
      ConfigError: widths, num_classes or stride are malformed.
      DataError: images are not floats [B, H, W, 3].
    """

    num_classes: int
    widths: Sequence[int] = WIDTHS
    stride: int = 8
    dropout: float = 0.0
    dtype: Any = None

    def __post_init__(self) -> None:
        lengths = {7: "five stages, fc6 and fc7", 15: "one a convolution"}
        layers.check_widths("FCN", self.widths, self.num_classes, lengths)
        if self.stride not in _SKIPS:
            raise base.ConfigError(f"FCN: stride={self.stride!r}; one of 8, 16, 32")
        super().__post_init__()

    @nn.compact
    def __call__(
        self, images: jax.Array, train: bool = False, sample: bool = False
    ) -> jax.Array:
        """Logits. `sample` leaves dropout on at test time: one Monte-Carlo sample."""
        layers.check_images(images)
        width = _by_name(self.widths)

        def block(x, stage, index, kernel=3):
            features = width[f"{stage}_conv{index}"]
            return layers.conv_bn(
                x, stage, index, features, kernel=kernel, train=train, dtype=self.dtype
            )

        def score(x, name):
            return layers.conv(x, name, self.num_classes, kernel=1, dtype=self.dtype)

        x, pooled = images, {}
        for s, i in _STAGES:
            x = block(x, f"encoder{s}", i)
            if i == DEPTHS[s - 1]:
                x = nn.max_pool(x, (2, 2), (2, 2), "SAME")
                pooled[s] = x
        for index, kernel in ((6, 7), (7, 1)):
            x = block(x, "fc", index, kernel)
            if self.dropout:
                x = nn.Dropout(self.dropout, deterministic=not (train or sample))(x)
        x = score(x, "score")
        for s in _SKIPS[self.stride]:
            x = layers.resize(x, pooled[s]) + score(pooled[s], f"score{s}")
        x = layers.resize(x, images)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def rebuild(net: FCN, variables: Mapping[str, Any]) -> FCN:
    """The plain FCN whose 15 widths are those that shrunk variables show.

    Raises:
      GraphError: a leaf is missing, or its shape does not fit the widths.
    """
    small = net.clone(widths=layers.read_widths(variables, conv_names()))
    layers.check_fit(small, variables)
    return small


def _by_name(widths: Sequence[int]) -> dict[str, int]:
    if len(widths) == 7:
        widths = (*(widths[s - 1] for s, _ in _STAGES), *widths[5:])
    return dict(zip(conv_names(), widths, strict=True))
