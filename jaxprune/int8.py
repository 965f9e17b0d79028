# SPDX-License-Identifier: Apache-2.0
"""Kernels as int8, one scale for each channel that they make; computed in floats.

Symmetric, to the nearest: Krishnamoorthi, "Quantizing deep convolutional networks for
efficient inference", 2018, section 3.1.2. Libraries that quantise Flax modules (qwix)
have none to look at in a pruned function, which is a program.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.base import Apply, GraphError, PyTree, key_path, path_str
from jaxprune.taps import readings
from jaxprune.trees import nbytes


class Quantized(NamedTuple):
    """A function and its tree; of n bytes, where the floats took `before`.

    In variables, a kernel is {'int8': int8[...], 'scale': [1, ..., out]}. error: by the
    kernel's key path, the largest |w - int8 * scale|, as it is applied: in float32 at
    most max |w| / 254 of the channel, in narrower floats more.
    """

    apply: Apply
    variables: PyTree
    error: dict[str, float]
    before: int
    bytes: int


def quantize_weights(
    apply: Apply, variables: PyTree, *inputs: Any, **kwargs: Any
) -> Quantized:
    """Kernels of plain convolutions and matrix products as int8, a scale a channel.

    inputs, kwargs: as of `trace`. Biases, statistics, kernels of grouped convolutions
    and whatever else no plain product reads stay as they are. Fold batch norms first
    (`fold_batch_norm`): the scales then take up their factors. The tree is smaller on
    disk and on the wire; the arithmetic is that of the floats. Raises GraphError where
    no product reads a variable, and for a kernel that is not finite.
    """
    made: dict[tuple[str, ...], set[int]] = {}
    for reading in readings(apply, variables, inputs, kwargs):
        axes = {*range(reading.kernel.ndim)} - {k for k, _ in reading.pairs}
        if reading.eqn.primitive.name == "conv_general_dilated":
            axes = {reading.eqn.params["dimension_numbers"].rhs_spec[0]}
        made[reading.path] = made.get(reading.path, axes) & axes
    if not made:
        raise GraphError("quantize_weights: no convolution or product reads a variable")
    error: dict[str, float] = {}

    def small(keys: Any, x: Any) -> Any:
        path = key_path(keys)
        if path not in made or not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        w = np.asarray(x, np.float64)
        if not np.isfinite(w).all():
            raise GraphError(
                f"quantize_weights: {path_str(path)} holds NaN or infinity"
            )
        rest = tuple(a for a in range(w.ndim) if a not in made[path])
        scale = np.asarray(np.abs(w).max(axis=rest, keepdims=True) / 127, x.dtype)
        scale = np.where(scale > 0, scale, np.ones_like(scale))
        q = np.clip(np.rint(w / scale.astype(np.float64)), -127, 127).astype(np.int8)
        thin = {"int8": jnp.asarray(q), "scale": jnp.asarray(scale)}
        error[path_str(path)] = float(
            np.abs(w - np.asarray(_whole(thin), w.dtype)).max()
        )
        return thin

    tree = jax.tree_util.tree_map_with_path(small, variables)

    @functools.wraps(apply)
    def run(variables: PyTree, *inputs: Any, **kwargs: Any) -> Any:
        whole = jax.tree.map(_whole, variables, is_leaf=_is_small)
        return apply(whole, *inputs, **kwargs)

    return Quantized(run, tree, error, nbytes(variables), nbytes(tree))


def _is_small(x: Any) -> bool:
    return isinstance(x, dict) and set(x) == {"int8", "scale"}


def _whole(x: Any) -> Any:
    return x["int8"].astype(x["scale"].dtype) * x["scale"] if _is_small(x) else x
