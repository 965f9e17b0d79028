# SPDX-License-Identifier: Apache-2.0
"""A pruning path: nested networks with their costs and risks, and the choice of one."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from jaxprune import budget as budgets
from jaxprune import formats, graph_io
from jaxprune.base import BudgetError, ConfigError, Cost, DataError
from jaxprune.budget import Budget

Rule = Literal["min", "1se", "knee"]


class Step(NamedTuple):
    """A network of the path.

    alpha: the criterion's increase per fraction of the dense cost saved at which it was
    cut from the one before; 0 for the dense one. keep: {group: bool[C]}. cost: of the
    shrunk network. risk, stderr: mean over the validation images that count, and its
    standard error; counted: how many they are. Of fewer than 2 the error is no number.
    sums: {name: array}, what else the risk measured, summed over the batches.
    """

    alpha: float
    keep: dict[str, np.ndarray]
    cost: Cost
    risk: float
    stderr: float
    counted: int | None = None
    sums: Mapping[str, np.ndarray] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Path:
    """The steps from the dense network down, a sequence; their keeps are nested."""

    steps: tuple[Step, ...]

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, number: int) -> Step:
        return self.steps[number]

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def select(self, rule: Rule | Budget, *, kind: budgets.Kind = "flops") -> Step:
        """One step of the path. Of equal ones, the smaller network.

        'min': the least risk. '1se': the cheapest network whose risk is within one
        standard error of the least, CART's rule. 'knee': with cost (of `kind`) and risk
        scaled to [0, 1], the step farthest below the line between the path's ends, so a
        corner of the lower convex hull (Satopaa et al., "Finding a 'kneedle' in a
        haystack", 2011); where none lies below it, the end of less risk. A budget: the
        least risk within it, as a fraction of the first step. Steps whose risk is not
        finite are never chosen.

        Raises BudgetError where no step meets the budget, or for an unknown kind of
        cost; ConfigError for another rule, or a path without steps; DataError where no
        risk is finite, or '1se' finds no standard error.
        """
        if isinstance(rule, Budget):
            return _least_risk(self._within(rule))
        if rule not in get_args(Rule):
            raise ConfigError(
                f"select({rule!r}): '1se', 'min', 'knee' or a budget as flops(0.4)"
            )
        if rule == "knee":
            return _knee(self.steps, kind)
        least = _least_risk(self.steps)
        if rule == "min":
            return least
        if not math.isfinite(least.stderr):
            counted = "too few" if least.counted is None else least.counted
            raise DataError(
                f"select('1se'): a standard error needs the risks of 2 images or more, "
                f"{counted} counted; validate on more, let the risk return one number "
                "an image, or select('min')"
            )
        most = least.risk + least.stderr
        # Costs fall along the path.
        return [s for s in self.steps if -math.inf < s.risk <= most][-1]

    def _within(self, budget: Budget) -> list[Step]:
        if not self.steps:
            raise ConfigError("the path has no steps")
        dense = _cost(self.steps[0], budget.kind)
        if not dense:
            raise BudgetError(
                f"the first step has no {budget.kind}; choose another kind of cost"
            )
        ratios = [_cost(s, budget.kind) / dense for s in self.steps]
        found = [
            s for s, r in zip(self.steps, ratios) if r <= budget.ratio * (1 + 1e-12)
        ]
        if not found:
            least = budgets.rounded_up(min(ratios))
            raise BudgetError(
                f"no step of the path meets {budget.kind}({budget.ratio}); the "
                f"smallest has {least}. Ask for more, or walk the path further down "
                "(until, multiple_of, min_channels)"
            )
        return found

    def to_json(self) -> str:
        """The path as JSON; keeps are strings of 0 and 1; null: not finite."""
        return json.dumps({"steps": [to_plain(s) for s in self.steps]}, indent=1)

    @staticmethod
    def from_json(text: str) -> Path:
        """The inverse of `to_json`; DataError for text that is none."""
        try:
            steps = formats.parse(text)["steps"]
            return Path(tuple(from_plain(s) for s in steps))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"this is not a pruning path: {error!r}") from error

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write a file that `load` reads: whole or not at all, with checksums."""
        from jaxprune import path_io

        path_io.write(file, self.steps)

    @staticmethod
    def load(file: str | os.PathLike[str]) -> Path:
        """The path that `save` wrote, or as far as a `prune_path(file=...)` has got.

        Raises DataError naming a file that is missing, damaged or something else.
        """
        from jaxprune import path_io

        return Path(path_io.read(file).steps)


def _cost(step: Step, kind: budgets.Kind) -> float:
    budgets.check_kind(kind)
    counts = [int(k.sum()) for k in step.keep.values()]
    if kind == "channels":
        return sum(counts)
    if not isinstance(kind, str):
        return float(kind.at(list(step.keep), counts))
    return getattr(step.cost, "activation_bytes" if kind == "bytes" else kind)


def _least_risk(steps: Iterable[Step]) -> Step:
    """Of ties the last, the smallest."""
    return min(reversed(_finite(steps)), key=lambda step: step.risk)


def _finite(steps: Iterable[Step]) -> list[Step]:
    """The steps whose risk is a finite number; there is one, or else an error."""
    steps = tuple(steps)
    if not steps:
        raise ConfigError("the path has no steps")
    finite = [step for step in steps if math.isfinite(step.risk)]
    if not finite:
        raise DataError(
            f"none of {len(steps)} steps has a finite risk: nothing can be chosen; are "
            "weights, risk and validation batches finite?"
        )
    return finite


def _knee(steps: Sequence[Step], kind: budgets.Kind) -> Step:
    finite = _finite(steps)
    costs = np.array([_cost(step, kind) for step in finite], float)
    risks = np.array([step.risk for step in finite], float)
    x, y = (
        (v - v.min()) / (np.ptp(v) if np.ptp(v) > 0 else 1.0) for v in (costs, risks)
    )
    # Distances from one line are in the same order as those along the axis of risk.
    below = y[-1] + (y[0] - y[-1]) * x - y
    if below.max() <= 1e-12:
        return _least_risk((finite[0], finite[-1]))
    return finite[np.flatnonzero(below >= below.max() - 1e-12)[-1]]


def to_plain(step: Step) -> dict[str, Any]:
    """A step as JSON holds it; null: not finite."""

    def number(x: float) -> float | None:
        return float(x) if math.isfinite(x) else None

    plain = {
        "alpha": number(step.alpha),
        "risk": number(step.risk),
        "stderr": number(step.stderr),
        "cost": {k: int(v) for k, v in step.cost._asdict().items()},
        "keep": graph_io.keep_to_text(step.keep),
    }
    if step.counted is not None:
        plain["counted"] = int(step.counted)
    if step.sums is not None:
        plain["sums"] = {n: np.asarray(v).tolist() for n, v in step.sums.items()}
    return plain


def from_plain(plain: dict[str, Any]) -> Step:
    """The inverse of `to_plain`; ValueError, KeyError or TypeError for another."""

    def number(x: float | None) -> float:
        return math.nan if x is None else float(x)

    keep = graph_io.keep_from_text(plain["keep"])
    cost = Cost(**plain["cost"])
    counts = [*cost, plain.get("counted") or 0]
    if not all(type(n) is int and n >= 0 for n in counts):
        raise ValueError(f"cost or counted of {counts} is no whole number")
    risks = number(plain["risk"]), number(plain["stderr"])
    sums = plain.get("sums")
    if sums is not None:
        sums = {n: np.asarray(v) for n, v in sums.items()}
        if any(v.dtype.kind not in "iuf" for v in sums.values()):
            raise ValueError("sums holds what is no array of numbers")
    return Step(number(plain["alpha"]), keep, cost, *risks, plain.get("counted"), sums)
