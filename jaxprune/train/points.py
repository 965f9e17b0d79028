# SPDX-License-Identifier: Apache-2.0
"""The points of a run's pruning path: its files, and what is told of each step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from jaxprune.base import CheckpointError, DataError
from jaxprune.budget import Kind
from jaxprune.graph_io import aligned
from jaxprune.path_io import read
from jaxprune.steps import Path as Walked
from jaxprune.steps import Rule, Step
from jaxprune.train.metrics import measures

RULES: tuple[Rule, ...] = get_args(Rule)


def file(workdir: Path, number: int) -> Path:
    """Where the walk of round `number`, from 1 on, is kept step by step."""
    return workdir / "path" / f"{number}.jsonl"


def load(workdir: Path, number: int | None = None) -> tuple[int, Walked]:
    """(number, path) of a round, by default of the last that was begun.

    Raises CheckpointError where the run has walked none, DataError for a damaged file.
    """
    files = (workdir / "path").glob("*.jsonl")
    found = sorted(int(p.stem) for p in files if p.stem.isdecimal())
    if not found or (number is not None and number not in found):
        if found:
            rounds = ", ".join(map(str, found))
            raise CheckpointError(
                f"{workdir}: no pruning path of round {number}, there are {rounds}"
            )
        raise CheckpointError(
            f"{workdir} holds no pruning path; runs with prune.method='path' keep one"
        )
    number = found[-1] if number is None else number
    return number, Walked(read(file(workdir, number)).steps)


def miou(step: Step) -> float | None:
    """On the validation split, before retraining; None where it was not measured."""
    matrix = (step.sums or {}).get("confusion")
    return None if matrix is None else measures(matrix)["miou"]


def chosen_by(path: Walked, kind: Kind = "flops") -> dict[Rule, Step]:
    """The step of each rule that can choose one."""
    found: dict[Rule, Step] = {}
    for rule in RULES:
        try:
            found[rule] = path.select(rule, kind=kind)
        except DataError:  # no finite risk, or no standard error
            continue
    return found


def rows(
    path: Walked, chosen: Step | None = None, kind: Kind = "flops"
) -> list[dict[str, Any]]:
    """A row for each step, as prune.json holds them; null: not finite."""

    def number(x: float) -> float | None:
        return float(x) if math.isfinite(x) else None

    rules = chosen_by(path, kind)
    return [
        {
            "alpha": float(step.alpha),
            "flops": int(step.cost.flops),
            "params": int(step.cost.params),
            "risk": number(step.risk),
            "stderr": number(step.stderr),
            "miou": miou(step),
            "chosen": step is chosen,
            "rules": [rule for rule, one in rules.items() if one is step],
        }
        for step in path.steps
    ]


def as_text(table: Sequence[Mapping[str, Any]], dense: Mapping[str, int]) -> str:
    """The rows as a table; costs in per cent of the dense network's, {field: cost}."""
    head = ["step", "alpha", "FLOPs", "parameters", "risk", "mIoU", ""]
    lines = [head]
    for i, row in enumerate(table):
        risk = "not finite" if row["risk"] is None else f"{row['risk']:.4f}"
        if row["stderr"] is not None:
            risk += f" ± {row['stderr']:.4f}"
        shares = [f"{row[f] / max(dense[f], 1):.1%}" for f in ("flops", "params")]
        score = "" if row["miou"] is None else f"{row['miou']:.3f}"
        marks = [*row["rules"], *(["chosen"] if row["chosen"] else [])]
        alpha = f"{row['alpha']:.4g}"
        lines.append([str(i), alpha, *shares, risk, score, ", ".join(marks)])
    return "\n".join(aligned(lines, text=[len(head) - 1]))
