# SPDX-License-Identifier: Apache-2.0
"""What the shipped networks share: convolutions, initial values, checks, widths."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxprune import base

# Caffe's "msra" filler: a Gaussian that is not truncated.
he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def conv_bn(
    x: jax.Array,
    stage: str,
    index: int,
    features: int,
    *,
    train: bool,
    relu: bool = True,
    norm: bool = True,
    dtype: Any = None,
    **geometry: Any,
) -> jax.Array:
    """Convolution `<stage>_conv<index>`, batch norm `<stage>_bn<index>` and ReLU.

    To be called inside a compact method. x: [B, H, W, C] -> [B, H, W, features];
    geometry: as of `conv`.
    """
    x = conv(x, f"{stage}_conv{index}", features, dtype=dtype, **geometry)
    if norm:
        x = batch_norm(x, f"{stage}_bn{index}", train=train, dtype=dtype)
    return nn.relu(x) if relu else x


def batch_norm(x: jax.Array, name: str, *, train: bool, dtype: Any = None) -> jax.Array:
    """Batch norm over all axes but the last, with running statistics."""
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        dtype=dtype,
        name=name,
    )(x)


def conv(
    x: jax.Array,
    name: str,
    features: int,
    *,
    kernel: int = 3,
    stride: int = 1,
    dilation: int = 1,
    depthwise: bool = False,
    dtype: Any = None,
) -> jax.Array:
    """A square convolution with bias, He-normal ('msra') init.

    The size stays but for the stride, by which it is divided, rounding up.
    """
    return nn.Conv(
        features,
        (kernel, kernel),
        strides=stride,
        kernel_dilation=dilation,
        padding=dilation * (kernel // 2),
        feature_group_count=features if depthwise else 1,
        kernel_init=he_normal,
        dtype=dtype,
        name=name,
    )(x)


def separable(
    x: jax.Array,
    name: str,
    features: int,
    *,
    dilation: int = 1,
    train: bool,
    dtype: Any = None,
) -> jax.Array:
    """Depthwise 3x3 `<name>_depth` and pointwise `<name>_point`, each normed, ReLU."""
    own = f"{name}_depth"
    x = conv(x, own, x.shape[-1], dilation=dilation, depthwise=True, dtype=dtype)
    x = nn.relu(batch_norm(x, f"{own}_bn", train=train, dtype=dtype))
    own = f"{name}_point"
    x = conv(x, own, features, kernel=1, dtype=dtype)
    return nn.relu(batch_norm(x, f"{own}_bn", train=train, dtype=dtype))


def resize(x: jax.Array, like: jax.Array) -> jax.Array:
    """Bilinear, to the height and width of `like`."""
    if x.shape[1:3] == like.shape[1:3]:
        return x
    shape = (x.shape[0], *like.shape[1:3], x.shape[-1])
    return jax.image.resize(x, shape, "bilinear")


def draw(key: jax.Array, shapes: Any) -> Any:
    """Initial variables of a tree of shapes: kernels He-normal, the rest constant.

    All kernels are cut from one draw: a draw each takes XLA several times as long to
    compile, which for SegNet is longer than the first training step.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    sizes = [math.prod(leaf.shape) if _is_kernel(path) else 0 for path, leaf in leaves]
    starts = list(itertools.accumulate(sizes, initial=0))

    def fill(key: jax.Array) -> list[jax.Array]:
        normal = jax.random.normal(key, (starts[-1],), jnp.float32)
        return [
            normal[start : start + size].reshape(leaf.shape) * _he_scale(leaf.shape)
            if size
            else jnp.full(leaf.shape, _constant(path), leaf.dtype)
            for (path, leaf), start, size in zip(leaves, starts, sizes, strict=False)
        ]

    return jax.tree_util.tree_unflatten(tree, jax.jit(fill)(key))


def _is_kernel(path: tuple[Any, ...]) -> bool:
    return path[-1].key == "kernel"


def _constant(path: tuple[Any, ...]) -> float:
    return float(path[-1].key in ("scale", "var"))


def _he_scale(shape: tuple[int, ...]) -> float:
    return math.sqrt(2 / math.prod(shape[:-1]))


def check_images(images: jax.Array, channels: int = 3) -> None:
    """Raises DataError unless images are floats [B, H, W, channels]."""
    shape = list(images.shape)
    if len(shape) != 4:
        raise base.DataError(
            f"expected images [B, H, W, {channels}], got shape {shape}; a single image"
            " needs a batch axis: images[None]"
        )
    if shape[-1] != channels:
        raise base.DataError(
            f"expected images with {channels} channels in the last axis, got {shape}"
        )
    if 0 in shape:
        raise base.DataError(f"images of shape {shape} are empty")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise base.DataError(
            f"expected images as floats in [0, 1], got {images.dtype}; "
            "divide 8-bit images by 255"
        )


def check_widths(
    net: str, widths: Sequence[int], num_classes: int, lengths: Mapping[int, str]
) -> None:
    """Raises ConfigError unless widths are positive integers and `len` is in lengths.

    lengths: {valid length: what the entries are}, for the message.
    """
    if not isinstance(num_classes, int) or num_classes < 1:
        raise base.ConfigError(f"{net}: num_classes={num_classes!r}; must be 1 or more")
    if not isinstance(widths, Sequence) or len(widths) not in lengths:
        valid = ", or ".join(f"{n} ({what})" for n, what in lengths.items())
        raise base.ConfigError(f"{net}: widths={widths!r}; must have length {valid}")
    for i, width in enumerate(widths):
        if not isinstance(width, int) or isinstance(width, bool) or width < 1:
            raise base.ConfigError(
                f"{net}: widths[{i}]={width!r}; must be a positive integer"
            )


def check_ties(
    net: str,
    widths: Mapping[str, int],
    ties: Mapping[str, str],
    why: str = "the locations of one place the values of the other",
) -> None:
    """Raises ConfigError unless the convolutions of each tie have one width."""
    for a, b in ties.items():
        if widths[a] != widths[b]:
            raise base.ConfigError(
                f"{net}: widths of {a} ({widths[a]}) and {b} ({widths[b]}) must be "
                f"equal: {why}"
            )


def read_widths(variables: Mapping[str, Any], names: Sequence[str]) -> tuple[int, ...]:
    """The numbers of output channels of the named convolutions' kernels.

    Raises GraphError naming the first kernel that is missing.
    """
    params = variables.get("params", {})
    for name in names:
        if name not in params or "kernel" not in params[name]:
            raise base.GraphError(f"variables have no leaf params/{name}/kernel")
    return tuple(int(params[name]["kernel"].shape[-1]) for name in names)


def check_fit(net: nn.Module, variables: Mapping[str, Any]) -> None:
    """Raises GraphError naming the first leaf whose shape is not what `net` expects."""
    images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    want = _shapes(jax.eval_shape(net.init, jax.random.key(0), images))
    seen = _shapes(
        {c: variables[c] for c in ("params", "batch_stats") if c in variables}
    )
    for path in sorted(want.keys() | seen.keys()):
        if want.get(path) != seen.get(path):
            raise base.GraphError(
                f"{type(net).__name__}: leaf {path} has shape {seen.get(path, 'none')},"
                f" the network of these widths has {want.get(path, 'none')}"
            )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in leaves
    }
