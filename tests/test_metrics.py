# SPDX-License-Identifier: Apache-2.0
"""Confusion matrices and the measures read off them, against counts by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.train import metrics


def counted(predicted: np.ndarray, truth: np.ndarray, classes: int) -> np.ndarray:
    """The confusion matrix, pixel by pixel."""
    matrix = np.zeros((classes, classes), int)
    for p, t in zip(predicted.ravel(), truth.ravel(), strict=True):
        if t < classes:
            matrix[t, p] += 1
    return matrix


@pytest.mark.parametrize("ignore", [4, 255])
def test_confusion_counts_pixels(ignore):
    rng = np.random.default_rng(0)
    predicted = rng.integers(0, 4, (3, 6, 5))
    truth = rng.choice([0, 1, 2, 3, ignore], (3, 6, 5))
    logits = np.eye(4)[predicted] + 0.1 * rng.random((3, 6, 5, 4))
    found = jax.jit(metrics.confusion, static_argnums=2)(
        jnp.asarray(logits), jnp.asarray(truth), ignore
    )
    assert jnp.issubdtype(found.dtype, jnp.integer)
    np.testing.assert_array_equal(found, counted(predicted, truth, 4))


def test_confusion_of_ignored_pixels_alone_is_zero():
    logits = jnp.ones((1, 2, 2, 3))
    found = metrics.confusion(logits, jnp.full((1, 2, 2), 255), 255)
    np.testing.assert_array_equal(found, np.zeros((3, 3)))


def test_measures_by_hand():
    # Rows are the truth: 4 pixels of class 0, 2 of class 1, 2 of class 2.
    found = metrics.measures([[3, 1, 0], [0, 2, 0], [1, 1, 0]])
    np.testing.assert_allclose(found["per_class_iou"], [3 / 5, 2 / 4, 0.0])
    np.testing.assert_allclose(found["miou"], (3 / 5 + 2 / 4 + 0) / 3)
    np.testing.assert_allclose(found["global_accuracy"], 5 / 8)
    np.testing.assert_allclose(found["class_accuracy"], (3 / 4 + 1 + 0) / 3)


def test_measures_leave_out_classes_that_never_occur():
    # Class 1 occurs nowhere; class 2 is predicted only: an IoU of 0, no accuracy.
    found = metrics.measures([[3, 0, 1], [0, 0, 0], [0, 0, 0]])
    assert found["per_class_iou"] == [0.75, None, 0.0]
    np.testing.assert_allclose(found["miou"], 0.375)
    np.testing.assert_allclose(found["class_accuracy"], 0.75)


def test_measures_of_nothing_are_zero():
    found = metrics.measures(np.zeros((2, 2)))
    assert found["miou"] == found["global_accuracy"] == found["class_accuracy"] == 0.0
    assert found["per_class_iou"] == [None, None]


def test_one_matrix_of_a_split_is_the_sum_over_its_batches():
    rng = np.random.default_rng(1)
    predicted, truth = rng.integers(0, 3, (2, 4, 5, 5))
    parts = [
        metrics.confusion(jnp.eye(3)[p][None], jnp.asarray(t)[None], 255)
        for p, t in zip(predicted, truth, strict=True)
    ]
    np.testing.assert_array_equal(sum(parts), counted(predicted, truth, 3))


def test_counts_are_of_each_image_and_of_all():
    rng = np.random.default_rng(1)
    predicted, truth = rng.integers(0, 3, (2, 4, 5, 6))
    truth[0, :2] = 255
    truth[3] = 255
    logits = jnp.asarray(np.eye(3)[predicted])
    found = jax.jit(metrics.counts, static_argnums=2)(logits, jnp.asarray(truth), 255)
    each = [counted(p, t, 3) for p, t in zip(predicted, truth, strict=True)]
    np.testing.assert_array_equal(found.confusion, sum(each))
    for image, matrix in zip(found.images, each, strict=True):
        np.testing.assert_array_equal(image[0], np.diag(matrix))
        np.testing.assert_array_equal(image[1], matrix.sum(1))
        np.testing.assert_array_equal(image[2], matrix.sum(0))


def test_the_error_of_a_mean_is_the_deviation_over_the_root_of_the_count():
    # Both classes have 60 pixels in every image, and nothing else is taken for them:
    # mIoU is a mean over images, whose error is the textbook's, s / sqrt(n).
    hits = np.random.default_rng(2).integers(20, 50, (30, 2))
    images = np.stack([hits, np.full_like(hits, 60), hits], 1)
    iou = (hits / 60).mean(1)
    expected = iou.std(ddof=1) / np.sqrt(30)
    np.testing.assert_allclose(metrics.miou_error(images), expected)


def test_the_error_is_of_leaving_each_image_out():
    rng = np.random.default_rng(3)
    each = rng.integers(0, 50, (12, 4, 4))
    each[:, 2] = each[:, :, 2] = 0  # a class that never occurs
    each[7] = 0  # nothing labelled
    images = np.stack([np.diagonal(each, 0, 1, 2), each.sum(2), each.sum(1)], 1)
    left = [i for i in range(12) if i != 7]
    without = [
        metrics.measures(each[[j for j in left if j != i]].sum(0))["miou"] for i in left
    ]
    spread = np.sum((np.array(without) - np.mean(without)) ** 2)
    expected = np.sqrt(10 / 11 * spread)
    np.testing.assert_allclose(metrics.miou_error(images), expected)
    np.testing.assert_allclose(
        metrics.judged(metrics.Counts(each.sum(0), images))["miou_error"], expected
    )


def test_one_image_has_no_error():
    assert metrics.miou_error(np.ones((1, 3, 2))) is None
    assert metrics.miou_error(np.zeros((5, 3, 2))) is None
