# SPDX-License-Identifier: Apache-2.0
"""One's own folder of images and masks, through the commands as a user types them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tinyrun
from PIL import Image

from jaxprune import cli

pytestmark = pytest.mark.slow  # whole runs, whose programs are compiled

NAMES = ["sky", "road", "car"]
COLORS = [[70, 130, 180], [128, 64, 128], [220, 20, 60]]
SIZE = (16, 24)
COUNTS = {"train": 8, "val": 3, "test": 4}

CONFIG = """
from jaxprune import train


def get_config():
    fit = train.Fit(epochs=3, batch=4, lr=1e-2, ema=0.5)
    return train.Config(
        network=train.Network("segnet_basic", widths=(6,)),
        data=train.Data("folder", size=(16, 24)),
        train=fit,
        prune=train.Prune(
            "criterion",
            "magnitude",
            ratio=0.5,
            multiple_of=1,
            min_channels=1,
            statistics=1,
        ),
        retrain=fit,
        evaluate=train.Evaluate(batch=4, repeats=0, samples=1),
    )
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """(data, config, work): the folder of docs/data.md, a config, and what ran."""
    home = tmp_path_factory.mktemp("own")
    data, config, work = home / "data", home / "tiny.py", home / "work"
    for number, (split, count) in enumerate(COUNTS.items()):
        rng = np.random.default_rng(number)
        for k in range(count):
            write_pair(data / split, f"frame{k}", rng)
    listed = {"names": NAMES, "colors": COLORS, "ignore": 255}
    (data / "classes.json").write_text(json.dumps(listed))
    config.write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        with tinyrun.compilations(home / "compiled"):
            command = ["run", str(config), "--workdir", str(work)]
            assert cli.main([*command, "--set", f"data.root={data}"]) == 0
            yield data, config, work


def write_pair(folder: Path, stem: str, rng: np.random.Generator) -> None:
    """An image whose colours tell its classes, and its mask with a border of 255."""
    blocks = rng.integers(0, len(NAMES), (SIZE[0] // 4, SIZE[1] // 4))
    label = np.kron(blocks, np.ones((4, 4), int)).astype(np.uint8)
    image = np.array(COLORS)[label] + rng.integers(-25, 25, (*SIZE, 3))
    label[0] = 255
    for name, array in (("images", image.clip(0, 255)), ("masks", label)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        ending = "jpg" if name == "images" else "png"
        picture = Image.fromarray(array.astype(np.uint8))
        picture.save(folder / name / f"{stem}.{ending}")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("data.counts=8,3,4", "test: no such folder"),
        ("network.widths=8,8", "widths"),
        ("network.encoder=nothere.npz", "nothere.npz"),
    ],
)
def test_faults_are_found_before_anything_is_decoded(
    own, setting, said, tmp_path, monkeypatch, capsys
):
    data, config, _ = own
    if setting.startswith("data"):
        data = Path(shutil.copytree(data, tmp_path / "data"))
        shutil.rmtree(data / "test")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for verb in ("run", "compare"):
        command = [verb, str(config), "--workdir", str(tmp_path / "work")]
        command += ["--set", f"data.root={data}", "--set", setting]
        assert cli.main(command) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "work").exists()


def masks(data: Path, split: str) -> np.ndarray:
    """The labels of a split as they lie on the disk."""
    files = sorted((data / split / "masks").iterdir())
    return np.stack([np.asarray(Image.open(file)) for file in files])


def mean_iou(truth: np.ndarray, seen: np.ndarray) -> float:
    """By sets of pixels, over the classes that there are in either."""
    seen, truth = seen[truth != 255], truth[truth != 255]
    pairs = [(truth == k, seen == k) for k in range(len(NAMES))]
    ious = [(a & b).sum() / (a | b).sum() for a, b in pairs if (a | b).any()]
    return float(np.mean(ious))


def read(folder: Path, name: str):
    return json.loads((folder / name).read_text())


def test_a_folder_is_trained_pruned_and_evaluated(own):
    data, _, work = own
    evaluation = read(work, "evaluation.json")
    assert (evaluation["classes"], evaluation["colors"]) == (NAMES, COLORS)
    dense, pruned = (evaluation["networks"][n] for n in ("dense", "pruned"))
    assert pruned["cost"]["flops"] <= 0.5 * dense["cost"]["flops"]
    for network in (dense, pruned):
        for split, count in COUNTS.items():
            if split != "train":
                truth = masks(data, split)
                assert len(truth) == count
                # Rows of the confusion matrix are the pixels of each class.
                expected = np.bincount(truth[truth != 255], minlength=len(NAMES))
                found = np.sum(network["splits"][split]["confusion"], 1)
                np.testing.assert_array_equal(found, expected)
    assert (work / "report" / "index.html").exists()


def test_a_split_without_labels_is_told_before_any_work(own, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(own[0], data)
    for file in (data / "val" / "masks").iterdir():
        Image.fromarray(np.full(SIZE, 255, np.uint8)).save(file)
    command = ["run", str(own[1]), "--workdir", str(tmp_path / "work")]
    assert cli.main([*command, "--set", f"data.root={data}"]) == 2
    assert "the split 'val' of folder: no pixel of its" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_eval_on_other_classes_than_were_trained(own, capsys):
    data, _, work = own
    file = data / "classes.json"
    listed = json.loads(file.read_text())
    try:
        file.write_text(json.dumps({**listed, "names": NAMES[::-1]}))
        assert cli.main(["eval", str(work)]) == 2
    finally:
        file.write_text(json.dumps(listed))
    said = f"the split 'test' has the classes {', '.join(NAMES[::-1])}, the network"
    assert said in capsys.readouterr().err


def test_eval_tells_the_miou_of_what_predict_writes(own, tmp_path, capsys):
    """Both by the commands, on the files; the measure by NumPy."""
    data, _, work = own
    images, out = data / "test" / "images", tmp_path / "out"
    command = ["predict", str(work), str(images), "--out", str(out), "--labels"]
    assert cli.main([*command, "--opacity", "1"]) == 0
    stems = [f"frame{k}" for k in range(COUNTS["test"])]
    seen = [np.asarray(Image.open(out / f"{stem}_labels.png")) for stem in stems]
    for stem, label in zip(stems, seen, strict=True):
        overlay = np.asarray(Image.open(out / f"{stem}_overlay.png"))
        shown = overlay[: SIZE[0], : SIZE[1], :3]  # the legend lies beside it
        np.testing.assert_array_equal(shown, np.array(COLORS)[label])
    expected = mean_iou(masks(data, "test"), np.stack(seen))
    capsys.readouterr()
    for split in ("test", "val"):
        assert cli.main(["eval", str(work), "--split", split]) == 0
        lines = capsys.readouterr().out.splitlines()
        found = read(work, "evaluation.json")["networks"]["pruned"]["splits"][split]
        shown = next(line for line in lines if line.startswith("mIoU")).split()[1]
        assert float(shown) == pytest.approx(found["miou"], abs=5e-5)
        assert [n for n in NAMES if any(f"IoU {n}" in line for line in lines)] == NAMES
        if split == "test":
            assert found["miou"] == pytest.approx(expected, abs=1e-6)


def test_methods_are_compared_over_seeds(own, tmp_path):
    """Two methods, a budget, two seeds: rows hold means and deviations (n - 1)."""
    data, config, _ = own
    study = tmp_path / "study"
    command = ["compare", str(config), "--workdir", str(study), "--seeds", "2"]
    command += ["--set", f"data.root={data}"]
    command += ["--methods", "l1,random", "--budgets", "0.5"]
    # Cut, and no more: the run did the rest, which compiles for each one's widths.
    command += ["--set", "retrain.epochs=0", "--set", "prune.statistics=0"]
    assert cli.main(command) == 0
    written = read(study, "comparison.json")
    keys = {(r["method"], r["budget"], r["seed"]) for r in written["runs"]}
    methods = {"dense": 1.0, "l1": 0.5, "random": 0.5}
    assert keys == {(m, b, seed) for m, b in methods.items() for seed in (0, 1)}
    rows = {row["method"]: row for row in written["rows"]}
    assert set(rows) == set(methods)
    spread = []
    for method, row in rows.items():
        assert row["seeds"] == 2 and row["flops"] <= row["budget"]
        for split in ("val", "test"):
            mine = [r[split] for r in written["runs"] if r["method"] == method]
            deviation = np.std(mine, ddof=1)
            np.testing.assert_allclose(row[split], np.mean(mine), rtol=1e-12)
            np.testing.assert_allclose(row[f"{split}_deviation"], deviation, atol=1e-12)
            assert row[f"{split}_margin"] == row[f"{split}_deviation"]
            spread.append(deviation)
    assert max(spread) > 1e-3  # the seeds are two networks
    # Each run's scores are those of its own folder, whose config has its own seed.
    for run in written["runs"]:
        if run["method"] != "dense":
            folder = study / f"{run['method']}-0.5-seed{run['seed']}"
            pruned = read(folder, "evaluation.json")["networks"]["pruned"]
            assert run["test"] == pruned["splits"]["test"]["miou"]
            assert read(folder, "config.json")["seed"] == run["seed"]
    # A seed's methods share its dense network, and seeds have networks of their own.
    dense = {
        folder.name: (folder / "checkpoints/train/6/manifest.sha256.json").read_bytes()
        for folder in study.glob("*-seed*")
    }
    for seed in (0, 1):
        assert dense[f"l1-0.5-seed{seed}"] == dense[f"random-0.5-seed{seed}"]
    assert dense["l1-0.5-seed0"] != dense["l1-0.5-seed1"]
    table = (study / "comparison.md").read_text()
    shown = f"{rows['l1']['test']:.3f} ± {rows['l1']['test_deviation']:.3f}"
    assert shown in table
    assert (study / "frontier.png").stat().st_size > 10_000
