# SPDX-License-Identifier: Apache-2.0
"""`reconstruct`: consumers of what is cut, refitted by least squares."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import keeps, trees
from jaxprune.base import (
    Apply,
    ConfigError,
    DataError,
    Graph,
    GraphError,
    Keep,
    Path,
    PyTree,
    check_separate,
    key_path,
    path_str,
)
from jaxprune.behind import biases
from jaxprune.placement import placed_like
from jaxprune.taps import Reading, taps


def reconstruct(
    apply: Apply,
    graph: Graph,
    keep: Keep,
    variables: PyTree,
    batches: Iterable[Any],
    *,
    positions: int | None = 256,
    ridge: float = 1e-4,
    seed: int = 0,
    **kwargs: Any,
) -> PyTree:
    """The masked variables, kernels that read a cut group refitted; of dense shapes.

    batches: inputs of apply, each an array or a tuple of several; kwargs go to apply
    (`train=False`). One after the other, in the order in which the program reads them,
    each kernel W that reads a group of which something is cut becomes the minimum of

        mean ||X W + b - Y||^2 + ridge * mean(X^2) ||W - W0||^2

    over `positions` random outputs of each batch (all, where it has less, or for None),
    X being what the masked network reads there, with the kernels before refitted, Y the
    dense network's outputs, W0 the old kernel. A bias b, a vector beside the kernel
    that is added to its outputs, takes the mean along: X and Y count from theirs. What
    loops, branches and grouped convolutions read stays as it is, and a kernel that is
    also used otherwise, such as one that another product reads along other axes. Then:
    `shrink(graph, keep, reconstruct(...))`. Holds every consumer's rows of a batch, and
    solves in float64 on the host.

    Raises GraphError for a keep or variables that do not fit, or where nothing that is
    cut has a consumer that can be refitted; DataError for empty batches, or what is
    read there and not finite; ConfigError for positions or a ridge out of range.

    Source: He et al., "Channel pruning for accelerating very deep neural networks",
    2017, eq. 2 (step ii) and section 3.2.
    """
    if positions is not None and positions < 1:
        raise ConfigError(f"reconstruct: positions={positions!r} must be at least 1")
    if not ridge >= 0:
        raise ConfigError(f"reconstruct: ridge={ridge!r} must not be negative")
    keep = keeps.check_keep(graph, keep, concrete=True)
    given = check_batches("reconstruct", batches)
    masked = trees.mask(graph, keep, variables)
    if all(k.all() for k in keep.values()):
        return masked
    wanted = consumers(graph, keep)
    seen = sampled(apply, variables, wanted, given, positions, seed, kwargs)
    if not seen.readings:
        raise GraphError(
            "reconstruct: what is cut is read by loops, branches, grouped "
            "convolutions, products of features, or kernels that other products read "
            "along other axes alone; none of them can be refitted"
        )
    stays = trees.mask(graph, keep, ones(variables))
    for path in seen.readings:
        read = seen.rows(masked, [path])[path]
        masked = replaced(masked, seen.refitted(path, read, stays, ridge))
    return masked


class Seen(NamedTuple):
    """What kernels read at sampled positions of batches.

    readings: by path, in the order in which the program reads. dense: the variables as
    float64, by path. answers: float64[n, made] of each, the dense network's outputs.
    rows(variables, paths): float64[n, read] of some of them. biases: {kernel: what its
    product is added to}.
    """

    readings: Mapping[Path, Reading]
    dense: Mapping[Path, np.ndarray]
    answers: Mapping[Path, np.ndarray]
    rows: Callable[[PyTree, Collection[Path]], dict[Path, np.ndarray]]
    biases: Mapping[Path, Path]

    def refitted(
        self, path: Path, read: np.ndarray, stays: PyTree, ridge: float
    ) -> dict[Path, np.ndarray]:
        """The kernel at a path, and its bias, by least squares of what it reads.

        read: of the network as it is. stays: variables, more than 0 where they stay.
        """
        reading, bias = self.readings[path], self.biases.get(path)
        left = {
            p: np.asarray(x) > 0
            for p, x in leaves_of(stays).items()
            if p in (path, bias)
        }
        alive = reading.matrix(left[path])
        old, y = reading.matrix(self.dense[path]) * alive, self.answers[path]
        new = _refitted(read, y, old, alive, ridge, centred=bias is not None)
        changed = {path: reading.kernel_of(new)}
        if bias is not None:
            moved = (y.mean(axis=0) - read.mean(axis=0) @ new) * left[bias]
            changed[bias] = self.dense[bias] * left[bias] + moved
        return changed


def sampled(
    apply: Apply,
    variables: PyTree,
    wanted: Mapping[Path, set[int]],
    given: Sequence[tuple[Any, ...]],
    positions: int | None,
    seed: int,
    kwargs: Mapping[str, Any],
) -> Seen:
    """What the kernels at `wanted`, as of `consumers`, read; else as `reconstruct`.

    Raises GraphError for kernels of complex numbers, and the rows that it makes
    DataError for what is not finite.
    """
    readings: dict[Path, Reading] = {}
    order = list(wanted)

    @jax.jit
    def collect(tree: PyTree, inputs: Any, key: Any) -> dict[str, Any]:
        here: list[Reading] = []
        others: set[Path] = set()

        def rows(reading: Reading) -> Any:
            if reading.path not in wanted:
                return None
            own = jax.random.fold_in(key, order.index(reading.path))
            abstract = jax.ShapeDtypeStruct(reading.kernel.shape, reading.kernel.dtype)
            here.append(reading._replace(features=None, kernel=abstract))
            return reading.rows(positions, own)

        _, seen = taps(apply, rows, elsewhere=others)(tree, *inputs, **kwargs)
        fit = refittable(here, wanted, others)
        readings.update(fit)
        return {path_str(path): jnp.concatenate(seen[path]) for path in fit}

    keys = jax.random.split(jax.random.key(seed), len(given))
    added = biases(apply, variables, given[0], kwargs)
    own = {*wanted, *(added[path] for path in wanted if path in added)}
    leaves = {p: x for p, x in leaves_of(variables).items() if p in own}
    for path, x in leaves.items():
        if jnp.iscomplexobj(x):
            raise GraphError(f"{path_str(path)} is complex, and only real ones are fit")
    dense = {p: np.asarray(x, np.float64) for p, x in leaves.items()}

    def rows(
        tree: PyTree, paths: Collection[Path], then: Callable[..., Any] = lambda p, x: x
    ) -> dict[Path, np.ndarray]:
        found: dict[Path, list[np.ndarray]] = {}
        for inputs, key in zip(given, keys, strict=True):
            new = collect(tree, inputs, key)
            for path in paths:
                read = then(path, np.asarray(new[path_str(path)], np.float64))
                if not np.isfinite(read).all():
                    raise DataError(
                        f"what {path_str(path)} reads of the batches, or answers to "
                        "them, is not finite; are the images and the weights?"
                    )
                found.setdefault(path, []).append(read)
        return {path: np.concatenate(parts) for path, parts in found.items()}

    # Readings are found as the network is traced.
    jax.eval_shape(collect, variables, given[0], keys[0])
    answers = rows(
        variables, list(readings), lambda p, x: x @ readings[p].matrix(dense[p])
    )
    return Seen(readings, dense, answers, rows, added)


def check_batches(name: str, batches: Iterable[Any]) -> list[tuple[Any, ...]]:
    """The inputs of each batch. Raises DataError where there are none."""
    if batches is None:
        raise DataError(f"{name} needs batches=[inputs of apply, ...]")
    check_separate(batches, f"{name}: batches")
    given = [b if isinstance(b, tuple) else (b,) for b in batches]
    if not given:
        raise DataError(f"{name}: batches is empty (or was used up before)")
    return given


def consumers(graph: Graph, keep: Keep) -> dict[Path, set[int]]:
    """{leaf that reads a group of which something is cut: along which of its axes}."""
    found: dict[Path, set[int]] = {}
    for name, group in graph.groups.items():
        for slot in group.slots:
            if slot.role == "in" and not keep[name].all():
                found.setdefault(slot.path, set()).add(slot.axis)
    return found


def refittable(
    found: Iterable[Reading],
    wanted: Mapping[Path, set[int]],
    others: Collection[Path],
) -> dict[Path, Reading]:
    """A reading of each kernel that reads, and is read, in one way, in their order.

    What another product reads along other axes, such as a kernel that makes channels,
    too, would be changed there as well; so would what is among `others`, which are used
    in another way than by a product that is shown.
    """
    mine: dict[Path, list[Reading]] = {}
    for reading in found:
        if reading.path in wanted:
            mine.setdefault(reading.path, []).append(reading)
    return {
        path: ways[0]
        for path, ways in mine.items()
        if path not in others
        and len({way.order for way in ways}) == 1
        and wanted[path] & {axis for axis, _ in ways[0].pairs}
    }


def _refitted(
    x: np.ndarray,
    y: np.ndarray,
    old: np.ndarray,
    alive: np.ndarray,
    ridge: float,
    *,
    centred: bool,
) -> np.ndarray:
    """The least-squares W [read, made] near `old`; 0 where it is not alive."""
    if centred:
        x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    lines = np.flatnonzero(alive.any(axis=1))
    part = x[:, lines]
    gram = part.T @ part / len(x)
    # At least what keeps dead and repeated features from making it singular.
    weight = max(ridge, 1e-12) * np.trace(gram) / max(len(lines), 1) or 1.0
    rest = part.T @ (y - part @ old[lines]) / len(x)
    step = np.linalg.solve(gram + weight * np.eye(len(lines)), rest)
    new = old.copy()
    new[lines] += step
    return new * alive


def leaves_of(tree: PyTree) -> dict[Path, Any]:
    """The leaves by their key paths."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {key_path(keys): x for keys, x in flat}


def ones(tree: PyTree) -> PyTree:
    """float32 ones of the leaves' shapes, of random keys, too."""
    return jax.tree.map(lambda x: np.ones(np.shape(x), np.float32), tree)


def replaced(tree: PyTree, changed: Mapping[Path, Any]) -> PyTree:
    """The tree with new numbers at some key paths, of the leaves' dtypes and place."""

    def of(keys: Any, x: Any) -> Any:
        new = changed.get(key_path(keys))
        return x if new is None else placed_like(x, jnp.asarray(new, x.dtype))

    return jax.tree_util.tree_map_with_path(of, tree)
