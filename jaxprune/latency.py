# SPDX-License-Identifier: Apache-2.0
"""Measured milliseconds of a network's own convolutions and products, as a cost.

`timings` runs each of them, alone, at a grid of widths on the device at hand; between
grid points time is interpolated. `latency(0.5, timings)` is then a budget like any.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import disk, formats, keeps
from jaxprune import jaxpr as jx
from jaxprune.base import Apply, BudgetError, Graph, GraphError, Keep, PyTree
from jaxprune.base import Path as KeyPath
from jaxprune.budget import Budget
from jaxprune.select import MultipleOf, check_positive, in_channels
from jaxprune.taps import Reading, readings


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """One product: milliseconds `ms` [R, M] at numbers of `read` [R], `made` [M].

    `reads`, `makes`: (what stays, {group: how often}), the lengths of the kernel's two
    axes as the keep changes them.
    """

    path: KeyPath
    read: np.ndarray
    made: np.ndarray
    ms: np.ndarray
    reads: tuple[int, Mapping[str, int]]
    makes: tuple[int, Mapping[str, int]]


@dataclasses.dataclass(frozen=True, eq=False)
class Timings:
    """What `timings` measured on `device`; a kind of cost, see `latency`."""

    device: str
    products: tuple[Product, ...]

    def __str__(self) -> str:
        return f"latency on {self.device}"

    def ms(self, graph: Graph, keep: Keep | None = None) -> float:
        """Milliseconds of the products where `keep` stays; None: all.

        Raises GraphError for a graph without a group that was measured.
        """
        kept = keeps.check_keep(graph, graph.full() if keep is None else keep)
        return float(self.at(list(kept), np.array([k.sum() for k in kept.values()])))

    def at(self, groups: Sequence[str], kept: Any) -> np.ndarray:
        """Milliseconds, float[...], at numbers of kept channels, int[..., G]."""
        return self.summands(groups, kept).sum(axis=-1)

    def summands(self, groups: Sequence[str], kept: Any) -> Any:
        """`at` product by product, float[..., P]; in float32 where `kept` is traced."""
        column = {name: i for i, name in enumerate(groups)}
        xp: Any = jnp if isinstance(kept, jax.Array) else np
        kept = xp.asarray(kept, jnp.float32 if xp is jnp else np.float64)
        each = []
        for product in self.products:
            lengths = []
            for fixed, times in (product.reads, product.makes):
                missing = [n for n in times if n not in column]
                if missing:
                    raise GraphError(
                        f"{self} was measured for a graph with the group "
                        f"{missing[0]!r}, which this one lacks"
                    )
                line = xp.full(kept.shape[:-1], float(fixed), kept.dtype)
                for name, count in times.items():
                    line = line + count * kept[..., column[name]]
                lengths.append(line)
            each.append(_between(xp, product, *lengths))
        return xp.stack(each, axis=-1)


@dataclasses.dataclass(frozen=True)
class Unmeasured:
    """A kind of cost that `prune` measures, and nothing else knows."""

    def __str__(self) -> str:
        return "latency"

    def at(self, groups: Sequence[str], kept: Any) -> np.ndarray:
        """Raises BudgetError."""
        raise BudgetError(
            "latency: nothing is measured yet; pass latency(ratio, jaxprune.timings("
            "apply, graph, variables, images))"
        )


def latency(ratio: float, timings: Timings | None = None) -> Budget:
    """At most `ratio` of the dense network's measured milliseconds stay.

    Those of the convolutions and matrix products that `timings` found; without it,
    `prune` measures them, and all else raises BudgetError when it looks at the budget.
    Raises BudgetError for a ratio outside (0, 1].
    """
    if timings is None:
        return Budget(Unmeasured(), ratio)
    if not isinstance(timings, Timings):
        raise BudgetError(
            f"latency({ratio!r}, {timings!r}): the second is what jaxprune.timings("
            "apply, graph, variables, images) measured"
        )
    return Budget(timings, ratio)


def timings(
    apply: Apply,
    graph: Graph,
    variables: PyTree,
    *inputs: Any,
    points: int = 4,
    multiple_of: MultipleOf = 8,
    repeats: int = 5,
    cache: str | os.PathLike | None = None,
    **kwargs: Any,
) -> Timings:
    """Measure each convolution and matrix product with a kernel in the graph.

    inputs, kwargs: as of `trace`; arrays or jax.ShapeDtypeStruct, of the batch that is
    to be fast. Each runs jitted on zeros, at up to `points` widths of what it reads and
    of what it makes, evenly spaced and multiples of `multiple_of`, as of `select` (the
    full ones besides); the median of `repeats` bursts of at least 2 ms counts. Times
    that fall as a width grows are raised to those of the smaller width. Convolutions in
    groups, but for depthwise ones, products inside loops and branches or along an axis
    of batches, and all that is no product, do not count: `latency(0.5, ...)` halves the
    rest. cache: a JSON file of earlier measurements on this kind of device, read and
    added to.

    Raises GraphError where there is nothing to measure, BudgetError for a cache that
    cannot be read, DiskError for one that cannot be written, ConfigError for points,
    multiple_of or repeats that are no positive numbers.
    """
    multiple_of = in_channels(multiple_of)
    check_positive(points=points, repeats=repeats)
    known = _Known(None if cache is None else Path(cache))
    products = []
    for reading in readings(apply, variables, inputs, kwargs, depthwise=True):
        axes = _axes(reading)
        if axes is None:
            continue
        lengths = [_length(graph, reading, axis) for axis in axes]
        if not any(times for _, times in lengths):
            continue
        # A depthwise kernel has as many filters as its channels, or times as many.
        step = math.lcm(multiple_of, _filters(reading, axes) or 1)
        grid = [_grid(reading.kernel.shape[a], points, step) for a in axes]
        cut = functools.partial(_shapes, reading, axes)
        ms = np.array(
            [
                [known.ms(reading, *cut((r, m)), repeats) for m in grid[1]]
                for r in grid[0]
            ]
        )
        for axis in (0, 1):
            ms = np.maximum.accumulate(ms, axis=axis)
        products.append(Product(reading.path, grid[0], grid[1], ms, *lengths))
    known.write()
    if not products:
        raise GraphError(
            "timings: no convolution or matrix product reads or makes a group; "
            "is the graph this function's?"
        )
    return Timings(_device(), tuple(products))


def _device() -> str:
    return jax.devices()[0].device_kind


def _axes(reading: Reading) -> tuple[int, int] | None:
    """The kernel's axes that are read along and made; None if there are others."""
    if reading.eqn.primitive.name == "dot_general":
        plain = reading.kernel.ndim == 2 and len(reading.pairs) == 1
        return (reading.pairs[0][0], 1 - reading.pairs[0][0]) if plain else None
    dims = reading.eqn.params["dimension_numbers"]
    return dims.rhs_spec[1], dims.rhs_spec[0]


def _filters(reading: Reading, axes: tuple[int, int]) -> int:
    """How many filters each channel has of a depthwise kernel; 0 of others."""
    groups = reading.eqn.params.get("feature_group_count", 1)
    return int(reading.kernel.shape[axes[1]] // groups) if groups > 1 else 0


def _length(graph: Graph, reading: Reading, axis: int) -> tuple[int, dict[str, int]]:
    """(indices that stay, {group: indices of each of its channels}) of a kernel."""
    times: dict[str, int] = {}
    loose = 0
    for group in graph.groups.values():
        for slot in group.slots:
            if (slot.path, slot.axis) == (reading.path, axis):
                count = slot.indices.shape[1]
                times[group.name] = times.get(group.name, 0) + count
                loose += count * group.size
    return reading.kernel.shape[axis] - loose, times


def _grid(length: int, points: int, multiple_of: int) -> np.ndarray:
    """Up to `points` widths from about length / points to length."""
    even = length * np.arange(1, points) / points
    rounded = np.maximum(np.rint(even / multiple_of), 1).astype(int) * multiple_of
    return np.unique(np.append(rounded[rounded < length], length))


def _between(xp: Any, product: Product, read: Any, made: Any) -> Any:
    """Bilinear between grid points; below the least ones, in proportion to them.

    xp: numpy, or jax.numpy for lengths that are traced.
    """
    place, share = [], xp.ones_like(read)
    for points, at in ((product.read, read), (product.made, made)):
        grid = xp.asarray(points, at.dtype)
        share = share * xp.minimum(at / grid[0], 1)
        at = xp.clip(at, grid[0], grid[-1])
        low = xp.searchsorted(grid, at, "right") - 1
        low = xp.clip(low, 0, max(len(points) - 2, 0))
        high = xp.minimum(low + 1, len(points) - 1)
        wide = xp.where(high > low, grid[high] - grid[low], 1)
        place.append((low, high, (at - grid[low]) / wide))
    (r0, r1, a), (m0, m1, b) = place
    ms = xp.asarray(product.ms, read.dtype)
    first = ms[r0, m0] * (1 - b) + ms[r0, m1] * b
    second = ms[r1, m0] * (1 - b) + ms[r1, m1] * b
    return share * (first * (1 - a) + second * a)


class _Known:
    """Milliseconds by what was run where, from a file and from before."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.found: dict[str, float] = {}
        self.new = False
        if file is not None and file.exists():
            try:
                self.found = {
                    k: float(v)
                    for k, v in formats.parse(formats.read_text(file)).items()
                }
            except (OSError, ValueError, AttributeError, TypeError) as error:
                raise BudgetError(
                    f"{file} is no cache of timings ({error}); delete it, or name "
                    "another as cache"
                ) from error

    def ms(self, reading: Reading, features: Any, kernel: Any, repeats: int) -> float:
        params = {**reading.eqn.params, **_changed(reading, features)}
        p = {k: str(v) for k, v in sorted(params.items())}
        what = (_device(), jax.__version__, reading.eqn.primitive.name, p)
        text = json.dumps([*what, str(features), str(kernel), reading.first])
        key = hashlib.sha256(text.encode()).hexdigest()[:24]
        if key not in self.found:
            self.found[key] = _timed(reading, features, kernel, repeats)
            self.new = True
        return self.found[key]

    def write(self) -> None:
        if self.file is None or not self.new:
            return
        text = json.dumps(self.found, indent=0, sort_keys=True)
        with disk.writing(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
        disk.write(self.file, text.encode())


def _shapes(
    reading: Reading, axes: tuple[int, int], widths: tuple[int, int]
) -> tuple[Any, Any]:
    """Features and kernel where so many channels are read and made."""
    kernel, features = list(reading.kernel.shape), list(reading.features.shape)
    for axis, width in zip(axes, widths, strict=True):
        kernel[axis] = width
    filters = _filters(reading, axes)
    features[reading.pairs[0][1]] = widths[1] // filters if filters else widths[0]
    return (
        jax.ShapeDtypeStruct(tuple(features), reading.features.dtype),
        jax.ShapeDtypeStruct(tuple(kernel), reading.kernel.dtype),
    )


def _changed(reading: Reading, features: Any) -> dict[str, int]:
    """The parameters of the equation that follow the width."""
    if reading.eqn.params.get("feature_group_count", 1) == 1:
        return {}
    return {"feature_group_count": features.shape[reading.pairs[0][1]]}


def _timed(reading: Reading, features: Any, kernel: Any, repeats: int) -> float:
    """Milliseconds of one product, jitted."""
    changed = _changed(reading, features)

    @jax.jit
    def run(x: Any, w: Any) -> Any:
        pair = (x, w) if reading.first else (w, x)
        return jx.bind(reading.eqn, *pair, **changed)[0]

    x, w = (jnp.zeros(s.shape, s.dtype) for s in (features, kernel))
    once = functools.partial(run, x, w)
    jax.block_until_ready(once())
    count = max(1, math.ceil(2e-3 / max(_seconds(once, 1), 1e-9)))
    return 1e3 * statistics.median(_seconds(once, count) for _ in range(repeats))


def _seconds(once: Callable[[], Any], count: int) -> float:
    """Of each of so many calls in a row."""
    start = time.perf_counter()
    for _ in range(count):
        out = once()
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / count
