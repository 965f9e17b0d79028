# SPDX-License-Identifier: Apache-2.0
"""Methods side by side: what is shared, what differs, and the table."""

import dataclasses
import json
import math
import operator
import re

import jax
import numpy as np
import pytest
import tinyrun
from PIL import Image

from jaxprune import checkpoint, cli, peers, train
from jaxprune.base import ConfigError
from jaxprune.report import plots
from jaxprune.train import study, tabulate
from jaxprune.train.config import Config
from jaxprune.train.loop import Splits

FIT = train.Fit(epochs=1, batch=8, ema=0.5)
CONFIG = train.Config(
    name="tiny",
    data=train.Data("synthetic", size=tinyrun.SIZE),
    train=FIT,
    prune=train.Prune(
        multiple_of=1, min_channels=1, batches=1, statistics=1, lasso_epochs=0.5
    ),
    retrain=FIT,
    scratch=True,
    evaluate=train.Evaluate(repeats=1, samples=1),
)


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """The dense network's programs are each run's: keep them."""
    with tinyrun.compilations(tmp_path_factory.mktemp("compiled")):
        yield


def test_plans_differ_in_the_method_alone_and_train_as_long():
    plans = {m: study.planned(CONFIG, m, 0.5, 3, ["l1"]) for m in study.METHODS}
    for method, plan in plans.items():
        assert plan.train == CONFIG.train
        assert plan.prune.ratio == 0.5
        assert plan.seed == CONFIG.seed + 3
        assert plan.scratch == (method == "l1")
        assert train.stages.pruned_epochs(plan) == 2
    assert plans["lasso"].retrain.epochs == 0.5
    # What the config says of one method is no hindrance to the others.
    steered = dataclasses.replace(
        CONFIG.prune,
        metric="optimizer",
        accelerated=True,
        repriced=True,
        target=0.4,
        cuts_in_training=1,
        reconstruct=1,
        carry_optimizer=True,
        estimate="fisher",
        scope="local",
        per_cost=True,
        normalize="max",
    )
    steered = dataclasses.replace(CONFIG, prune=steered)
    for method, own in study.METHODS.items():
        plan = train.config.check(study.planned(steered, method, 0.5, 3, ["l1"]))
        if plan.prune.method == "criterion":
            ranks = operator.attrgetter("scope", "per_cost", "normalize")
            assert ranks(plan.prune) == ranks(plans[method].prune)
            assert plan.prune.per_cost == (method == "taylor_per_cost")
            assert plan.prune.criterion == own["criterion"]
        # Steered to the study's budget, not to what the config says for its own; where
        # the path goes the rest, to half of the way, in factors.
        wanted = dict.fromkeys(("lasso", "ssl_filters", "ssl_channels", "gates"), 0.5)
        wanted["lasso_then_path"] = math.sqrt(0.5)
        assert plan.prune.target == 0.95 * wanted.get(method, 0.0)
    rounds = dataclasses.replace(CONFIG.prune, rounds=3, recovery_epochs=0.25)
    rounds = dataclasses.replace(CONFIG, prune=rounds)
    for method in study.METHODS:
        plan = study.planned(rounds, method, 0.5, 3, ["l1"])
        assert train.stages.pruned_epochs(plan) == 2.5
    lasso = study.planned(rounds, "lasso", 0.5, 3, ["l1"])
    assert (lasso.prune.rounds, lasso.retrain.epochs) == (1, 1.0)
    both = study.planned(rounds, "lasso_then_path", 0.5, 3, ["l1"])
    assert (both.prune.rounds, both.retrain.epochs) == (2, 0.75)
    # A penalty that is to train for longer than there is time leaves half of it.
    longer = dataclasses.replace(CONFIG.prune, lasso_epochs=20.0)
    longer = dataclasses.replace(CONFIG, prune=longer)
    plan = train.config.check(study.planned(longer, "gates", 0.5, 3, ["l1"]))
    assert (plan.prune.lasso_epochs, plan.retrain.epochs) == (0.5, 0.5)
    with pytest.raises(ConfigError, match="no method 'tailor'; is 'taylor' meant"):
        study.planned(CONFIG, "tailor", 0.5, 0, ["l1"])
    for budget in (-0.5, 0.0, 1.5, math.nan, math.inf):
        with pytest.raises(ConfigError, match=re.escape(f"prune.ratio = {budget}:")):
            plan = study.planned(CONFIG, "lasso_then_path", budget, 0, ["l1"])
            train.config.check(plan)


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    page = tmp_path / "comparison.md"
    page.write_text("my own")
    for folder in (tmp_path, page):
        with pytest.raises(ConfigError, match=r"no folder of a comparison"):
            study.study(CONFIG, folder, ["path"], [0.5])
    assert page.read_text() == "my own"


def test_who_begins_anew_has_the_widths_of_the_first_that_cuts_channels():
    assert study._narrower(CONFIG, ["weights", "svd", "l1", "path"]) == ["l1"]
    assert study._narrower(CONFIG, ["path", "l1"]) == ["path"]
    assert study._narrower(CONFIG, ["weights", "cp"]) == []


def network(val, test, flops, error=None):
    return {
        "splits": {
            "val": {"miou": val, "miou_error": error},
            "test": {"miou": test, "miou_error": error},
        },
        "cost": {"flops": flops, "params": flops},
        "epochs": 2.0,
    }


def test_the_table_is_of_means_and_deviations():
    found = [
        {
            "method": "l1",
            "budget": 0.5,
            "seed": seed,
            "name": f"l1-{seed}",
            "dense": network(0.5 + seed / 10, 0.4, 100),
            "pruned": network(0.3 + seed / 10, 0.2, 50),
        }
        for seed in (0, 2)
    ]
    again = {
        "method": "path",
        "budget": 0.5,
        "seed": 0,
        "name": "path-0",
        "dense": network(0.5, 0.4, 100),
        "pruned": network(0.45, 0.3, 49, error=0.01),
        "scratch": network(0.44, 0.3, 49),
    }
    times = {"dense": 12.0, "l1-0": 5.0, "l1-2": 7.0, "path-0": 4.0}
    runs = tabulate.scores([*found, again], times)
    assert [(r["method"], r["seed"]) for r in runs].count(("dense", 0)) == 1
    dense, path, scratch, l1 = tabulate.table(runs)
    assert scratch["method"] == "from scratch" and scratch["ms"] == path["ms"]
    assert [r["method"] for r in (dense, path, l1)] == ["dense", "path", "l1"]
    assert (dense["seeds"], path["seeds"], l1["seeds"]) == (2, 1, 2)
    np.testing.assert_allclose([dense["val"], l1["val"]], [0.6, 0.4])
    np.testing.assert_allclose(l1["val_deviation"], np.std([0.3, 0.5], ddof=1))
    assert (l1["val_error"], path["val_deviation"]) == (None, None)
    np.testing.assert_allclose([r["speedup"] for r in (dense, path, l1)], [1, 3, 2])
    bare = tabulate.table(tabulate.scores(found, {}))
    assert {(r["ms"], r["speedup"]) for r in bare} == {(None, None)}
    text = tabulate.as_markdown([dense, path, l1])
    assert "| l1 | 50% | 50.0% | 50.0% | 0.400 ± 0.141 | 0.200 ± 0.000 |" in text
    assert "| path | 50% | 49.0% | 49.0% | 0.450 ± 0.010 | 0.300 ± 0.010 |" in text
    assert "| 4.0 | 3.00 | 2 | 1 |" in text
    close = [{**l1, "budget": b} for b in (0.29, 0.125, 0.001)]
    cells = [
        line.split(" | ")[1] for line in tabulate.as_markdown(close).splitlines()[2:5]
    ]
    assert cells == ["29%", "12.5%", "0.1%"]


def test_zeros_are_told_of_beside_the_dense_cost():
    found = [
        {
            "method": method,
            "budget": 0.5,
            "seed": 0,
            "name": method,
            "dense": network(0.5, 0.4, 100),
            "pruned": {**network(0.4, 0.3, flops), **more},
        }
        for method, flops, more in (
            ("l1", 48, {}),
            ("weights", 100, {"nonzero": {"flops": 49, "params": 30}}),
        )
    ]
    times = dict.fromkeys(("dense", "l1", "weights"), 8.0)
    text = tabulate.as_markdown(tabulate.table(tabulate.scores(found, times)))
    assert "| epochs | FLOPs, zeros skipped |" in text
    same = "0.400 | 0.300 | 8.0 | 1.00 | 2"
    assert f"| weights | 50% | 100.0% | 100.0% | {same} | 49.0% |" in text
    assert f"| l1 | 50% | 48.0% | 48.0% | {same} |  |" in text


def drawn(monkeypatch, tmp_path, rows):
    """The axes of a comparison's plot, and the names in its legend."""
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, file: figures.append(figure))
    plots.frontier(rows, tmp_path / "frontier.png")
    (legend,) = figures[0].legends
    return figures[0].axes, [text.get_text() for text in legend.get_texts()]


def row(method, budget, flops, test, ms=None, margin=None):
    return {
        "method": method,
        "budget": budget,
        "flops": flops,
        "test": test,
        "ms": ms,
        "test_margin": margin,
    }


def test_the_frontier_shows_every_method_with_its_margins(monkeypatch, tmp_path):
    rows = [
        row("dense", 1.0, 1.0, 0.61, 12.0),
        row("l1", 0.5, 0.49, 0.55, 7.0, 0.02),
        row("path", 0.5, 0.5, 0.58, 8.0, 0.03),
        row("path", 0.25, 0.24, 0.52, 5.0),  # one seed, and no error over images
    ]
    axes, names = drawn(monkeypatch, tmp_path, rows)
    assert sorted(names) == ["dense", "l1", "path"]
    # By costs that rise, FLOPs in percent; bars of margin either way.
    percent = {"l1": [49], "path": [24, 50]}
    ms = {"l1": [7], "path": [5, 8]}
    test = {"l1": [0.55], "path": [0.52, 0.58]}
    bars = {"l1": [(0.53, 0.57)], "path": [(0.52, 0.52), (0.55, 0.61)]}
    flops, speed = axes
    for ax, label, costs, dense in (
        (flops, "FLOPs that stay (%)", percent, 100),
        (speed, "milliseconds, one image", ms, 12),
    ):
        assert (ax.get_xlabel(), ax.get_ylabel()) == (label, "test mIoU")
        assert ax.get_xlim()[0] == 0
        lines = {c.get_label(): c.lines for c in ax.containers}
        assert set(lines) == {"l1", "path"}
        for method, (points, _, (bar,)) in lines.items():
            np.testing.assert_allclose(points.get_xdata(orig=False), costs[method])
            np.testing.assert_allclose(points.get_ydata(orig=False), test[method])
            ends = [[y for _, y in segment] for segment in bar.get_segments()]
            np.testing.assert_allclose(ends, bars[method])
        level, point = [x for x in ax.lines if x.get_color() == plots.GREY]
        assert set(level.get_ydata()) == {0.61} and level.get_label() == "dense"
        assert (point.get_xdata(), point.get_ydata()) == ([dense], [0.61])
    colours = [c.lines[0].get_color() for c in flops.containers]
    assert colours == [c.lines[0].get_color() for c in speed.containers]
    assert len(set(colours)) == 2


def test_without_times_the_frontier_is_of_flops_alone(monkeypatch, tmp_path):
    rows = [row("l1", 0.5, 0.5, 0.55, margin=0.01), row("dense", 1.0, 1.0, 0.6)]
    (ax,), names = drawn(monkeypatch, tmp_path, rows)
    assert ax.get_xlabel() == "FLOPs that stay (%)" and set(names) == {"l1", "dense"}
    monkeypatch.undo()
    file = plots.frontier(rows, tmp_path / "frontier.png")
    with Image.open(file) as picture:
        assert picture.size[0] == 160 * plots.WIDTH


@pytest.mark.slow
def test_a_study_shares_the_dense_network_and_goes_on(tmp_path, monkeypatch, capsys):
    config = tmp_path / "tiny.py"
    config.write_text(
        "import test_study\n\n\ndef get_config():\n    return test_study.CONFIG\n"
    )
    folder = tmp_path / "study"
    tinyrun.ship(monkeypatch, tinyrun.job(tmp_path / "data").splits)
    command = ["compare", str(config), "--workdir", str(folder), "--budgets", "0.6"]
    assert cli.main([*command, "--methods", "l1,lasso"]) == 0
    written = json.loads((folder / "comparison.json").read_text())
    assert tabulate.table(written["runs"]) == written["rows"]
    rows = written["rows"]
    assert {r["method"] for r in rows} == {"dense", "l1", "lasso", "from scratch"}
    assert all(r["flops"] <= 0.6 for r in rows if r["method"] != "dense")
    assert all(r["ms"] > 0 and r["speedup"] > 0 for r in rows)
    times = json.loads((folder / "latencies.json").read_text())
    assert set(times) == {"dense", "l1-0.6-seed0", "lasso-0.6-seed0"}
    assert (folder / "comparison.md").read_text().count("\n|") == 5
    assert (folder / "frontier.png").stat().st_size > 10_000
    one, other = (folder / f"{m}-0.6-seed0" for m in ("l1", "lasso"))
    kept = "checkpoints/train/3/manifest.sha256.json"
    assert (one / kept).read_bytes() == (other / kept).read_bytes()
    # What is there is not run again; one more method is.
    trained = []
    loop = train.loop.train

    def counted(job, *rest):
        trained.append((job.workdir.name, job.stage))
        return loop(job, *rest)

    monkeypatch.setattr(train.stages, "train", counted)
    monkeypatch.setattr(train.cut, "train", counted)
    assert cli.main([*command, "--methods", "l1,lasso,random"]) == 0
    new = [(where, stage) for where, stage in trained if where.startswith("random")]
    assert new == [("random-0.6-seed0", "train"), ("random-0.6-seed0", "retrain")]
    again = json.loads((folder / "latencies.json").read_text())
    assert set(again) == {*times, "random-0.6-seed0"}
    bench = study.bench
    monkeypatch.setattr(study, "bench", lambda *a, **k: pytest.fail("timed again"))
    # In any order, and one of them alone: none is another's, nor trained anew.
    saves = {p: p.stat().st_mtime_ns for p in folder.glob("*/checkpoints/*/*/*.json")}
    assert cli.main([*command, "--methods", "random,l1"]) == 0
    assert cli.main([*command, "--methods", "lasso"]) == 0
    assert saves == {p: p.stat().st_mtime_ns for p in saves}
    rows = json.loads((folder / "comparison.json").read_text())["rows"]
    # What has ended before stands in the table too, of this config alone.
    methods = {"dense", "l1", "lasso", "random", "from scratch"}
    assert {r["method"] for r in rows} == methods
    # Of the other budgets each has one from scratch, and all have the dense network.
    more = [*command[:-1], "0.7", "--methods", "random"]
    monkeypatch.setattr(study, "bench", bench)
    assert cli.main(more) == 0
    assert json.loads((folder / "random-0.7-seed0" / "config.json").read_text())[
        "scratch"
    ]
    store = checkpoint.open_store(folder / "random-0.7-seed0" / "checkpoints" / "train")
    assert (store.directory / "3" / "manifest.sha256.json").read_bytes() == (
        one / kept
    ).read_bytes()
    # Another config is refused before any of the runs goes on.
    trained.clear()
    changed = [*command, "--methods", "fisher,lasso", "--set", "retrain.lr=0.5"]
    assert cli.main(changed) == 2
    assert not trained and not (folder / "fisher-0.6-seed0").exists()
    (folder / "latencies.json").write_text('{"dense": "fast"}')
    assert cli.main([*command, "--methods", "l1"]) == 2
    rows = (folder / "random-0.6-seed0" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(r)["stage"] for r in rows].count("train") >= 1
    # What was trained on other images of that name and number is not taken for its own.
    other = Splits(*(tinyrun.split(n, c, 9) for n, c in tinyrun.COUNTS.items()))
    tinyrun.ship(monkeypatch, other)
    capsys.readouterr()
    assert cli.main([*command, "--methods", "activation"]) == 2
    assert "'train' is not what this run began with" in capsys.readouterr().err


def test_bad_requests_are_named(tmp_path, capsys):
    config = tmp_path / "tiny.py"
    config.write_text(
        "import test_study\n\n\ndef get_config():\n    return test_study.CONFIG\n"
    )
    for more, match in (
        (["--methods", "l3"], "no method 'l3'"),
        (["--budgets", "half"], "'half' is no number"),
        (["--budgets", "1.5"], "prune.ratio = 1.5"),
        (["--methods", ","], "at least one method"),
    ):
        command = ["compare", str(config), "--workdir", str(tmp_path / "new"), *more]
        assert cli.main(command) == 2
        assert match in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert dataclasses.asdict(CONFIG)["scratch"]


def test_of_several_processes_one_takes_a_dense_network_over(tmp_path, monkeypatch):
    """The others wait for it: two that copy into one folder would trip each other."""
    first, folder = tmp_path / "first", tmp_path / "second"
    (first / "checkpoints" / "train" / "3").mkdir(parents=True)
    rows = '{"stage": "train"}\n{"stage": "retrain"}\n{"stage": "tr'  # cut off
    (first / "metrics.jsonl").write_text(rows)
    (first / "data.json").write_text('{"train": {"count": 24}}')
    (first / "timings.json").write_text('{"a": 1.5}')
    monkeypatch.setattr(study, "_trained", lambda *_: first)
    waits = []
    monkeypatch.setattr(peers, "barrier", waits.append)
    for index in (1, 0, 0):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        study._take_over(tmp_path, folder, Config(), 24)
        assert folder.exists() == (index == 0)
    assert waits == [f"jaxprune began {folder}"] * 3
    assert (folder / "checkpoints" / "train" / "3").is_dir()
    assert (folder / "metrics.jsonl").read_text() == '{"stage": "train"}\n'
    assert (folder / "data.json").read_text() == '{"train": {"count": 24}}'
    # All methods cut by the same clock.
    assert (folder / "timings.json").read_text() == '{"a": 1.5}'
