# SPDX-License-Identifier: Apache-2.0
"""The files of a work folder, read and checked; no accelerator, no JAX."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxprune import base, formats

NUMBER = (int, float)
# What the report relies on: a dict lists the fields that must be there ('*' = each
# entry), a list its items, a type or tuple of types a value; None is always accepted.
EVALUATION = {
    "classes": [str],
    "colors": [[int]],
    "networks": {
        "*": {
            "splits": {"*": {"miou": NUMBER, "per_class_iou": [NUMBER]}},
            "cost": {"flops": NUMBER, "params": NUMBER, "activation_bytes": NUMBER},
        }
    },
}
PRUNE = {
    "groups": [{"name": str, "before": int, "after": int}],
    "frozen": [{"path": (str, list), "axis": int, "count": int, "cause": str}],
    "path": [{"flops": NUMBER}],
}
ROW = {"stage": str, "step": int}
GRAPH = {"groups": (dict, list), "frozen": list}
STAGE_OF = {
    "config.json": "any",
    "graph.json": "any",
    "metrics.jsonl": "train",
    "prune.json": "prune",
    "evaluation.json": "evaluate",
    "samples.npz": "evaluate",
}


@dataclasses.dataclass(frozen=True)
class Record:
    """What a work folder holds; a field is None where its file is not there yet."""

    folder: Path
    config: Mapping[str, Any] | None
    graph: Mapping[str, Any] | None
    rows: tuple[Mapping[str, Any], ...] | None
    prune: Mapping[str, Any] | None
    evaluation: Mapping[str, Any] | None
    samples: Mapping[str, np.ndarray] | None
    missing: tuple[str, ...]


def read(workdir: str | Path) -> Record:
    """Read a work folder.

    Raises DataError where the folder is missing or holds none of a run's files, and
    where a file is damaged; the message names the file.
    """
    folder = Path(workdir)
    if not folder.is_dir():
        raise base.DataError(
            f"{folder} is not a folder; give the --workdir of a 'jaxprune run'"
        )
    missing = tuple(name for name in STAGE_OF if not (folder / name).exists())
    own = [name for name in STAGE_OF if name != "graph.json"]  # saved networks have one
    if set(own) <= set(missing):
        raise base.DataError(
            f"{folder} holds none of {', '.join(own)}: it is no work folder; give the "
            "--workdir of a 'jaxprune run'"
        )
    return Record(
        folder,
        config=_json(folder / "config.json", {}),
        graph=_json(folder / "graph.json", GRAPH),
        rows=_rows(folder / "metrics.jsonl"),
        prune=_json(folder / "prune.json", PRUNE),
        evaluation=_checked_evaluation(folder / "evaluation.json"),
        samples=_samples(folder / "samples.npz"),
        missing=missing,
    )


def _damaged(file: Path, why: object) -> base.DataError:
    return base.DataError(
        f"{file} is damaged ({why}); delete it and repeat 'jaxprune run': the stage "
        "that writes it runs again"
    )


def _text(file: Path) -> str:
    try:
        return formats.read_text(file)
    except (OSError, ValueError) as error:
        raise _damaged(file, error) from error


def _json(file: Path, form: Any) -> Any:
    if not file.exists():
        return None
    try:
        document = formats.parse(_text(file))
    except ValueError as error:
        raise _damaged(file, f"not JSON: {error}") from error
    _check(document, form, file, "")
    return document


def _check(value: Any, form: Any, file: Path, at: str) -> None:
    """Raise DataError, with the place in the file, where `value` lacks the form."""
    if value is None:
        return
    kind = type(form) if isinstance(form, dict | list) else form
    if not isinstance(value, kind):
        raise _damaged(file, f"{at or 'the document'} is {type(value).__name__}")
    if isinstance(form, list):
        for i, item in enumerate(value):
            _check(item, form[0], file, f"{at}[{i}]")
    elif isinstance(form, dict):
        for key, sub in form.items():
            if key != "*" and key not in value:
                raise _damaged(file, f"{at or 'the document'} lacks the field {key!r}")
            for name in value if key == "*" else (key,):
                _check(value[name], sub, file, f"{at}.{name}" if at else name)


def _checked_evaluation(file: Path) -> Any:
    """evaluation.json, each network with as many classes as there are names."""
    document = _json(file, EVALUATION)
    if document is None:
        return None
    classes = len(document["classes"])
    if len(document["colors"]) != classes:
        raise _damaged(file, f"{len(document['colors'])} colors, {classes} classes")
    for name, network in document["networks"].items():
        for split, result in network["splits"].items():
            at = f"networks.{name}.splits.{split}"
            if len(result["per_class_iou"]) != classes:
                raise _damaged(file, f"{at}.per_class_iou has not {classes} entries")
            _check(result.get("miou_error"), NUMBER, file, f"{at}.miou_error")
            confusion = result.get("confusion")
            if confusion is not None and np.shape(confusion) != (classes, classes):
                raise _damaged(file, f"{at}.confusion is not {classes} x {classes}")
    return document


def _rows(file: Path) -> tuple[Mapping[str, Any], ...] | None:
    """The rows of metrics.jsonl; of rows written twice after a resume, the later."""
    if not file.exists():
        return None
    text = _text(file)
    # A kill can cut the last line short: it has no newline then, and is left out.
    lines = text[: text.rfind("\n") + 1].splitlines()
    rows: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = formats.parse(line)
        except ValueError as error:
            raise _damaged(file, f"line {number} is not JSON: {error}") from error
        _check(row, ROW, file, f"line {number}")
        at = ("stage", "network", "split", "step")
        rows[tuple(row.get(key) for key in at)] = row
    return tuple(rows.values())


def _samples(file: Path) -> Mapping[str, np.ndarray] | None:
    """samples.npz: images uint8[n, H, W, 3]; truth, dense, pruned uint8[n, H, W]."""
    if not file.exists():
        return None
    try:
        samples = formats.read_npz(file)
    except (OSError, ValueError) as error:
        raise _damaged(file, error) from error
    for name in ("images", "truth", "dense", "pruned"):
        if name not in samples:
            raise _damaged(file, f"it lacks the array {name!r}")
        expected = samples["images"].shape[: 4 if name == "images" else 3]
        if samples[name].shape != expected or samples["images"].ndim != 4:
            raise _damaged(file, f"{name} has shape {samples[name].shape}")
    return samples
