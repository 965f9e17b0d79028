# SPDX-License-Identifier: Apache-2.0
"""A pruning path: nested networks with their costs and risks, and the choice of one."""

import dataclasses
import json
import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxprune import budget as budgets
from jaxprune import graph_io
from jaxprune.base import BudgetError, ConfigError, Cost, DataError
from jaxprune.budget import Budget


class Step(NamedTuple):
    """A network of the path.

    alpha: the criterion's increase per fraction of the dense cost saved at which it was
    cut from the one before; 0 for the dense one. keep: {group: bool[C]}. cost: of the
    shrunk network. risk, stderr: mean over the validation images and its standard
    error.
    """

    alpha: float
    keep: dict[str, np.ndarray]
    cost: Cost
    risk: float
    stderr: float


@dataclasses.dataclass(frozen=True, eq=False)
class Path:
    """The steps from the dense network down; their keeps are nested."""

    steps: tuple[Step, ...]

    def select(self, rule: Literal["1se", "min"] | Budget) -> Step:
        """One step of the path.

        'min': the least risk. '1se': the cheapest network whose risk is within one
        standard error of the least, CART's rule. A budget: the least risk within it, as
        a fraction of the first step. Of equal risks, the smaller network. Raises
        BudgetError where no step meets the budget, ConfigError for another rule.
        """
        if isinstance(rule, Budget):
            return _least_risk(self._within(rule))
        if rule not in ("1se", "min"):
            raise ConfigError(
                f"select({rule!r}): '1se', 'min' or a budget as flops(0.4)"
            )
        least = _least_risk(self.steps)
        if rule == "min":
            return least
        most = least.risk + least.stderr
        # Costs fall along the path.
        return [s for s in self.steps if s.risk <= most or s is least][-1]

    def _within(self, budget: Budget) -> list[Step]:
        ratios = [
            _cost(s, budget.kind) / _cost(self.steps[0], budget.kind)
            for s in self.steps
        ]
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
        return json.dumps({"steps": [_to_plain(s) for s in self.steps]}, indent=1)

    @staticmethod
    def from_json(text: str) -> "Path":
        """The inverse of `to_json`; DataError for text that is none."""
        try:
            return Path(tuple(_from_plain(s) for s in json.loads(text)["steps"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"this is not a pruning path: {error!r}") from error


def _cost(step: Step, kind: budgets.Kind) -> float:
    counts = [int(k.sum()) for k in step.keep.values()]
    if kind == "channels":
        return sum(counts)
    if not isinstance(kind, str):
        return float(kind.at(list(step.keep), counts))
    return getattr(step.cost, "activation_bytes" if kind == "bytes" else kind)


def _least_risk(steps: Iterable[Step]) -> Step:
    """A risk that is no number counts as infinite; of ties the last, the smallest."""
    best = None
    for step in steps:
        risk = math.inf if math.isnan(step.risk) else step.risk
        if best is None or risk <= best[0]:
            best = (risk, step)
    if best is None:
        raise ConfigError("the path has no steps")
    return best[1]


def _to_plain(step: Step) -> dict[str, Any]:
    def number(x: float) -> float | None:
        return x if math.isfinite(x) else None

    return {
        "alpha": number(step.alpha),
        "risk": number(step.risk),
        "stderr": number(step.stderr),
        "cost": {k: int(v) for k, v in step.cost._asdict().items()},
        "keep": graph_io.keep_to_text(step.keep),
    }


def _from_plain(plain: dict[str, Any]) -> Step:
    def number(x: float | None) -> float:
        return math.nan if x is None else float(x)

    keep = graph_io.keep_from_text(plain["keep"])
    cost = Cost(**plain["cost"])
    risks = number(plain["risk"]), number(plain["stderr"])
    return Step(number(plain["alpha"]), keep, cost, *risks)
