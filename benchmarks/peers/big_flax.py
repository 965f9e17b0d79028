# SPDX-License-Identifier: Apache-2.0
"""The seven large networks in Flax: the same as in `big_torch`.

SegNet, U-Net and the VAE are linen modules, the others, of `big_nnx`, nnx ones: linen
traces each parameter's initialiser again when it is read, to check the shape, which is
more than half of the seconds that JAX's tracing of a ResNet takes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import big_nnx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from jaxprune import models

CLASSES, SIZE = 11, 64
# Of the data that they were made for: CamVid, cells, ImageNet, faces.
SIZES = {
    "SegNet": (360, 480),
    "U-Net": (512, 512),
    "ResNet-18": (224, 224),
    "ResNet-50": (224, 224),
    "DenseNet-121": (224, 224),
    "VAE with group norm": (256, 256),
    "ShuffleNet": (224, 224),
}


def conv(x: Any, width: int, size: int = 3, **options: Any) -> Any:
    return nn.Conv(width, (size, size), **options)(x)


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


LINEN = ("SegNet", "U-Net", "VAE with group norm")
BIG: dict[str, Callable[[], Any]] = {
    "SegNet": lambda: models.SegNet(CLASSES),
    "U-Net": lambda: models.UNet(CLASSES),
    "ResNet-18": lambda: big_nnx.ResNet((2, 2, 2, 2), False),
    "ResNet-50": lambda: big_nnx.ResNet((3, 4, 6, 3), True),
    "DenseNet-121": big_nnx.DenseNet,
    "VAE with group norm": VAE,
    "ShuffleNet": big_nnx.ShuffleNet,
}


def network(
    name: str, size: tuple[int, int] = (SIZE, SIZE)
) -> tuple[Callable[..., Any], Any, jax.ShapeDtypeStruct]:
    """The function, and shapes and dtypes of its variables and of its input."""
    like = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    if name in LINEN:
        net = BIG[name]()
        return net.apply, jax.eval_shape(net.init, jax.random.key(0), like), like
    definition, variables = nnx.split(nnx.eval_shape(BIG[name]))
    return lambda state, x: nnx.merge(definition, state)(x), variables, like
