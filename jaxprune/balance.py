# SPDX-License-Identifier: Apache-2.0
"""Grouped convolutions behind shuffles: as many channels of every group go together.

The made channels of a convolution in groups may go in any sets that take as many of
each group. Which sets leave most to choose from is known when all else is tied: after a
shuffle what the next convolution ties may be such sets already.

The search for sets is a heuristic of our own: greedy, neither complete nor of the most
sets. It looks at 64 kinds of channels at most, and at tables of 2^22 counts. Where it
finds none, the same channel of every group goes together, which is always balanced.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

_TYPES, _COUNTS = 64, 2**22


class Balance(NamedTuple):
    """The labels of the made channels of a convolution, and its number of groups."""

    line: np.ndarray
    groups: int


def balanced(
    component: np.ndarray, frozen: np.ndarray, balances: Iterable[Balance]
) -> np.ndarray:
    """int[labels]: the components, tied so that each takes as many of every group.

    frozen: bool[components]; those never go, and need nothing. A set stays balanced
    when it is tied to another, so the convolutions come one after another.
    """
    merged = np.arange(len(frozen))
    for line, groups in balances:
        here = merged[component[line]].reshape(groups, -1)
        ids, which = np.unique(here, return_inverse=True)
        which = which.reshape(here.shape)
        roots = None
        if len(ids) * groups <= _COUNTS:
            counts = np.zeros((len(ids), groups), int)
            np.add.at(counts, (which, np.arange(groups)[:, None]), 1)
            counts -= counts.min(1, keepdims=True)
            roots = _sets(counts, ~frozen[ids] & counts.any(1))
        if roots is None:  # the same channel of every group
            roots = np.arange(len(ids))
            while not np.array_equal(roots, less := _columns(roots, which)):
                roots = less
        stuck = np.zeros(len(ids), bool)
        np.logical_or.at(stuck, roots, frozen[ids])
        frozen = frozen.copy()
        frozen[ids] = stuck[roots]
        onto = np.arange(len(frozen))
        onto[ids] = ids[roots]
        merged = onto[merged]
    return merged[component]


def _columns(roots: np.ndarray, which: np.ndarray) -> np.ndarray:
    """The roots when those that share a column have been hung below its least."""
    less = roots.copy()
    np.minimum.at(less, roots[which], roots[which].min(0)[None])
    return less[less[roots]]


def _sets(counts: np.ndarray, loose: np.ndarray) -> np.ndarray | None:
    """The roots of balanced sets of the loose ones; None where none are found.

    counts: int[n, groups], how many of each group, beyond the fewest.
    """
    roots = np.arange(len(counts))
    rows, kind = np.unique(counts[loose], axis=0, return_inverse=True)
    if len(rows) > _TYPES:
        return None
    kind = kind.reshape(-1)
    members = [np.flatnonzero(loose)[kind == t] for t in range(len(rows))]
    for t in range(len(rows)):
        while len(members[t]):
            pattern = _pattern(rows, np.array([len(m) for m in members]), t)
            if pattern is None:
                return None
            used = np.flatnonzero(pattern)
            times = min(len(members[s]) // pattern[s] for s in used)
            first = members[t][: times * pattern[t] : pattern[t]]
            for s in used:
                taken, members[s] = np.split(members[s], [times * pattern[s]])
                roots[taken] = np.repeat(first, pattern[s])
    return roots


def _pattern(rows: np.ndarray, left: np.ndarray, t: int) -> np.ndarray | None:
    """How many of each kind, of kind t one or more, have as many of every group.

    Each step takes the kind that leaves the groups most alike, below a level that is
    raised where that leads nowhere.
    """
    groups, highest = rows.shape[1], rows[t].max() + rows.max() + 1
    for level in range(rows[t].max(), highest + 1):
        pattern, total = np.zeros(len(rows), int), rows[t].copy()
        pattern[t] = 1
        while (total < level).any():
            after = total + rows
            fits = (left > pattern) & (after <= level).all(1)
            if not fits.any():
                break
            unlike = groups * (after**2).sum(1) - after.sum(1) ** 2
            s = int(np.argmin(np.where(fits, unlike, np.iinfo(int).max)))
            pattern[s] += 1
            total = after[s]
        else:
            return pattern
    return None
