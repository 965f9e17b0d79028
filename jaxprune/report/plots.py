# SPDX-License-Identifier: Apache-2.0
"""The report's plots, each drawn from plain numbers into one PNG file.

Colours are Okabe and Ito's (2008, "Color universal design"); every network also has a
line style and a marker of its own. No figure needs a display.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxprune.report import words

INK = "#202020"
GREY = "#999999"
DENSE, PRUNED, SCRATCH = "#0072B2", "#D55E00", "#009E73"
COLOR = {"dense": DENSE, "pruned": PRUNED, "scratch": SCRATCH}
STAGES = {  # colour, line style, what it is called
    "train": (DENSE, "-", "dense training"),
    "lasso": ("#56B4E9", "-", "training under the penalty"),
    "gates": ("#56B4E9", "-", "training of gates"),
    "prune": ("#CC79A7", ":", "pruning"),
    "recover": ("#E69F00", "-", "recovery between cuts"),
    "retrain": (PRUNED, "-", "retraining"),
    "scratch": (SCRATCH, "--", "from scratch"),
}
_MANY = (PRUNED, DENSE, SCRATCH, "#E69F00", "#56B4E9", "#CC79A7", INK, "#8C6D31")
WIDTH = 6.4  # inches; at 160 dpi a phone's screen still shows 9 point text


def _figure(height: float, rows: int = 1, *, sharex: bool = False) -> tuple[Any, Any]:
    """A figure without pyplot's global state: dark text on white."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 10, "axes.edgecolor": INK, "text.color": INK}):
        figure = Figure(figsize=(WIDTH, height), dpi=160, layout="constrained")
        axes = figure.subplots(rows, 1, squeeze=False, sharex=sharex)[:, 0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(colors=INK, labelsize=9)
        ax.grid(color="#E4E4E4", linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, axes


def _save(figure: Any, file: Path) -> Path:
    figure.savefig(file, metadata={"Software": None})
    return file


def curves(rows: Sequence[Mapping[str, Any]], file: Path) -> Path:
    """Loss (training) and mIoU (validation) against epochs, a colour a stage.

    Each stage begins where the one before ended; the from-scratch net begins at 0.
    """
    figure, (top, bottom) = _figure(5.2, 2, sharex=True)
    labelled = set()
    for stage, placed in _chained(rows).items():
        color, style, label = STAGES[_kind(stage)]
        for ax, key, split in ((top, "loss", "train"), (bottom, "miou", "val")):
            points = sorted(
                (epoch, row[key])
                for epoch, row in placed
                if row.get("split") == split and row.get(key) is not None
            )
            if points:
                marker = "o" if len(points) < 50 else None
                new = (ax, label) not in labelled
                labelled.add((ax, label))
                ax.plot(
                    *zip(*points, strict=True),
                    color=color,
                    linestyle=style if len(points) > 1 else "none",
                    marker=marker,
                    markersize=3 if len(points) > 1 else 7,
                    label=label if new else None,
                )
    top.set_ylabel("training loss (nats)")
    bottom.set_ylabel("validation mIoU")
    bottom.set_xlabel("epochs of training")
    for ax in (top, bottom):
        if ax.lines:
            ax.legend(frameon=False, fontsize=9)
    return _save(figure, file)


def _chained(
    rows: Sequence[Mapping[str, Any]],
) -> dict[str, list[tuple[float, Mapping[str, Any]]]]:
    """{stage: (epochs since the network was new, row)}, in the order of the file."""
    placed: dict[str, list[tuple[float, Mapping[str, Any]]]] = {}
    begun: dict[str, float] = {"scratch": 0.0}
    end = 0.0
    for row in rows:
        stage = row["stage"]
        if _kind(stage) not in STAGES:
            continue
        epoch = end
        if stage != "prune":  # whose steps are rounds, and train nothing
            # Cuts within a training under the penalty do not start its epochs anew.
            whole = _kind(stage) if _kind(stage) in ("lasso", "gates") else stage
            epoch = begun.setdefault(whole, end)
            epoch += float(row.get("epoch", row["step"]) or 0.0)
        if stage != "scratch":
            end = max(end, epoch)
        placed.setdefault(stage, []).append((epoch, row))
    return placed


def _kind(stage: str) -> str:
    return stage.rstrip("0123456789")  # recover1, recover2, ...


def widths(
    groups: Sequence[Mapping[str, Any]], file: Path, unit: str = "channels"
) -> Path:
    """A bar a group: its channels (or a kernel's ranks), and how many of them stay."""
    figure, (ax,) = _figure(1.2 + 0.26 * len(groups))
    y = np.arange(len(groups))
    before = np.array([g["before"] for g in groups])
    after = np.array([g["after"] for g in groups])
    ax.barh(y, before, color="#D9D9D9", height=0.78, label="before")
    ax.barh(y, after, color=PRUNED, height=0.5, label="after")
    for i, group in enumerate(groups):
        exact = "" if group.get("exact", True) else " (not exact)"
        text = f" {after[i]} of {before[i]}{exact}"
        ax.text(before[i], i, text, va="center", fontsize=8, color=INK)
    ax.set_yticks(y, [words.shorten(g["name"]) for g in groups], fontsize=8)
    ax.set_xlim(0, before.max() * 1.22)
    ax.set_ylim(len(groups) - 0.4, -0.6)
    ax.set_xlabel(unit)
    ax.grid(False, axis="y")
    figure.legend(loc="outside lower right", ncols=2, frameon=False, fontsize=9)
    return _save(figure, file)


def path(
    steps: Sequence[Mapping[str, Any]], dense_flops: float | None, file: Path
) -> Path:
    """mIoU and risk, where known, against the FLOPs that stay; the choice is marked.

    So are the knee, and the band of one standard error above the least risk, which the
    1-SE rule chooses from, of the last round. Of several rounds, each is a line of its
    own: the network was retrained in between.
    """
    series = [
        (key, label)
        for key, label in (
            ("miou", "mIoU, not retrained"),
            ("risk", "risk (nats)"),
        )
        if any(s.get(key) is not None for s in steps)
    ]
    figure, axes = _figure(0.8 + 2.4 * max(1, len(series)), max(1, len(series)))
    whole = dense_flops or max(s["flops"] for s in steps)
    for ax, (key, label) in zip(axes, series, strict=False):
        for number in sorted({s.get("round", 1) for s in steps}):
            known = sorted(
                (s for s in steps if s.get("round", 1) == number and key in s),
                key=lambda s: s["flops"],
            )
            known = [s for s in known if s[key] is not None]
            x = [100 * s["flops"] / whole for s in known]
            y = [s[key] for s in known]
            error = [s.get("stderr") or 0.0 for s in known] if key == "risk" else None
            ax.errorbar(x, y, error, color=DENSE, marker="o", markersize=4, capsize=2)
        last = max(s.get("round", 1) for s in steps)
        ending = [s for s in steps if s.get("round", 1) == last]
        band = words.within_one_error(ending) if key == "risk" else None
        if band is not None:
            ax.axhspan(*band, color=DENSE, alpha=0.12, lw=0, label="1 SE of the least")
        knees = [s for s in ending if "knee" in (s.get("rules") or ())]
        for marked, look, size, name in (
            ([s for s in steps if s.get("chosen")], "D", 9, "chosen"),
            (knees, "v", 9, "knee"),
        ):
            found = [s for s in marked if s.get(key) is not None]
            if found:
                at = [100 * s["flops"] / whole for s in found]
                y = [s[key] for s in found]
                color = PRUNED if name == "chosen" else INK
                ax.plot(at, y, look, color=color, markersize=size, label=name, zorder=3)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False, fontsize=9)
        ax.set_ylabel(label)
    axes[-1].set_xlabel(f"FLOPs that stay (% of {words.quantity(whole)}FLOPs)")
    return _save(figure, file)


def frontier(rows: Sequence[Mapping[str, Any]], file: Path) -> Path:
    """A comparison's test mIoU against the FLOPs and the milliseconds that stay.

    rows: as of comparison.json. A line a method, with bars of its deviation over seeds
    or, of one seed, of its standard error over images. Milliseconds are left out where
    none were measured.
    """
    timed = any(r["ms"] is not None for r in rows)
    methods = list(dict.fromkeys(r["method"] for r in rows))
    height = (6.4 if timed else 3.2) + 0.17 * -(-len(methods) // 3)
    figure, axes = _figure(height, 2 if timed else 1)
    dense = next((r for r in rows if r["method"] == "dense"), None)
    markers = "osD^vP*X<>"
    fields = ("flops", "FLOPs that stay (%)"), ("ms", "milliseconds, one image")
    for ax, (field, label) in zip(axes, fields):
        scale = 100 if field == "flops" else 1
        for i, method in enumerate(m for m in methods if m != "dense"):
            mine = [r for r in rows if r["method"] == method and r[field] is not None]
            mine.sort(key=lambda r: r[field])
            ax.errorbar(
                [scale * r[field] for r in mine],
                [r["test"] for r in mine],
                [r["test_margin"] or 0.0 for r in mine],
                marker=markers[i % len(markers)],
                markersize=5,
                capsize=2,
                color=_MANY[i % len(_MANY)],
                label=method,
            )
        if dense is not None:
            ax.axhline(dense["test"], color=GREY, linestyle="--", label="dense")
            ax.plot(scale * (dense[field] or 0), dense["test"], "o", color=GREY)
        # In full: of one budget, all have the same cost but for a trifle.
        ax.set_xlim(left=0)
        ax.set_xlabel(label)
        ax.set_ylabel("test mIoU")
    lines = axes[0].get_legend_handles_labels()
    figure.legend(
        *lines, loc="outside lower center", fontsize=8, ncols=3, frameon=False
    )
    return _save(figure, file)


def confusion(matrix: np.ndarray, classes: Sequence[str], file: Path) -> Path:
    """The confusion matrix [K, K], rows = truth, each row in percent of its pixels."""
    from matplotlib.colors import LinearSegmentedColormap

    shares = 100 * words.row_shares(matrix)
    k = len(classes)
    figure, (ax,) = _figure(5.5)
    white_to_blue = LinearSegmentedColormap.from_list("blue", ["#FFFFFF", DENSE])
    mesh = ax.imshow(shares, cmap=white_to_blue, vmin=0, vmax=100)
    if k <= 15:
        for i, j in np.ndindex(k, k):
            if shares[i, j] >= 0.5:
                color = "white" if shares[i, j] > 50 else INK
                text = f"{shares[i, j]:.0f}"
                ax.text(j, i, text, ha="center", va="center", color=color, fontsize=9)
    ax.set_xticks(range(k), classes, rotation=45, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(k), classes)
    ax.set_xlabel("what the pruned net says")
    ax.set_ylabel("truth")
    ax.grid(False)
    bar = figure.colorbar(mesh, ax=ax, shrink=0.7, label="% of the true class's pixels")
    bar.outline.set_visible(False)
    return _save(figure, file)


def per_class(
    series: Mapping[str, Sequence[float | None]], classes: Sequence[str], file: Path
) -> Path:
    """IoU of each class, a bar for each network of `series` (dense, pruned, ...)."""
    height = 0.8 / len(series)
    figure, (ax,) = _figure(1.2 + 0.22 * len(series) * len(classes))
    y = np.arange(len(classes))
    for i, (name, values) in enumerate(series.items()):
        known = [np.nan if v is None else v for v in values]
        at = y + (i - (len(series) - 1) / 2) * height
        label = words.NAMES.get(name, name)
        ax.barh(at, known, height * 0.92, color=COLOR.get(name, GREY), label=label)
        for j, value in enumerate(known):
            if np.isfinite(value):
                text = f" {words.share(value)}"
                ax.text(value, at[j], text, va="center", fontsize=8, color=INK)
    ax.set_yticks(y, classes)
    ax.set_xlim(0, 1.08)
    ax.set_ylim(len(classes) - 0.5, -0.5)
    ax.set_xlabel("IoU (1 = every pixel right)")
    ax.grid(False, axis="y")
    figure.legend(loc="outside lower right", ncols=3, frameon=False, fontsize=9)
    return _save(figure, file)
