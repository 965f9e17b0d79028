# SPDX-License-Identifier: Apache-2.0
"""Drawn streets: the same for the same seed, with CamVid's classes and imbalance."""

import numpy as np
import pytest

from jaxprune import data
from jaxprune.data import camvid, synthetic

# Shares of CamVid's train pixels, classes 0 to 10 and unlabelled.
SHARES = np.array(
    [*(0.1685, 0.2326, 0.0098, 0.3166, 0.0449, 0.0972)]
    + [*(0.0117, 0.0113, 0.0587, 0.0064, 0.0029, 0.0395)]
)


def test_a_scene_is_a_function_of_split_size_and_index():
    image, label = synthetic.scene("train", (48, 64), 5)
    again = synthetic.scene("train", (48, 64), 5)
    np.testing.assert_array_equal(image, again[0])
    np.testing.assert_array_equal(label, again[1])
    for split, index in (("train", 6), ("val", 5), ("test", 5)):
        other = synthetic.scene(split, (48, 64), index)[0]
        assert np.mean(image != other) > 0.5


@pytest.mark.parametrize("size", [(96, 128), (33, 47), (64, 32), (8, 8)])
def test_any_size(size):
    image, label = synthetic.scene("val", size, 0)
    assert (image.shape, image.dtype) == ((*size, 3), np.uint8)
    assert (label.shape, label.dtype) == (size, np.uint8)
    assert label.max() <= 11


def test_classes_are_as_rare_as_in_camvid():
    split = data.load("synthetic", size=(96, 128), count=120, cache=False)
    assert split.classes == camvid.CLASSES
    pixels = data.class_pixels(split).sum(0)
    shares = pixels / pixels.sum()
    np.testing.assert_allclose(
        shares[[0, 1, 3, 5, 8]], SHARES[[0, 1, 3, 5, 8]], rtol=0.2
    )
    ratio = shares / SHARES
    assert (ratio > 0.5).all() and (ratio < 2).all(), ratio
    weights = data.class_weights(split)
    assert weights[10] > 3 and weights[3] < 0.3


def test_scenes_vary_in_light_and_layout():
    split = data.load("synthetic", size=(48, 64), count=40, cache=False)
    means = split.images.mean((1, 2, 3))
    assert np.std(means) > 8
    assert np.std([np.mean(label == 3) for label in split.labels]) > 0.02


def test_counts_and_cache(tmp_path):
    for name, count in (("train", 400), ("val", 80), ("test", 80)):
        assert len(synthetic.source(name).stems) == count
    first = data.load("synthetic", None, "test", (24, 32), tmp_path, count=5)
    again = data.load("synthetic", None, "test", (24, 32), tmp_path, count=5)
    more = data.load("synthetic", None, "test", (24, 32), tmp_path, count=7)
    np.testing.assert_array_equal(first.images, again.images)
    np.testing.assert_array_equal(first.images, more.images[:5])
    assert (len(first), len(more)) == (5, 7)
