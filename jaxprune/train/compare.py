# SPDX-License-Identifier: Apache-2.0
"""The evaluate stage: every network of a run on the same splits, costs and clocks."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import disk, formats
from jaxprune.base import Apply, CheckpointError, Cost, PyTree
from jaxprune.train import layout as layouts
from jaxprune.train import step as steps
from jaxprune.train.config import Config
from jaxprune.train.folder import write_json
from jaxprune.train.loop import Job, counts_of
from jaxprune.train.metrics import judged
from jaxprune.train.progress import Progress

_FILE = "evaluation.json"
# What reading a document of another form ends in.
_NO_EVALUATION = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


class Contender(NamedTuple):
    """A trained network; epochs: how many it has seen in all.

    nonzero: what of its cost is not of zeros, where single weights were cut.
    """

    apply: Apply
    variables: PyTree
    cost: Cost
    epochs: float
    nonzero: Cost | None = None


def evaluate_stage(
    job: Job, networks: Mapping[str, Contender], progress: Progress
) -> dict[str, Any]:
    """Measure all, write evaluation.json and samples.npz, print the closing card.

    Raises CheckpointError for a file that is there and is no evaluation.
    """
    file = job.workdir / _FILE
    if file.exists():
        progress.note("evaluate: done already")
        evaluation = read(job.workdir)
    else:
        classes = job.splits.train.classes
        progress.rewind("evaluate", -1)
        forwards = {n: _forward(c) for n, c in networks.items()}
        times = _latencies(job.config, forwards)
        evaluation = {
            "classes": list(classes.names),
            "colors": [list(map(int, c)) for c in classes.colors],
            "networks": {
                n: {
                    "splits": _judged(job, c, n, progress),
                    "cost": {k: int(v) for k, v in c.cost._asdict().items()},
                    **_nonzero(c),
                    "latency_ms": times[n],
                    "epochs": c.epochs,
                }
                for n, c in networks.items()
            },
        }
        if jax.process_index() == 0:
            _samples(job, forwards)
        write_json(file, evaluation)
    names = list(evaluation["networks"])
    progress.card("dense against pruned", _card_rows(evaluation), ("", *names))
    return evaluation


def as_text(result: Mapping[str, Any], names: Sequence[str]) -> str:
    """One network's measures of one split as lines, a class each."""
    lines = [
        f"{'mIoU':20} {result['miou']:.4f}{_margin(result)}",
        f"{'global accuracy':20} {result['global_accuracy']:.4f}",
        f"{'class accuracy':20} {result['class_accuracy']:.4f}",
    ]
    for name, iou in zip(names, result["per_class_iou"], strict=True):
        lines.append(f"{'IoU ' + name:20} {_number(iou, 4)}")
    return "\n".join(lines)


def _margin(result: Mapping[str, Any]) -> str:
    """mIoU's standard error over images, where there is one."""
    error = result.get("miou_error")
    return "" if error is None else f" ± {error:.4f}"


def read(workdir: Path) -> dict[str, Any]:
    """A run's evaluation, which holds all that the closing card shows.

    Raises CheckpointError for a file that is none.
    """
    file = workdir / _FILE
    try:
        evaluation = formats.parse(formats.read_text(file))
        _card_rows(evaluation)
    except _NO_EVALUATION as error:
        reason = error if isinstance(error, ValueError) else repr(error)
        raise CheckpointError(
            f"{file} is damaged ({reason}); delete it to evaluate again"
        ) from error
    return evaluation


def _judged(job: Job, contender: Contender, name: str, progress: Progress) -> dict:
    """Measures and confusion matrices of one network, by split."""
    ignore = job.splits.train.classes.ignore
    layout, batch = steps.layout_of(job.config.scale), job.config.evaluate.batch
    evaluate = jax.jit(steps.make_evaluate(contender.apply, ignore, layout))
    variables = layouts.put(layout, contender.variables)
    splits = {}
    for split in ("val", "test"):
        found = getattr(job.splits, split)
        splits[split] = judged(counts_of(evaluate, variables, found, batch))
        row = {k: v for k, v in splits[split].items() if k != "confusion"}
        place = {"stage": "evaluate", "step": 0, "network": name, "split": split}
        progress.append({**place, **row})
    return splits


def _nonzero(contender: Contender) -> dict[str, Any]:
    """{'nonzero': its FLOPs and parameters}, where there is one."""
    found = contender.nonzero
    if found is None:
        return {}
    return {"nonzero": {"flops": int(found.flops), "params": int(found.params)}}


def _forward(contender: Contender) -> Callable[[Any], Any]:
    """float images [B, H, W, 3] -> logits, compiled for one device."""
    variables = layouts.on_one_device(contender.variables)
    run = jax.jit(lambda v, x: contender.apply(v, x, train=False))
    return lambda images: run(variables, images)


def _latencies(
    config: Config, forwards: Mapping[str, Callable[[Any], Any]]
) -> dict[str, dict[str, Any]]:
    """Of each, the median milliseconds of a compiled call on random images.

    On one device; in turns, so that a machine which is busy for a while is so for all.
    """
    batch, repeats = config.evaluate.batch, config.evaluate.repeats
    found: dict[str, dict[str, Any]] = {
        n: {"1": None, "N": None, "batch": batch} for n in forwards
    }
    for name, count in (("1", 1), ("N", batch)) if repeats else ():
        shape = (count, *config.data.size, 3)
        images = jnp.asarray(np.random.default_rng(0).random(shape, np.float32))
        times: dict[str, list[float]] = {n: [] for n in forwards}
        for forward in forwards.values():  # compiled first
            jax.block_until_ready(forward(images))
        for _ in range(repeats):
            for n, forward in forwards.items():
                start = time.perf_counter()
                jax.block_until_ready(forward(images))
                times[n].append(time.perf_counter() - start)
        for n, seconds in times.items():
            found[n][name] = float(np.median(seconds) * 1e3)
    return found


def _samples(job: Job, forwards: Mapping[str, Callable[[Any], Any]]) -> None:
    """samples.npz: evenly spaced test images with what each network sees."""
    split, batch = job.splits.test, job.config.evaluate.batch
    count = min(job.config.evaluate.samples, len(split))
    chosen = np.linspace(0, len(split) - 1, count).astype(int)
    arrays = {
        "images": np.stack([split.images[i] for i in chosen]),
        "truth": np.stack([split.labels[i] for i in chosen]),
    }
    for name, forward in forwards.items():
        seen = []
        for start in range(0, count, batch):  # of the size that is compiled already
            images = np.resize(arrays["images"][start:], (batch, *split.size, 3))
            logits = forward(steps.scaled(jnp.asarray(images)))
            seen.append(np.asarray(jnp.argmax(logits, -1), np.uint8))
        arrays[name] = np.concatenate(seen)[:count]
    archive = io.BytesIO()
    np.savez_compressed(archive, allow_pickle=False, **arrays)  # type: ignore[arg-type]
    disk.write(job.workdir / "samples.npz", archive.getvalue())


def _card_rows(evaluation: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The closing card: a title and each network's text, a row each."""
    networks = evaluation["networks"]
    dense = networks["dense"]

    def row(title: str, value: Any) -> tuple[str, ...]:
        return (title, *map(value, networks.values()))

    def share(n: Any, key: str) -> str:
        return f"{n['cost'][key]:,} ({n['cost'][key] / dense['cost'][key]:.0%})"

    def skipped(n: Any) -> str:
        return share({"cost": n.get("nonzero", n["cost"])}, "flops")

    rows = []
    for split in ("val", "test"):

        def score(network: Any, split: str = split) -> str:
            found = network["splits"][split]
            return f"{found['miou']:.4f}{_margin(found)}"

        rows.append(row(f"mIoU {split}", score))
    for index in _worst(dense["splits"]["test"]["per_class_iou"], 3):
        name = evaluation["classes"][index]
        rows.append(
            row(
                f"IoU {name}",
                lambda n, i=index: _number(n["splits"]["test"]["per_class_iou"][i]),
            )
        )
    rows.append(row("parameters", lambda n: share(n, "params")))
    rows.append(row("FLOPs", lambda n: share(n, "flops")))
    if any("nonzero" in n for n in networks.values()):
        rows.append(row("FLOPs, zeros skipped", skipped))
    rows.append(row("activation bytes", lambda n: share(n, "activation_bytes")))
    batch = dense["latency_ms"]["batch"]
    for key, title in (("1", "ms, batch 1"), ("N", f"ms, batch {batch}")):
        rows.append(row(title, lambda n, k=key: _number(n["latency_ms"][k], 1)))
    rows.append(row("epochs", lambda n: f"{n['epochs']:g}"))
    return rows


def _worst(values: list[float | None], count: int) -> list[int]:
    known = sorted((v, i) for i, v in enumerate(values) if v is not None)
    return [i for _, i in known[:count]]


def _number(value: float | None, places: int = 3) -> str:
    return "-" if value is None else f"{value:.{places}f}"
