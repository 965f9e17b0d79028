# SPDX-License-Identifier: Apache-2.0
"""Small networks of every supported kind, and random ones, to test the laws on."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxprune.models import pooling


class ResNet(nn.Module):
    """Strided blocks, projections, residual sums, global pooling."""

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        def norm(x: Any) -> Any:
            return nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)

        x = nn.relu(norm(nn.Conv(8, (3, 3), use_bias=False)(x)))
        for width, stride in ((8, 1), (12, 2)):
            y = nn.Conv(width, (3, 3), (stride, stride), use_bias=False)(x)
            y = nn.relu(norm(y))
            y = norm(nn.Conv(width, (3, 3), use_bias=False)(y))
            if x.shape != y.shape:
                x = norm(nn.Conv(width, (1, 1), (stride, stride))(x))
            x = nn.relu(x + y)
        return nn.Dense(3)(x.mean(axis=(1, 2)))


class Vgg(nn.Module):
    """Max pooling, flatten, dense layers, dropout."""

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        for width in (6, 9):
            x = nn.relu(nn.Conv(width, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(nn.Dense(10)(x)))
        return nn.Dense(3)(x)


class Mobile(nn.Module):
    """Depthwise and dilated convolutions, curved activations, a pointwise gate."""

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        x = nn.silu(nn.Conv(8, (3, 3))(x))
        y = nn.Conv(8, (3, 3), feature_group_count=8, kernel_dilation=(2, 2))(x)
        y = nn.gelu(nn.BatchNorm(use_running_average=not train)(y))
        y = nn.Conv(16, (3, 3), feature_group_count=8)(y)
        y = nn.Conv(8, (1, 1))(nn.relu6(y))
        gate = nn.sigmoid(nn.Dense(8)(nn.relu(nn.Dense(4)(y.mean(axis=(1, 2))))))
        return nn.Conv(3, (1, 1))(x + y * gate[:, None, None, :])


class Fcn(nn.Module):
    """Skip sums of upsampled scores, transposed convolution, average pooling."""

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        a = nn.relu(nn.Conv(7, (3, 3))(x))
        b = nn.avg_pool(nn.elu(nn.Conv(6, (3, 3), (2, 2))(a)), (2, 2), (2, 2))
        b = nn.ConvTranspose(5, (4, 4), (4, 4))(b)
        b = nn.leaky_relu(b)[:, : x.shape[1], : x.shape[2]]
        c = jnp.concatenate([a, b], axis=-1)
        c = nn.LayerNorm(use_fast_variance=True)(c)
        c = jax.image.resize(nn.Conv(6, (3, 3))(c), (*x.shape[:3], 6), "bilinear")
        return nn.Conv(3, (1, 1))(nn.softplus(c))


class Split(nn.Module):
    """Chunks of channels, gated linear units, padding of channels, group norm."""

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        a, b = jnp.split(nn.Conv(12, (3, 3))(x), 2, axis=-1)
        y = a * nn.sigmoid(b)
        y = nn.GroupNorm(num_groups=2)(nn.Conv(8, (3, 3))(y))
        y = nn.relu(y) + jnp.pad(a, ((0, 0), (0, 0), (0, 0), (0, 2)))
        left, right = y[..., :4], y[..., 4:]
        return nn.Conv(3, (1, 1))(jnp.concatenate([right, left], -1)) + left.sum(
            axis=-1, keepdims=True
        )


class NnxResNet(nnx.Module):
    """`ResNet` without projection, in nnx."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.conv = nnx.Conv(8, 8, (3, 3), rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = nnx.relu(self.norm(self.stem(x)))
        x = x + nnx.relu(self.conv(x))
        return self.head(x.mean(axis=(1, 2)))


class LinenTwin(nn.Module):
    """`NnxResNet` in linen."""

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(8, (3, 3))(x)))
        x = x + nn.relu(nn.Conv(8, (3, 3))(x))
        return nn.Dense(3)(x.mean(axis=(1, 2)))


LINEN = (ResNet, Vgg, Mobile, Fcn, Split)


def randomised(shapes: Any, seed: int) -> Any:
    """Variables at which nothing is accidentally zero or one; variances positive."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, x: Any) -> Any:
        name, noise = jax.tree_util.keystr(path), rng.normal(size=x.shape)
        if "var" in name:
            value = 0.5 + np.abs(noise)
        elif "kernel" in name:
            value = noise / np.sqrt(np.prod(x.shape[:-1]))
        else:
            value = ("scale" in name) + 0.3 * noise
        return value.astype(x.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def images(seed: int, shape: tuple[int, ...] = (2, 8, 8, 3)) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def linen(
    net: Callable[[], nn.Module], seed: int = 0, shape: tuple[int, ...] = (2, 8, 8, 3)
) -> tuple[Any, Any, Any]:
    """(apply, variables, images) of a linen network."""
    module, x = net(), images(seed, shape)
    shapes = jax.eval_shape(module.init, jax.random.key(seed), x)
    return module.apply, randomised(shapes, seed), x


def nnx_net(seed: int = 0) -> tuple[Any, Any, Any]:
    """(apply, state, images) of NnxResNet in eval mode."""
    module = NnxResNet(nnx.Rngs(seed))
    module.eval()
    definition, state = nnx.split(module)

    def apply(state: Any, x: Any) -> Any:
        return nnx.merge(definition, state)(x)

    return apply, randomised(state, seed), images(seed)


def two_layers(middle: Any) -> tuple[Any, Any, Any]:
    """x @ a, something, @ b."""
    rng = np.random.default_rng(0)
    variables = {
        "a": rng.normal(size=(3, 6)).astype(np.float32),
        "b": rng.normal(size=(6, 2)).astype(np.float32),
    }
    x = rng.normal(size=(4, 3)).astype(np.float32)
    return (lambda v, x: middle(x @ v["a"]) @ v["b"]), variables, x


def random_keep(graph: Any, seed: int, share: float = 0.6) -> dict[str, np.ndarray]:
    """A keep that leaves at least one channel of every group."""
    rng = np.random.default_rng(seed)
    keep = {n: rng.random(g.size) < share for n, g in graph.groups.items()}
    for line in keep.values():
        line[rng.integers(len(line))] = True
    return keep


class Drawn(nn.Module):
    """A random network: every op reads one or two earlier features and makes a new one.

    `ops`: (kind, a, b) with a and b picking features and widths.
    """

    ops: tuple[tuple[str, int, int], ...]

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        features = [nn.Conv(5, (3, 3))(x)]
        for kind, a, b in self.ops:
            y = features[-1 - a % len(features)]
            z = features[-1 - b % len(features)]
            features.append(self._op(kind, y, z, b, train))
        if self.ops and self.ops[-1][1] % 3 == 0:
            flat = nn.Dense(4)(features[-1].reshape(x.shape[0], -1))
            return nn.Dense(3)(nn.tanh(flat))
        return nn.Conv(3, (1, 1))(features[-1])

    def _op(self, kind: str, y: Any, z: Any, b: int, train: bool) -> Any:
        width = y.shape[-1]
        if kind == "conv":
            return nn.Conv(3 + b % 5, (3, 3), use_bias=bool(b % 2))(y)
        if kind == "dilated":
            return nn.Conv(3 + b % 5, (3, 3), kernel_dilation=(2, 2))(y)
        if kind == "depthwise":
            return nn.Conv(width * (1 + b % 2), (3, 3), feature_group_count=width)(y)
        if kind == "grouped":
            groups = next(g for g in (4, 3, 2, 1) if width % g == 0)
            width = groups * (1 + b % 4)
            return nn.relu(nn.Conv(width, (3, 3), feature_group_count=groups)(y))
        if kind == "shuffle":
            groups = next(g for g in (3, 2, 1) if width % g == 0)
            parts = y.reshape(*y.shape[:-1], groups, -1)
            return parts.swapaxes(-1, -2).reshape(y.shape)
        if kind == "order":
            first = jnp.take_along_axis(y, jnp.argsort(z[..., :1], axis=1), axis=1)
            return jnp.sort(y, axis=2).at[:, 1:3].add(first[:, :2])
        if kind == "transposed":
            return nn.ConvTranspose(3 + b % 5, (2, 2), (2, 2))(y[:, ::2, ::2])
        if kind == "norm":
            return nn.BatchNorm(use_running_average=not train)(y)
        if kind == "layer_norm":
            return nn.LayerNorm()(y)
        if kind == "activation":
            acts = (nn.relu, nn.gelu, nn.silu, nn.elu, nn.sigmoid, nn.hard_swish)
            return acts[b % len(acts)](y)
        if kind == "dropout":
            return nn.Dropout(0.5, deterministic=not train)(y)
        if kind == "add":
            return y + (z if z.shape == y.shape else nn.Conv(width, (1, 1))(z))
        if kind == "mul":
            return y * nn.sigmoid(nn.Dense(width)(z.mean(axis=(1, 2), keepdims=True)))
        if kind == "concat":
            return jnp.concatenate([y, z], axis=-1)
        if kind == "unpool":
            pooled, code = pooling.max_pool(y)
            value = nn.Conv(width, (3, 3))(pooled)
            return pooling.unpool(value, code, y.shape[1:3])
        if kind == "slice":
            return y[..., : width - b % 3] if width > 3 else y
        return nn.relu(nn.Conv(4, (3, 3))(y))


KINDS = (
    *("conv", "dilated", "depthwise", "transposed", "norm", "layer_norm", "dropout"),
    *("grouped", "shuffle", "order"),
    *("activation", "add", "mul", "concat", "unpool", "slice", "block"),
)


def drawn(ops: tuple[tuple[str, int, int], ...], seed: int = 0) -> tuple[Any, Any, Any]:
    """(apply, variables, images) of a random network."""
    return linen(lambda: Drawn(ops), seed)


def multiply_adds(jaxpr, *, valid=False):
    """Of all convolutions (outputs x kernel taps, padding counted) and products.

    valid: only taps that lie on the image, for odd kernels of stride 1 padded to SAME:
    k n - (k // 2) (k // 2 + 1) of k n along an axis of n.
    """
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "conv_general_dilated":
            dims = eqn.params["dimension_numbers"]
            kernel = eqn.invars[1].aval.shape
            taps = math.prod(kernel) // kernel[dims.rhs_spec[0]]
            out = eqn.outvars[0].aval.shape
            share = Fraction(1)
            for a, b in zip(dims.rhs_spec[2:], dims.out_spec[2:], strict=True):
                k, n = kernel[a], out[b]
                share *= Fraction(k * n - (k // 2) * (k // 2 + 1), k * n)
            total += math.prod(out) * taps * (share if valid else 1)
        if eqn.primitive.name == "dot_general":
            (summed, _), _ = eqn.params["dimension_numbers"]
            read = [eqn.invars[0].aval.shape[a] for a in summed]
            total += math.prod(eqn.outvars[0].aval.shape) * math.prod(read)
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += multiply_adds(inner, valid=valid)
    return total
