# SPDX-License-Identifier: Apache-2.0
"""Runs that cut single weights, and budgets that nothing meets."""

import dataclasses
import sys

import chex
import jax
import numpy as np
import pytest
import toygraphs
from jax.experimental import multihost_utils
from test_run import CONFIG, prepared

import jaxprune as jp
from jaxprune import peers
from jaxprune.base import BudgetError, GraphError
from jaxprune.train import choose, cut, loop, run, stages, study
from jaxprune.train import step as steps
from jaxprune.train.config import Network
from jaxprune.train.progress import Progress

METHODS = ["criterion", "layerwise", "lasso", "lasso_then_path", "gates", "path"]
METHODS += ["random_masks", "particles"]


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_that_cannot_be_met_is_told_before_any_work(method, tmp_path):
    job, graph, _ = prepared(tmp_path, method=method, ratio=0.3, multiple_of=3)
    with pytest.raises(
        BudgetError, match=r"has 0\.5000 of .* flops\(0\.5000\) or more"
    ):
        cut.check_reachable(job.config.prune, graph)


def test_a_path_that_may_end_above_the_budget_is_walked_down_to_it(tmp_path):
    job, graph, _ = prepared(tmp_path, method="path", ratio=0.3, multiple_of=3)
    free = dataclasses.replace(job.config.prune, choose="1se")
    with pytest.raises(BudgetError, match=r"flops\(0\.5000\) or more"):
        cut.check_reachable(free, graph)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"criterion": "bn_scale"}, "bn_scale: no normalisation scale in 'l0'"),
        (
            {"criterion": "bn_scale", "method": "lasso", "adaptive": 1.0},
            "bn_scale: no normalisation",
        ),
        ({"criterion": "activation"}, "activation: nothing reads 'l0'"),
        ({"method": "layerwise", "reconstruct": 1}, "lasso_select: nothing reads 'l0'"),
        (
            {"method": "path", "estimate": "reconstruction"},
            "reconstruction_error: nothing reads 'l0'",
        ),
        ({"method": "path"}, ""),
        ({"criterion": "taylor", "per_cost": True}, ""),
        ({"criterion": "fisher"}, ""),
        ({"method": "gates"}, ""),
    ],
)
def test_a_method_that_cannot_score_a_group_is_told_before_any_work(fields, words):
    """Of a network without norms, whose layers are read in a loop only."""

    def looped(variables, x, train):
        del train
        return jax.lax.map(lambda row: toygraphs.apply(variables, row[None])[0], x)

    variables, x = toygraphs.variables(toygraphs.chain(6, 4)), np.ones((2, 3))
    graph = jp.trace(looped, variables, x, train=False)
    shapes = jax.eval_shape(lambda: variables)
    prune = dataclasses.replace(CONFIG.prune, multiple_of=1, min_channels=1, **fields)
    if not words:
        return choose.check_method(prune, looped, graph, shapes, x)
    with pytest.raises(GraphError, match=words):
        choose.check_method(prune, looped, graph, shapes, x)


def test_lamp_is_not_normalised_again():
    graph = toygraphs.chain(6, 4)
    variables = toygraphs.variables(graph)
    assert CONFIG.prune.normalize == "mean"
    scores = jp.score(
        choose._criterion(CONFIG.prune, "lamp", "flops"), graph, variables
    )
    assert [s.max() for s in scores.values()] == [1.0, 1.0]


def test_a_run_asks_whether_its_method_can_score_the_network(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "train", None)
    network = Network("refinenet", widths=(4,) * 9)
    prune = dataclasses.replace(CONFIG.prune, criterion="bn_scale", ratio=0.9)
    config = dataclasses.replace(CONFIG, network=network, prune=prune)
    with pytest.raises(GraphError, match="bn_scale: no normalisation scale in 'refine"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "fields",
    [
        {"criterion": "magnitude"},
        {"method": "path", "block": 0.1, "batches": 1},
        {"method": "random_masks", "trials": 2},
        {"method": "lasso", "lasso_epochs": 1.0, "strength": 1e3, "target": 0.6},
    ],
    ids=lambda fields: fields.get("method", "criterion"),
)
def test_a_run_keeps_within_its_budget_of_activation_bytes(tmp_path, fields):
    job, graph, dense = prepared(
        tmp_path, budget="bytes", ratio=0.6, statistics=1, **fields
    )
    found = cut.prune_stage(job, graph, dense, Progress(tmp_path))
    kernels = [found.variables["params"][n]["kernel"] for n in ("first", "last")]
    # Both convolutions keep the size of 8x12 and write float32: 6 + 3 channels when
    # dense, so that 2 + 3 may stay. Of FLOPs it would be 3.
    written = sum(4 * 8 * 12 * kernel.shape[-1] for kernel in kernels)
    assert written == 4 * 8 * 12 * (2 + 3) <= 0.6 * 4 * 8 * 12 * (6 + 3)
    assert jp.cost(graph, found.keep).activation_bytes == written


@pytest.mark.parametrize("method", ["lasso", "lasso_then_path", "gates"])
def test_a_target_out_of_reach_is_told_before_any_work(method, tmp_path):
    job, graph, _ = prepared(tmp_path, method=method, target=0.1)
    with pytest.raises(
        BudgetError, match=r"target=0\.1: .* 0\.1667 of the dense flops"
    ):
        cut.check_reachable(job.config.prune, graph)


def test_zeros_out_of_reach_are_told_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    prune = dataclasses.replace(
        CONFIG.prune, method="weights", budget="params", ratio=1e-6
    )
    config = dataclasses.replace(CONFIG, prune=prune, scratch=False)
    with pytest.raises(BudgetError, match=r"what is no kernel's weight has 0\.\d+ of"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_milliseconds_out_of_reach_are_told_before_any_training(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys.modules["jaxprune.latency"], "_timed", lambda *_: 1.0)
    monkeypatch.setattr(stages, "train", lambda *_: pytest.fail("trained"))
    prune = dataclasses.replace(CONFIG.prune, budget="latency", ratio=1e-3)
    with pytest.raises(BudgetError, match=r"cannot be met: what must stay has 0\.\d+"):
        run(dataclasses.replace(CONFIG, prune=prune), tmp_path / "run")


def test_all_processes_cut_by_the_milliseconds_of_the_first(tmp_path, monkeypatch):
    clock = iter(range(1, 100))
    monkeypatch.setattr(
        sys.modules["jaxprune.latency"], "_timed", lambda *_: float(next(clock))
    )
    job, graph, dense = prepared(tmp_path)
    found = []

    def here(index: int, count: int) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(jax, "process_index", lambda: index)
            patch.setattr(jax, "process_count", lambda: count)
            found.append(choose.kind_of(job, graph, dense.average, "latency"))

    # The second waits until the first has measured, however long that takes.
    def first(name: str) -> None:
        assert peers.limit() > 1e5
        here(0, 1)

    monkeypatch.setattr(multihost_utils, "sync_global_devices", first)
    here(1, 2)
    first, second = ([p.ms for p in f.products] for f in found)
    chex.assert_trees_all_equal(second, first)
    assert next(clock) == 1 + sum(map(np.size, first))


def test_a_run_that_cannot_be_small_enough_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    prune = dataclasses.replace(CONFIG.prune, ratio=0.01)
    with pytest.raises(BudgetError, match="cannot be met: what must stay has"):
        run(dataclasses.replace(CONFIG, prune=prune), tmp_path / "run")
    with pytest.raises(BudgetError, match=r"flops\(0.01\) cannot be met"):
        study.study(CONFIG, tmp_path / "study", ["l1", "path"], [0.5, 0.01])
    assert not (tmp_path / "run").exists() and not (tmp_path / "study").exists()


def test_single_weights_are_held_in_retraining_and_counted(tmp_path, monkeypatch):
    """The stages of a run that cuts weights, no training and no evaluation."""
    around, seen = {}, {}

    def train(job, variables, progress):
        around[job.stage] = job.around
        return steps.State(0, variables, variables, None)

    def prune_stage(job, graph, dense, progress):
        odd = jax.tree.map(
            lambda x: x * (np.arange(x.size) % 2).reshape(x.shape), dense.average
        )
        return cut.Cut(graph.full(), odd)

    monkeypatch.setattr(stages, "train", train)
    monkeypatch.setattr(cut, "prune_stage", prune_stage)
    monkeypatch.setattr(
        stages.compare, "evaluate_stage", lambda job, networks, _: seen.update(networks)
    )
    monkeypatch.setattr(stages, "save_network", lambda *args, **more: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    prune = dataclasses.replace(CONFIG.prune, method="weights")
    run(dataclasses.replace(CONFIG, prune=prune, scratch=False), tmp_path / "run")
    assert around["train"] is None and around["retrain"] is not None
    dense, pruned = seen["dense"], seen["pruned"]
    assert dense.nonzero is None and pruned.cost == dense.cost
    # Of the dense kernels, as many weights of each lie at even places as at odd ones.
    assert pruned.nonzero.flops == dense.cost.flops // 2


def test_single_weights_stay_cut_through_rounds_and_resumes(tmp_path, monkeypatch):
    rounds = {"rounds": 2, "recovery_epochs": 2 / 3, "batches": 2, "statistics": 2}
    job, graph, dense = prepared(tmp_path, method="weights", ratio=0.4, **rounds)
    seen = []

    def train(job, variables, progress):
        state = loop.train(job, variables, progress)
        seen.extend([variables, state.variables, state.average])
        return state

    monkeypatch.setattr(cut, "train", train)
    found = cut.prune_stage(job, graph, dense, Progress(tmp_path))
    assert all(k.all() for k in found.keep.values())
    kernels = [
        np.concatenate([np.ravel(v["params"][n]["kernel"]) for n in ("first", "last")])
        for v in (*seen, found.variables)
    ]
    assert (kernels[0] != kernels[1]).any()
    before, *trained, after = (k == 0 for k in kernels)
    for zeros in trained:
        np.testing.assert_array_equal(zeros, before)
    assert after[before].all()
    # Each weight is used as often as any other: both kernels at every pixel.
    for zeros, share in ((before, 0.4**0.5), (after, 0.4)):
        assert share - 1 / 324 < 1 - zeros.mean() <= share
    left = cut.nonzero(job, found.variables)
    assert left.flops == 2 * 8 * 12 * (324 - after.sum())
    assert left.params == 324 + 6 + 3 + 12 - after.sum()
    again = cut.prune_stage(job, graph, dense, Progress(tmp_path))
    chex.assert_trees_all_equal(again.variables, found.variables)
