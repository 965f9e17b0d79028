# SPDX-License-Identifier: Apache-2.0
"""Which rank each kernel gets, within a budget of all together.

Zhang et al., "Accelerating very deep convolutional networks for classification and
detection", 2016, "Rank selection for whole-model acceleration": the product over
kernels of the energies that stay is made large, greedily.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxprune import factors
from jaxprune.base import BudgetError, Graph, Path
from jaxprune.budget import Budget, rounded_up
from jaxprune.cost import cost
from jaxprune.taps import Reading

_EVENLY = ("cp", "predicted")  # of which no spectrum tells the energy


class Choice(NamedTuple):
    """One way to have a kernel: its rank (0: whole), cost, and fraction of energy."""

    rank: int
    cost: float
    energy: float


def choices(
    method: str,
    kernel: np.ndarray,
    reading: Reading,
    kind: str,
    spectrum: np.ndarray | None,
    multiple_of: int = 1,
) -> list[Choice]:
    """The whole kernel, and the ranks that cost less, rising.

    kind: 'flops' for the inputs of the reading, or 'params' that are trained. spectrum:
    of what the kernel answers; None: of the kernel itself.
    """
    whole, *thinner = priced(method, reading, kind, multiple_of)
    shape, kept = tuple(kernel.shape), [c.rank for c in thinner]
    energy = np.ones(len(kept))
    if method not in _EVENLY and kept:
        own = factors.spectrum(method, kernel) if spectrum is None else spectrum
        energy = energies(own, kept)
        if method == "asymmetric3d":
            inner = [factors.inner_rank(shape, r) for r in kept]
            energy = energy * energies(factors.spectrum(method, kernel), inner)
    of_ranks = zip(thinner, energy, strict=True)
    return [whole, *(c._replace(energy=float(e)) for c, e in of_ranks)]


def priced(
    method: str, reading: Reading, kind: str, multiple_of: int = 1
) -> list[Choice]:
    """The same from shapes alone, as if all energy stayed."""
    shape = tuple(reading.kernel.shape)
    images, axes = _axes(reading)

    def costs(parts: Sequence[tuple[int, ...]]) -> int:
        if kind == "params":
            trained = parts[1:] if method == "predicted" and len(parts) > 1 else parts
            return sum(map(math.prod, trained))
        return 2 * images * factors.multiply_adds(parts, axes)

    whole = Choice(0, costs([shape]), 1.0)
    found = range(multiple_of, factors.full_rank(method, shape), multiple_of)
    thinner = [Choice(r, costs(factors.shapes(method, shape, r)), 1.0) for r in found]
    return [whole, *(c for c in thinner if c.cost < whole.cost)]


def _axes(reading: Reading) -> tuple[int, list[factors.Axis]]:
    """Images (or rows) at a time, and positions along each window axis."""
    read, made = reading.features.shape, reading.eqn.outvars[0].aval.shape
    if reading.eqn.primitive.name == "dot_general":
        summed = [f for _, f in reading.pairs]
        return int(np.prod([n for a, n in enumerate(read) if a not in summed])), []
    dims = reading.eqn.params["dimension_numbers"]
    axes = []
    for dilation, i, o in zip(
        reading.eqn.params["lhs_dilation"],
        dims.lhs_spec[2:],
        dims.out_spec[2:],
        strict=True,
    ):
        at = read[i] if dilation > 1 else made[o]
        axes.append(factors.Axis(read[i], at, made[o]))
    return read[dims.lhs_spec[0]], axes


def within(table: Mapping[Path, Sequence[Choice]], ratio: float) -> dict[Path, Choice]:
    """For each kernel the largest rank of at most that fraction of its cost."""
    found = {}
    for path, (whole, *thinner) in table.items():
        fits = [c for c in thinner if c.cost <= ratio * whole.cost]
        found[path] = max(fits, key=lambda c: c.rank, default=whole)
    return found


def together(
    graph: Graph, table: Mapping[Path, Sequence[Choice]], method: str, budget: Budget
) -> dict[Path, Choice]:
    """Ranks within a budget of the whole network; BudgetError where none are.

    graph: traced with inputs of the sizes that the table is of.
    """
    limit = check(graph, table, method, budget)
    select = evenly if method in _EVENLY else greedily
    found = select(list(table.values()), limit)
    return dict(zip(table, found or (), strict=True))


def check(
    graph: Graph, table: Mapping[Path, Sequence[Choice]], method: str, budget: Budget
) -> float:
    """What the kernels of the table may cost together; BudgetError if it is too little.

    The rest of the network is as it was.
    """
    rows = table.values()
    whole = getattr(cost(graph), str(budget.kind))
    rest = whole - sum(row[0].cost for row in rows)
    limit = whole * budget.ratio - rest
    if not table and limit < 0:
        raise BudgetError(
            f"factorize: {budget.kind}({budget.ratio}): no kernel can be factorised by "
            f"{method!r}; take another method"
        )
    if not _fits([cheapest(row) for row in rows], limit):
        least = rest + sum(cheapest(row).cost for row in rows)
        raise BudgetError(
            f"factorize: {budget.kind}({budget.ratio}) is out of reach of {method!r}; "
            "take more kernels (only) or finer ranks (multiple_of): of these, the "
            f"lowest ranks leave {rounded_up(least / whole)}"
        )
    return limit


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
    total = np.cumsum(np.maximum(spectrum, 0))
    places = np.minimum(np.asarray(ranks, int), len(total)) - 1
    return total[places] / total[-1] if total[-1] > 0 else np.ones(len(places))
