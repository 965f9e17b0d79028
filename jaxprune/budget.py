# SPDX-License-Identifier: Apache-2.0
"""Budgets: the fraction of FLOPs, parameters, channels or bytes that may stay."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, Protocol, get_args

import numpy as np

from jaxprune.base import BudgetError, Graph, Keep
from jaxprune.cost import at

Name = Literal["flops", "params", "channels", "bytes"]


class Measured(Protocol):
    """A cost of one's own, such as `latency.Timings`; growing with every count."""

    def at(self, groups: Sequence[str], kept: Any) -> np.ndarray:
        """The cost at numbers of kept channels of these, int[..., G] -> [...]."""


Kind = Name | Measured


@dataclasses.dataclass(frozen=True)
class Budget:
    """At most `ratio` of the dense network's `kind` stays.

    Raises BudgetError for an unknown kind or a ratio outside (0, 1].
    """

    kind: Kind
    ratio: float

    def __post_init__(self) -> None:
        check_kind(self.kind)
        number = isinstance(self.ratio, int | float | np.number)
        if not number or isinstance(self.ratio, bool) or not 0 < self.ratio <= 1:
            raise BudgetError(
                f"{self.kind}({self.ratio!r}): a budget is the fraction that stays, a "
                "number in (0, 1]; 0.4 keeps 40 %"
            )
        # Of NumPy's halves, a product with FLOPs would be infinite.
        object.__setattr__(self, "ratio", float(self.ratio))


def check(budget: Any) -> None:
    """Raise BudgetError for anything but a Budget, such as a bare 0.4."""
    if not isinstance(budget, Budget):
        raise BudgetError(
            f"budget={budget!r:.80}: say of what, by jaxprune.flops(0.4), "
            "params, channels, bytes or latency"
        )


def flops(ratio: float) -> Budget:
    """At most `ratio` of the dense network's FLOPs stay; BudgetError outside (0, 1]."""
    return Budget("flops", ratio)


def params(ratio: float) -> Budget:
    """At most `ratio` of the trained parameters stay; BudgetError outside (0, 1]."""
    return Budget("params", ratio)


def channels(ratio: float) -> Budget:
    """At most `ratio` of the prunable channels stay; BudgetError outside (0, 1]."""
    return Budget("channels", ratio)


def bytes(ratio: float) -> Budget:
    """At most `ratio` of the activation bytes stay; BudgetError outside (0, 1]."""
    return Budget("bytes", ratio)


def check_kind(kind: Any) -> None:
    """Raises BudgetError for a kind of cost that cannot be measured."""
    if not hasattr(kind, "at") and kind not in get_args(Name):
        raise BudgetError(
            f"no budget kind {kind!r}; there are {', '.join(get_args(Name))}, and what "
            "jaxprune.timings measures"
        )


def measure(graph: Graph, kind: Kind, kept: Any) -> np.ndarray:
    """The cost of `kind` at numbers of kept channels, int[..., G] -> int[...]."""
    check_kind(kind)
    if kind == "channels":
        return np.asarray(kept).sum(axis=-1)
    if not isinstance(kind, str):
        return kind.at(list(graph.groups), kept)
    field = "activation_bytes" if kind == "bytes" else kind
    return np.asarray(getattr(at(graph, kept), field))


def sizes(graph: Graph) -> np.ndarray:
    """int[G], the channels of each group, in the graph's order."""
    return np.array([g.size for g in graph.groups.values()], np.int64)


def limit(graph: Graph, budget: Budget) -> float:
    """The most that may stay, in the budget's own unit, forgiving float rounding."""
    return float(measure(graph, budget.kind, sizes(graph))) * budget.ratio * (1 + 1e-12)


def met(graph: Graph, keep: Keep, budget: Budget) -> bool:
    """Whether what a keep leaves is within the budget."""
    return within(graph, np.array([np.sum(k) for k in keep.values()], int), budget)


def within(graph: Graph, kept: np.ndarray, budget: Budget) -> bool:
    """`met` of the numbers of kept channels, int[G]."""
    return bool(measure(graph, budget.kind, kept) <= limit(graph, budget))


def rounded_up(ratio: float) -> str:
    """A ratio for a message, rounded up so that asking for it succeeds."""
    return f"{math.ceil(ratio * 1e4) / 1e4:.4f}"


def marginal(graph: Graph, kind: Kind) -> np.ndarray:
    """float[G]: the fraction of the dense cost that a channel of each group carries.

    See `cuts`: of several at once, the most that any number of them saves, by channel.
    """
    full = sizes(graph)
    dense = measure(graph, kind, full)
    if dense == 0:
        raise BudgetError(
            f"the dense network has no {kind}; choose another kind of cost"
        )
    cut = cuts(np, kind, full)
    less = full - cut[..., None] * np.eye(len(full), dtype=int)
    saved = dense - measure(graph, kind, less)
    return (saved / cut).max(axis=0) / dense


def cuts(xp: Any, kind: Kind, kept: Any) -> Any:
    """[K, G]: how many of each group's channels to cut at once, to price one of them.

    One; of measured costs also eighths of the group, for these have plateaus, on which
    one channel less saves nothing. xp: numpy, or jax.numpy for counts that are traced.
    """
    one = xp.ones_like(kept)
    if isinstance(kind, str):
        return xp.stack([one])
    lower = [xp.maximum(xp.floor(kept * j / 8), 1) for j in range(1, 9)]
    more = [xp.maximum(kept - low, 1).astype(kept.dtype) for low in lower]
    return xp.stack([one, *more])
