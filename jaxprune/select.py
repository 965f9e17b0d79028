# SPDX-License-Identifier: Apache-2.0
"""What stays, at one stroke: scores and a budget in, a keep out."""

import difflib
import fnmatch
from collections.abc import Mapping
from numbers import Integral
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jaxprune import budget as budgets
from jaxprune.base import BudgetError, ConfigError, Graph, GraphError, Scores
from jaxprune.budget import Budget
from jaxprune.criteria import check_scores

MultipleOf = int | Literal["auto"]


def select(
    graph: Graph,
    scores: Scores,
    budget: Budget,
    *,
    multiple_of: MultipleOf = 1,
    min_channels: int = 1,
    scope: Literal["global", "local"] = "global",
    overrides: Mapping[str, float | bool] | None = None,
) -> dict[str, np.ndarray]:
    """The keep {group: bool[C]} that has the highest scores and meets the budget.

    The channels of a group, by falling score (ties: by index), are cut into blocks of
    `multiple_of`. 'global' ranks all blocks by their mean score; 'local' ranks them by
    what fraction of its group a block completes, so that every group keeps the same
    fraction. Blocks stay in rank order as long as the budget is met; from the first
    that does not fit on, those that still do are added, so that no further one fits.

    Args:
      graph: of the dense network.
      scores: {group: float[C]}, higher = more important.
      budget: what may stay at most, e.g. `flops(0.4)`.
      multiple_of: kept counts are multiples of it, or the group's full size; 'auto':
        of what suits the device at hand, see `alignment`.
      min_channels: the least that stays in any group.
      scope: compare scores between groups, or only within each.
      overrides: {group name or fnmatch pattern: fraction in (0, 1] that stays, rounded
        down to a possible count; True keeps all}. A later entry wins over an earlier.

    Raises:
      BudgetError: the budget cannot be met; the message says the least ratio that can;
        or it is none, but a bare number.
      GraphError: scores that do not fit the graph or are not finite; an override that
        matches no group.
      ConfigError: multiple_of, min_channels, scope or an override's value is malformed.
    """
    if scope not in ("global", "local"):
        raise ConfigError(f"scope={scope!r}: scope is 'global' or 'local'")
    budgets.check(budget)
    scores = check_scores(graph, scores)
    counts = allowed_counts(graph, multiple_of, min_channels)
    for name, fraction in _fractions(graph, overrides or {}).items():
        most = fraction * graph.groups[name].size * (1 + 1e-9)
        fits = counts[name][counts[name] <= most]
        counts[name] = fits[-1:] if len(fits) else counts[name][:1]

    orders = {n: np.argsort(-s, kind="stable") for n, s in scores.items()}
    ranked = _rank(scores, orders, counts, scope)
    kept = _fill(graph, np.array([c[0] for c in counts.values()]), ranked, budget)
    keep = graph.full()
    for stays, order, count in zip(keep.values(), orders.values(), kept, strict=True):
        stays[order[count:]] = False
    return keep


def alignment(platform: str | None = None) -> int:
    """The multiple of channels that suits a platform, by default of the first device.

    TPU: the 128 lanes of a vector register. GPU: the 8 channels of 16 bits that tensor
    cores take at once (NVIDIA, "Matrix multiplication background"). CPU: the 8 floats
    of a 256-bit vector register.
    """
    return 128 if (platform or jax.devices()[0].platform) == "tpu" else 8


def in_channels(multiple_of: MultipleOf) -> int:
    """`multiple_of` as a number, 'auto' being `alignment`'s; else ConfigError."""
    if multiple_of == "auto":
        return alignment()
    check_positive(multiple_of=multiple_of)
    return multiple_of


def check_positive(**values: Any) -> None:
    """Raise ConfigError naming the first that is no positive integer."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            raise ConfigError(f"{name}={value!r}: a positive integer is needed")


def allowed_counts(
    graph: Graph, multiple_of: MultipleOf, min_channels: int
) -> dict[str, np.ndarray]:
    """{group: int[n]}, rising: the numbers of channels that a group may keep.

    Multiples of `multiple_of` from `min_channels` on, and the full size. Raises
    ConfigError where one of the two is not a positive integer (or 'auto').
    """
    multiple_of = in_channels(multiple_of)
    check_positive(min_channels=min_channels)
    counts = {}
    for name, group in graph.groups.items():
        steps = np.arange(multiple_of, group.size, multiple_of)
        counts[name] = np.append(steps[steps >= min_channels], group.size)
    return counts


def check_budget(
    graph: Graph, budget: Budget, multiple_of: MultipleOf, min_channels: int
) -> None:
    """Raise BudgetError, saying the least ratio, where no allowed widths meet it."""
    budgets.check(budget)
    counts = allowed_counts(graph, multiple_of, min_channels)
    least = np.array([c[0] for c in counts.values()], int)
    if budgets.measure(graph, budget.kind, least) > budgets.limit(graph, budget):
        _refuse(graph, least, budget)


class _Blocks(NamedTuple):
    """Blocks in the order in which they stay: whose they are, and how many channels."""

    group: np.ndarray
    size: np.ndarray


def _rank(
    scores: Scores,
    orders: Mapping[str, np.ndarray],
    counts: Mapping[str, np.ndarray],
    scope: str,
) -> _Blocks:
    group, size, rank = [], [], []
    for i, (name, ends) in enumerate(counts.items()):
        ranked = scores[name][orders[name]].astype(float)[: ends[-1]]
        sizes = np.diff(ends)
        if scope == "global":
            means = np.add.reduceat(ranked, ends[:-1]) / sizes
            # Rounding must not put a block before one that it follows.
            keys = np.maximum.accumulate(-means)
        else:
            keys = ends[1:] / len(scores[name])
        group.append(np.full(len(sizes), i))
        size.append(sizes)
        rank.append(keys)
    order = np.argsort(np.concatenate([*rank, []]), kind="stable")
    return _Blocks(
        np.concatenate([*group, np.zeros(0, int)])[order],
        np.concatenate([*size, np.zeros(0, int)])[order],
    )


def _fill(
    graph: Graph, least: np.ndarray, ranked: _Blocks, budget: Budget
) -> np.ndarray:
    """int[G], the channels that stay: `least`, and the ranked blocks that fit."""

    def fits(kept: np.ndarray) -> bool:
        return bool(budgets.measure(graph, budget.kind, kept) <= most)

    def first(n: int) -> np.ndarray:
        added = np.bincount(ranked.group[:n], ranked.size[:n], minlength=len(least))
        return least + added.astype(int)

    most = budgets.limit(graph, budget)
    if not fits(least):
        _refuse(graph, least, budget)
    low, high = 0, len(ranked.group)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(first(middle)) else (low, middle - 1)
    kept = first(low)
    # Costs grow with every count, so a group whose block does not fit is done.
    full: set[int] = set()
    for g, size in zip(ranked.group[low:], ranked.size[low:]):
        if g not in full:
            kept[g] += size
            if not fits(kept):
                kept[g] -= size
                full.add(g)
    return kept


def _refuse(graph: Graph, least: np.ndarray, budget: Budget) -> None:
    cost = budgets.measure(graph, budget.kind, np.stack([least, budgets.sizes(graph)]))
    ratio = budgets.rounded_up(cost[0] / cost[1])
    timed = not isinstance(budget.kind, str)
    call = f"latency({ratio}, timings)" if timed else f"{budget.kind}({ratio})"
    raise BudgetError(
        f"{budget.kind}({budget.ratio}) cannot be met: what must stay has {ratio} of "
        f"the dense network's {budget.kind}. Ask for {call} or more, "
        "or lower multiple_of, min_channels or the overrides"
    )


def _fractions(graph: Graph, overrides: Mapping[str, float | bool]) -> dict[str, float]:
    if not isinstance(overrides, Mapping):
        raise ConfigError(
            f"overrides={overrides!r:.80}: {{group or pattern: fraction}}"
        )
    fractions = {}
    for pattern, value in overrides.items():
        number = isinstance(value, int | float | np.number)
        if not number or value is False or not 0 < value <= 1:
            raise ConfigError(
                f"overrides[{pattern!r}] = {value!r}: the fraction that stays, in "
                "(0, 1], or True to keep all"
            )
        names = [pattern] if pattern in graph.groups else []
        names = names or fnmatch.filter(graph.groups, pattern)
        if not names:
            near = difflib.get_close_matches(pattern, graph.groups, 3, 0.3)
            raise GraphError(
                f"overrides name {pattern!r}, which matches no group; the nearest are "
                f"{', '.join(near or list(graph.groups)[:3])}"
            )
        fractions.update(dict.fromkeys(names, float(value)))
    return fractions
