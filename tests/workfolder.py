# SPDX-License-Identifier: Apache-2.0
"""A small work folder written by hand, as a finished run leaves it."""

import json
from pathlib import Path

import numpy as np

CLASSES = ["Sky", "Road", "Tree", "Car"]
COLORS = [[128, 128, 128], [128, 64, 128], [128, 128, 0], [64, 0, 128]]


def confusion(diagonal: int) -> list[list[int]]:
    """[4, 4]: `diagonal` pixels right in each class, the others taken for the next."""
    k = len(CLASSES)
    matrix = np.eye(k, dtype=int) * diagonal
    matrix += np.roll(np.eye(k, dtype=int), 1, axis=1) * (100 - diagonal)
    return matrix.tolist()


def network(miou: float, scale: float) -> dict:
    """One network's entry of evaluation.json."""
    result = {
        "miou": miou,
        "global_accuracy": miou + 0.3,
        "class_accuracy": miou + 0.1,
        "per_class_iou": [miou + 0.2, miou, miou - 0.1, miou - 0.1],
        "confusion": confusion(int(100 * miou)),
    }
    return {
        "splits": {"val": {**result, "miou": miou + 0.05}, "test": result},
        "cost": {
            "flops": 2e9 * scale,
            "params": 1e6 * scale,
            "activation_bytes": 4e6 * scale**0.5,
        },
        "latency_ms": {"1": 20 * scale, "N": 150 * scale, "batch": 8},
        "epochs": 20,
    }


def rows() -> list[dict]:
    """The rows of metrics.jsonl: training, then retraining."""
    found = []
    for stage, start in (("train", 0.1), ("retrain", 0.3), ("scratch", 0.1)):
        for epoch in range(1, 9):
            at = {"stage": stage, "step": 10 * epoch, "epoch": float(epoch)}
            found.append({**at, "split": "train", "loss": 2 / epoch, "lr": 1e-3})
            found.append({**at, "split": "val", "miou": start + 0.02 * epoch})
    return found


def prune() -> dict:
    """prune.json with two groups, one frozen axis and a path of five steps."""
    groups = [
        {"name": "params/conv1/kernel", "before": 16, "after": 12, "exact": True},
        {"name": "params/conv2/kernel", "before": 32, "after": 8, "exact": False},
    ]
    path = [
        {
            "alpha": a,
            "flops": 2e9 * f,
            "params": 1e6 * f,
            "risk": 0.5 + (1 - f) ** 2,
            "stderr": 0.02,
            "miou": 0.4 - 0.2 * (1 - f) ** 2,
            "chosen": f == 0.25,
        }
        for a, f in ((0.0, 1.0), (0.1, 0.75), (0.2, 0.5), (0.3, 0.25), (0.4, 0.1))
    ]
    frozen = [
        {
            "path": ["params", "head", "kernel"],
            "axis": 3,
            "count": 4,
            "cause": "the function's output",
        }
    ]
    return {
        "groups": groups,
        "frozen": frozen,
        "path": path,
        "method": "group lasso, 1-SE",
    }


def evaluation() -> dict:
    """evaluation.json of a dense, a pruned and a from-scratch network."""
    networks = {
        "dense": network(0.36, 1.0),
        "pruned": network(0.37, 0.25),
        "scratch": network(0.33, 0.25),
    }
    return {"classes": CLASSES, "colors": COLORS, "networks": networks}


def samples(n: int = 2, height: int = 24, width: int = 32) -> dict[str, np.ndarray]:
    """The arrays of samples.npz: scenes of stripes, a little noise in the answers."""
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(height) * 4 // height, width).reshape(1, height, width)
    truth = np.tile(truth, (n, 1, 1)).astype(np.uint8)
    truth[:, 0] = 255
    noisy = [
        np.where(rng.random(truth.shape) < p, rng.integers(0, 4, truth.shape), truth)
        for p in (0.1, 0.2)
    ]
    images = rng.integers(0, 256, (n, height, width, 3), np.uint8)
    answers = [np.clip(a, 0, 3).astype(np.uint8) for a in noisy]
    return {"images": images, "truth": truth, "dense": answers[0], "pruned": answers[1]}


def write(folder: Path, *, leave_out: tuple[str, ...] = ()) -> Path:
    """Write the folder's files but those left out; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    documents = {
        "config.json": {"name": "tiny", "seed": 0},
        "graph.json": {"groups": [], "frozen": []},
        "prune.json": prune(),
        "evaluation.json": evaluation(),
    }
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document))
    lines = "".join(json.dumps(row) + "\n" for row in rows())
    (folder / "metrics.jsonl").write_text(lines)
    np.savez(folder / "samples.npz", **samples())
    for name in leave_out:
        (folder / name).unlink()
    return folder
