# SPDX-License-Identifier: Apache-2.0
"""Arrays that lie in parts over a mesh: cut, grown and read where they lie.

An array is never put together on one host or device. To take indices of an axis that is
split, the array is split along another axis meanwhile (an all-to-all of one share a
device), where each device takes them of its own part.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxprune import jaxpr as jx
from jaxprune import peers


def lies_apart(x: Any) -> bool:
    """Whether x is a concrete array over several devices of a mesh.

    Not of a mesh whose axes are part of its type: there, JAX says what goes where.
    """
    if isinstance(x, jax.core.Tracer) or not isinstance(x, jax.Array):
        return False
    named = isinstance(x.sharding, NamedSharding) and x.sharding.num_devices > 1
    return named and jx.explicit_sharding(x) is None


def refit(sharding: NamedSharding, shape: Sequence[int]) -> NamedSharding:
    """It, for an array of another shape.

    Devices along which an axis no longer divides evenly split the largest axis instead
    that is whole and does divide; where there is none, each of them holds the same.
    """
    spec = _padded(sharding, len(shape))
    moved = [a for a, names in enumerate(spec) if shape[a] % _parts(sharding, names)]
    if not moved:
        return sharding
    pending = [spec[a] for a in moved]
    for axis in moved:
        spec[axis] = None
    for names in pending:
        parts = _parts(sharding, names)
        free = [a for a, n in enumerate(spec) if n is None and shape[a] % parts == 0]
        if free:
            spec[max(free, key=lambda a: shape[a])] = names
    return sharding.update(spec=PartitionSpec(*spec))


def taken(x: jax.Array, indices: Sequence[np.ndarray | None]) -> jax.Array:
    """x at these indices of every axis (None: all), on its mesh: `refit`.

    Zeros where an index is the axis's length. No device holds more than its share of x
    and of the result, a few times, where another axis can be split meanwhile.
    """
    wanted = {a: i.astype(np.int32) for a, i in enumerate(indices) if i is not None}
    sizes = [n if i is None else len(i) for n, i in zip(x.shape, indices)]
    given: Any = x.sharding
    return _taker(given, refit(given, sizes), x.ndim, tuple(wanted))(x, wanted)


def grown(kept: Sequence[np.ndarray | None], shape: Sequence[int]) -> list[Any]:
    """The indices that undo `taken(x, kept)`, for x of this shape, with zeros."""

    def back(indices: np.ndarray, length: int) -> np.ndarray:
        inverse = np.full(length, len(indices))
        inverse[indices] = np.arange(len(indices))
        return inverse

    return [None if k is None else back(k, n) for k, n in zip(kept, shape)]


def fetched(x: Any) -> np.ndarray:
    """x in NumPy, also where other processes hold parts of it: all of them call it.

    Raises PeerError where one of them is gone.
    """
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        if not x.is_fully_replicated:
            from jax.experimental import multihost_utils

            with peers.told(), peers.watched("share of an array"):
                return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)


@functools.lru_cache(maxsize=512)
def _taker(
    given: NamedSharding, goal: NamedSharding, ndim: int, axes: tuple[int, ...]
) -> Any:
    def take(x: jax.Array, indices: dict[int, Any]) -> jax.Array:
        spec = _padded(given, ndim)
        for axis in sorted(axes, key=lambda a: spec[a] is not None):  # whole ones first
            if spec[axis] is not None:
                spec = _elsewhere(spec, axis, x.shape)
                x = _constrained(x, given, spec)
            x = jnp.take(x, indices[axis], axis, mode="fill", fill_value=0)
            x = _constrained(x, given, spec)
        return x

    return jax.jit(take, out_shardings=goal)


def _elsewhere(spec: list[Any], axis: int, shape: Sequence[int]) -> list[Any]:
    """The spec with this axis whole and the largest that was whole split instead."""
    spec, names = list(spec), spec[axis]
    free = [a for a, n in enumerate(spec) if n is None and shape[a] > 1]
    spec[axis] = None
    if free:
        spec[max(free, key=lambda a: shape[a])] = names
    return spec


def _constrained(x: jax.Array, like: NamedSharding, spec: list[Any]) -> jax.Array:
    sharding = like.update(spec=PartitionSpec(*spec))
    return jax.lax.with_sharding_constraint(x, sharding)


def _padded(sharding: NamedSharding, ndim: int) -> list[Any]:
    parts = list(sharding.spec)[:ndim]
    return parts + [None] * (ndim - len(parts))


def _parts(sharding: NamedSharding, names: Any) -> int:
    names = (names,) if isinstance(names, str) else names or ()
    return math.prod(sharding.mesh.shape[name] for name in names)
