# SPDX-License-Identifier: Apache-2.0
"""Networks that can be pruned, each rebuilt smaller from shrunk variables."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxprune import base
from jaxprune.models import pooling as pooling
from jaxprune.models import segnet
from jaxprune.models.pooling import max_pool, unpool
from jaxprune.models.segnet import SegNet

__all__ = ["SegNet", "build", "init", "max_pool", "rebuild", "unpool"]

_NAMES = ("segnet",)


def build(name: str, args: Mapping[str, Any]) -> nn.Module:
    """The network called `name`, 'segnet', with the fields `args`.

    args: e.g. `{'num_classes': 11, 'widths': [16, 32, 64, 128, 128]}`; a dtype may be
    given by name.

    Raises:
      ConfigError: no such network or field, or a field's value is out of range.
    """
    if name == "segnet":
        return _construct(SegNet, name, args)
    raise base.ConfigError(f"no network {name!r}; choose one of {', '.join(_NAMES)}")


def init(net: nn.Module, key: jax.Array, size: tuple[int, int]) -> dict[str, Any]:
    """Fresh variables `{'params': ..., 'batch_stats': ...}` for images of size (H, W)."""
    # Compiled as a whole, so that the forward pass, whose result is unused, falls away.
    return jax.jit(lambda k: net.init(k, jnp.zeros((1, *size, 3))))(key)


def rebuild(net: nn.Module, variables: Mapping[str, Any]) -> nn.Module:
    """The plain, smaller network of `net`'s kind that shrunk `variables` belong to.

    Raises:
      GraphError: the variables do not belong to such a network.
    """
    if isinstance(net, SegNet):
        return segnet.rebuild(net, variables)
    raise base.GraphError(
        f"cannot rebuild a {type(net).__name__}: not a shipped network"
    )


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
    if "widths" in values:
        values["widths"] = tuple(values["widths"])
    if isinstance(values.get("dtype"), str):
        values["dtype"] = jnp.dtype(values["dtype"])
    return kind(**values)
