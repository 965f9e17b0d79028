# SPDX-License-Identifier: Apache-2.0
"""Channels that are alone in the axes where they lie, tied in pairs that are not.

A group of one cannot be cut. After a shuffle channels go one way through the layers
each: of two halves of a block, this one lies in the left, the right, the left ...
Together with the one that lies in the right, the left, the right it lies in both
everywhere, as other such pairs do: these are a group.

A heuristic of our own: it looks at all pairs of 512 channels at most, n^2 / 2 sums a
round, and takes them greedily, so it need not find the most pairs.
"""

from __future__ import annotations

import numpy as np

_MOST = 512  # it looks at all pairs


def in_pairs(ids: np.ndarray, sums: np.ndarray, count: int) -> np.ndarray | None:
    """int[count]: by component, the one that it is tied to; itself where to none.

    ids: the components that are alone. sums: uint64, for each that of the marks of the
    axes where it lies. Pairs of one sum lie in the same axes, the two taken together.
    Those sums go first that most pairs have. None where nothing is tied.
    """
    if len(ids) > _MOST:
        return None
    tied, merged = False, np.arange(count)
    left = np.arange(len(ids))
    while len(left) >= 4:
        pairs = _of_most(left, sums)
        if not pairs:
            break
        for i, j in pairs:
            merged[ids[j]], tied = ids[i], True
        left = np.setdiff1d(left, np.array(pairs))
    return merged if tied else None


def _of_most(left: np.ndarray, sums: np.ndarray) -> list[tuple[int, int]]:
    """Disjoint pairs of the sums that most pairs have, two or more of each sum."""
    first, second = (left[side] for side in np.triu_indices(len(left), 1))
    total = sums[first] + sums[second]
    _, which, counts = np.unique(total, return_inverse=True, return_counts=True)
    most = int(counts.max())
    chosen = np.flatnonzero(counts[which] == most) if most > 1 else np.zeros(0, int)
    rows = chosen[np.argsort(which[chosen], kind="stable")].reshape(-1, most)
    free, found = np.ones(len(sums), bool), []
    for row in rows[np.argsort(rows[:, 0])]:  # the pairs of a sum
        mine = row[free[first[row]] & free[second[row]]]
        if len(mine) > 1:
            found += list(zip(first[mine].tolist(), second[mine].tolist()))
            free[first[mine]] = free[second[mine]] = False
    return found
