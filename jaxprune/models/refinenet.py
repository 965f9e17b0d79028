# SPDX-License-Identifier: Apache-2.0
"""RefineNet: features of a ResNet, refined from coarse to fine.

Lin, Milan, Shen and Reid, "RefineNet: Multi-Path Refinement Networks for
High-Resolution Semantic Segmentation", 2017.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxprune.models import layers, resnet

# The backbone's five, then those of the four refinements, from coarse to fine.
WIDTHS = (*resnet.WIDTHS, 512, 256, 256, 256)
_PATHS = (4, 3, 2, 1)


def conv_names(depths: Sequence[int] = resnet.DEPTHS) -> tuple[str, ...]:
    """All convolutions before the classifier, in the order of `RefineNet.widths`."""
    return (*resnet.conv_names(depths), *(n for p in _PATHS for n in _path(p)))


def _path(p: int) -> list[str]:
    """The convolutions of refinement p: units, fusion, chained pooling, unit."""
    names = [f"refine{p}_reduce"]
    # What comes from the path before has units of its own; the coarsest has none, and
    # with nothing to be fused with passes the fusion as it is.
    for source in ("near", "far")[: 1 if p == 4 else 2]:
        names += [f"refine{p}_{source}{u}_conv{i}" for u in (1, 2) for i in (1, 2)]
        names += [] if p == 4 else [f"refine{p}_{source}_fuse"]
    # Two more units before the classifier, the paper's end of the finest.
    last = [f"last{u}_conv{i}" for u in (1, 2) for i in (1, 2)] if p == 1 else []
    return [*names, *(f"refine{p}_{part}" for part in (*_REST, *last))]


_REST = ("pool1", "pool2", "out_conv1", "out_conv2")


def _fused(p: int) -> str:
    """The first of the convolutions whose outputs add up to refinement p's own."""
    return f"refine{p}_near_fuse" if p < 4 else f"refine{p}_reduce"


def _ties() -> dict[str, str]:
    """{convolution: the one to whose output its own is added}, by refinement."""
    ties = {}
    for p in _PATHS:
        fused = _fused(p)
        before = {"near": f"refine{p}_reduce", "far": _fused(p + 1)}
        for name in _path(p):
            if name.endswith("_far_fuse") or "_pool" in name:
                ties[name] = fused
            elif name.endswith("_conv2"):
                ties[name] = next((b for s, b in before.items() if s in name), fused)
    return ties


class RefineNet(nn.Module):
    """RefineNet, `[B, H, W, 3]` in [0, 1] -> logits float32 `[B, H, W, K]`.

    Any size. As in the paper, the refinements have no batch norm.

    Attributes:
      num_classes: K, number of classes.
      widths: of stem, four stages and four refinements, coarse to fine; or of all
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
        resnet.check_depths("RefineNet", self.depths)
        count = len(conv_names(self.depths))
        lengths = {9: "one a part", count: "one a convolution"}
        layers.check_widths("RefineNet", self.widths, self.num_classes, lengths)
        tied = resnet.ties(self.depths) | _ties()
        layers.check_ties("RefineNet", self._by_name(), tied, resnet.RESIDUAL)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        layers.check_images(images)
        width = self._by_name()

        def conv(x, name):
            return layers.conv(x, name, width[name], dtype=self.dtype)

        def unit(x, name):  # a residual convolution unit
            y = conv(nn.relu(x), f"{name}_conv1")
            return x + conv(nn.relu(y), f"{name}_conv2")

        def units(x, name):
            return unit(unit(x, f"{name}1"), f"{name}2")

        def fused(x, name):
            return conv(units(x, name), f"{name}_fuse")

        stages = resnet.features(
            images, width, self.depths, train=train, dtype=self.dtype
        )
        x: Any = None
        for p in _PATHS:
            near = conv(stages[p - 1], f"refine{p}_reduce")
            if x is None:
                near = units(near, f"refine{p}_near")
            else:
                near = fused(near, f"refine{p}_near")
                near = near + layers.resize(fused(x, f"refine{p}_far"), near)
            # Chained residual pooling.
            x = chained = nn.relu(near)
            for i in (1, 2):
                chained = nn.max_pool(chained, (5, 5), (1, 1), "SAME")
                chained = conv(chained, f"refine{p}_pool{i}")
                x = x + chained
            x = unit(x, f"refine{p}_out")
        x = units(x, "refine1_last")
        x = layers.conv(x, "classifier", self.num_classes, dtype=self.dtype)
        x = layers.resize(x, images)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))

    def _by_name(self) -> dict[str, int]:
        widths = list(self.widths)
        if len(widths) == 9:
            own = {p: widths[5 + i] for i, p in enumerate(_PATHS)}
            refined = [
                # Units of what comes from the path before are as wide as that.
                own[p + 1] if "_far" in name and "_fuse" not in name else own[p]
                for p in _PATHS
                for name in _path(p)
            ]
            widths = [*resnet.all_widths(widths[:5], self.depths), *refined]
        return dict(zip(conv_names(self.depths), widths, strict=True))


def rebuild(net: RefineNet, variables: Mapping[str, Any]) -> RefineNet:
    """The plain RefineNet whose widths are those that shrunk variables show.

    Raises:
      GraphError: a leaf is missing, or its shape does not fit the widths.
      ConfigError: tied widths differ.
    """
    small = net.clone(widths=layers.read_widths(variables, conv_names(net.depths)))
    layers.check_fit(small, variables)
    return small
