# SPDX-License-Identifier: Apache-2.0
"""Class weights against the imbalance of street scenes."""

import numpy as np

from jaxprune.data.types import Split


def class_pixels(split: Split) -> np.ndarray:
    """int64[N, K + 1]: pixels of each class in each image; last, those ignored."""
    count = len(split.classes)
    rows = [np.bincount(label.ravel(), minlength=256) for label in split.labels]
    pixels = np.stack(rows)
    return np.append(pixels[:, :count], pixels[:, [split.classes.ignore]], axis=1)


def class_weights(split: Split, power: float = 1.0) -> np.ndarray:
    """float32[K], (median frequency / frequency of the class) to the `power`.

    A class's frequency is its pixels over all labelled pixels of the images that show
    it; the median is over the classes that occur. A class that never does has weight 1.
    Eigen and Fergus, 2015, "Predicting depth, surface normals and semantic labels",
    section 6.3.2.
    """
    pixels = class_pixels(split)[:, :-1]
    of_class = pixels.sum(0)
    around = (pixels > 0).T @ pixels.sum(1)
    occurs = of_class > 0
    frequency = of_class[occurs] / around[occurs]
    weights = np.ones(len(split.classes), np.float32)
    weights[occurs] = (np.median(frequency) / frequency) ** power
    return weights
