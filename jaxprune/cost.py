# SPDX-License-Identifier: Apache-2.0
"""FLOPs, parameters and activation bytes as polynomials of the kept channels.

`trace` leaves a term for every convolution and matrix product; here they are evaluated,
many keeps at once, in a few NumPy operations: quick enough for a search.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.base import Cost, Extent, Graph, Keep
from jaxprune.keeps import check_keep


def cost(graph: Graph, keep: Keep | None = None) -> Cost:
    """The cost of the network that `keep` leaves (None: the dense one), in integers.

    For the input that was traced. FLOPs are 2 x multiply-adds of convolutions and
    matrix products, padding taps counted. Raises GraphError for a keep that does not
    fit.
    """
    keep = check_keep(graph, graph.full() if keep is None else keep, concrete=True)
    return Cost(*map(int, at(graph, np.array([k.sum() for k in keep.values()], int))))


def at(graph: Graph, kept: Any) -> Cost:
    """Costs at numbers of kept channels: int[..., G] in the graph's order -> [...]."""
    table = _table(graph)
    kept = np.asarray(kept)
    kept = kept.astype(np.float64 if kept.dtype.kind == "f" else np.int64)
    lengths = table.fixed + kept @ table.times.T
    summands = table.coefficients * lengths[..., table.factors].prod(axis=-1)
    return Cost(*(summands[..., table.kinds == k].sum(axis=-1) for k in range(3)))


def summands(graph: Graph, field: str) -> Callable[[Any], jax.Array]:
    """The terms of one field of `Cost` as fractions of the dense network's whole cost.

    The function takes numbers of kept channels, float[..., G] in the graph's order, to
    float32[..., T], in jax.numpy: it may be traced. Each term is a product of lengths
    relative to the dense ones, so float32 is enough however large the cost. All are 0
    where the dense network has nothing of this cost.
    """
    table = _table(graph)
    mine = table.kinds == Cost._fields.index(field)
    factors = table.factors[mine]
    full = np.array([g.size for g in graph.groups.values()], np.int64)
    dense = np.maximum(table.fixed + full @ table.times.T, 1)
    weight = table.coefficients[mine] * np.prod(dense[factors], axis=-1, dtype=float)
    weight = np.float32(weight / max(weight.sum(), 1))
    fixed, times = np.float32(table.fixed / dense), np.float32(table.times.T / dense)

    def of(kept: Any) -> jax.Array:
        kept = jnp.asarray(kept, jnp.float32)
        lengths = fixed + jnp.matmul(kept, times, precision="highest")
        return weight * lengths[..., factors].prod(axis=-1)

    return of


@dataclasses.dataclass(frozen=True)
class _Table:
    """E extents (`fixed` [E], `times` [E, G]); T terms of up to F `factors` [T, F]."""

    fixed: np.ndarray
    times: np.ndarray
    coefficients: np.ndarray
    factors: np.ndarray
    kinds: np.ndarray


@functools.lru_cache(maxsize=32)
def _table(graph: Graph) -> _Table:
    numbers: dict[Extent, int] = {Extent(1): 0}
    rows: list[tuple[int, int, list[int]]] = []

    def add(kind: str, coefficient: int, extents: Any) -> None:
        factors = []
        for extent in extents:
            if extent.groups:
                factors.append(numbers.setdefault(extent, len(numbers)))
            else:
                coefficient *= extent.fixed
        rows.append((Cost._fields.index(kind), coefficient, factors))

    for term in graph.terms:
        add(term.kind, term.coefficient, term.extents)
    for extents in parameter_extents(graph):
        add("params", 1, extents)

    column = {name: i for i, name in enumerate(graph.groups)}
    times = np.zeros((len(numbers), len(column)), np.int64)
    for extent, row in numbers.items():
        for name, count in extent.groups:
            times[row, column[name]] += count
    width = max((len(factors) for _, _, factors in rows), default=0)
    return _Table(
        fixed=np.array([extent.fixed for extent in numbers], np.int64),
        times=times,
        coefficients=np.array([c for _, c, _ in rows], np.int64),
        factors=np.array(
            [f + [0] * (width - len(f)) for _, _, f in rows], np.int64
        ).reshape(len(rows), width),
        kinds=np.array([k for k, _, _ in rows], np.int64),
    )


def parameter_extents(graph: Graph) -> list[tuple[Extent, ...]]:
    """For each trained leaf, the lengths of its axes."""
    axes: dict[tuple, dict[str, int]] = {}
    for group in graph.groups.values():
        for slot in group.slots:
            counts = axes.setdefault((slot.path, slot.axis), {})
            counts[group.name] = counts.get(group.name, 0) + slot.indices.shape[1]
    extents = []
    for leaf in graph.leaves:
        if leaf.trained:
            per_axis = []
            for axis, length in enumerate(leaf.shape):
                groups = axes.get((leaf.path, axis), {})
                cut = sum(graph.groups[g].size * n for g, n in groups.items())
                per_axis.append(Extent(length - cut, tuple(groups.items())))
            extents.append(tuple(per_axis))
    return extents
