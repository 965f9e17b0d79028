# SPDX-License-Identifier: Apache-2.0
"""SegNet-Basic: four 7x7 encoders and decoders on a locally normalised image.

Badrinarayanan, Kendall and Cipolla, "SegNet: A Deep Convolutional Encoder-Decoder
Architecture for Image Segmentation", 2017, section 3.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxprune.models import layers, pooling


def conv_names() -> tuple[str, ...]:
    """The 8 convolutions before the classifier, in the order of `widths`."""
    encoder = [f"encoder{s}_conv1" for s in range(1, 5)]
    return (*encoder, *(f"decoder{s}_conv1" for s in range(4, 0, -1)))


class SegNetBasic(nn.Module):
    """SegNet-Basic, `[B, H, W, 3]` in [0, 1] -> float32 `[B, H, W, num_classes]`.

    Any size; pooling rounds up and un-pooling goes back to the exact size.

    Attributes:
      num_classes: K, number of classes.
      widths: one for all; or of the 4 encoders, mirrored by the decoders; or of all 8
        convolutions, in the order of `conv_names()`, as a pruned network has them.
      pixel_scale: multiplies the image inside the local response normalisation, whose
        constants the authors used on 0..255: 255.0 normalises as strongly as they did.
      dtype: of the computation; parameters, statistics and logits stay float32.

    Raises:
      ConfigError: widths or num_classes are malformed, or a decoder's width differs
        from that of the encoder whose locations place its values.
      DataError: images are not floats [B, H, W, 3].
    """

    num_classes: int
    widths: Sequence[int] = (64,)
    pixel_scale: float = 1.0
    dtype: Any = None

    def __post_init__(self) -> None:
        lengths = {1: "one for all", 4: "one an encoder", 8: "one a convolution"}
        layers.check_widths("SegNetBasic", self.widths, self.num_classes, lengths)
        ties = {f"decoder{s + 1}_conv1": f"encoder{s}_conv1" for s in range(1, 4)}
        layers.check_ties("SegNetBasic", _by_name(self.widths), ties)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        layers.check_images(images)
        width = _by_name(self.widths)

        def block(x, stage, relu):
            features = width[f"{stage}_conv1"]
            return layers.conv_bn(
                x,
                stage,
                1,
                features,
                kernel=7,
                train=train,
                relu=relu,
                dtype=self.dtype,
            )

        alpha = 1e-4 * self.pixel_scale**2
        x, codes, sizes = local_response_norm(images, alpha=alpha), [], []
        for s in range(1, 5):
            x = block(x, f"encoder{s}", relu=True)
            sizes.append((x.shape[1], x.shape[2]))
            x, code = pooling.max_pool(x)
            codes.append(code)
        for s in range(4, 0, -1):
            x = pooling.unpool(x, codes[s - 1], sizes[s - 1])
            x = block(x, f"decoder{s}", relu=False)
        x = layers.conv(x, "classifier", self.num_classes, kernel=1, dtype=self.dtype)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def local_response_norm(
    x: jax.Array, *, size: int = 5, alpha: float = 1e-4, beta: float = 0.75
) -> jax.Array:
    """`x / (1 + alpha / size * sum of x^2 over size neighbouring channels)^beta`.

    The window is centred on each channel and cut at the ends. [..., C] -> [..., C].

    Reference: Krizhevsky et al., "ImageNet Classification with Deep Convolutional
    Neural Networks", 2012, section 3.3, with caffe's alpha / size.
    """
    reach = size // 2
    pad = [(0, 0)] * (x.ndim - 1) + [(reach, size - 1 - reach)]
    squares = jnp.pad(jnp.square(x), pad)
    total = sum(squares[..., i : i + x.shape[-1]] for i in range(size))
    return x * (1 + alpha / size * total) ** -beta


def rebuild(net: SegNetBasic, variables: Mapping[str, Any]) -> SegNetBasic:
    """The plain SegNet-Basic whose 8 widths are those that shrunk variables show.

    Raises:
      GraphError: a leaf is missing, or its shape does not fit the widths.
      ConfigError: tied widths differ.
    """
    small = net.clone(widths=layers.read_widths(variables, conv_names()))
    layers.check_fit(small, variables)
    return small


def _by_name(widths: Sequence[int]) -> dict[str, int]:
    """Widths of all 8 convolutions; decoder s ends in the width of encoder s - 1."""
    if len(widths) == 1:
        widths = tuple(widths) * 4
    if len(widths) == 4:
        first, second, third, _ = widths
        widths = (*widths, third, second, first, first)
    return dict(zip(conv_names(), widths, strict=True))
