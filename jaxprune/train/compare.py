# SPDX-License-Identifier: Apache-2.0
"""The evaluate stage: every network of a run on the same splits, costs and clocks."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.base import Apply, Cost, PyTree
from jaxprune.train import step as steps
from jaxprune.train.folder import write_json
from jaxprune.train.loop import Job, confusion_of
from jaxprune.train.metrics import measures
from jaxprune.train.progress import Progress

_FILE = "evaluation.json"


class Contender(NamedTuple):
    """A trained network; epochs: how many it has seen in all."""

    apply: Apply
    variables: PyTree
    cost: Cost
    epochs: float


def evaluate_stage(
    job: Job, networks: Mapping[str, Contender], progress: Progress
) -> dict[str, Any]:
    """Measure all, write evaluation.json and samples.npz, print the closing card."""
    file = job.workdir / _FILE
    if file.exists():
        evaluation = json.loads(file.read_text("utf-8"))
    else:
        classes = job.splits.train.classes
        progress.rewind("evaluate", -1)
        evaluation = {
            "classes": list(classes.names),
            "colors": [list(map(int, c)) for c in classes.colors],
            "networks": {
                n: _measured(job, c, n, progress) for n, c in networks.items()
            },
        }
        if jax.process_index() == 0:
            _samples(job, networks)
        write_json(file, evaluation)
    _closing_card(evaluation, progress)
    return evaluation


def as_text(result: Mapping[str, Any], names: Sequence[str]) -> str:
    """One network's measures of one split as lines, a class each."""
    lines = [
        f"{'mIoU':20} {result['miou']:.4f}",
        f"{'global accuracy':20} {result['global_accuracy']:.4f}",
        f"{'class accuracy':20} {result['class_accuracy']:.4f}",
    ]
    for name, iou in zip(names, result["per_class_iou"], strict=True):
        lines.append(f"{'IoU ' + name:20} {_number(iou, 4)}")
    return "\n".join(lines)


def _measured(job: Job, contender: Contender, name: str, progress: Progress) -> dict:
    evaluate = jax.jit(
        steps.make_evaluate(contender.apply, job.splits.train.classes.ignore)
    )
    mesh = steps.make_mesh()
    variables = jax.device_put(contender.variables, steps.replicated(mesh))
    splits = {}
    for split in ("val", "test"):
        matrix = confusion_of(
            evaluate,
            variables,
            getattr(job.splits, split),
            job.config.evaluate.batch,
        )
        splits[split] = {**measures(matrix), "confusion": matrix.tolist()}
        row = {k: v for k, v in splits[split].items() if k != "confusion"}
        progress.append(
            {"stage": "evaluate", "step": 0, "network": name, "split": split} | row
        )
    return {
        "splits": splits,
        "cost": {k: int(v) for k, v in contender.cost._asdict().items()},
        "latency_ms": _latency(job, contender),
        "epochs": contender.epochs,
    }


def _latency(job: Job, contender: Contender) -> dict[str, Any]:
    """Median milliseconds of a compiled call on random images, on one device."""
    f = jax.jit(lambda v, x: contender.apply(v, x, train=False))
    found: dict[str, Any] = {"1": None, "N": None, "batch": job.config.evaluate.batch}
    if not job.config.evaluate.repeats:
        return found
    variables = jax.device_put(contender.variables, jax.local_devices()[0])
    for name, batch in (("1", 1), ("N", job.config.evaluate.batch)):
        shape = (batch, *job.config.data.size, 3)
        images = jnp.asarray(np.random.default_rng(0).random(shape, np.float32))
        jax.block_until_ready(f(variables, images))
        times = []
        for _ in range(job.config.evaluate.repeats):
            start = time.perf_counter()
            jax.block_until_ready(f(variables, images))
            times.append(time.perf_counter() - start)
        found[name] = float(np.median(times) * 1e3)
    return found


def _samples(job: Job, networks: Mapping[str, Contender]) -> None:
    """samples.npz: evenly spaced test images with what each network sees."""
    split = job.splits.test
    chosen = np.unique(
        np.linspace(0, len(split) - 1, job.config.evaluate.samples).astype(int)
    )
    images = np.stack([split.images[i] for i in chosen])
    arrays = {"images": images, "truth": np.stack([split.labels[i] for i in chosen])}
    for name, contender in networks.items():
        logits = jax.jit(lambda v, x, f=contender.apply: f(v, x, train=False))(
            contender.variables, steps.scaled(jnp.asarray(images))
        )
        arrays[name] = np.asarray(jnp.argmax(logits, -1), np.uint8)
    _write_npz(job.workdir / "samples.npz", arrays)


def _write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    partial = path.with_name("samples.partial.npz")
    named: dict[str, Any] = dict(arrays)
    np.savez_compressed(partial, **named)
    os.replace(partial, path)


def _closing_card(evaluation: Mapping[str, Any], progress: Progress) -> None:
    networks = evaluation["networks"]
    names = list(networks)
    dense = networks["dense"]

    def row(title: str, value: Any) -> tuple[str, ...]:
        return (title, *(value(networks[n]) for n in names))

    def share(n: Any, key: str) -> str:
        return f"{n['cost'][key]:,} ({n['cost'][key] / dense['cost'][key]:.0%})"

    rows = []
    for split in ("val", "test"):
        rows.append(
            row(f"mIoU {split}", lambda n, s=split: f"{n['splits'][s]['miou']:.4f}")
        )
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
    rows.append(row("activation bytes", lambda n: share(n, "activation_bytes")))
    batch = dense["latency_ms"]["batch"]
    for key, title in (("1", "ms, batch 1"), ("N", f"ms, batch {batch}")):
        rows.append(row(title, lambda n, k=key: _number(n["latency_ms"][k], 1)))
    rows.append(row("epochs", lambda n: f"{n['epochs']:g}"))
    progress.card("dense against pruned", rows, ("", *names))


def _worst(values: list[float | None], count: int) -> list[int]:
    known = sorted((v, i) for i, v in enumerate(values) if v is not None)
    return [i for _, i in known[:count]]


def _number(value: float | None, places: int = 3) -> str:
    return "-" if value is None else f"{value:.{places}f}"
