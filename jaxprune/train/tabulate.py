# SPDX-License-Identifier: Apache-2.0
"""The table of a study: means over seeds for each method and budget, and margins."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_LEGEND = """\
±: the deviation over seeds or, of one seed, the standard error over images. ms: of one
image, all networks in turns. speed-up: over the dense network.
"""
_MEANS = ("flops", "params", "nonzero", "val", "test", "ms", "epochs")


def scores(
    found: Iterable[Mapping[str, Any]], times: Mapping[str, float]
) -> list[dict[str, Any]]:
    """What each trained network of a study has shown, a flat row each.

    found: a run each: {method, budget, seed, name}, and its networks as of `run`.
    times: milliseconds of one image by the runs' names, and of 'dense'. 'flops',
    'params' and 'nonzero' are fractions of the dense network's. The dense network of a
    seed, which all its runs share, has one row; a network from scratch takes the time
    of the run whose widths it has.
    """
    rows: dict[tuple[str, float, int], dict[str, Any]] = {}
    for run in found:
        whole = run["dense"]["cost"]
        for kind, method, budget, name in (
            ("dense", "dense", 1.0, "dense"),
            ("pruned", run["method"], run["budget"], run["name"]),
            ("scratch", "from scratch", run["budget"], run["name"]),
        ):
            if kind not in run:
                continue
            network = run[kind]
            row = {"method": method, "budget": budget, "seed": run["seed"]}
            for field in ("flops", "params"):
                row[field] = network["cost"][field] / whole[field]
            left = network.get("nonzero")
            row["nonzero"] = left["flops"] / whole["flops"] if left else None
            for split in ("val", "test"):
                row[split] = network["splits"][split]["miou"]
                row[f"{split}_error"] = network["splits"][split].get("miou_error")
            row |= {"ms": times.get(name), "epochs": network["epochs"]}
            rows[method, budget, run["seed"]] = row
    return list(rows.values())


def table(runs: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each method and budget, the best first: means over the seeds.

    runs: as of `scores`, of one study or of several. 'val_error' is the standard error
    over images, 'val_deviation' that over seeds, 'val_margin' the latter where there
    are several; 'speedup' is over the dense network.
    """
    groups: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["method"], run["budget"]), []).append(run)
    rows = []
    for (method, budget), mine in groups.items():
        row: dict[str, Any] = {"method": method, "budget": budget, "seeds": len(mine)}
        row |= {field: _mean(run[field] for run in mine) for field in _MEANS}
        for split in ("val", "test"):
            several = len(mine) > 1
            spread = statistics.stdev(r[split] for r in mine) if several else None
            row[f"{split}_deviation"] = spread
            row[f"{split}_error"] = _mean(run[f"{split}_error"] for run in mine)
            which = "deviation" if several else "error"
            row[f"{split}_margin"] = row[f"{split}_{which}"]
        rows.append(row)
    dense = next((row["ms"] for row in rows if row["method"] == "dense"), None)
    for row in rows:
        row["speedup"] = dense / row["ms"] if dense and row["ms"] else None
    return sorted(rows, key=lambda r: (-r["budget"], -r["val"]))


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table; behind ± each score's margin."""

    def score(row: Mapping[str, Any], split: str) -> str:
        spread = row[f"{split}_margin"]
        return f"{row[split]:.3f}" + ("" if spread is None else f" ± {spread:.3f}")

    columns = {
        "method": lambda r: r["method"],
        "budget": lambda r: f"{100 * r['budget']:.6g}%",
        "FLOPs": lambda r: f"{r['flops']:.1%}",
        "parameters": lambda r: f"{r['params']:.1%}",
        "mIoU val": lambda r: score(r, "val"),
        "mIoU test": lambda r: score(r, "test"),
        "ms": lambda r: _shown(r["ms"], "{:.1f}"),
        "speed-up": lambda r: _shown(r["speedup"], "{:.2f}"),
        "epochs": lambda r: f"{r['epochs']:g}",
    }
    if any(row["seeds"] > 1 for row in rows):
        columns["seeds"] = lambda r: str(r["seeds"])
    if any(row["nonzero"] is not None for row in rows):
        columns["FLOPs, zeros skipped"] = lambda r: _shown(r["nonzero"], "{:.1%}")
    cells = [[show(row) for show in columns.values()] for row in rows]
    rule = ["---", *["---:"] * (len(columns) - 1)]
    table = [list(columns), rule, *cells]
    lines = [f"| {' | '.join(line)} |" for line in table]
    return "\n".join([*lines, "", _LEGEND])


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
