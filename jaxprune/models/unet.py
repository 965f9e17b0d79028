# SPDX-License-Identifier: Apache-2.0
"""U-Net with padded convolutions.

Ronneberger, Fischer and Brox, "U-Net: Convolutional Networks for Biomedical Image
Segmentation", 2015.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxprune.models import layers, pooling

WIDTHS = (64, 128, 256, 512, 1024)
_UP = ("transpose", "conv1", "conv2")


def conv_names() -> tuple[str, ...]:
    """The 22 convolutions before the classifier, in the order of `UNet.widths`."""
    down = [f"down{s}_conv{i}" for s in range(1, 6) for i in (1, 2)]
    up = [f"up{s}_{kind}" for s in range(4, 0, -1) for kind in _UP]
    return (*down, *up)


class UNet(nn.Module):
    """U-Net, `[B, H, W, 3]` in [0, 1] -> logits float32 `[B, H, W, num_classes]`.

    Unlike the paper's, convolutions are padded, so that logits cover the image. Any
    size: pooling rounds up, and what is sampled up is cropped to its skip.

    Attributes:
      num_classes: K, number of classes.
      widths: of the 5 resolutions; or of all 22 convolutions, in the order of
        `conv_names()`, as a pruned network has them.
      norm: batch norm behind each 3x3 convolution; the paper has none.
      dtype: of the computation; parameters, statistics and logits stay float32.

    Raises:
      ConfigError: widths or num_classes are malformed.
      DataError: images are not floats [B, H, W, 3].
    """

    num_classes: int
    widths: Sequence[int] = WIDTHS
    norm: bool = True
    dtype: Any = None

    def __post_init__(self) -> None:
        lengths = {5: "one a resolution", 22: "one a convolution"}
        layers.check_widths("UNet", self.widths, self.num_classes, lengths)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        layers.check_images(images)
        width = _by_name(self.widths)

        def twice(x, stage):
            for i in (1, 2):
                features = width[f"{stage}_conv{i}"]
                x = layers.conv_bn(
                    x, stage, i, features, train=train, norm=self.norm, dtype=self.dtype
                )
            return x

        def upsample(x, name):
            return nn.ConvTranspose(
                width[name],
                (2, 2),
                strides=(2, 2),
                kernel_init=layers.he_normal,
                dtype=self.dtype,
                name=name,
            )(x)

        x, skips = twice(images, "down1"), []
        for s in range(2, 6):
            skips.append(x)
            x, _ = pooling.max_pool(x)
            x = twice(x, f"down{s}")
        for s in range(4, 0, -1):
            skip = skips[s - 1]
            x = upsample(x, f"up{s}_transpose")
            x = x[:, : skip.shape[1], : skip.shape[2]]
            x = twice(jnp.concatenate([skip, x], axis=-1), f"up{s}")
        x = layers.conv(x, "classifier", self.num_classes, kernel=1, dtype=self.dtype)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def rebuild(net: UNet, variables: Mapping[str, Any]) -> UNet:
    """The plain U-Net whose 22 widths are those that shrunk variables show.

    Raises:
      GraphError: a leaf is missing, or its shape does not fit the widths.
    """
    small = net.clone(widths=layers.read_widths(variables, conv_names()))
    layers.check_fit(small, variables)
    return small


def _by_name(widths: Sequence[int]) -> dict[str, int]:
    """Widths of all 22 convolutions."""
    if len(widths) == 5:
        down = [w for w in widths for _ in (1, 2)]
        widths = (*down, *(w for w in widths[-2::-1] for _ in _UP))
    return dict(zip(conv_names(), widths, strict=True))
