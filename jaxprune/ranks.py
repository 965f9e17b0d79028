# SPDX-License-Identifier: Apache-2.0
"""Which rank each kernel gets, within a budget of all together.

Zhang et al., "Accelerating very deep convolutional networks for classification and
detection", 2016, "Rank selection for whole-model acceleration": the product over
kernels of the energies that stay is made large, greedily.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Choice(NamedTuple):
    """One way to have a kernel: its rank (0: whole), cost, and fraction of energy."""

    rank: int
    cost: float
    energy: float


def by_ratio(choices: Sequence[Choice], ratio: float) -> Choice:
    """The largest rank within the ratio of what the whole kernel, the first, costs."""
    fits = [c for c in choices[1:] if c.cost <= ratio * choices[0].cost]
    return max(fits, default=choices[0])


def evenly(table: Sequence[Sequence[Choice]], limit: float) -> list[Choice] | None:
    """One ratio for all kernels, the largest within the limit, and what is then left.

    Where no rank fits a ratio, the lowest is taken. None: even those cost too much.
    """

    def at(ratio: float) -> list[Choice]:
        return [
            max(
                (c for c in choices if c.cost <= ratio * choices[0].cost),
                key=lambda c: c.cost,
                default=cheapest(choices),
            )
            for choices in table
        ]

    if not _fits(at(0.0), limit):
        return None
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _fits(at(middle), limit) else (low, middle)
    return _filled(table, at(low), limit)


def greedily(table: Sequence[Sequence[Choice]], limit: float) -> list[Choice] | None:
    """Choices of at most `limit` together, whose energies' product is large.

    From whole kernels down, where the product falls least for what is saved: the
    paper's (dE / E) / dC of one eigenvalue, with d log E, as steps may be of more: from
    a whole kernel to the first rank that is worth it. None where even the lowest ranks
    cost more.
    """
    hulls = [_hull(choices) for choices in table]
    at = [0] * len(hulls)
    slopes = [_slopes(hull) for hull in hulls]
    total = sum(hull[0].cost for hull in hulls)
    while total > limit * (1 + 1e-12):
        ahead = [s[i] if i < len(s) else math.inf for s, i in zip(slopes, at)]
        least = min(range(len(ahead)), key=ahead.__getitem__, default=None)
        if least is None or ahead[least] == math.inf:
            return None
        hull, i = hulls[least], at[least]
        total += hull[i + 1].cost - hull[i].cost
        at[least] += 1
    chosen = [hull[i] for hull, i in zip(hulls, at)]
    return _filled(table, chosen, limit)


def cheapest(choices: Sequence[Choice]) -> Choice:
    """The one that costs least."""
    return min(choices, key=lambda c: c.cost)


def _fits(chosen: Sequence[Choice], limit: float) -> bool:
    return sum(c.cost for c in chosen) <= limit * (1 + 1e-12)


def _hull(choices: Sequence[Choice]) -> list[Choice]:
    """Those that no mixture of others beats, from the dearest to the cheapest."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.cost, -c.energy)):
        if hull and _log(choice) <= _log(hull[-1]):
            continue
        while len(hull) > 1 and _gain(hull[-1], choice) > _gain(hull[-2], hull[-1]):
            hull.pop()
        hull.append(choice)
    return hull[::-1]


def _slopes(hull: Sequence[Choice]) -> list[float]:
    return [_gain(b, a) for a, b in zip(hull, hull[1:])]


def _log(choice: Choice) -> float:
    return math.log(max(choice.energy, 1e-300))


def _gain(a: Choice, b: Choice) -> float:
    """How much the logarithm of the energy grows by cost, from a to the dearer b."""
    return (_log(b) - _log(a)) / (b.cost - a.cost)


def _filled(
    table: Sequence[Sequence[Choice]], chosen: Sequence[Choice], limit: float
) -> list[Choice]:
    """What is left of the limit goes to the steps up that gain most, while they fit."""
    chosen = list(chosen)
    left = limit * (1 + 1e-12) - sum(c.cost for c in chosen)
    while True:
        steps = [
            (_log(up) - _log(now), up.cost - now.cost, i, up)
            for i, (now, choices) in enumerate(zip(chosen, table))
            for up in choices
            if 0 < up.cost - now.cost <= left and up.energy >= now.energy
        ]
        if not steps:
            return chosen
        gain, cost, i, up = max(steps, key=lambda s: (s[0], -s[1], -s[2]))
        chosen[i], left = up, left - cost


def energies(spectrum: np.ndarray, ranks: Sequence[int]) -> np.ndarray:
    """The fraction that so many of the largest values make, float[len(ranks)]."""
    total = np.maximum(np.cumsum(np.maximum(spectrum, 0)), 0)
    places = np.minimum(np.asarray(ranks, int), len(total)) - 1
    return (
        total[places] / total[-1]
        if len(total) and total[-1] > 0
        else np.ones(len(places))
    )
