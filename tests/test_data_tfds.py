# SPDX-License-Identifier: Apache-2.0
"""TFDS data sets are built and read without TensorFlow, equal to their folder."""

import dataclasses
import json
import re
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


def write(root: Path, **counts: int) -> Path:
    """So many images and masks of each split, in CamVid's layout."""
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        for name, shape in ((split, (9, 12, 3)), (f"{split}annot", (9, 12))):
            (root / name).mkdir(parents=True)
            high = 256 if len(shape) == 3 else 12
            for k in range(count):
                array = rng.integers(0, high, shape).astype(np.uint8)
                Image.fromarray(array).save(root / name / f"s{split}{k}.png")
    return root


def prepare(root: Path, home: Path, name: str) -> None:
    """The folder as a data set of another name, as TFDS leaves it in `home`."""
    builder = camvid_tfds.CamVid(data_dir=home, file_format="array_record")
    how = tfds.download.DownloadConfig(manual_dir=root)
    builder.download_and_prepare(download_config=how)
    (home / "camvid").rename(home / name)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write(tmp_path / "camvid", train=4, val=2, test=3)


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Prepared data sets, one of them 'pets', with a train and a test split alone."""
    root = write(tmp_path / "camvid", train=11, test=3)
    prepare(root, tmp_path / "prepared", "pets")
    return tmp_path / "prepared"


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


def test_the_newest_version_is_read(pets, tmp_path):
    """By its numbers, not by its letters; several data sets are to be named."""
    (old,) = (pets / "pets").iterdir()
    home = write(tmp_path / "more", train=5, test=1)
    prepare(home, tmp_path / "other", "pets")
    (new,) = (tmp_path / "other/pets").iterdir()
    old.rename(pets / "pets/1.9.0")
    new.rename(pets / "pets/1.10.0")
    cache = tmp_path / "cache"
    assert len(data.load("tfds:pets", pets, "train", cache=cache).stems) == 5
    assert len(data.load("tfds:pets/1.9.0", pets, "train", cache=cache).stems) == 11
    (pets / "pets/large").mkdir()
    (pets / "pets/1.9.0").rename(pets / "pets/large/1.9.0")
    with pytest.raises(DataError, match="several data sets: name one, pets, pets/lar"):
        data.load("tfds:pets", pets, "train", cache=cache)
    assert len(data.load("tfds:pets/large", pets, "train", cache=cache).stems) == 11


def test_faults_are_named(root, tmp_path):
    cache = tmp_path / "cache"
    with pytest.raises(DataError, match="--set data.root=DIR"):
        data.load("tfds:streets", None, cache=cache)
    with pytest.raises(DataError, match="streets: no prepared data set.*array_record"):
        data.load("tfds:streets", tmp_path, cache=cache)
    (root / "val/sval1.png").unlink()
    with pytest.raises(DataError, match=r"sval1\.png: a mask without image"):
        data.load("tfds:camvid", root, "val", cache=cache)


def test_a_split_that_is_missing_can_be_named(pets, tmp_path):
    """As the error says; against the same samples, read as a folder."""

    def loaded(source, split):
        return data.load(source, pets, split, cache=tmp_path / "cache")

    whole = data.load("camvid", tmp_path / "camvid", "train", cache=False)
    with pytest.raises(DataError, match="no split 'val'; it has train, test") as found:
        loaded("tfds:pets", "val")
    (source,) = re.findall("data.source='(.+)'", str(found.value))
    assert source == "tfds:pets?train=train[:90%],val=train[90%:]"
    np.testing.assert_array_equal(loaded("tfds:pets", "train").images, whole.images)
    for split, part in (("train", slice(10)), ("val", slice(10, None))):
        mine = loaded(source, split)
        assert mine.stems == whole.stems[part] and mine.name == split
        np.testing.assert_array_equal(mine.images, whole.images[part])
        np.testing.assert_array_equal(mine.labels, whole.labels[part])
    test = data.load("camvid", tmp_path / "camvid", "test", cache=False)
    np.testing.assert_array_equal(loaded(source, "test").labels, test.labels)
    # Another part is not what the cache holds of the first, nor is the whole.
    other = "tfds:pets?val=train[:3],train=train[3:] + test[:1],test=test[1:]"
    np.testing.assert_array_equal(loaded(other, "val").images, whole.images[:3])
    assert loaded(other, "train").stems == (*whole.stems[3:], test.stems[0])
    assert loaded(other, "test").stems == test.stems[1:]
    assert loaded("tfds:pets", "train").stems == whole.stems


@pytest.mark.parametrize(
    "named, match",
    [
        (
            "val=train[90%:]",
            r"train=train and val=train\[90%:\] have 1 samples in common",
        ),
        ("train=train+test,val=test", "and val=test have 3 samples"),
        ("test=train[2:4],val=test", r"test=train\[2:4\] have 2 samples"),
        (
            "val=trian[90%:]",
            r"'trian\[90%:\]' is no part of it, or .*; it has train \(11\), test \(3\)",
        ),
        ("val=test[:900%]", "no part of it"),
        ("val=test[:9]", "no part of it"),
        ("val=test[", "no part of it"),
        ("val=test[:1%]", r"'test\[:1%\]' is no part of it, or holds no"),
        ("valid=test", r"'valid=test' is not understood; write tfds:pets\?train=train"),
        ("val", "'val' is not understood"),
        ("val=test,", "'' is not understood"),
        ("val=test[:1],val=test[1:]", "once for a split"),
    ],
)
def test_a_part_that_is_none_is_named(pets, tmp_path, named, match):
    with pytest.raises(DataError, match=match):
        data.load(f"tfds:pets?{named}", pets, "val", cache=tmp_path / "cache")


def test_splits_have_the_same_classes(root, tmp_path):
    """Those found in any of them, though one may lack some."""
    for file in (root / "valannot").iterdir():
        Image.fromarray(np.full((9, 12), 3, np.uint8)).save(file)
    prepare(root, tmp_path / "prepared", "streets")
    for split in ("train", "val", "test"):
        found = data.load("tfds:streets", tmp_path / "prepared", split, cache=False)
        assert found.classes == data.load("folder", root, split, cache=False).classes
        assert len(found.classes) == 12


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
    prepare(root, home, "streets")
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


def test_a_run_takes_the_splits_that_its_config_names(pets, tmp_path, monkeypatch):
    """Up to the splits that it trains on; before that, the command says what to do."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config, seen = tmp_path / "tiny.py", []
    config.write_text(CONFIG)

    def spied(config, net, args, splits, workdir, progress):
        seen.append(splits)
        return {}

    monkeypatch.setattr(stages, "_stages", spied)
    monkeypatch.setattr(report, "write", str)
    command = ["run", str(config), "--workdir", str(tmp_path / "work")]
    command += ["--set", f"data.root={pets}", "--set"]
    assert cli.main([*command, "data.source=tfds:pets"]) == 2
    assert not (tmp_path / "work").exists()
    named = "tfds:pets?train=train[:90%],val=train[90%:]"
    assert cli.main([*command, f"data.source={named}"]) == 0
    (splits,) = seen
    assert [len(s) for s in (splits.train, splits.val, splits.test)] == [10, 1, 3]
    # Other samples are another run.
    named = named.replace("90%", "80%")
    assert cli.main([*command, f"data.source={named}"]) == 2
