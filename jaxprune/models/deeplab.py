# SPDX-License-Identifier: Apache-2.0
"""DeepLabv3+: atrous separable convolutions on a ResNet.

Chen, Zhu, Papandreou, Schroff and Adam, "Encoder-Decoder with Atrous Separable
Convolution for Semantic Image Segmentation", 2018.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxprune.models import layers, resnet

# The backbone's five, the pyramid's, the low-level features', the decoder's.
WIDTHS = (*resnet.WIDTHS, 256, 48, 256)
RATES = (6, 12, 18)  # at output stride 16
_HEAD = (
    "aspp_conv1",
    "aspp2_point",
    "aspp3_point",
    "aspp4_point",
    "pool_conv1",
    "aspp_conv2",
    "low_conv1",
    "decoder1_point",
    "decoder2_point",
)


def conv_names(depths: Sequence[int] = resnet.DEPTHS) -> tuple[str, ...]:
    """All convolutions that choose their width, in the order of `widths`.

    Depthwise ones have that of what they read, the classifier that of the classes.
    """
    return (*resnet.conv_names(depths), *_HEAD)


class DeepLabV3Plus(nn.Module):
    """DeepLabv3+, `[B, H, W, 3]` in [0, 1] -> logits float32 `[B, H, W, K]`.

    Output stride 16: the last stage is dilated. Any size.

    Attributes:
      num_classes: K, number of classes.
      widths: of stem, four stages, pyramid, low-level features and decoder; or of all
        convolutions in `conv_names(depths)`, as a pruned network has them.
      depths: blocks of the four stages, ResNet-50's by default.
      dtype: of the computation; parameters, statistics and logits stay float32.

    Raises:
      ConfigError: widths, depths or num_classes are malformed, or convolutions whose
        outputs are added up differ in width.
      DataError: images are not floats [B, H, W, 3].
    """

    num_classes: int
    widths: Sequence[int] = WIDTHS
    depths: Sequence[int] = resnet.DEPTHS
    dtype: Any = None

    def __post_init__(self) -> None:
        resnet.check_depths("DeepLabV3Plus", self.depths)
        count = len(conv_names(self.depths))
        lengths = {8: "one a part", count: "one a convolution"}
        layers.check_widths("DeepLabV3Plus", self.widths, self.num_classes, lengths)
        layers.check_ties(
            "DeepLabV3Plus", self._by_name(), resnet.ties(self.depths), resnet.RESIDUAL
        )
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        layers.check_images(images)
        width = self._by_name()
        more = {"train": train, "dtype": self.dtype}
        low, *_, x = resnet.features(
            images, width, self.depths, strides=(1, 2, 2, 1), **more
        )

        def point(x, stage, index):
            features = width[f"{stage}_conv{index}"]
            return layers.conv_bn(x, stage, index, features, kernel=1, **more)

        def separable(x, name, dilation=1):
            features = width[f"{name}_point"]
            return layers.separable(x, name, features, dilation=dilation, **more)

        pyramid = [point(x, "aspp", 1)]
        pyramid += [separable(x, f"aspp{i}", r) for i, r in enumerate(RATES, 2)]
        mean = point(x.mean(axis=(1, 2), keepdims=True), "pool", 1)
        pyramid.append(jnp.broadcast_to(mean, (*x.shape[:3], mean.shape[-1])))
        x = point(jnp.concatenate(pyramid, axis=-1), "aspp", 2)

        low = point(low, "low", 1)
        x = jnp.concatenate([layers.resize(x, low), low], axis=-1)
        for i in (1, 2):
            x = separable(x, f"decoder{i}")
        x = layers.conv(x, "classifier", self.num_classes, kernel=1, dtype=self.dtype)
        x = layers.resize(x, images)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))

    def _by_name(self) -> dict[str, int]:
        widths = list(self.widths)
        if len(widths) == 8:
            *stages, pyramid, low, decoder = widths
            head = [*[pyramid] * 6, low, decoder, decoder]
            widths = [*resnet.all_widths(stages, self.depths), *head]
        return dict(zip(conv_names(self.depths), widths, strict=True))


def rebuild(net: DeepLabV3Plus, variables: Mapping[str, Any]) -> DeepLabV3Plus:
    """The plain DeepLabv3+ whose widths are those that shrunk variables show.

    Raises:
      GraphError: a leaf is missing, or its shape does not fit the widths.
      ConfigError: tied widths differ.
    """
    small = net.clone(widths=layers.read_widths(variables, conv_names(net.depths)))
    layers.check_fit(small, variables)
    return small
