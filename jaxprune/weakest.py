# SPDX-License-Identifier: Apache-2.0
"""The weakest link: of all units that may go, those with the least rise per cost."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxprune import budget as budgets
from jaxprune.base import DataError, Graph, Keep

_ROUNDING = 1e-9  # of the cost

Counts = Mapping[str, np.ndarray]
# (number of the group, how many of its weakest channels go) -> what the loss gains.
Rises = Callable[[int, int], float]


class Link(NamedTuple):
    """A block: the keep behind it, what the loss gains by it, and the cost it saves.

    As far as there was a use for it.
    """

    keep: dict[str, np.ndarray]
    rise: float
    saved: float


def order(keep: Keep, scores: Counts) -> list[np.ndarray]:
    """By group the channels that are left, the weakest first; ties: by index."""
    found = []
    for name, stays in keep.items():
        remaining = np.flatnonzero(stays)
        found.append(remaining[np.argsort(scores[name][remaining], kind="stable")])
    return found


def without(keep: Keep, weakest: Sequence[np.ndarray], gone: Sequence[int]) -> Keep:
    """The keep without the first `gone` of each group's `weakest` channels."""
    smaller = {n: np.array(k) for n, k in keep.items()}
    for stays, channels, count in zip(smaller.values(), weakest, gone, strict=True):
        stays[channels[:count]] = False
    return smaller


def summed(scores: Counts, weakest: Sequence[np.ndarray]) -> Rises:
    """Rises as sums of the channels' own, as a criterion estimates them."""
    totals = [
        np.append(0.0, np.cumsum(values[channels], dtype=float))
        for values, channels in zip(scores.values(), weakest, strict=True)
    ]
    return lambda group, gone: float(totals[group][gone])


def measured(
    keep: Keep, weakest: Sequence[np.ndarray], loss: Callable[[Keep], float]
) -> Rises:
    """Rises as the loss of the network without them shows, each measured once.

    One that is no finite number counts as infinite: what breaks the network stays.
    Raises DataError where the network is broken without it.
    """
    now = loss(keep)
    if not np.isfinite(now):
        raise DataError(
            f"the loss on batches is {now} before anything more is cut: no rise can be "
            "measured; are weights and batches finite?"
        )
    known: dict[tuple[int, int], float] = {}

    def rise(group: int, gone: int) -> float:
        if gone == 0:
            return 0.0
        if (group, gone) not in known:
            counts = [gone if g == group else 0 for g in range(len(weakest))]
            found = loss(without(keep, weakest, counts)) - now
            known[group, gone] = found if np.isfinite(found) else np.inf
        return known[group, gone]

    return rise


def cut(
    graph: Graph,
    keep: Keep,
    weakest: Sequence[np.ndarray],
    rises: Rises,
    allowed: Counts,
    kind: budgets.Kind,
    target: float,
    excess: float,
    enough: Callable[[np.ndarray], bool],
) -> Link | None:
    """Cut the weakest units until `target` is saved; None where nothing may be cut.

    Or until these numbers of channels, int[G], are `enough`. What a unit saves beyond
    the `excess` over the budget is worth nothing. A unit whose rise is not finite
    stays.
    """
    start = np.array([len(channels) for channels in weakest])
    kept, saved = start.copy(), 0.0
    now = before = float(budgets.measure(graph, kind, kept))
    while saved < target or saved == 0:
        lower, saving = _units(graph, kept, allowed, kind, now)
        worth = np.minimum(saving, excess - saved)
        ratio = np.full(len(kept), np.inf)
        for g in map(int, np.flatnonzero(worth > 0)):
            # Infinite less infinite would be no number, which `argmin` takes for least.
            rise = rises(g, int(start[g] - lower[g]))
            if np.isfinite(rise):
                ratio[g] = (rise - rises(g, int(start[g] - kept[g]))) / worth[g]
        if not np.isfinite(ratio).any():
            break
        weak = ratio.argmin()
        kept[weak] = lower[weak]
        now = float(budgets.measure(graph, kind, kept))
        saved = before - now
        if enough(kept):
            break
    if not saved:
        return None
    gone = [int(n) for n in start - kept]
    rise = sum(rises(g, n) for g, n in enumerate(gone))
    return Link(dict(without(keep, weakest, gone)), float(rise), min(saved, excess))


def _units(
    graph: Graph, kept: np.ndarray, allowed: Counts, kind: budgets.Kind, now: float
) -> tuple[np.ndarray, np.ndarray]:
    """To what each group falls by a unit, and what that saves.

    A unit is made wider where it saves nothing, as measured time does that is flat,
    but for what rounds.
    """
    lower = kept
    saving = np.zeros(len(kept))
    while True:
        flat = saving <= _ROUNDING * now
        next_ = [_next_lower(a, k) for a, k in zip(allowed.values(), lower)]
        wider = np.where(flat, next_, lower)
        if np.array_equal(wider, lower):
            return lower, saving
        lower = wider
        trial = kept - np.diag(kept - lower)
        saving = now - budgets.measure(graph, kind, trial)


def _next_lower(counts: np.ndarray, kept: int) -> int:
    """The largest allowed count below `kept`, or `kept` itself where there is none."""
    below = counts[counts < kept]
    return int(below[-1]) if len(below) else int(kept)
