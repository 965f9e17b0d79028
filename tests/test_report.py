# SPDX-License-Identifier: Apache-2.0
"""The report: what a work folder holds is shown, what it lacks is said."""

import json
import re
import subprocess
import sys
import types

import numpy as np
import pytest
import workfolder
from PIL import Image

from jaxprune import base, report
from jaxprune.report import files, plots, tables, words


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The report of a complete work folder, drawn once: (folder, the page's text)."""
    folder = workfolder.write(tmp_path_factory.mktemp("run"))
    path = report.write(folder)
    assert path == folder / "report" / "index.html"
    return folder, path.read_text(encoding="utf-8")


def test_page_shows_every_picture_and_loads_nothing_else(whole):
    folder, page = whole
    sources = re.findall(r'<img[^>]*src="([^"]+)"', page)
    for name in ("curves", "widths", "path", "confusion", "classes", "sample_1_truth"):
        assert f"{name}.png" in sources
    for source in sources:
        with Image.open(folder / "report" / source) as picture:
            picture.load()
    assert "://" not in page and "<script" not in page and "<link" not in page
    assert len(re.findall(r"<img[^>]*alt=\"[^\"]+\"", page)) == len(sources)


@pytest.mark.parametrize(
    "finding",
    [
        "Pruned reaches .370 mIoU on test, dense .360, at 25 % of the FLOPs",
        "20 of 48 channels stay; conv2 loses most (32 → 8)",
        "Chosen: 25 % of the FLOPs, mIoU .28",
        "63 % of Sky is taken for Road",
        "the function&#x27;s output",
        "head axis 3",
        "group lasso, 1-SE",
        "Best validation mIoU: .460 after pruning and retraining, .260 before",
    ],
)
def test_page_states_the_findings(whole, finding):
    assert finding in whole[1]


def test_drawing_again_gives_the_same_bytes(whole, tmp_path):
    folder, _ = whole
    before = {p.name: p.read_bytes() for p in (folder / "report").iterdir()}
    report.write(folder)
    after = {p.name: p.read_bytes() for p in (folder / "report").iterdir()}
    assert before == after


@pytest.mark.parametrize(
    ("leave_out", "said", "absent"),
    [
        (("prune.json", "evaluation.json", "samples.npz"), "not been evaluated", "bar"),
        (("metrics.jsonl",), "training curves", "curves.png"),
        (("samples.npz",), "pictures: the stage", "strips.png"),
    ],
)
def test_partial_folder_says_what_is_missing(tmp_path, leave_out, said, absent):
    folder = workfolder.write(tmp_path / "run", leave_out=leave_out)
    page = report.write(folder).read_text(encoding="utf-8")
    assert said in page and absent not in page
    for name in leave_out:
        assert f"({name})" in page


def test_dense_only_evaluation(tmp_path):
    folder = workfolder.write(tmp_path)
    evaluation = workfolder.evaluation()
    del evaluation["networks"]["pruned"], evaluation["networks"]["scratch"]
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    page = report.write(folder).read_text(encoding="utf-8")
    assert "Evaluated: dense" in page and "confusion.png" not in page


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", b"{", "not JSON"),
        ("graph.json", b"[]", "is list"),
        ("prune.json", b'{"groups": [], "frozen": []}', "lacks the field 'path'"),
        ("prune.json", b'{"groups": [{"name": 3}]}', "groups[0].name is int"),
        ("evaluation.json", b"\xff\xfe\x00", "utf-8"),
        ("evaluation.json", b'{"classes": ["a"], "colors": []}', "lacks the field"),
        ("metrics.jsonl", b'{"stage": "train", "step": 1}\nnonsense\n', "line 2"),
        ("metrics.jsonl", b'{"stage": "train"}\n', "lacks the field 'step'"),
        ("samples.npz", b"PK\x03\x04 torn", "damaged"),
    ],
)
def test_damaged_file_is_named(tmp_path, name, content, said):
    folder = workfolder.write(tmp_path)
    (folder / name).write_bytes(content)
    with pytest.raises(base.DataError, match=re.escape(name)) as error:
        report.write(folder)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("per_class_iou", [0.5]), ("confusion", [[1, 2], [3, 4]])],
)
def test_evaluation_of_other_classes_is_an_error(tmp_path, field, value):
    folder = workfolder.write(tmp_path)
    evaluation = workfolder.evaluation()
    evaluation["networks"]["pruned"]["splits"]["test"][field] = value
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    with pytest.raises(base.DataError, match=f"pruned.splits.test.{field}"):
        report.write(folder)


def test_samples_of_different_sizes_are_an_error(tmp_path):
    folder = workfolder.write(tmp_path)
    arrays = workfolder.samples()
    np.savez(folder / "samples.npz", **{**arrays, "dense": arrays["dense"][:, 1:]})
    with pytest.raises(base.DataError, match=r"samples\.npz.*dense has shape"):
        files.read(folder)


def test_no_work_folder(tmp_path):
    with pytest.raises(base.DataError, match="is not a folder"):
        report.write(tmp_path / "nowhere")
    with pytest.raises(base.DataError, match="no work folder"):
        report.write(tmp_path)
    assert not list(tmp_path.iterdir())


def test_line_cut_short_by_a_kill_is_left_out(tmp_path):
    folder = workfolder.write(tmp_path)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "retrain", "st')
    assert len(files.read(folder).rows) == len(workfolder.rows())


def test_rows_written_twice_count_once(tmp_path):
    folder = workfolder.write(tmp_path)
    again = {"stage": "train", "step": 10, "split": "val", "miou": 0.9}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(again) + "\n")
    rows = files.read(folder).rows
    assert len(rows) == len(workfolder.rows())
    assert again in rows


def test_strips_places_each_picture():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 5, 7, 3), np.uint8)
    truth, dense, pruned = rng.integers(0, 4, (3, 3, 5, 7))
    truth[0, 0, 0] = 255
    picture = report.strips(images, truth, dense, pruned, workfolder.COLORS)
    assert picture.shape == (3 * 9 - 4, 4 * 11 - 4, 3) and picture.dtype == np.uint8
    colors = np.array(workfolder.COLORS)
    np.testing.assert_array_equal(picture[9:14, :7], images[1])
    np.testing.assert_array_equal(picture[18:23, 22:29], colors[dense[2]])
    np.testing.assert_array_equal(picture[:5, 33:], colors[pruned[0]])
    np.testing.assert_array_equal(picture[0, 11], [0, 0, 0])
    assert (picture[5:9] == 255).all() and (picture[:, 7:11] == 255).all()


def test_overlay_is_the_mean_of_image_and_colours():
    image = np.full((2, 2, 3), 100, np.uint8)
    labels = np.array([[0, 1], [2, 255]])
    colors = [[0, 0, 0], [200, 100, 50], [255, 255, 255]]
    expected = [[[50, 50, 50], [150, 100, 75]], [[178, 178, 178], [50, 50, 50]]]
    np.testing.assert_array_equal(report.overlay(image, labels, colors), expected)


@pytest.mark.parametrize("width", [40, 320, 1920])
def test_legend_shows_every_colour_at_any_width(width):
    band = report.legend(workfolder.CLASSES, workfolder.COLORS, width)
    assert band.shape[1:] == (width, 3)
    seen = {tuple(c) for c in band.reshape(-1, 3)}
    assert {tuple(c) for c in workfolder.COLORS} <= seen


def test_results_table_is_markdown():
    lines = report.results_table(workfolder.evaluation()).splitlines()
    assert lines[0] == "|  | dense | pruned | from scratch | pruned against dense |"
    assert lines[1] == "| --- | ---: | ---: | ---: | ---: |"
    assert "| mIoU, val | .410 | .420 | .380 | +.010 |" in lines
    assert "| FLOPs per image | 2 G | 500 M | 500 M | 25 % |" in lines
    assert "| latency, batch 8 | 150 ms | 37.5 ms | 37.5 ms | 25 % |" in lines
    assert len({line.count("|") for line in lines}) == 1


def test_results_table_without_latency_or_a_split():
    evaluation = workfolder.evaluation()
    del evaluation["networks"]["dense"]["latency_ms"]
    del evaluation["networks"]["dense"]["splits"]["test"]
    rows = {row[0]: row[1:] for row in tables.results_rows(evaluation)}
    assert rows["mIoU, test"] == ["–", ".370", ".330", ""]
    assert rows["latency, batch 1"] == ["–", "5 ms", "5 ms", ""]


@pytest.mark.parametrize(
    ("function", "value", "shown"),
    [
        (words.share, 0.4951, ".495"),
        (words.share, 1.0, "1.000"),
        (words.share, None, "–"),
        (words.share, float("nan"), "–"),
        (words.signed, -0.0121, "−.012"),
        (words.quantity, 213_424_865_280, "213.4 G"),
        (words.quantity, 512, "512"),
        (words.shorten, "params/a/kernel", "a"),
        (words.shorten, "x" * 50, "…" + "x" * 33),
    ],
)
def test_numbers_as_people_read_them(function, value, shown):
    assert function(value) == shown


def test_what_loses_nothing_is_not_said_to():
    groups = [{"name": "a", "before": 8, "after": 8}]
    assert words.widths(groups) == "All 8 channels stay"


def test_frozen_axes_are_summed_up_by_cause():
    frozen = [(f"params/c{i}/kernel", 0, 3, "sort") for i in range(5)]
    rows = words.by_cause([*frozen, ("params/d/kernel", 1, 8, "cumsum")])
    assert rows[1:] == [
        ["sort", "5", "15", "c0 axis 0, c1 axis 0, c2 axis 0 and 2 more"],
        ["cumsum", "1", "8", "d axis 1"],
    ]


def test_unequal_training_is_said():
    networks = {"dense": {"epochs": 14}, "pruned": {"epochs": 48.0}}
    (sentence,) = words.unequal_training(networks)
    assert sentence.startswith("Not trained alike: dense 14, pruned 48 epochs")
    assert words.unequal_training({n: {"epochs": 3} for n in networks}) == []
    assert words.unequal_training({"dense": {}, "pruned": {"epochs": 3}}) == []


def test_rows_of_several_networks_stand_side_by_side(tmp_path):
    folder = workfolder.write(tmp_path)
    row = {"stage": "evaluate", "step": 0, "split": "val"}
    with (folder / "metrics.jsonl").open("a") as file:
        for name in ("dense", "pruned"):
            file.write(json.dumps({**row, "network": name, "miou": 0.4}) + "\n")
    assert len(files.read(folder).rows) == len(workfolder.rows()) + 2


def test_percent_of_nothing():
    assert words.percent(1, 3) == "33 %"
    assert words.percent(0.083, 1) == "8.3 %"
    assert words.percent(1, 0) == words.percent(None, 3) == "–"


def test_class_absent_from_a_split(tmp_path):
    title = words.per_class([0.5, None], [0.4, 0.3], ["a", "b"])
    assert title == "No class gains; a loses most (−.100 IoU)"
    assert words.per_class([None], [None], ["a"]) == "IoU by class"
    plots.per_class({"dense": [0.5, None]}, ["a", "b"], tmp_path / "p.png")
    assert words.row_shares(np.zeros((2, 2))).tolist() == [[0, 0], [0, 0]]
    assert "no class" in words.confusion(np.eye(2), ["a", "b"])


def test_the_path_tells_of_the_knee_and_the_band(tmp_path):
    steps = workfolder.prune()["path"]  # risk 0.5 + (1 - f)^2, stderr 0.02
    steps[0]["rules"], steps[1]["rules"] = ["min"], ["1se"]
    steps[2]["rules"] = ["knee"]
    assert words.within_one_error(steps) == (0.5, 0.52)
    text = words.path(steps, 2e9)
    assert "; the 1-SE rule at 75 %; the knee at 50 %" in text
    plain, marked = tmp_path / "plain.png", tmp_path / "marked.png"
    plots.path(workfolder.prune()["path"], 2e9, plain)
    plots.path(steps, 2e9, marked)
    assert plain.read_bytes() != marked.read_bytes()
    for step in steps:
        step["stderr"] = None  # of one image
    assert words.within_one_error(steps) is None
    assert words.within_one_error([{"flops": 1, "risk": None}]) is None


def test_path_without_scores(tmp_path):
    steps = [{"flops": 2.0}, {"flops": 1.0, "chosen": False}]
    plots.path(steps, None, tmp_path / "path.png")
    assert words.path(steps, None) == "2 steps, none chosen yet"


def test_report_needs_no_jax():
    code = (
        "import sys, types, jaxprune.report.files, jaxprune.report.tables;"
        "print(sorted({'matplotlib', 'PIL', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_rounds_and_their_recoveries_follow_each_other():
    """Two cuts, and one recovery of 4 epochs between them, behind 10 epochs."""
    stages = [("train", 5), ("train", 10), ("prune", 1), ("recover1", 4)]
    stages += [("prune", 2), ("retrain", 3), ("scratch", 17)]
    placed = plots._chained([{"stage": s, "step": n} for s, n in stages])
    assert {stage: [e for e, _ in rows] for stage, rows in placed.items()} == {
        "train": [5, 10],
        "prune": [10, 14],
        "recover1": [14],
        "retrain": [17],
        "scratch": [17],
    }


def test_the_headline_tells_where_the_other_network_is_ahead():
    record = types.SimpleNamespace(evaluation=workfolder.evaluation())
    told = words.headline(record)
    record.evaluation["networks"]["pruned"]["splits"]["val"]["miou"] = 0.2
    assert words.headline(record) == f"{told}; on val .200, dense .410"
