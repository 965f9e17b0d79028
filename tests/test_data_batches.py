# SPDX-License-Identifier: Apache-2.0
"""Augmentation is a pure function, and batch i depends on (seed, i) alone."""

import itertools

import numpy as np
import pytest

from jaxprune import data
from jaxprune.base import DataError
from jaxprune.data import augment as augments

CLASSES = data.Classes(("a", "b", "c"), ((0, 0, 0),) * 3, ignore=9)
EVERYTHING = data.Augment(
    scale=(0.5, 2.0), crop=(6, 10), stretch=0.2, colour=0.3, gamma=0.2
)


def make_split(count: int = 7, size: tuple[int, int] = (8, 12)) -> data.Split:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 3, (count, *size)).astype(np.uint8)
    images = np.repeat(labels[..., None] * 80 + 10, 3, -1)
    images[:, 0, 0] = np.arange(count)[:, None]  # which sample it is
    stems = tuple(str(k) for k in range(count))
    return data.Split("train", images, labels, stems, CLASSES)


def take(iterator, count: int) -> list:
    return list(itertools.islice(iterator, count))


def assert_same(ours: list, theirs: list) -> None:
    for one, other in zip(ours, theirs, strict=True):
        for key in ("image", "label"):
            np.testing.assert_array_equal(one[key], other[key])


def view(how: data.Augment, seed: int = 0, split: data.Split | None = None):
    split = split or make_split(1)
    rng = np.random.default_rng(seed)
    return augments.augment(how, rng, split.images[0], split.labels[0], CLASSES.ignore)


def test_batches_have_the_shapes_and_types():
    batch = next(data.batches(make_split(), batch=4, seed=0, augment=EVERYTHING))
    assert (batch["image"].shape, batch["image"].dtype) == ((4, 6, 10, 3), np.uint8)
    assert (batch["label"].shape, batch["label"].dtype) == ((4, 6, 10), np.int32)


@pytest.mark.parametrize("start", [0, 1, 5, 23])
@pytest.mark.parametrize("threads", [0, 2, 5])
def test_resume_is_exact_whatever_the_threads(start, threads):
    split, settings = make_split(), {"batch": 4, "seed": 3, "augment": EVERYTHING}
    whole = take(data.batches(split, **settings), start + 6)
    resumed = data.batches(split, **settings, start=start, threads=threads)
    assert_same(take(resumed, 6), whole[start:])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_processes_share_each_global_batch_in_order(count):
    split, settings = make_split(), {"batch": 4, "seed": 3, "augment": EVERYTHING}
    parts = [
        take(data.batches(split, **settings, start=2, process=(index, count)), 5)
        for index in range(count)
    ]
    joined = [
        {key: np.concatenate([row[key] for row in rows]) for key in ("image", "label")}
        for rows in zip(*parts, strict=True)
    ]
    assert_same(joined, take(data.batches(split, **settings, start=2), 5))


def test_each_pass_shows_every_sample_once_in_another_order():
    rows = take(data.batches(make_split(6), batch=4, seed=0), 6)
    seen = np.concatenate([row["image"][:, 0, 0, 0] for row in rows]).reshape(4, 6)
    np.testing.assert_array_equal(np.sort(seen, 1), [np.arange(6)] * 4)
    assert len({tuple(order) for order in seen}) > 1


def test_seeds_differ_and_views_differ_between_passes():
    split = make_split(1)
    rows = take(data.batches(split, batch=1, seed=0, augment=EVERYTHING), 4)
    rows += take(data.batches(split, batch=1, seed=1, augment=EVERYTHING), 4)
    assert len({row["image"].tobytes() for row in rows}) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 0}, "batch 0"),
        ({"batch": 5, "process": (0, 2)}, "batch 5: must be a positive multiple of 2"),
        ({"process": (2, 2)}, r"process \(2, 2\)"),
        ({"start": -1}, "start -1"),
    ],
)
def test_batch_arguments_are_checked(arguments, message):
    with pytest.raises(DataError, match=message):
        data.batches(make_split(), **{"batch": 4, "seed": 0, **arguments})


def test_evaluation_batches_pad_with_ignored_pixels():
    split = make_split(7)
    rows = list(data.eval_batches(split, 3))
    assert [row["image"].shape for row in rows] == [(3, 8, 12, 3)] * 3
    images, labels = (np.concatenate([r[k] for r in rows]) for k in ("image", "label"))
    np.testing.assert_array_equal(images[:7], split.images)
    np.testing.assert_array_equal(labels[:7], split.labels)
    assert (labels[7:] == CLASSES.ignore).all()
    assert not images[7:].any()
    with pytest.raises(DataError, match="batch 0"):
        next(data.eval_batches(split, 0))


def test_no_augmentation_changes_nothing():
    split = make_split(1)
    image, label = view(data.Augment(flip=False))
    np.testing.assert_array_equal(image, split.images[0])
    np.testing.assert_array_equal(label, split.labels[0])


def test_a_share_of_an_augmentation():
    half = EVERYTHING.times(0.5)
    low, high = EVERYTHING.scale
    np.testing.assert_allclose(half.scale, (low**0.5, high**0.5))
    assert (half.colour, half.gamma) == (EVERYTHING.colour / 2, EVERYTHING.gamma / 2)
    assert EVERYTHING.times(1.0) == EVERYTHING
    image, label = view(data.Augment(False, (0.5, 2), colour=1, gamma=1).times(0.0))
    np.testing.assert_array_equal(image, make_split(1).images[0])
    np.testing.assert_array_equal(label, make_split(1).labels[0])


def test_a_flip_turns_both():
    split, flips = make_split(1), 0
    for seed in range(20):
        image, label = view(data.Augment(), seed)
        if np.array_equal(image, split.images[0]):
            np.testing.assert_array_equal(label, split.labels[0])
            continue
        flips += 1
        np.testing.assert_array_equal(image[:, ::-1], split.images[0])
        np.testing.assert_array_equal(label[:, ::-1], split.labels[0])
    assert 4 < flips < 16


def test_views_are_pure():
    split = make_split(1)
    before = split.images.copy()
    for seed in range(10):
        first, second = view(EVERYTHING, seed, split), view(EVERYTHING, seed, split)
        np.testing.assert_array_equal(first[0], second[0])
        np.testing.assert_array_equal(first[1], second[1])
    np.testing.assert_array_equal(split.images, before)


@pytest.mark.parametrize("crop", [None, (30, 40), (60, 80), (45, 31), (7, 90)])
@pytest.mark.parametrize("scale", [(1.0, 1.0), (2.0, 2.0), (0.4, 0.4), (0.5, 3.0)])
def test_image_and_label_stay_aligned(crop, scale):
    # Two halves of two colours: in the view, colour and label must change together.
    labels = np.zeros((1, 48, 64), np.uint8)
    labels[:, :, 32:] = 1
    images = np.repeat(labels[..., None] * 200 + 20, 3, -1)
    split = data.Split("train", images, labels, ("x",), CLASSES)
    for seed in range(8):
        how = data.Augment(scale=scale, crop=crop)
        image, label = view(how, seed, split)
        assert image.shape[:2] == label.shape == (crop or (48, 64))
        sharp = (image[..., 0] < 30) | (image[..., 0] > 210)
        labelled = sharp & (label != CLASSES.ignore)
        expected = (image[..., 0] > 120).astype(np.uint8)
        np.testing.assert_array_equal(label[labelled], expected[labelled])


def test_zoom_is_what_it_says():
    # One column in 64 is another class: its width in the view shows the zoom.
    labels = np.zeros((1, 48, 64), np.uint8)
    labels[:, :, 16:48] = 1
    split = data.Split(
        "train", np.zeros((1, 48, 64, 3), np.uint8), labels, ("x",), CLASSES
    )
    for zoom, share in ((1.0, 0.5), (0.5, 0.125)):
        how = data.Augment(scale=(zoom, zoom), crop=(96, 128))
        label = view(how, 1, split)[1]
        assert np.mean(label == 1) == pytest.approx(share, abs=0.01)
        assert np.mean(label == CLASSES.ignore) == pytest.approx(1 - zoom**2, abs=0.02)


def test_the_border_has_the_mean_colour():
    split = make_split(1, (40, 40))
    image, label = view(data.Augment(scale=(0.5, 0.5)), 0, split)
    border = image[label == CLASSES.ignore]
    np.testing.assert_allclose(
        border, split.images[0].mean((0, 1))[None] + border * 0, atol=1
    )


def test_colour_keeps_greys_grey_and_labels_whole():
    split = make_split(1)
    for seed in range(10):
        image, label = view(data.Augment(flip=False, colour=1.0), seed)
        assert np.ptp(image.astype(int), -1).max() <= 2
        np.testing.assert_array_equal(label, split.labels[0])


def test_colour_and_gamma_vary_but_do_not_drift():
    split = make_split(1, (20, 20))
    split.images[0] = 128
    how = data.Augment(colour=0.4, gamma=0.3)
    means = [view(how, seed, split)[0].mean() for seed in range(200)]
    assert np.std(means) > 10
    assert abs(np.mean(means) - 128) < 8


@pytest.mark.parametrize(
    "fields",
    [
        {"scale": (0.0, 1.0)},
        {"scale": (2.0, 1.0)},
        {"crop": (0, 4)},
        {"colour": 1.5},
        {"stretch": -0.1},
        {"gamma": -1.0},
    ],
)
def test_augment_fields_are_checked(fields):
    with pytest.raises(DataError, match=f"augment: {next(iter(fields))}"):
        data.Augment(**fields)
