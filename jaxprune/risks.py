# SPDX-License-Identifier: Apache-2.0
"""What masked networks lose: the risk with its standard error, compiled once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.base import ConfigError, DataError, Graph, Keep, PyTree, check_separate
from jaxprune.sharded import fetched
from jaxprune.trees import mask

Risk = Callable[[PyTree, Any], Any]


class Found(NamedTuple):
    """The last fields of a `Step`."""

    risk: float
    stderr: float
    counted: int
    sums: dict[str, np.ndarray] | None


def finite(batches: Iterable[Any], what: str = "batches") -> list[Any]:
    """The batches in memory, to be used again; DataError where there are none."""
    check_separate(batches, what)
    held = list(batches)
    if not held:
        raise DataError(f"{what} is empty (or an iterator that was used up before)")
    return held


def evaluator(graph: Graph, risk: Risk) -> Callable[..., Found]:
    """(keep, variables, batches) -> risk, standard error, count, sums; traced once."""

    @jax.jit
    def seen(keep: Keep, variables: PyTree, batch: Any) -> tuple[Any, Any, Any]:
        result = risk(mask(graph, keep, variables), batch)
        parts = result if isinstance(result, tuple) else (result, None)
        if len(parts) not in (2, 3):
            raise ConfigError(
                f"the risk is a tuple of {len(parts)}; it is [B], ([B], bool[B]) or "
                "([B], bool[B], {name: array}), for B images"
            )
        values, counts, sums = (*parts, None)[:3]
        values = jnp.atleast_1d(values)
        if values.ndim > 1:
            raise ConfigError(
                f"the risk is of shape {values.shape}; it is one number an image, [B], "
                "for images are what its standard error is over: average what follows"
            )
        counts = jnp.ones(values.shape, bool) if counts is None else counts
        return values, counts, sums

    def evaluate(keep: Keep, variables: PyTree, batches: Any) -> Found:
        begun = (seen(keep, variables, batch) for batch in batches)
        # Fetched when the next has begun, which the device works on meanwhile.
        pairs = itertools.pairwise(itertools.chain(begun, [None]))
        parts: list[Any] = [jax.tree.map(fetched, found) for found, _ in pairs]
        values = np.concatenate([v[c.astype(bool)] for v, c, _ in parts])
        values = values.astype(np.float64)
        if not len(values):
            raise DataError("the risk counts no image of the validation batches")
        sums = None
        if parts[0][2] is not None:
            sums = {n: _total([p[2][n] for p in parts]) for n in parts[0][2]}
        with np.errstate(invalid="ignore", over="ignore"):
            mean = float(values.mean())
            spread = values.std(ddof=1) if len(values) > 1 else math.nan
        error = float(spread / math.sqrt(len(values)))
        return Found(mean, error, len(values), sums)

    return evaluate


def _total(arrays: list[np.ndarray]) -> np.ndarray:
    """The sum in 64 bits."""
    exact = np.issubdtype(arrays[0].dtype, np.integer)
    return np.asarray(np.sum(arrays, 0, np.int64 if exact else np.float64))
