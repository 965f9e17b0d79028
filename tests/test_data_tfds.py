# SPDX-License-Identifier: Apache-2.0
"""TFDS data sets are built and read without TensorFlow, equal to their folder."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxprune import data
from jaxprune.base import DataError

tfds = pytest.importorskip("tensorflow_datasets")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2), ("test", 3)):
        for name, shape in ((split, (9, 12, 3)), (f"{split}annot", (9, 12))):
            folder = tmp_path / "camvid" / name
            folder.mkdir(parents=True)
            high = 256 if len(shape) == 3 else 12
            for k in range(count):
                array = rng.integers(0, high, shape).astype(np.uint8)
                Image.fromarray(array).save(folder / f"s{split}{k}.png")
    return tmp_path / "camvid"


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_camvid_reads_as_the_folder_does(root, tmp_path, split):
    ours = data.load("tfds:camvid", root, split, cache=tmp_path / "cache")
    theirs = data.load("camvid", root, split, cache=False)
    assert ours.stems == theirs.stems
    assert ours.classes == theirs.classes
    np.testing.assert_array_equal(ours.images, theirs.images)
    np.testing.assert_array_equal(ours.labels, theirs.labels)
    assert "tensorflow" not in sys.modules


def test_changed_files_are_prepared_again(root, tmp_path):
    settings = {"root": root, "split": "val", "cache": tmp_path / "cache"}
    data.load("tfds:camvid", **settings)
    Image.fromarray(np.full((9, 12, 3), 7, np.uint8)).save(root / "val/sval1.png")
    assert (data.load("tfds:camvid", **settings).images[1] == 7).all()


def test_a_prepared_data_set_reads_by_its_name(root, tmp_path):
    from jaxprune.data import camvid_tfds

    home = tmp_path / "prepared"
    builder = camvid_tfds.CamVid(data_dir=home, file_format="array_record")
    config = tfds.download.DownloadConfig(manual_dir=root)
    builder.download_and_prepare(download_config=config)
    assert builder.info.splits["test"].num_examples == 3
    sample = builder.as_data_source("test")[0]
    assert sample["segmentation_mask"].shape == (9, 12, 1)
    (home / "camvid").rename(home / "streets")
    split = data.load("tfds:streets", home, "test", cache=tmp_path / "cache")
    assert (len(split.classes), split.classes.ignore) == (12, 255)
    theirs = data.load("camvid", root, "test", cache=False)
    np.testing.assert_array_equal(split.labels, theirs.labels)


def test_faults_are_named(root, tmp_path):
    cache = tmp_path / "cache"
    with pytest.raises(DataError, match="--set data.root=DIR"):
        data.load("tfds:streets", None, cache=cache)
    with pytest.raises(DataError, match="streets: no prepared data set.*array_record"):
        data.load("tfds:streets", tmp_path, cache=cache)
    (root / "val/sval1.png").unlink()
    with pytest.raises(DataError, match=r"sval1\.png: a mask without image"):
        data.load("tfds:camvid", root, "val", cache=cache)
