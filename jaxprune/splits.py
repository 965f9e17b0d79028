# SPDX-License-Identifier: Apache-2.0
"""Where a reshape splits an axis of channels: along which part they are cut.

Of 96 channels in 32 groups of 3, whole groups can go, or the same place in every group,
not both. Sites must agree where the same channels pass several of them (the norms
around a concatenation), and a choice may be frozen further on (a norm's mean is over
one of the two parts). So the program is analysed under a few strategies, and every
cluster of sites that share variables takes the one that leaves most prunable.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxprune.labels import Labels, Solved, Value, components, longest

Strategy = Callable[[Sequence[int]], int]
Analysis = Callable[[Labels], Sequence[Value]]


def settle(analysis: Analysis, exact: bool) -> tuple[Labels, Solved, Sequence[Value]]:
    """The analysis that leaves most prunable, solved, and the values of the leaves.

    analysis(labels) labels the whole program and returns those values.
    """
    tries: list[_Try] = []
    for strategy in (longest, *map(_place, (0, 1, 2, -1))):
        if any(_agree(strategy, known) for known in tries):
            continue
        tries.append(_attempt(analysis, exact, {}, strategy))
    if len(tries) > 1:
        chosen = _by_cluster(tries)
        if not any(_holds(chosen, known) for known in tries):
            tries.append(_attempt(analysis, exact, chosen, longest))
    best = tries[0]
    if len(tries) > 1:
        best = max(tries, key=lambda known: tuple(known.scores.sum(0)))
    if best.labels.shuffled and best.labels.balances:
        later = _attempt(analysis, exact, best.chosen, longest, later=True)
        best = max(best, later, key=lambda known: tuple(known.scores.sum(0)))
    return best.labels, best.solved, best.ins


@dataclasses.dataclass(frozen=True)
class _Try:
    """One analysis.

    sizes, chosen: by site, the lengths of the parts, and the part that was cut.
    """

    labels: Labels
    ins: Sequence[Value]
    solved: Solved
    sizes: dict[int, tuple[int, ...]]
    chosen: dict[int, int]

    @functools.cached_property
    def scores(self) -> np.ndarray:
        """int[axes of all leaves, 3], see `_scores`."""
        return _scores(self.ins, self.solved)


def _place(number: int) -> Strategy:
    """The part at a place among those longer than 1 (the last if there are fewer)."""

    def strategy(sizes: Sequence[int]) -> int:
        longer = [axis for axis, n in enumerate(sizes) if n > 1]
        return longer[min(number, len(longer) - 1)]

    return strategy


def _agree(strategy: Strategy, known: _Try) -> bool:
    """Whether a strategy says the same of every site that an analysis met."""
    return all(strategy(n) == known.chosen[site] for site, n in known.sizes.items())


def _holds(chosen: Mapping[int, int], known: _Try) -> bool:
    return all(chosen.get(site, part) == part for site, part in known.chosen.items())


def _attempt(
    analysis: Analysis,
    exact: bool,
    chosen: Mapping[int, int],
    strategy: Strategy,
    later: bool = False,
) -> _Try:
    def split(site: int, sizes: Sequence[int], grid: np.ndarray) -> int:
        del grid
        return chosen.get(site, strategy(sizes))

    labels = Labels(exact=exact, split=split, later=later)
    ins = analysis(labels)
    solved = labels.solve()
    sizes = {s.site: s.sizes for s in labels.splits}
    parts = {s.site: s.part for s in labels.splits}
    return _Try(labels, ins, solved, sizes, parts)


def _lines(ins: Sequence[Value]) -> list[np.ndarray]:
    """The labels of all axes of all leaves."""
    lines = [axis for value in ins for axis in value.labels]
    return [np.zeros(1, int) if axis is None else axis for axis in lines]


def _scores(ins: Sequence[Value], solved: Solved) -> np.ndarray:
    """Per axis: indices that can be cut, those of them exactly, and channels."""
    lines = [solved.component[line] for line in _lines(ins)]
    # Channels of one group lie in the same axes: each axis adds its mark. One that is
    # alone is all of its group, and stays.
    marks = np.random.default_rng(0).integers(2**63, size=len(lines), dtype=np.uint64)
    sums = np.zeros(len(solved.frozen), np.uint64)
    for line, mark in zip(lines, marks):
        np.add.at(sums, line, mark)
    _, group, sizes = np.unique(sums, return_inverse=True, return_counts=True)
    loose = ~solved.frozen & (sizes[group] > 1)
    rows = []
    for line in lines:
        mine = line[loose[line]]
        exact = np.count_nonzero(~solved.inexact[mine])
        rows.append((len(mine), exact, len(np.unique(mine))))
    return np.array(rows)


def _by_cluster(tries: Sequence[_Try]) -> dict[int, int]:
    """By site, the part that the best try of its cluster has cut.

    Sites and axes that any try ties to one another are one cluster.
    """
    sites = {
        site: i
        for i, site in enumerate(dict.fromkeys(s for t in tries for s in t.sizes))
    }
    axes = len(tries[0].scores)
    count = axes + len(sites)
    edges: list[tuple[int, np.ndarray]] = []
    for known in tries:
        lines = [*enumerate(_lines(known.ins))]
        lines += [(axes + sites[s.site], s.line) for s in known.labels.splits]
        for node, line in lines:
            found = np.unique(known.solved.component[line[line > 0]])
            edges.append((node, count + found))
        count += len(known.solved.frozen)
    rows = np.concatenate([np.full(len(found), node) for node, found in edges])
    columns = np.concatenate([found for _, found in edges])
    cluster = components(count, rows, columns)

    chosen: dict[int, int] = {}
    for site, number in sites.items():
        mine = cluster[:axes] == cluster[axes + number]
        best = max(tries, key=lambda known: tuple(known.scores[mine].sum(0)))
        if site in best.chosen:
            chosen[site] = best.chosen[site]
    return chosen
