# SPDX-License-Identifier: Apache-2.0
"""Whole runs: every stage and file, nothing twice, and each way to choose a keep."""

import ast
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tinyrun
from PIL import Image

import jaxprune as jp
from jaxprune import data, report, trees
from jaxprune import gates as gated_by
from jaxprune.base import ConfigError, DataError
from jaxprune.train import choose, cut, loop, run, sparsify, stages
from jaxprune.train import step as steps
from jaxprune.train.config import (
    Config,
    Data,
    Distill,
    Evaluate,
    Fit,
    Network,
    Prune,
)
from jaxprune.train.progress import Progress

ROOT = Path(jp.__file__).parents[1]
FIT = Fit(epochs=1, batch=4, ema=0.5)
CONFIG = Config(
    name="tiny",
    network=Network("segnet_basic", widths=(8,)),
    data=Data("synthetic", size=(16, 16), stored=(24, 24), counts=(8, 5, 6)),
    train=FIT,
    prune=Prune(ratio=0.4, multiple_of=2, min_channels=2, batches=1, statistics=2),
    retrain=FIT,
    distill=Distill(0.5),
    scratch=True,
    evaluate=Evaluate(every=1, batch=4, repeats=1, samples=3),
)


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """The same programs are compiled again when a run is resumed: keep them."""
    with tinyrun.compilations(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, what `run` returned) of a whole run."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        folder = tmp_path_factory.mktemp("work") / "run"
        yield folder, run(CONFIG, folder)


def read(folder: Path, name: str):
    return json.loads((folder / name).read_text())


def rows(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_all_networks_are_compared(whole):
    folder, evaluation = whole
    assert read(folder, "evaluation.json") == evaluation
    networks = evaluation["networks"]
    assert list(networks) == ["dense", "pruned", "scratch"]
    dense, pruned, scratch = networks.values()
    assert dense["epochs"] == 1 and pruned["epochs"] == scratch["epochs"] == 2
    assert pruned["cost"] == scratch["cost"]
    assert pruned["cost"]["flops"] <= 0.4 * dense["cost"]["flops"]
    for network in networks.values():
        assert set(network["splits"]) == {"val", "test"}
        assert network["latency_ms"]["1"] > 0 and network["latency_ms"]["N"] > 0
        labels = stages.load_split(CONFIG, "test").labels
        counted = np.sum(network["splits"]["test"]["confusion"])
        assert counted == np.sum(labels != 11)


def test_the_report_reads_the_folder(whole):
    folder, _ = whole
    record = report.read(folder)
    assert record.missing == ()
    assert report.write(folder) == folder / "report" / "index.html"
    assert record.samples["images"].shape == (3, 16, 16, 3)
    assert {"truth", "dense", "pruned"} <= set(record.samples)
    groups = record.prune["groups"]
    assert sum(g["after"] for g in groups) < sum(g["before"] for g in groups)
    stages_seen = {(r["stage"], r["split"]) for r in rows(folder)}
    for stage in ("train", "retrain", "scratch"):
        assert {(stage, "train"), (stage, "val")} <= stages_seen
    assert [r["step"] for r in rows(folder) if r["stage"] == "prune"] == [1]


def test_final_loads_by_itself_and_is_what_was_evaluated(whole):
    folder, evaluation = whole
    pruned = jp.load(folder / "final")
    assert pruned.info["size"] == [16, 16]
    assert pruned.info["classes"]["names"] == evaluation["classes"]
    split = stages.load_split(CONFIG, "val")
    logits = pruned.apply(pruned.variables, split.images / np.float32(255), train=False)
    seen, truth = np.argmax(logits, -1), split.labels
    expected = np.zeros((11, 11), int)
    np.add.at(expected, (truth[truth != 11], seen[truth != 11]), 1)
    found = evaluation["networks"]["pruned"]["splits"]["val"]
    np.testing.assert_array_equal(found["confusion"], expected)
    again = stages.evaluate(folder, "val")
    assert again["confusion"] == found["confusion"] and again["miou"] == found["miou"]


def test_a_run_is_measured_on_several_devices_as_on_one(whole):
    folder, evaluation = whole
    lines = "import sys, jaxprune.train as t; print(t.evaluate(sys.argv[1], 'val'))"
    flags = "--xla_force_host_platform_device_count=2"
    done = subprocess.run(
        [sys.executable, "-c", lines, str(folder)],
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = ast.literal_eval(done.stdout)
    assert found["miou"] == evaluation["networks"]["pruned"]["splits"]["val"]["miou"]


def test_a_finished_run_only_shows_its_result(whole, monkeypatch, capsys):
    folder, evaluation = whole
    before = (folder / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(steps, "make_step", None)
    monkeypatch.setattr(choose, "choose", None)
    assert run(CONFIG, folder) == evaluation
    assert (folder / "metrics.jsonl").read_bytes() == before
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "done already" in line] == [
        "train: done already, step 2 of 2",
        "prune: done already, cut 1 of 1",
        "retrain: done already, step 2 of 2",
        "scratch: done already, step 4 of 4",
        "evaluate: done already",
    ]


def test_stages_whose_files_are_gone_run_again(whole):
    folder, evaluation = whole
    kept = (folder / "prune.json").read_text()
    (folder / "prune.json").unlink()
    (folder / "evaluation.json").unlink()
    again = run(CONFIG, folder)
    assert (folder / "prune.json").read_text() == kept
    for name, network in again["networks"].items():
        assert network["splits"] == evaluation["networks"][name]["splits"]
    steps_of = [
        (r["stage"], r["step"], r.get("network"), r["split"]) for r in rows(folder)
    ]
    assert len(set(steps_of)) == len(steps_of)


def test_another_config_is_refused_before_any_work(whole, monkeypatch):
    folder, _ = whole
    monkeypatch.setattr(data, "load", None)
    with pytest.raises(ConfigError, match="retrain.lr .there 0.002, now 0.1."):
        other = dataclasses.replace(FIT, lr=0.1)
        run(dataclasses.replace(CONFIG, retrain=other), folder)


def test_missing_data_leaves_no_folder(tmp_path):
    where = Data("folder", root=str(tmp_path / "none"), size=(16, 16))
    with pytest.raises(DataError, match="none"):
        run(dataclasses.replace(CONFIG, data=where), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_same_data_may_move_and_others_are_refused(tmp_path, monkeypatch):
    def draw(root: Path, seed: int) -> Path:
        rng = np.random.default_rng(seed)
        for name in ("train", "val", "test"):
            for kind, shape in (("images", (16, 16, 3)), ("masks", (16, 16))):
                (root / name / kind).mkdir(parents=True)
                picture = Image.fromarray(rng.integers(0, 3, shape, np.uint8))
                picture.save(root / name / kind / "a.png")
        return root

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(stages, "_stages", lambda *args: {"ran": True})

    def again(root: Path) -> dict:
        where = Data("folder", root=str(root), size=(16, 16))
        return run(dataclasses.replace(CONFIG, data=where), tmp_path / "run")

    assert again(draw(tmp_path / "a", 0)) == {"ran": True}
    assert again((tmp_path / "a").rename(tmp_path / "b")) == {"ran": True}
    with pytest.raises(ConfigError, match="the split 'train' is not what .*data.root"):
        again(draw(tmp_path / "c", 1))


# The prune stage alone, on a network of one group.


def prepared(folder: Path, **fields):
    """(job, graph, dense state) with the given fields of `Prune`."""
    job = tinyrun.job(folder, 1)
    prune = Prune(**{"ratio": 0.5, "multiple_of": 1, "min_channels": 1, **fields})
    job = dataclasses.replace(
        job, stage="retrain", config=dataclasses.replace(job.config, prune=prune)
    )
    variables = tinyrun.variables()
    images = jnp.zeros((1, *tinyrun.SIZE, 3))
    graph = jp.trace(job.apply, variables, images, train=False)
    tx, _ = steps.optimizer(job.fit, job.total)
    return job, graph, steps.init_state(variables, tx)


STEERED = {
    "lasso_epochs": 2.0,
    "strength": 1e3,
    "target": 0.5,
    "cuts_in_training": 1,
    "repriced": True,
}


@pytest.mark.parametrize(
    "fields",
    [
        {"criterion": "magnitude"},
        {"criterion": "taylor", "per_cost": True},
        {"criterion": "bn_scale", "normalize": "none"},
        {"criterion": "fisher"},
        {"criterion": "lamp"},
        {"criterion": "apoz"},
        {"criterion": "reconstruction", "reconstruct": 2},
        {"criterion": "random", "scope": "local"},
        {"method": "layerwise", "reconstruct": 2},
        {"method": "random_masks", "trials": 3},
        {"method": "particles", "trials": 6, "stages": 2},
        {"method": "path", "block": 0.1},
        {"method": "lasso", "lasso_epochs": 1.0, "strength": 30.0},
        {"method": "gates", "lasso_epochs": 1.0, "strength": 30.0},
        {"method": "gates", "lasso_epochs": 1.0, "strength": 0.0},
        {"criterion": "magnitude", "rounds": 2, "recovery_epochs": 1 / 3},
        {**STEERED, "method": "lasso", "metric": "optimizer", "carry_optimizer": True},
        {**STEERED, "method": "gates", "accelerated": True},
        {**STEERED, "method": "lasso", "adaptive": 1.0, "strength": 0.0},
        {**STEERED, "method": "lasso_then_path", "block": 0.1},
        {**STEERED, "method": "gates", "adaptive": 1.0, "strength": 0.0},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_every_method_meets_the_budget_and_resumes(tmp_path, fields):
    job, graph, dense = prepared(tmp_path, batches=2, statistics=2, **fields)
    found = cut.prune_stage(job, graph, dense, Progress(tmp_path))
    kept = {n: int(k.sum()) for n, k in found.keep.items()}
    assert 1 <= kept["first"] <= 3
    kernel = found.variables["params"]["last"]["kernel"]
    assert kernel.shape == (3, 3, kept["first"], 3)
    (row,) = read(tmp_path, "prune.json")["groups"]
    assert (row["before"], row["after"]) == (6, kept["first"])
    path = read(tmp_path, "prune.json")["path"]
    if fields.get("method") in ("path", "lasso_then_path"):
        assert [s["flops"] for s in path] == sorted(s["flops"] for s in path)[::-1]
        assert sum(s["chosen"] for s in path) == 1 and path[0]["miou"] > 0
    else:
        assert path is None
    again = cut.prune_stage(job, graph, dense, Progress(tmp_path))
    chex.assert_trees_all_equal(again.keep, found.keep)
    chex.assert_trees_all_equal(again.variables, found.variables)


@pytest.mark.parametrize("method", ["criterion", "path"])
def test_a_budget_of_milliseconds_is_measured_once(tmp_path, monkeypatch, method):
    """As if a convolution took as long as its kernel is large."""
    batches = []

    def timed(reading, features, kernel, repeats):
        batches.append(features.shape[0])
        return float(np.prod(kernel.shape))

    monkeypatch.setattr(sys.modules["jaxprune.latency"], "_timed", timed)
    job, graph, dense = prepared(tmp_path, method=method, budget="latency", ratio=0.7)
    found = cut.prune_stage(job, graph, dense, Progress(tmp_path))
    assert found.keep["first"].sum() == 4
    assert set(batches) == {job.config.evaluate.batch} and len(batches) == 2
    shutil.rmtree(tmp_path / "checkpoints")  # killed before the cut was saved
    again = cut.prune_stage(job, graph, dense, Progress(tmp_path))
    assert len(batches) == 2 and (tmp_path / "timings.json").exists()
    chex.assert_trees_all_equal(again.keep, found.keep)


ROUNDS = {
    "method": "path",
    "block": 0.1,
    "rounds": 2,
    "recovery_epochs": 1 / 3,
    "batches": 2,
    "statistics": 2,
}


def test_prune_json_tells_of_every_round(tmp_path):
    job, graph, dense = prepared(tmp_path, **ROUNDS)
    cut.prune_stage(job, graph, dense, Progress(tmp_path))
    rows = read(tmp_path, "prune.json")["path"]
    assert [s["round"] for s in rows if s["chosen"]] == [1, 2]
    # A round begins where the one before ended.
    first, second = ([s["flops"] for s in rows if s["round"] == n] for n in (1, 2))
    assert second[0] == first[-1]


@pytest.mark.parametrize("killed", ["_recover", "_write", "restated", "store"])
def test_pruning_killed_anywhere_goes_on_to_the_same(tmp_path, monkeypatch, killed):
    whole, other = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    other.mkdir()
    job, graph, dense = prepared(whole, **ROUNDS)
    expected = cut.prune_stage(job, graph, dense, Progress(whole))
    job, graph, dense = prepared(other, **ROUNDS)
    if killed == "store":  # the last round decided, its checkpoint not yet written
        cut.prune_stage(job, graph, dense, Progress(other))
        shutil.rmtree(other / "checkpoints" / "prune" / "2")
    else:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(cut, killed, mock.Mock(side_effect=KeyboardInterrupt))
            cut.prune_stage(job, graph, dense, Progress(other))
    found = cut.prune_stage(job, graph, dense, Progress(other))
    chex.assert_trees_all_equal(found.keep, expected.keep)
    chex.assert_trees_all_equal(found.variables, expected.variables)
    assert read(other, "prune.json") == read(whole, "prune.json")


FAINT = jnp.array([1, 1, 1e-3, 1, 1e-3, 1e-3])


def test_what_the_lasso_ended_is_zero_in_the_average_too(tmp_path):
    job, graph, dense = prepared(
        tmp_path, method="lasso", lasso_epochs=1.0, strength=3.0
    )
    faint = trees.channel_scale(graph, {"first": FAINT}, dense.average)
    dense = dense._replace(average=faint)
    variables, _ = sparsify.sparsify(job, graph, dense, Progress(tmp_path))
    np.testing.assert_array_equal(jp.dead(graph, variables)["first"], FAINT == 1)
    found = cut.prune_stage(job, graph, dense, Progress(tmp_path))
    np.testing.assert_array_equal(found.keep["first"], FAINT == 1)


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"ratio": 1.0}, [0, 1, 3]),
        ({"ratio": 1.0, "multiple_of": 4}, [0, 1, 2, 3]),
        ({"ratio": 1.0, "min_channels": 5}, [0, 1, 2, 3, 4]),
        ({"ratio": 1.0, "min_channels": 9}, [0, 1, 2, 3, 4, 5]),
        ({"ratio": 0.5, "multiple_of": 2}, None),  # two of those three
    ],
    ids=lambda x: str(x).strip("{}"),
)
@pytest.mark.parametrize("method", ["lasso", "gates"])
def test_zeros_fill_up_the_widths_that_are_wanted(tmp_path, method, fields, kept):
    job, graph, dense = prepared(tmp_path, method=method, **fields)
    alive = {"first": np.asarray(FAINT == 1)}
    variables = trees.mask(graph, alive, dense.average)
    budget = jp.flops(job.config.prune.ratio)
    keep, _ = choose.choose(job, graph, variables, budget, Progress(tmp_path))
    if kept is None:
        assert keep["first"].sum() == 2 and not (keep["first"] & ~alive["first"]).any()
    else:
        np.testing.assert_array_equal(np.flatnonzero(keep["first"]), kept)


def test_gates_are_trained_read_and_folded_into_the_weights(tmp_path, monkeypatch):
    job, graph, dense = prepared(
        tmp_path, method="gates", lasso_epochs=1.0, strength=1.0
    )
    monkeypatch.setattr(gated_by, "init_gates", lambda graph: {"first": FAINT})
    states = []

    def train(*args):
        states.append(loop.train(*args))
        return states[-1]

    monkeypatch.setattr(sparsify, "train", train)
    found = cut.prune_stage(job, graph, dense, Progress(tmp_path))
    np.testing.assert_array_equal(found.keep["first"], FAINT == 1)
    gates = states[0].average["params"]["gates"]["first"]
    assert (gates[2] > 0) and not np.isin(gates[:2], [0, 1]).any()

    variables, _ = sparsify.sparsify(job, graph, dense, Progress(tmp_path))
    kept = {"first": np.where(FAINT == 1, gates, 0)}
    params = {"network": states[0].average["params"]["network"], "gates": kept}
    gated = sparsify._gated(job.apply, graph)
    images = jax.random.uniform(jax.random.key(0), (2, *tinyrun.SIZE, 3))
    small = jp.shrink(graph, found.keep, variables)
    with jax.enable_x64(True):
        trees = ({**states[0].average, "params": params}, small, images)
        dense, small, images = jax.tree.map(lambda x: np.asarray(x, np.float64), trees)
        expected = gated(dense, images)
        slimmed = jp.slim(job.apply, graph, found.keep)(small, images)
    # The folded weights are float32: logits near 0 are of parts that cancel.
    bound = 1e-6 * np.abs(expected).max()
    np.testing.assert_allclose(slimmed, expected, rtol=0, atol=bound)


def test_the_last_rounds_budget_is_of_the_dense_network(tmp_path):
    job, graph, dense = prepared(tmp_path, criterion="magnitude", rounds=3, ratio=0.2)
    found = cut.prune_stage(job, graph, dense, Progress(tmp_path))
    assert jp.cost(graph, found.keep).flops <= 0.2 * jp.cost(graph).flops


def test_statistics_are_those_of_the_cut_network(tmp_path):
    job, graph, dense = prepared(tmp_path, criterion="magnitude", statistics=60)
    found = cut.prune_stage(job, graph, dense, Progress(tmp_path))
    batches = choose.estimates(job, 60)
    apply = jp.slim(job.apply, graph, found.keep)
    images = np.concatenate([b["image"] for b in batches[-20:]]) / np.float32(255)
    kernel = found.variables["params"]["first"]
    mean = (
        jax.lax.conv_general_dilated(
            images,
            kernel["kernel"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        ).mean((0, 1, 2))
        + kernel["bias"]
    )
    assert apply(found.variables, images[:2], train=False).shape == (2, 8, 12, 3)
    # flax's momentum of 0.99 has forgotten half of the initial zeros.
    weight = 1 - 0.99**60
    stats = found.variables["batch_stats"]["norm"]
    np.testing.assert_allclose(stats["mean"], weight * mean, rtol=0.05, atol=0.02)


def test_the_optimiser_is_cut_along(tmp_path):
    job, graph, dense = prepared(
        tmp_path, criterion="magnitude", carry_optimizer=True, statistics=0
    )
    found = cut.prune_stage(job, graph, dense, Progress(tmp_path))
    tx, _ = steps.optimizer(job.fit, job.total)
    fresh = steps.init_state(found.variables, tx, found.carried)
    shapes = jax.tree.map(jnp.shape, tx.init(found.variables["params"]))
    assert jax.tree.map(jnp.shape, fresh.opt_state) == shapes
