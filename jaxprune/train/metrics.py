# SPDX-License-Identifier: Apache-2.0
"""Measures of segmentation, all from one confusion matrix of a whole split."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np


def confusion(logits: Any, labels: Any, ignore: int) -> Any:
    """int32[K, K]: pixels by truth (rows) and prediction, but those labelled ignore.

    logits: float[B, H, W, K]; labels: int[B, H, W]. Runs inside jit.
    """
    classes = logits.shape[-1]
    predicted = jnp.argmax(logits, axis=-1)
    counted = (labels != ignore) & (labels >= 0) & (labels < classes)
    index = jnp.where(counted, labels * classes + predicted, classes * classes)
    pixels = jnp.bincount(index.ravel(), length=classes * classes + 1)
    return pixels[:-1].reshape(classes, classes)


def measures(matrix: Any) -> dict[str, Any]:
    """Global accuracy, class average accuracy, mean and per-class IoU.

    matrix: [K, K], rows = truth. A class that is neither in the truth nor predicted has
    no IoU (None) and is left out of the means; one that is not in the truth has no
    accuracy.
    """
    matrix = np.asarray(matrix, np.float64)
    hit, truth, found = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    union = truth + found - hit
    with np.errstate(invalid="ignore", divide="ignore"):
        iou, accuracy = hit / union, hit / truth
    return {
        "miou": _mean(iou),
        "global_accuracy": float(hit.sum() / max(matrix.sum(), 1)),
        "class_accuracy": _mean(accuracy),
        "per_class_iou": [None if np.isnan(x) else float(x) for x in iou],
    }


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else 0.0
