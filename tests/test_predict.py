# SPDX-License-Identifier: Apache-2.0
"""Prediction: any image file in, labels and overlays of the same size out."""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import jaxprune as jp
from jaxprune import base, models, predict

INFO = {
    "classes": {
        "names": ["dark", "red", "blue"],
        "colors": [[0, 0, 0], [230, 159, 0], [0, 114, 178]],
        "ignore": 255,
    },
    "size": [8, 12],
}


def reddest(variables, images, train=False):
    """A network of no memory: class 1 where red leads, 2 where blue does, else 0."""
    red, blue = images[..., 0], images[..., 2]
    return jnp.stack([jnp.full_like(red, 0.3), red, blue], -1) * variables["scale"]


@pytest.fixture
def net():
    """What `load` returns, as far as prediction looks."""
    return types.SimpleNamespace(
        apply=reddest, variables={"scale": jnp.float32(1)}, info=INFO
    )


def halves(height, width):
    """Left half red, right half blue, and its labels."""
    image = np.zeros((height, width, 3), np.uint8)
    image[:, : width // 2, 0] = 255
    image[:, width // 2 :, 2] = 255
    return image, np.where(image[..., 0] > 0, 1, 2)


@pytest.mark.parametrize("shape", [(8, 12), (16, 24), (80, 120), (4, 6), (40, 60)])
@pytest.mark.parametrize("size", [None, "native", (8, 12)])
def test_labels_come_back_in_the_image_s_size(net, shape, size):
    image, labels = halves(*shape)
    (answer,) = predict.predict(net, [image], size=size)
    assert answer.dtype == np.uint8
    np.testing.assert_array_equal(answer, labels)


def test_no_input_is_overwritten(net, tmp_path):
    image, _ = halves(8, 12)
    for name in ("a", "a_overlay", "b", "b_labels"):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for names in (["a"], ["b"]):
        files = predict.find([tmp_path / f"{n}*.png" for n in names])
        with pytest.raises(base.ConfigError, match="one of the inputs"):
            list(predict.write(net, files, tmp_path))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    # What another command has written there before is.
    (written,) = predict.write(net, [tmp_path / "a.png"], tmp_path)
    assert written.read_bytes() != before["a_overlay.png"]


@pytest.mark.parametrize("size", [None, "native"])
@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_batches_keep_the_order(net, size, batch):
    shapes = [(8, 12), (8, 12), (8, 12), (16, 8), (8, 12)]
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in shapes]
    answers = list(predict.predict(net, images, size="native", batch=batch))
    for image, answer in zip(images, answers, strict=True):
        scores = np.stack(
            [np.full(image.shape[:2], 76.5), image[..., 0], image[..., 2]]
        )
        np.testing.assert_array_equal(answer, scores.argmax(0))


def test_one_compilation_for_a_ragged_number_of_images(net):
    traced = []

    def counted(variables, images, train=False):
        traced.append(images.shape)
        return reddest(variables, images)

    net.apply = counted
    list(predict.predict(net, [halves(8, 12)[0]] * 7, batch=4))
    assert traced == [(4, 8, 12, 3)]


def test_no_images_no_answers(net):
    assert list(predict.predict(net, [])) == []


def test_logits_are_scaled_before_the_largest_is_taken():
    logits = np.zeros((1, 2, 3), np.float32)
    logits[0, 0] = [0.0, 1.0, 0.9]
    logits[0, 1] = [1.0, 0.0, 0.9]
    # Half-way between the two the third class leads, which neither end shows.
    labels = predict._labels(logits, (1, 4))
    np.testing.assert_array_equal(labels, [[1, 2, 2, 0]])


@pytest.mark.parametrize(
    ("mode", "pixel", "expected"),
    [
        ("RGB", (10, 20, 30), (10, 20, 30)),
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 65535, (255, 255, 255)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ("LA", (50, 255), (50, 50, 50)),
    ],
)
def test_any_mode_becomes_rgb(tmp_path, mode, pixel, expected):
    file = tmp_path / "image.png"
    Image.new(mode, (5, 4), pixel).save(file)
    image = predict.read_image(file)
    assert image.shape == (4, 5, 3) and image.dtype == np.uint8
    assert (image == expected).all()


def test_palette_with_transparency(tmp_path):
    image = Image.new("P", (2, 1), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.putpixel((1, 0), 0)
    image.save(tmp_path / "p.png", transparency=0)
    found = predict.read_image(tmp_path / "p.png")
    np.testing.assert_array_equal(found, [[[10, 20, 30], [255, 255, 255]]])


def test_photograph_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    Image.new("RGB", (6, 4)).save(tmp_path / "p.jpg", exif=exif)
    assert predict.read_image(tmp_path / "p.jpg").shape == (6, 4, 3)


@pytest.fixture
def folder(tmp_path):
    """Three images and a file that is none."""
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    for name in ("b.png", "a.JPG", "deep/a.png"):
        Image.fromarray(halves(16, 24)[0]).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    (folder / "._b.png").write_text("what a Mac leaves beside b.png")
    (folder / "deep.png").mkdir()
    return folder


@pytest.mark.parametrize(
    ("inputs", "names"),
    [
        (["."], ["a.JPG", "b.png"]),
        (["b.png", "."], ["b.png", "a.JPG"]),
        (["*.png"], ["b.png"]),
        (["**/*.png"], ["b.png", "deep/a.png"]),
        (["deep", "b.png", "deep/a.png"], ["deep/a.png", "b.png"]),
    ],
)
def test_inputs_are_found(folder, inputs, names):
    found = predict.find([str(folder / entry) for entry in inputs])
    assert found == [folder / name for name in names]


def test_name_with_brackets_is_a_file_first(tmp_path):
    file = tmp_path / "frame[1].png"
    Image.new("RGB", (2, 2)).save(file)
    assert predict.find([file]) == [file]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("nowhere.png", "does not exist"),
        ("*.tif", "no file matches"),
        ("empty", "holds no image"),
    ],
)
def test_missing_input_is_named(folder, entry, said):
    (folder / "empty").mkdir()
    with pytest.raises(base.DataError, match=said) as error:
        predict.find([folder / "b.png", folder / entry])
    assert entry in str(error.value)


def test_write_overlays_and_labels(net, folder, tmp_path):
    out = tmp_path / "a" / "out"
    files = predict.find([folder / "**/*.png"])
    written = list(predict.write(net, files, out, labels=True))
    assert written == [out / "b_overlay.png", out / "a_overlay.png"]
    with Image.open(out / "a_labels.png") as picture:
        assert picture.mode == "P" and picture.getpalette()[3:6] == [230, 159, 0]
        np.testing.assert_array_equal(np.asarray(picture), halves(16, 24)[1])
    with Image.open(out / "b_overlay.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape[0] > 16 and pixels.shape[2] == 3
    red_and_orange = np.round(np.mean([[255, 0, 0], [230, 159, 0]], 0))
    assert np.abs(pixels[8, 4].astype(int) - red_and_orange).max() <= 1
    assert {"a_overlay.png", "b_labels.png"} <= {p.name for p in out.iterdir()}


def test_equal_names_are_told_apart(net, folder, tmp_path):
    files = predict.find([folder / "a.JPG", folder / "deep"])
    names = [path.name for path in predict.write(net, files, tmp_path / "out")]
    assert names == ["a.JPG_overlay.png", "a.png_overlay.png"]
    other = folder / "other"
    other.mkdir()
    Image.new("RGB", (4, 4)).save(other / "a.png")
    files = predict.find([folder / "deep", other])
    names = [path.name for path in predict.write(net, files, tmp_path / "out")]
    assert names == ["deep_a.png_overlay.png", "other_a.png_overlay.png"]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("truncated", "damaged, it ends too early"),
        ("text", "damaged, or no image at all"),
        ("flipped", "damaged (broken PNG file"),
    ],
)
def test_damaged_image_stops_before_anything_is_written(
    net, folder, tmp_path, damage, said
):
    bad = folder / "z.png"
    Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    ).save(bad)
    data = bytearray(bad.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 1
    content = {"truncated": data[:-200], "text": b"hello", "flipped": data}[damage]
    bad.write_bytes(content)
    with pytest.raises(base.DataError, match=re.escape(f"{bad}: {said}")):
        list(predict.write(net, predict.find([folder]), tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_network_saved_without_classes_or_size(net, folder, tmp_path):
    net.info = {}
    with pytest.raises(base.CheckpointError, match="names no classes"):
        list(predict.write(net, predict.find([folder]), tmp_path / "out"))
    with pytest.raises(base.ConfigError, match="--size"):
        list(predict.predict(net, [halves(4, 4)[0]]))


def noisy(variables, images, train=False, sample=False, rngs=None):
    """Class 1 or 2 at a coin's toss each sample on the left, class 2 on the right."""
    shape = images.shape[:-1]
    logits = jnp.zeros((*shape, 3)).at[..., 2].set(50.0)
    if not sample:
        return logits
    heads = jax.random.bernoulli(rngs["dropout"])
    left = jnp.arange(shape[2]) < shape[2] // 2
    toss = jnp.where(heads & left, 100.0, 0.0)
    return logits.at[..., 1].set(jnp.broadcast_to(toss, shape))


def test_samples_give_the_mean_and_the_variance_of_the_probabilities(tmp_path):
    net = types.SimpleNamespace(apply=noisy, variables={}, info=INFO)
    images = [np.zeros((8, 12, 3), np.uint8)] * 3
    count = 400
    found = list(predict.sample(net, images, samples=count, batch=2))
    again = list(predict.sample(net, images, samples=count, batch=2))
    for (labels, variance), (_, same) in zip(found, again, strict=True):
        assert labels.shape == variance.shape == (8, 12)
        assert (labels[:, 6:] == 2).all()
        # Of three probabilities, two are Bernoulli(p): variance p (1 - p) each.
        np.testing.assert_allclose(variance[:, :6], 2 / 3 / 4, rtol=0.05)
        np.testing.assert_allclose(variance[:, 6:], 0, atol=1e-6)
        np.testing.assert_array_equal(variance, same)

    file = tmp_path / "a.png"
    Image.fromarray(images[0]).save(file)
    list(predict.write(net, [file], tmp_path / "out", samples=8))
    grey = np.asarray(Image.open(tmp_path / "out" / "a_uncertainty.png"))
    assert grey.shape == (8, 12)
    assert (grey[:, :6] > 150).all() and (grey[:, 6:] == 0).all()


def test_sampling_a_network_without_dropout_is_refused(net):
    net.info = {**INFO, "network": {"name": "segnet", "args": {"num_classes": 3}}}
    with pytest.raises(base.ConfigError, match="without dropout.*network.dropout"):
        next(predict.sample(net, [np.zeros((8, 12, 3), np.uint8)]))


def test_a_pruned_bayesian_segnet_is_sampled():
    args = {"num_classes": 3, "widths": [4, 4, 4, 4, 4], "dropout": 0.5}
    segnet = models.build("segnet", args)
    variables = models.init(segnet, jax.random.key(0), (8, 12))
    x = jnp.zeros((1, 8, 12, 3))
    pruned = jp.prune(segnet.apply, variables, x, budget=jp.flops(0.6), train=False)
    info = {**INFO, "network": {"name": "segnet", "args": args}}
    image = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8)
    ((labels, variance),) = predict.sample(pruned._replace(info=info), [image])
    assert labels.shape == (8, 12) and (variance > 0).any()
