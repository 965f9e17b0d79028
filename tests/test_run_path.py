# SPDX-License-Identifier: Apache-2.0
"""A run's walk: kept, resumed in the middle, and cut out at any of its points."""

import dataclasses
import json
import shutil
import typing

import chex
import jax
import numpy as np
import pytest
import tinyrun

import jaxprune as jp
from jaxprune import checkpoint, cli, graph_io, path_io
from jaxprune.base import BudgetError, CheckpointError, ConfigError
from jaxprune.train import choose, cut, cutout, loop, points, run, stages
from jaxprune.train.config import Config, Data, Fit, Network, Prune, to_json
from jaxprune.train.folder import write_text
from jaxprune.train.metrics import measures
from jaxprune.train.progress import Progress

PRUNE = Prune(
    method="path",
    ratio=0.3,
    block=0.1,
    multiple_of=1,
    min_channels=1,
    batches=1,
    statistics=2,
)
CONFIG = Config(
    name="tiny",
    network=Network("segnet_basic", widths=(4,)),
    data=Data("synthetic", size=(16, 16), counts=(8, 1, 2)),
    train=Fit(batch=4),
    retrain=Fit(batch=4),
    prune=PRUNE,
)


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """The same programs are compiled again when a walk is resumed: keep them."""
    with tinyrun.compilations(tmp_path_factory.mktemp("compiled")):
        yield


def prepared(folder, **fields):
    """(job, graph, dense state) of the prune stage alone."""
    job = tinyrun.job(folder, 1)
    prune = dataclasses.replace(PRUNE, **fields)
    config = dataclasses.replace(job.config, prune=prune)
    job = dataclasses.replace(job, stage="retrain", config=config)
    variables = tinyrun.variables()
    images = jax.ShapeDtypeStruct((1, *tinyrun.SIZE, 3), np.float32)
    graph = jp.trace(job.apply, variables, images, train=False)
    tx, _ = cut.steps.optimizer(job.fit, job.total)
    return job, graph, cut.steps.init_state(variables, tx)


@pytest.mark.parametrize("estimate", ["measured", "reconstruction"])
def test_a_walk_killed_in_the_middle_goes_on_to_the_same(
    tmp_path, monkeypatch, capsys, estimate
):
    expected, found = {}, {}
    for name, killed in (("whole", False), ("killed", True)):
        (tmp_path / name).mkdir()
        job, graph, dense = prepared(tmp_path / name, estimate=estimate)
        progress = Progress(tmp_path / name)
        if killed:
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(points, "miou", kill_at(3))
                cut.prune_stage(job, graph, dense, progress)
            assert len(points.load(tmp_path / name)[1].steps) == 3
            capsys.readouterr()
        expected, found = found, cut.prune_stage(job, graph, dense, progress)
    said = capsys.readouterr().out
    assert "going on behind 3 steps" in said
    read = [(tmp_path / n / "prune.json").read_text() for n in ("whole", "killed")]
    assert read[0] == read[1]
    chex.assert_trees_all_equal(found.keep, expected.keep)
    chex.assert_trees_all_equal(found.variables, expected.variables)
    rows = json.loads(read[0])["path"]
    assert said.count("of the FLOPs, risk") == len(rows) - 3 > 0
    assert {r for row in rows for r in row["rules"]} == {"min", "1se", "knee"}


def kill_at(count):
    """`points.miou`, which is called behind each step, until so many are walked."""
    calls, miou = [], points.miou

    def until(step):
        calls.append(step)
        if len(calls) == count:
            raise KeyboardInterrupt
        return miou(step)

    return until


def test_the_walk_counts_as_the_evaluation_does(tmp_path):
    """The confusion that comes with the risk, against images one by one."""
    job, graph, dense = prepared(tmp_path)
    cut.prune_stage(job, graph, dense, Progress(tmp_path))
    step = points.load(tmp_path)[1].steps[0]
    split, total = job.splits.val, np.zeros((3, 3), int)
    rngs = {"dropout": jax.random.key(job.config.seed)}
    images = split.images / np.float32(255)
    # 5 images in a batch of 8: the last are the first ones again, and do not count.
    images = np.concatenate([images, images[:3]])
    logits, _ = job.apply(
        dense.average, images, train=True, mutable=["batch_stats"], rngs=rngs
    )
    seen, truth = np.argmax(logits[:5], -1), split.labels
    np.add.at(total, (truth[truth != 255], seen[truth != 255]), 1)
    np.testing.assert_array_equal(step.sums["confusion"], total)
    assert step.counted == 5
    assert points.miou(step) == measures(total)["miou"]


def test_copies_beside_a_walk_are_no_rounds(tmp_path):
    path_io.write(points.file(tmp_path, 2), ())
    for name in ("2 copy", "2-old", "x"):
        path_io.write(tmp_path / "path" / f"{name}.jsonl", ())
    assert points.load(tmp_path)[0] == 2


def test_a_split_of_another_name_is_refused():
    with pytest.raises(ConfigError, match="'tset': must be one of train, val, test"):
        stages.load_split(CONFIG, "tset")


def test_every_estimate_of_a_config_is_known():
    hints = typing.get_type_hints(Prune)
    assert set(typing.get_args(hints["estimate"])) == set(choose._ESTIMATES)
    rules = typing.get_args(hints["choose"])
    assert set(rules) == {"budget", *points.RULES}


WALKED = [
    {"method": "path"},
    {
        "method": "lasso_then_path",
        "lasso_epochs": 2.0,
        "target": 0.8,
        "strength": 0.0,
        "adaptive": 1.0,
        "cuts_in_training": 1,
    },
]


@pytest.fixture(scope="module", params=WALKED, ids=lambda how: how["method"])
def pruned_run(request, tmp_path_factory):
    """(folder, graph) of a run of two rounds whose prune stage has ended."""
    folder = tmp_path_factory.mktemp("work")
    how = {**request.param, "rounds": 2, "recovery_epochs": 1 / 3}
    job, graph, dense = prepared(folder, **how)
    progress = Progress(folder)
    trained = dataclasses.replace(job, stage="train")
    dense = loop.train(trained, dense.average, progress)
    cut.prune_stage(job, graph, dense, progress)
    write_text(folder / "config.json", to_json(job.config))
    write_text(folder / "graph.json", graph.to_json())
    return folder, graph


@pytest.fixture
def tiny(monkeypatch, pruned_run):
    tinyrun.ship(monkeypatch, tinyrun.job(pruned_run[0]).splits)


@pytest.mark.parametrize("number", [1, 2])
def test_a_point_is_cut_out_as_the_prune_stage_does(
    pruned_run, tiny, tmp_path, capsys, number
):
    folder, _ = pruned_run
    rows = json.loads((folder / "prune.json").read_text())["path"]
    mine = [row for row in rows if row["round"] == number]
    place = next(i for i, row in enumerate(mine) if row["chosen"])
    out = tmp_path / "point"
    arguments = [str(folder), "--round", str(number)]
    code = cli.main(["path", *arguments, "--at", f"step={place}", "--out", str(out)])
    assert code == 0
    said = capsys.readouterr().out
    assert f"round {number} of 2: {len(mine)} steps, not retrained" in said
    assert "chosen" in said and f"step {place}, not retrained: {out}" in said
    point = jp.load(out, apply=tinyrun.Net().apply)
    info = point.info["point"]
    assert (info["round"], info["step"], info["retrained"]) == (number, place, False)
    store = checkpoint.open_store(folder / "checkpoints" / "prune")
    tree, meta = store.restore(number, {"variables": point.variables})
    assert graph_io.keep_to_text(point.keep) == meta["keep"]
    chex.assert_trees_all_equal(point.variables, tree["variables"])
    with pytest.raises(CheckpointError, match="exists; choose another"):
        cutout.cut_out(folder, place, out)


@pytest.mark.parametrize("epochs", [1.0, 0.0])
def test_a_point_behind_a_round_that_no_training_followed(
    tmp_path, monkeypatch, epochs
):
    """prune.recovery_epochs = 0, the default: what was cut is what is walked on."""
    folder = tmp_path / "work"
    job, graph, dense = prepared(folder, rounds=2, recovery_epochs=0.0)
    tinyrun.ship(monkeypatch, job.splits)
    fit = dataclasses.replace(job.config.train, epochs=epochs, warmup=0.0)
    job = dataclasses.replace(job, config=dataclasses.replace(job.config, train=fit))
    trained = dataclasses.replace(job, stage="train", fit=fit)
    dense = loop.train(trained, dense.average, Progress(folder))
    found = cut.prune_stage(job, graph, dense, Progress(folder))
    write_text(folder / "config.json", to_json(job.config))
    write_text(folder / "graph.json", graph.to_json())
    rows = json.loads((folder / "prune.json").read_text())["path"]
    mine = [row for row in rows if row["round"] == 2]
    place = next(i for i, row in enumerate(mine) if row["chosen"])
    cutout.cut_out(folder, place, tmp_path / "point")
    point = jp.load(tmp_path / "point", apply=tinyrun.Net().apply)
    chex.assert_trees_all_equal(point.keep, found.keep)
    chex.assert_trees_all_equal(point.variables, found.variables)


def test_a_path_of_other_weights_is_not_cut_out(pruned_run, tiny, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(pruned_run[0], folder)
    file = points.file(folder, 1)
    kept = path_io.read(file)
    path_io.write(file, kept.steps, {**kept.walk, "variables": 1})
    with pytest.raises(CheckpointError, match="walked from other weights than the che"):
        cutout.cut_out(folder, 1, tmp_path / "out", 1)
    assert not (tmp_path / "out").exists()


def test_points_are_found_by_rules_and_budgets(pruned_run):
    folder, graph = pruned_run
    dense = jp.cost(graph).flops
    for number in (1, 2):
        _, walked = points.load(folder, number)
        for ratio in (0.9, 0.6, 0.35):
            risks = {
                i: s.risk
                for i, s in enumerate(walked.steps)
                if s.cost.flops <= ratio * dense
            }
            if risks:
                found = cutout.find(walked, jp.flops(ratio), graph, "flops")
                assert risks[found] == min(risks.values())
        least = np.ceil(1e4 * walked.steps[-1].cost.flops / dense) / 1e4
        with pytest.raises(BudgetError, match=rf"flops\(0\.01\).* has {least:.4f}"):
            cutout.find(walked, jp.flops(0.01), graph, "flops")
        for rule in points.RULES:
            found = cutout.find(walked, rule, graph, "flops")
            assert walked.steps[found] is walked.select(rule)
        with pytest.raises(ConfigError, match=f"steps 0 to {len(walked.steps) - 1}"):
            cutout.find(walked, 99, graph, "flops")


def test_a_path_that_is_still_walked_is_shown(tmp_path, monkeypatch, capsys):
    job, graph, dense = prepared(tmp_path)
    write_text(tmp_path / "config.json", to_json(job.config))
    write_text(tmp_path / "graph.json", graph.to_json())
    assert cli.main(["path", str(tmp_path)]) == 2
    assert "holds no pruning path; runs with prune.method=" in capsys.readouterr().err
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(points, "miou", kill_at(3))
        cut.prune_stage(job, graph, dense, Progress(tmp_path))
    capsys.readouterr()
    assert cli.main(["path", str(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "3 steps, not retrained; the prune stage has not ended" in said[0]
    assert len(said) == 5 and "100.0%" in said[2]
    for arguments, words in (
        (["--at", "1se"], "--at POINT and --out FOLDER go together"),
        (["--at", "step=x", "--out", "o"], "write step=7"),
        (["--at", "best", "--out", "o"], "a point is step=7"),
        (["--round", "2"], "no pruning path of round 2, there are 1"),
    ):
        assert cli.main(["path", str(tmp_path), *arguments]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"prune": dataclasses.replace(PRUNE, ratio=0.01)},
            BudgetError,
            "flops.0.01. cannot be met",
        ),
        (
            {"prune": dataclasses.replace(PRUNE, choose="1se")},
            ConfigError,
            "prune.choose = '1se'.* 1 counted.*min, knee or budget",
        ),
    ],
)
def test_what_no_walk_can_choose_is_refused_before_training(
    tmp_path, monkeypatch, change, error, words
):
    monkeypatch.setattr(stages, "train", None)
    with pytest.raises(error, match=words):
        run(dataclasses.replace(CONFIG, **change), tmp_path / "run")
