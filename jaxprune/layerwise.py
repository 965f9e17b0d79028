# SPDX-License-Identifier: Apache-2.0
"""`lasso_select`: channels chosen layer by layer, by what the cut network reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import trees
from jaxprune.base import (
    Apply,
    ConfigError,
    Graph,
    Keep,
    Path,
    PyTree,
    Slot,
)
from jaxprune.budget import Budget
from jaxprune.features import check_read, lasting
from jaxprune.reconstruct import (
    Seen,
    check_batches,
    consumers,
    leaves_of,
    ones,
    refittable,
    replaced,
    sampled,
)
from jaxprune.select import MultipleOf, select
from jaxprune.taps import Reading, readings

# Compiled once for all groups of a size.
_lasting = jax.jit(lasting, static_argnums=1)


def lasso_select(
    apply: Apply,
    graph: Graph,
    variables: PyTree,
    batches: Iterable[Any],
    budget: Budget,
    *,
    multiple_of: MultipleOf = 1,
    min_channels: int = 1,
    positions: int | None = 256,
    steps: int = 48,
    ridge: float = 1e-4,
    seed: int = 0,
    **kwargs: Any,
) -> tuple[dict[str, np.ndarray], PyTree]:
    """(keep, the masked variables with their readers refitted, of dense shapes).

    Every group keeps about the same fraction, as by `select(scope='local')`. Layer by
    layer, as the program reads them: of a group that is read for the first time those
    channels stay that last longest, lambda rising, in

        min_beta ||Y - sum_c beta[c] z[c]||^2 / 2 + lambda ||beta||_1,

    z[c] being what channel c adds to its readers' outputs at random positions, in the
    network as it is cut and refitted by then, and Y what the dense network puts out
    there, less what other channels add. Then the reader is refitted as `reconstruct`
    does, which makes the same kernels of the same keep. Channels are as good as their
    readers make them: one that others can stand in for goes, however large it is.

    batches, positions, ridge, seed, kwargs: as of `reconstruct`. budget, multiple_of,
    min_channels: as of `select`. steps: how many lambdas, in equal factors from the
    largest that keeps any channel to a thousandth of it.

    Raises BudgetError, telling the least, for a budget that cannot be met; DataError
    for empty batches, or what is read there and not finite; ConfigError for numbers out
    of range; GraphError naming the groups that no convolution or matrix product reads
    plainly.

    Source: He et al., "Channel pruning for accelerating very deep neural networks",
    2017, eq. 2 and section 3.1, for any graph of layers.
    """
    some = positions is None or positions > 0
    if not some or steps < 2 or not ridge >= 0:
        raise ConfigError(
            f"lasso_select(positions={positions!r}, steps={steps!r}, ridge={ridge!r}): "
            "at least 1, 2 and 0"
        )
    widths = _widths(graph, budget, multiple_of, min_channels)
    counts = {name: int(k.sum()) for name, k in widths.items()}
    given = check_batches("lasso_select", batches)
    keep = graph.full()
    if all(k.all() for k in widths.values()):
        return keep, variables
    seen = sampled(
        apply, variables, consumers(graph, widths), given, positions, seed, kwargs
    )
    readers = _readers(graph, widths, seen.readings)
    masked, stays = variables, ones(variables)
    for path in seen.readings:
        undecided = [
            name
            for name, mine in readers.items()
            if keep[name].all() and any(slot.path == path for slot in mine)
        ]
        wanted = {s.path for name in undecided for s in readers[name]} | {path}
        rows = seen.rows(masked, wanted)
        for name in undecided:
            scores = _scores(seen, readers[name], rows, masked, steps)
            keep[name][np.argsort(-scores, kind="stable")[counts[name] :]] = False
        read = rows[path]
        if undecided:  # a norm in between may have read what went just now
            masked, stays = trees.mask(graph, keep, (masked, stays))
            read = seen.rows(masked, [path])[path]
        masked = replaced(masked, seen.refitted(path, read, stays, ridge))
    return keep, masked


def check_readers(
    apply: Apply,
    graph: Graph,
    variables: PyTree,
    inputs: Any,
    budget: Budget,
    *,
    multiple_of: MultipleOf = 1,
    min_channels: int = 1,
    **kwargs: Any,
) -> None:
    """Raise what `lasso_select` would of the graph or the program, from shapes alone.

    inputs: one batch of its `batches`.
    """
    widths = _widths(graph, budget, multiple_of, min_channels)
    (given,) = check_batches("lasso_select", [inputs])
    others: set[Path] = set()
    found = readings(apply, variables, given, kwargs, elsewhere=others)
    _readers(graph, widths, refittable(found, consumers(graph, widths), others))


def _widths(
    graph: Graph, budget: Budget, multiple_of: MultipleOf, min_channels: int
) -> dict[str, np.ndarray]:
    """A keep of as many channels of each group as the budget leaves it."""
    alike = {name: np.zeros(group.size) for name, group in graph.groups.items()}
    return select(
        graph,
        alike,
        budget,
        multiple_of=multiple_of,
        min_channels=min_channels,
        scope="local",
    )


def _readers(
    graph: Graph, widths: Keep, known: Mapping[Path, Reading]
) -> dict[str, list[Slot]]:
    """Of each group that is to be cut, the slots of kernels that read it plainly."""
    readers = {
        name: [
            slot
            for slot in group.slots
            if slot.path in known and slot.axis in dict(known[slot.path].pairs)
        ]
        for name, group in graph.groups.items()
        if not widths[name].all()
    }
    check_read("lasso_select", readers)
    return readers


def _scores(
    seen: Seen,
    readers: list[Slot],
    rows: dict[Path, np.ndarray],
    variables: PyTree,
    steps: int,
) -> np.ndarray:
    """How long each channel of a group lasts, summed over what reads it.

    z[c] is never formed: of rows X and a kernel W, <z[c], z[d]> is the sum of
    (X'X * WW') over the lines of c and those of d.
    """
    count = len(readers[0].indices)
    gram, wanted = np.zeros((count, count)), np.zeros(count)
    kernels = leaves_of(variables)
    for slot in readers:
        reading, read = seen.readings[slot.path], rows[slot.path]
        kernel = reading.matrix(np.asarray(kernels[slot.path], np.float64))
        mine = _lines(reading, slot)
        other = ~mine.any(axis=0)
        rest = seen.answers[slot.path] - read[:, other] @ kernel[other]
        gram = gram + mine @ ((read.T @ read) * (kernel @ kernel.T)) @ mine.T
        wanted = wanted + mine @ ((read.T @ rest) * kernel).sum(axis=1)
    scale = np.trace(gram) / count or 1.0
    return np.asarray(
        _lasting(jnp.float32(gram / scale), steps, jnp.float32(wanted / scale))
    )


def _lines(reading: Reading, slot: Slot) -> np.ndarray:
    """float64[C, lines of the kernel's matrix]: 1 where a line reads a channel."""
    shape = reading.kernel.shape
    owner = np.full(shape[slot.axis], -1)
    owner[slot.indices] = np.arange(len(slot.indices))[:, None]
    along = [1] * len(shape)
    along[slot.axis] = -1
    lines = reading.matrix(np.broadcast_to(owner.reshape(along), shape))[:, 0]
    return np.equal.outer(np.arange(len(slot.indices)), lines).astype(np.float64)
