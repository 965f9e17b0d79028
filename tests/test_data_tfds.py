# SPDX-License-Identifier: Apache-2.0
"""TFDS data sets are built and read without TensorFlow, equal to their folder."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxprune import cli, data, report
from jaxprune.base import DataError
from jaxprune.train import stages

tfds = pytest.importorskip("tensorflow_datasets")

from jaxprune.data import camvid_tfds  # noqa: E402


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


CONFIG = """
from jaxprune import train


def get_config():
    none = train.Fit(epochs=0, batch=2)
    return train.Config(
        network=train.Network("segnet_basic", widths=(4,)),
        data=train.Data(size=(16, 16)),
        train=none,
        prune=train.Prune(
            criterion="magnitude", multiple_of=1, min_channels=1, statistics=1
        ),
        retrain=none,
        evaluate=train.Evaluate(batch=2, repeats=0, samples=1),
    )
"""


def test_the_commands_run_on_either(root, tmp_path, monkeypatch):
    """`run`, `eval` and `predict` on a prepared data set; `run` on the folder, up to
    the splits that it trains on, which are the same ones."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config, home = tmp_path / "tiny.py", tmp_path / "prepared"
    config.write_text(CONFIG)
    builder = camvid_tfds.CamVid(data_dir=home, file_format="array_record")
    how = tfds.download.DownloadConfig(manual_dir=root)
    builder.download_and_prepare(download_config=how)
    (home / "camvid").rename(home / "streets")
    names = [f"class {k}" for k in range(12)]
    classes = {"names": names, "colors": [[20 * k, 0, 0] for k in range(12)]}
    for folder in (root, home):
        (folder / "classes.json").write_text(json.dumps(classes))
    seen, stages_of = [], stages._stages

    def spied(config, net, args, splits, workdir, progress):
        seen.append(splits)
        given = config, net, args, splits, workdir, progress
        return stages_of(*given) if len(seen) == 1 else {}

    monkeypatch.setattr(stages, "_stages", spied)
    monkeypatch.setattr(report, "write", str)
    for source, where in (("tfds:streets", home), ("folder", root)):
        settings = [f"data.source={source}", f"data.root={where}"]
        more = [x for s in settings for x in ("--set", s)]
        work = tmp_path / source.partition(":")[0]
        assert cli.main(["run", str(config), "--workdir", str(work), *more]) == 0
    for one, other in zip(*(dataclasses.astuple(s) for s in seen), strict=True):
        np.testing.assert_array_equal(one[1], other[1])
        np.testing.assert_array_equal(one[2], other[2])
        assert one[4] == other[4] and one[4][0] == tuple(names)
    work, out = tmp_path / "tfds", tmp_path / "out"
    assert json.loads((work / "evaluation.json").read_text())["classes"] == names
    assert cli.main(["eval", str(work), "--split", "test"]) == 0
    image = root / "test" / "stest0.png"
    assert cli.main(["predict", str(work), str(image), "--out", str(out)]) == 0
    assert [p.suffix for p in out.iterdir() if p.stem.startswith("stest0")] == [".png"]
