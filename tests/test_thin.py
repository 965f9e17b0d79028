# SPDX-License-Identifier: Apache-2.0
"""A whole run by low rank: the budget, the files, resuming, the saved network."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tinyrun

import jaxprune as jp
from jaxprune import models, report
from jaxprune.base import BudgetError, ConfigError
from jaxprune.train import config as configs
from jaxprune.train import run, stages, study
from jaxprune.train.config import Config, Data, Evaluate, Fit, Network, Prune

FIT = Fit(epochs=1, batch=4, ema=0.5)
CONFIG = Config(
    name="thin",
    network=Network("segnet_basic", widths=(8,)),
    data=Data("synthetic", size=(16, 16), counts=(4, 4, 4)),
    train=dataclasses.replace(FIT, epochs=0),
    prune=Prune(method="asymmetric", ratio=0.4, multiple_of=1, batches=1, statistics=1),
    retrain=FIT,
    evaluate=Evaluate(every=1, batch=4, repeats=0, samples=1),
)


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """The same programs are compiled again and again: keep them."""
    with tinyrun.compilations(tmp_path_factory.mktemp("compiled")):
        yield


def test_a_run_meets_the_budget_and_is_resumed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "run"
    evaluation = run(CONFIG, folder)
    dense, pruned = (evaluation["networks"][n] for n in ("dense", "pruned"))
    assert 0.37 < pruned["cost"]["flops"] / dense["cost"]["flops"] <= 0.4
    assert pruned["epochs"] == 1
    # From the folder alone, what was evaluated.
    loaded = jp.load(folder / "final")
    assert loaded.info["network"]["name"] == "segnet_basic"
    assert int(jp.cost(loaded.graph, loaded.keep).flops) == pruned["cost"]["flops"]
    again = stages.evaluate(folder, "val")
    assert again["confusion"] == pruned["splits"]["val"]["confusion"]
    document = json.loads((folder / "prune.json").read_text())
    kernels = {g["name"]: g for g in document["groups"]}
    assert all(g["after"] < g["before"] for g in kernels.values())
    relu = {n for n, g in kernels.items() if g["relu"]}
    assert relu == {n for n in kernels if "encoder" in n}  # decoders have none
    assert "ranks stay" in report.write(folder).read_text()
    capsys.readouterr()
    assert run(CONFIG, folder) == evaluation
    said = capsys.readouterr().out
    for stage in ("prune", "retrain", "evaluate"):
        assert f"{stage}: done already" in said


def test_what_low_rank_does_not_do_is_refused():
    def check(**fields):
        prune = dataclasses.replace(CONFIG.prune, **fields)
        configs.check(dataclasses.replace(CONFIG, prune=prune))

    check()
    for fields, match in (
        ({"budget": "bytes"}, "prune.budget = 'bytes': must be flops or params"),
        ({"rounds": 2}, "prune.rounds = 2: must be 1 where the method is 'asymm"),
        ({"reconstruct": 1}, "prune.reconstruct"),
        ({"carry_optimizer": True}, "prune.carry_optimizer"),
    ):
        with pytest.raises(ConfigError, match=match):
            check(**fields)
    with pytest.raises(ConfigError, match="scratch"):
        configs.check(dataclasses.replace(CONFIG, scratch=True))


@pytest.mark.parametrize("method", ["svd", "predicted", "asymmetric3d"])
def test_ranks_out_of_reach_are_told_before_any_work(tmp_path, monkeypatch, method):
    """With the same least that `factorize` tells."""
    prune = dataclasses.replace(CONFIG.prune, method=method, ratio=0.01)
    config = dataclasses.replace(CONFIG, prune=prune)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(BudgetError, match=f"out of reach of '{method}'") as early:
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    least = float(str(early.value).split()[-1])
    net = models.build("segnet_basic", stages.network_args(config, 11))
    images = np.zeros((1, 16, 16, 3), np.float32)
    variables = models.init(net, jax.random.key(0), (16, 16))
    graph = jp.trace(net.apply, variables, images, train=False)
    more = {"method": method, "batches": [images], "train": False}
    found = jp.factorize(
        net.apply, graph, variables, images, budget=jp.flops(least), **more
    )
    assert min(c.rank for c in found.chains.values()) == 1
    with pytest.raises(BudgetError, match=f"leave {least:.4f}"):
        jp.factorize(
            net.apply, graph, variables, images, budget=jp.flops(least - 1e-4), **more
        )


def test_a_comparison_trains_it_as_long_as_the_others():
    prune = Prune(rounds=3, recovery_epochs=2.0, reconstruct=4)
    base = dataclasses.replace(CONFIG, prune=prune, scratch=True)
    plans = [
        configs.check(study.planned(base, m, 0.4, 0, ["svd"])) for m in ("svd", "l1")
    ]
    assert plans[0].prune.method == "svd" and not plans[0].scratch
    np.testing.assert_equal(*map(stages.pruned_epochs, plans))
