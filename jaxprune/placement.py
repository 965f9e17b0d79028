# SPDX-License-Identifier: Apache-2.0
"""Arrays cut and put where the dense ones lie: NumPy, one CPU, or a mesh."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from jaxprune import jaxpr as jx
from jaxprune.sharded import refit

# Bytes that are cut at a time.
_BLOCK = 2**21
# Numbers that are summed at a time: they stay in a core's cache.
_ROWS = 2**15


def is_numpy(x: Any) -> bool:
    """Whether x is a NumPy array, or one number of an array's type."""
    return isinstance(x, np.ndarray | np.generic)


def on_cpu(x: Any) -> bool:
    """Whether x is a whole, concrete JAX array in the memory that NumPy sees."""
    if isinstance(x, jax.core.Tracer) or not isinstance(x, jax.Array):
        return False
    (device, *others) = x.devices()
    here = device.platform == "cpu" and not others and x.is_fully_addressable
    return here and jx.is_array(x) and not x.weak_type


def on_host(tree: Any) -> Any:
    """The tree with NumPy arrays that share a CPU's memory; None if one lies elsewhere.

    Of arrays that JAX knows, in the types that it knows them by; zeros for keys.
    """
    leaves, treedef = jax.tree.flatten(tree)
    leaves = [np.zeros(x.shape) if _is_key(x) else x for x in leaves]
    if not all(is_numpy(x) or on_cpu(x) for x in leaves):
        return None
    return jax.tree.unflatten(treedef, [np.asarray(x) for x in leaves])


def _is_key(x: Any) -> bool:
    return hasattr(x, "dtype") and not jx.is_array(x)


def power_sums(x: np.ndarray, axis: int, power: int) -> np.ndarray:
    """float[n]: sum |x| ** power over all axes but one, a few rows at a time.

    Rows are summed in x's own precision (float32 at least), their sums in float64.
    """
    wide = np.promote_types(x.dtype, np.float32)
    before, length = math.prod(x.shape[:axis]), x.shape[axis]
    x = x.reshape(before, length, math.prod(x.shape[axis + 1 :]))
    rows = max(1, _ROWS * before // max(1, x.size))
    lines = length if rows > 1 else max(1, _ROWS // max(1, x.shape[2]))
    total = np.zeros(length)
    for start in range(0, length, lines):
        band = slice(start, start + lines)
        for row in range(0, before, rows):
            part = np.abs(x[row : row + rows, band].astype(wide, copy=False))
            if power == 2:
                part *= part
            total[band] += part.sum(axis=(0, 2))
    real = np.empty(0, wide).real.dtype
    return total.astype(jax.dtypes.canonicalize_dtype(real))


def gathered(x: np.ndarray, kept: list[np.ndarray | None]) -> np.ndarray:
    """x at the kept indices of every axis, a few rows at a time.

    So nothing else of x's size is held; and JAX takes an array that starts at a
    multiple of 64 bytes over as it is.
    """
    shape = tuple(n if k is None else len(k) for n, k in zip(x.shape, kept))
    size = math.prod(shape) * x.dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    small = memory[start : start + size].view(x.dtype).reshape(shape)
    rows, *others = kept
    spaced = [None if k is None else _slice(k) for k in others]
    step = max(1, _BLOCK * len(x) // max(1, x.nbytes))
    for start in range(0, len(small), step):
        block = slice(start, start + step)
        part = x[block if rows is None else _slice(rows[block]) or rows[block]]
        for axis, (indices, even) in enumerate(zip(others, spaced), 1):
            if even is not None:
                part = part[(slice(None),) * axis + (even,)]
            elif indices is not None:
                part = np.take(part, indices, axis)
        small[block] = part
    return small


def _slice(indices: np.ndarray) -> slice | None:
    """Rising, evenly spaced indices as a slice, whose elements need no copy."""
    steps = np.diff(indices)
    step = int(steps[0]) if len(steps) else 1
    if step < 1 or not (steps == step).all():
        return None
    return slice(int(indices[0]), int(indices[-1]) + 1, step)


def from_cpu(x: jax.Array, y: np.ndarray) -> jax.Array:
    """y as a JAX array where x is, committed to that place if x is."""
    return jax.device_put(y, x.sharding if x.committed else None)


def placed_like(x: Any, y: Any) -> Any:
    """y on x's mesh, as x was, or as `sharded.refit` says."""
    if isinstance(x, jax.core.Tracer) or not isinstance(x, jax.Array):
        return y
    sharding = x.sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        sharding = refit(sharding, y.shape)
    return jax.device_put(y, sharding) if y.sharding != sharding else y
