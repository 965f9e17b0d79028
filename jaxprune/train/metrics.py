# SPDX-License-Identifier: Apache-2.0
"""Measures of segmentation, from one confusion matrix of a whole split."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Counts(NamedTuple):
    """Pixels of a batch or a split, as integers.

    confusion: [K, K], rows = truth. images: [N, 3, K], of each image the pixels of a
    class that are found, that are in the truth, and that are predicted; all 0 of the
    images that fill a batch up.
    """

    confusion: Any
    images: Any


def counts(logits: Any, labels: Any, ignore: int) -> Counts:
    """What a network says of a batch, counted; arguments as of `confusion`."""
    each = jax.vmap(lambda x, y: confusion(x, y, ignore))(logits, labels)
    hits = jnp.diagonal(each, axis1=1, axis2=2)
    return Counts(each.sum(0), jnp.stack([hits, each.sum(2), each.sum(1)], 1))


def confusion(logits: Any, labels: Any, ignore: int) -> Any:
    """int32[K, K]: pixels by truth (rows) and prediction, but those labelled ignore.

    logits: float[..., K]; labels: int[...]. Runs inside jit.
    """
    classes = logits.shape[-1]
    predicted = jnp.argmax(logits, axis=-1)
    counted = (labels != ignore) & (labels >= 0) & (labels < classes)
    truth = labels.astype(jnp.int32)
    index = jnp.where(counted, truth * classes + predicted, classes * classes)
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


def judged(found: Counts) -> dict[str, Any]:
    """`measures` of a split, with `miou_error` and, as a list, its `confusion`."""
    error = miou_error(found.images)
    matrix = np.asarray(found.confusion).tolist()
    return {**measures(found.confusion), "miou_error": error, "confusion": matrix}


def miou_error(images: Any) -> float | None:
    """The standard error of the mean IoU, were the split drawn anew; None of one image.

    images: as of `Counts`. The jackknife's: mIoU is of pixels of all images at once, so
    what one image brings is seen by leaving it out (Efron & Tibshirani, "An
    Introduction to the Bootstrap", 1993, eq. 11.5). Images without a labelled pixel do
    not count.
    """
    images = np.asarray(images, np.float64)
    images = images[images[:, 1].sum(-1) > 0]
    count = len(images)
    if count < 2:
        return None
    hits, truth, found = np.moveaxis(images.sum(0) - images, 1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        without = [_mean(iou) for iou in hits / (truth + found - hits)]
    return float(np.sqrt((count - 1) * np.var(without)))


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else 0.0
