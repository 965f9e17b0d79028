# SPDX-License-Identifier: Apache-2.0
"""SegNet: VGG-16's convolutions, mirrored, un-pooled by the encoder's locations.

Badrinarayanan, Kendall and Cipolla, "SegNet: A Deep Convolutional Encoder-Decoder
Architecture for Image Segmentation", 2017; Kendall, Badrinarayanan and Cipolla,
"Bayesian SegNet", 2017.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxprune.models import layers, pooling

DEPTHS = (2, 2, 3, 3, 3)
WIDTHS = (64, 128, 256, 512, 512)
# Stages whose output is dropped in the Bayesian network: the central ones.
_DROPPED = (3, 4, 5)


def conv_names() -> tuple[str, ...]:
    """The 25 convolutions before the classifier, in the order of `SegNet.widths`."""
    encoder = [f"encoder{s}_conv{i}" for s, i in _stages()]
    # decoder1 has one fewer: its last convolution is the classifier.
    decoder = [f"decoder{s}_conv{i}" for s, i in _decoder_stages()]
    return (*encoder, *decoder)


class SegNet(nn.Module):
    """SegNet, `[B, H, W, 3]` in [0, 1] -> logits float32 `[B, H, W, num_classes]`.

    Any size; pooling rounds up and un-pooling goes back to the exact size.

    Attributes:
      num_classes: K, number of classes.
      widths: of the 5 stages, mirrored by the decoder; or of all 25 convolutions, in
        the order of `conv_names()`, as a pruned network has them.
      dropout: rate behind the three central encoders and decoders (Bayesian SegNet:
        0.5); needs the rng 'dropout' in training, and with `sample=True`.
      dtype: of the computation; parameters, statistics and logits stay float32.

    Raises:
      ConfigError: widths or num_classes are malformed, or a decoder stage's last width
        differs from that of the encoder stage whose locations place its values.
      DataError: images are not floats [B, H, W, 3].
    """

    num_classes: int
    widths: Sequence[int] = WIDTHS
    dropout: float = 0.0
    dtype: Any = None

    def __post_init__(self) -> None:
        lengths = {5: "one a stage", 25: "one a convolution"}
        layers.check_widths("SegNet", self.widths, self.num_classes, lengths)
        ties = {f"decoder{s + 1}_conv{DEPTHS[s]}": _last(s) for s in range(1, 5)}
        layers.check_ties("SegNet", _by_name(self.widths), ties)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, images: jax.Array, train: bool = False, sample: bool = False
    ) -> jax.Array:
        """Logits. `sample` leaves dropout on at test time: one Monte-Carlo sample."""
        layers.check_images(images)
        width = _by_name(self.widths)

        def stage(x, coder, s, count):
            for i in range(1, count + 1):
                features = width[f"{coder}{s}_conv{i}"]
                x = layers.conv_bn(
                    x, f"{coder}{s}", i, features, train=train, dtype=self.dtype
                )
            return x

        def drop(x, s):
            if not self.dropout or s not in _DROPPED:
                return x
            return nn.Dropout(self.dropout, deterministic=not (train or sample))(x)

        x, codes, sizes = images, [], []
        for s in range(1, 6):
            x = stage(x, "encoder", s, DEPTHS[s - 1])
            sizes.append((x.shape[1], x.shape[2]))
            x, code = pooling.max_pool(x)
            codes.append(code)
            x = drop(x, s)
        for s in range(5, 0, -1):
            x = pooling.unpool(x, codes[s - 1], sizes[s - 1])
            x = stage(x, "decoder", s, DEPTHS[s - 1] - (s == 1))
            x = drop(x, s)
        logits = layers.conv(x, "classifier", self.num_classes, dtype=self.dtype)
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def rebuild(net: SegNet, variables: Mapping[str, Any]) -> SegNet:
    """The plain SegNet whose 25 widths are those that shrunk variables show.

    Raises:
      GraphError: a leaf is missing, or its shape does not fit the widths.
      ConfigError: tied widths differ.
    """
    small = net.clone(widths=layers.read_widths(variables, conv_names()))
    layers.check_fit(small, variables)
    return small


def _stages() -> list[tuple[int, int]]:
    return [(s + 1, i + 1) for s, depth in enumerate(DEPTHS) for i in range(depth)]


def _decoder_stages() -> list[tuple[int, int]]:
    return [
        (s, i + 1) for s in range(5, 0, -1) for i in range(DEPTHS[s - 1] - (s == 1))
    ]


def _last(stage: int) -> str:
    return f"encoder{stage}_conv{DEPTHS[stage - 1]}"


def _by_name(widths: Sequence[int]) -> dict[str, int]:
    """Widths of all 25 convolutions; a decoder stage ends in the width one stage up."""
    if len(widths) == 5:
        encoder = [widths[s - 1] for s, _ in _stages()]
        decoder = [
            widths[s - 2] if s > 1 and i == DEPTHS[s - 1] else widths[s - 1]
            for s, i in _decoder_stages()
        ]
        widths = (*encoder, *decoder)
    return dict(zip(conv_names(), widths, strict=True))
