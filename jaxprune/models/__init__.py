# SPDX-License-Identifier: Apache-2.0
"""Networks that can be pruned, each rebuilt smaller from shrunk variables."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxprune import base
from jaxprune.models import (
    deeplab,
    fcn,
    layers,
    refinenet,
    segnet,
    segnet_basic,
    unet,
)
from jaxprune.models.deeplab import DeepLabV3Plus
from jaxprune.models.encoders import import_encoder
from jaxprune.models.fcn import FCN
from jaxprune.models.pooling import max_pool, unpool
from jaxprune.models.refinenet import RefineNet
from jaxprune.models.segnet import SegNet
from jaxprune.models.segnet_basic import SegNetBasic
from jaxprune.models.unet import UNet

__all__ = [
    "FCN",
    "DeepLabV3Plus",
    "RefineNet",
    "SegNet",
    "SegNetBasic",
    "UNet",
    "build",
    "import_encoder",
    "init",
    "max_pool",
    "rebuild",
    "unpool",
]

_KINDS: dict[str, Any] = {
    "segnet": SegNet,
    "segnet_basic": SegNetBasic,
    "unet": UNet,
    "fcn": FCN,
    "deeplab": DeepLabV3Plus,
    "refinenet": RefineNet,
}
_REBUILD: dict[Any, Any] = {
    SegNet: segnet.rebuild,
    SegNetBasic: segnet_basic.rebuild,
    UNet: unet.rebuild,
    FCN: fcn.rebuild,
    DeepLabV3Plus: deeplab.rebuild,
    RefineNet: refinenet.rebuild,
}


def build(name: str, args: Mapping[str, Any]) -> nn.Module:
    """The network called `name` with the fields `args`.

    name: 'segnet', 'segnet_basic', 'unet', 'fcn', 'deeplab' or 'refinenet'.
    args: e.g. `{'num_classes': 11, 'widths': [16, 32, 64, 128, 128]}`; a dtype may be
    given by name.

    Raises:
      ConfigError: no such network or field, or a field's value is out of range.
    """
    if not isinstance(name, str) or name not in _KINDS:
        raise base.ConfigError(
            f"no network {name!r}; choose one of {', '.join(_KINDS)}"
        )
    return _construct(_KINDS[name], name, args)


def init(net: nn.Module, key: jax.Array, size: tuple[int, int]) -> dict[str, Any]:
    """Fresh variables `{'params': ..., 'batch_stats': ...}` for images of size (H, W).

    Distributed as `net.init` draws them (He-normal kernels), but not the same numbers.
    """
    images = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    return layers.draw(key, jax.eval_shape(net.init, key, images))


def rebuild(net: nn.Module, variables: Mapping[str, Any]) -> nn.Module:
    """The plain, smaller network of `net`'s kind that shrunk `variables` belong to.

    Raises:
      GraphError: the variables do not belong to such a network.
    """
    if type(net) not in _REBUILD:
        raise base.GraphError(
            f"cannot rebuild a {type(net).__name__}: not a shipped network"
        )
    return _REBUILD[type(net)](net, variables)


def _construct(kind: Any, name: str, args: Mapping[str, Any]) -> nn.Module:
    fields = [f for f in kind.__dataclass_fields__ if f not in ("parent", "name")]
    for field in args:
        if field not in fields:
            raise base.ConfigError(
                f"{name} has no field {field!r}; it has {', '.join(fields)}"
            )
    if "num_classes" not in args:
        raise base.ConfigError(f"{name} needs the field 'num_classes'")
    values = dict(args)
    for field in ("widths", "depths"):
        if field in values:
            values[field] = _numbers(name, field, values[field])
    if isinstance(values.get("dtype"), str):
        try:
            values["dtype"] = jnp.dtype(values["dtype"])
        except TypeError as error:
            raise base.ConfigError(f"{name}: dtype={values['dtype']!r}") from error
    for field, value in values.items():
        fits, need = _FIELDS.get(field, (None, ""))
        if fits and not fits(value):
            raise base.ConfigError(f"{name}: {field}={_short(value)}; must be {need}")
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise base.ConfigError(f"{name} with {_short(args)}: {error}") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# What constructors take as it is, and what it must be.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "norm": (lambda x: isinstance(x, bool), "true or false"),
    "dropout": (lambda x: _is_number(x) and 0 <= x < 1, "a rate in [0, 1)"),
    "pixel_scale": (lambda x: _is_number(x) and 0 < x < math.inf, "positive"),
    "dtype": (lambda x: x is None or jnp.issubdtype(x, jnp.floating), "of floats"),
}


def _numbers(name: str, field: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, list | tuple):
        return tuple(value)
    raise base.ConfigError(f"{name}: {field}={_short(value)}; must be a list")


def _short(value: Any) -> str:
    return f"{value!r:.80}"
