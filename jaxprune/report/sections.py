# SPDX-License-Identifier: Apache-2.0
"""From a work folder to its report: what is there is shown, what is not is named."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxprune import base, disk
from jaxprune.report import files, html, pictures, plots, tables, words

MISSING = {
    "metrics.jsonl": "training curves: the stage 'train' has not written any",
    "prune.json": "widths, path and what is frozen: the stage 'prune' has not ended",
    "evaluation.json": "scores and costs: the stage 'evaluate' has not ended",
    "samples.npz": "pictures: the stage 'evaluate' has not written any",
    "config.json": "the run's config",
    "graph.json": "the network's graph",
}
_TILE = 240  # pixels that a picture of the strips is magnified to, at most
COUNTED = (
    "FLOPs are 2 x the multiply-adds of convolutions and matrix products of one image, "
    "padding taps counted; activations are what those write."
)


def write(workdir: str | Path) -> Path:
    """Write `workdir`/report/index.html and its pictures; returns that path.

    Drawn from config.json, graph.json, metrics.jsonl, prune.json, evaluation.json and
    samples.npz; what a missing one would have shown is listed in the report. Raises
    DataError where the folder is no work folder or a file is damaged, naming it, and
    DiskError where it cannot be written.
    """
    record = files.read(workdir)
    out = record.folder / "report"
    title = words.headline(record)
    with disk.writing(out):
        out.mkdir(exist_ok=True)
        page = html.page(title, sections(record, out))
    disk.write(out / "index.html", page.encode())
    return out / "index.html"


def sections(record: files.Record, out: Path) -> list[str]:
    """The report's sections; their pictures are written into `out`."""
    parts = []
    if record.missing:
        lines = [f"{MISSING[name]} ({name})" for name in record.missing]
        parts.append(html.missing(lines))
    parts += _results(record)
    parts += _strips(record, out)
    parts += _per_class(record, out)
    parts += _curves(record, out)
    parts += _pruning(record, out)
    parts += _confusion(record, out)
    if record.config:
        parts.append(html.section("The config", html.folded("show", record.config)))
    return parts


def _results(record: files.Record) -> list[str]:
    if record.evaluation is None:
        return []
    evaluation = record.evaluation
    split = words.judged(evaluation)
    notes = [COUNTED]
    for name, network in evaluation["networks"].items():
        low = tables.worst(network, split, evaluation["classes"])
        if low:
            label = words.NAMES.get(name, name)
            notes.append(f"Worst classes on {split}, {label}: {', '.join(low)}.")
    notes += words.unequal_training(evaluation["networks"])
    title = "Dense against pruned"
    body = html.table(tables.results_rows(evaluation))
    return [html.section(title, body, *(html.text(n, "note") for n in notes))]


def _strips(record: files.Record, out: Path) -> list[str]:
    if record.samples is None or record.evaluation is None:
        return []
    samples, colors = record.samples, record.evaluation["colors"]
    names = record.evaluation["classes"]
    columns = ("image", "truth", "dense", "pruned")
    arrays = [samples[n] for n in ("images", *columns[1:])]
    pictures.save_png(out / "strips.png", _as_one(arrays, columns, names, colors))
    parts = [html.legend(names, colors)]
    for i, row in enumerate(zip(*arrays, strict=True)):
        cells = [f"sample_{i}_{name}.png" for name in columns]
        for file, cell in zip(cells, row, strict=True):
            color = cell if cell.ndim == 3 else pictures.colorize(cell, colors)
            pictures.save_png(out / file, color)
        parts.append(html.cells(cells, columns))
    same = np.mean(samples["dense"] == samples["pruned"])
    title = f"Dense and pruned agree on {100 * same:.0f} % of these pixels"
    note = html.text("Black in the truth: not labelled. As one picture: strips.png.")
    return [html.section(title, *parts, note)]


def _as_one(
    arrays: Sequence[np.ndarray],
    columns: Sequence[str],
    names: Sequence[str],
    colors: Sequence[Sequence[int]],
) -> np.ndarray:
    """The samples side by side with headings and a legend; small ones magnified."""
    times = max(1, _TILE // arrays[0].shape[2])
    images, truth, dense, pruned = (
        x.repeat(times, axis=1).repeat(times, axis=2) for x in arrays
    )
    picture = pictures.strips(images, truth, dense, pruned, colors)
    if (truth >= len(names)).any():
        names, colors = [*names, "not labelled"], [*colors, (0, 0, 0)]
    head = pictures.headings(columns, picture.shape[1])
    return pictures.with_legend(np.concatenate([head, picture]), names, colors)


def _per_class(record: files.Record, out: Path) -> list[str]:
    if record.evaluation is None:
        return []
    evaluation = record.evaluation
    split = words.judged(evaluation)
    series = {
        name: network["splits"][split]["per_class_iou"]
        for name, network in evaluation["networks"].items()
        if split in network["splits"]
    }
    if not series:
        return []
    classes = evaluation["classes"]
    title = "IoU by class"
    if "dense" in series and "pruned" in series:
        title = words.per_class(series["dense"], series["pruned"], classes)
    plots.per_class(series, classes, out / "classes.png")
    note = html.text(f"IoU of each class on {split}.", "note")
    return [html.section(title, html.plot("classes.png", title), note)]


def _curves(record: files.Record, out: Path) -> list[str]:
    if not record.rows:
        return []
    title = words.curves(record.rows)
    plots.curves(record.rows, out / "curves.png")
    return [html.section(title, html.plot("curves.png", title))]


def _pruning(record: files.Record, out: Path) -> list[str]:
    if record.prune is None:
        return []
    parts = []
    groups, steps = record.prune["groups"], record.prune["path"]
    if groups:
        unit = record.prune.get("unit", "channels")
        title = words.widths(groups, unit)
        plots.widths(groups, out / "widths.png", unit)
        method = record.prune.get("method")
        note = [html.text(f"Method: {method}.", "note")] if method else []
        parts.append(html.section(title, html.plot("widths.png", title), *note))
    if steps:
        title = words.path(steps, _dense_flops(record))
        plots.path(steps, _dense_flops(record), out / "path.png")
        parts.append(html.section(title, html.plot("path.png", title)))
    return [*parts, _frozen(record.prune["frozen"] or [])]


def _frozen(frozen: list) -> str:
    frozen = [entry for entry in frozen if entry["cause"] not in base.EDGES]
    if not frozen:
        return html.section("Every channel inside the network could be cut")
    entries = []
    for entry in frozen:
        path = entry["path"]
        path = path if isinstance(path, str) else "/".join(path)
        entries.append((path, entry["axis"], entry["count"], entry["cause"]))
    rows = words.by_cause(entries)
    causes = "one cause" if len(rows) == 2 else f"{len(rows) - 1} causes"
    title = f"{len(frozen)} axes of kernels and vectors cannot be cut, for {causes}"
    whole = html.folded("all of them", [" ".join(map(str, e)) for e in entries])
    return html.section(title, html.table(rows, numbers=False), whole)


def _dense_flops(record: files.Record) -> float | None:
    if record.evaluation is None:
        return None
    dense = record.evaluation["networks"].get("dense")
    return dense and dense["cost"]["flops"]


def _confusion(record: files.Record, out: Path) -> list[str]:
    if record.evaluation is None:
        return []
    split = words.judged(record.evaluation)
    pruned = record.evaluation["networks"].get("pruned", {"splits": {}})
    matrix = pruned["splits"].get(split, {}).get("confusion")
    if matrix is None:
        return []
    classes = record.evaluation["classes"]
    title = words.confusion(np.asarray(matrix), classes)
    plots.confusion(np.asarray(matrix), classes, out / "confusion.png")
    note = html.text(f"On {split}; each row is 100 % of that class's pixels.", "note")
    return [html.section(title, html.plot("confusion.png", title), note)]
