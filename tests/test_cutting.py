# SPDX-License-Identifier: Apache-2.0
"""Channels that die in training are cut on the way: the same trajectory, resumable."""

import dataclasses
import json
import os
import signal
import sys
from pathlib import Path
from unittest import mock

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tinyrun
import toygraphs

import jaxprune as jp
from jaxprune import pricing, sparsity
from jaxprune.base import CheckpointError
from jaxprune.train import choose, loop, penalty, sparsify
from jaxprune.train import step as steps
from jaxprune.train.config import Prune
from jaxprune.train.progress import Progress

GRAPH = toygraphs.chain(8, 6)
KEEP = {"l0": np.arange(8) % 3 != 1, "l1": np.arange(6) != 2}
INPUTS = jax.random.normal(jax.random.key(0), (16, 3))


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """The same programs are compiled again when a run is resumed: keep them."""
    with tinyrun.compilations(tmp_path_factory.mktemp("compiled")):
        yield


def optimiser(name, graph, keep):
    """One whose steps are elementwise, behind it a penalty of the dense network's."""
    steer = jp.steer(GRAPH, 0.3, rate=0.02, start=0.05)
    fixed = {n: w[keep[n]] for n, w in jp.flops_weights(GRAPH).items()}
    if name == "adam":
        return optax.chain(optax.adam(0.02), jp.proximal(graph, 1e-3, fixed))
    return jp.preconditioned(
        optax.adam(0.02), graph, steer, jp.repriced(GRAPH), steps=jp.adam_steps()
    )


def trained(tx, apply, state, count):
    """The state after so many steps of a regression, its average going along."""

    def loss(variables):
        return jnp.mean((apply(variables, INPUTS) - INPUTS[:, :2]) ** 2)

    @jax.jit
    def step(state):
        variables, opt_state = state.variables, state.opt_state
        updates, opt_state = tx.update(jax.grad(loss)(variables), opt_state, variables)
        variables = optax.apply_updates(variables, updates)
        average = optax.incremental_update(variables, state.average, 0.1)
        return steps.State(state.step + 1, variables, average, opt_state)

    for _ in range(count):
        state = step(state)
    return jax.tree.map(np.asarray, state)


def begun(tx, variables):
    variables = jax.tree.map(jnp.asarray, variables)
    return steps.State(jnp.int32(0), variables, variables, tx.init(variables))


@pytest.mark.parametrize("name", ["adam", "metric"])
def test_training_goes_on_as_it_would_with_all_masked(name):
    """Law 4, in the middle of a training under a penalty, its controller and all."""
    dense = optimiser(name, GRAPH, GRAPH.full())
    start = begun(dense, toygraphs.variables(GRAPH))
    state = trained(dense, toygraphs.apply, start, 5)
    masked = steps.State(state.step, *jp.mask(GRAPH, KEEP, tuple(state[1:])))
    wanted = trained(dense, toygraphs.apply, masked, 10)

    smaller = jp.shrink_graph(GRAPH, KEEP)
    small = sparsify.cut_state(GRAPH, KEEP, state)
    found = trained(optimiser(name, smaller, KEEP), toygraphs.apply, small, 10)
    chex.assert_trees_all_close(
        found,
        steps.State(wanted.step, *jp.shrink(GRAPH, KEEP, tuple(wanted[1:]))),
        rtol=1e-4,
        atol=1e-5,
    )
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), found[1], small[1])
    assert min(jax.tree.leaves(moved)) > 1e-3


@pytest.mark.parametrize("accelerated", [False, True])
def test_gates_are_cut_along(accelerated):
    """Of gates that are 0 nothing is left, wherever the optimiser keeps them."""

    def of(graph):
        if accelerated:
            own = optax.chain(
                optax.scale_by_learning_rate(0.05), jp.accelerated_gates(1e-3)
            )
            return penalty.apart(optax.sgd(0.02), own)
        last = jp.proximal_gates(1e-3, key="gates")
        return optax.chain(optax.adam(0.02), last)

    def function(graph):
        def run(variables, x):
            return toygraphs.apply(sparsify._folded(graph, variables), x)

        return run

    gates = {n: jnp.asarray(k, jnp.float32) for n, k in KEEP.items()}
    variables = toygraphs.variables(GRAPH)["params"]
    tree = {"params": {"network": variables, "gates": gates}}

    def params(tx):
        def init(tree):
            return tx.init(tree["params"])

        def update(updates, state, tree):
            new, state = tx.update(updates["params"], state, tree["params"])
            return {"params": new}, state

        return optax.GradientTransformation(init, update)

    # In float64: these gates grow until a rounding of float32 shows after six steps.
    with jax.enable_x64(True):
        tree = jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
        tx = params(of(GRAPH))
        state = begun(tx, tree)
        keep = sparsify.alive(GRAPH, state.variables, ("out", "in"))
        chex.assert_trees_all_equal(keep, KEEP)
        wanted = trained(tx, function(GRAPH), state, 6)
        small = sparsify.cut_state(GRAPH, KEEP, jax.tree.map(np.asarray, state))
        smaller = jp.shrink_graph(GRAPH, KEEP)
        found = trained(params(of(smaller)), function(smaller), small, 6)
        wanted = sparsify.cut_state(GRAPH, KEEP, wanted)
    chex.assert_trees_all_close(found, wanted, rtol=1e-9, atol=1e-12)


# In the pipeline, on a network of one group.


def prepared(folder: Path, optimizer: str = "sgd", **fields):
    """(job, graph, dense state): three epochs under the penalty, its cuts at two."""
    folder.mkdir(exist_ok=True)
    job = tinyrun.job(folder, 1)
    prune = Prune(
        **{
            "method": "lasso",
            "lasso_epochs": 3.0,
            "multiple_of": 1,
            "min_channels": 1,
            **fields,
        }
    )
    fit = dataclasses.replace(job.fit, optimizer=optimizer, momentum=0.0)
    config = dataclasses.replace(job.config, prune=prune, train=fit)
    job = dataclasses.replace(job, stage="retrain", config=config, fit=fit)
    variables = tinyrun.variables()
    images = jnp.zeros((1, *tinyrun.SIZE, 3))
    graph = jp.trace(job.apply, variables, images, train=False)
    faint = jnp.array([1, 1, 1e-3, 1, 0.3, 0.3])
    variables = jp.trees.channel_scale(graph, {"first": faint}, variables)
    tx, _ = steps.optimizer(job.fit, job.total)
    return job, graph, steps.init_state(variables, tx)


def rows(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k not in tinyrun.TIMED}
        for line in lines
    ]


STRENGTH = {"strength": 20.0, "weights": "size"}


def sparsified(folder: Path, **fields):
    job, graph, dense = prepared(folder, **fields)
    return graph, sparsify.sparsify(job, graph, dense, Progress(folder))[0]


def test_what_is_cut_on_the_way_changes_nothing(tmp_path, monkeypatch, capsys):
    """Behind plain gradients: they leave at 0 what is there, so that cutting is all."""
    _, uncut = sparsified(tmp_path / "uncut", **STRENGTH)
    made = []
    make_step = steps.make_step
    monkeypatch.setattr(
        steps, "make_step", lambda *a, **k: made.append(a) or make_step(*a, **k)
    )
    graph, cut = sparsified(tmp_path / "cut", cuts_in_training=2, **STRENGTH)
    assert len(made) == 3
    keep = jp.dead(graph, cut)["first"]
    assert keep.sum() < 6
    chex.assert_trees_all_close(cut, uncut, rtol=2e-4, atol=1e-5)
    found = rows(tmp_path / "cut")
    assert [(r["stage"], r["step"]) for r in found if r["split"] == "train"] == [
        ("lasso", 3),
        ("lasso1", 6),
        ("lasso2", 9),
    ]
    for a, b in zip(found, rows(tmp_path / "uncut"), strict=True):
        if "loss" in a:
            np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-4)
            assert a["lr"] == b["lr"] and a["epoch"] == b["epoch"]
    assert "lasso: cut to" in capsys.readouterr().out


FORMS = {
    "lasso": {"optimizer": "adam", "metric": "optimizer", "repriced": True},
    "gates": {
        "method": "gates",
        "accelerated": True,
        "gates_lr": 0.02,
        "lasso_epochs": 3.0,
    },
    "gates behind adam": {
        "method": "gates",
        "optimizer": "adam",
        "metric": "optimizer",
    },
    "filters": {"roles": "out"},
    "readers": {"roles": "in"},
    "adaptive": {"adaptive": 1.0, "batches": 1},
    "adaptive gates": {
        "method": "gates",
        "adaptive": 0.5,
        "repriced": True,
        "batches": 1,
    },
}
STEERED = {
    "target": 0.5,
    "strength": 1e3,
    "lasso_epochs": 2.0,
    "cuts_in_training": 1,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """{form: (folder, result)} of trainings that nothing disturbed."""
    found = {}
    for name, fields in FORMS.items():
        folder = tmp_path_factory.mktemp(name)
        found[name] = folder, sparsified(folder, **{**STEERED, **fields})[1]
    return found


@pytest.mark.parametrize(
    ("form", "killed"),
    [
        ("lasso", 4),
        ("lasso", "cut"),
        ("lasso", "begin"),
        ("gates", 10),
        ("gates behind adam", 4),
        ("adaptive", "begin"),
        ("adaptive gates", 7),
    ],
)
def test_killed_anywhere_it_goes_on_to_the_same(
    whole, tmp_path, monkeypatch, form, killed
):
    fields = {**STEERED, **FORMS[form]}
    with monkeypatch.context() as patch:
        if killed == "cut":
            broken = mock.Mock(side_effect=KeyboardInterrupt)
            patch.setattr(sparsify, "cut_state", broken)
        elif killed == "begin":  # cut, but nothing of what follows is saved
            run = loop._run
            patch.setattr(
                loop,
                "_run",
                lambda job, *a: (
                    run(job, *a)
                    if not job.stage.endswith("1")
                    else mock.Mock(side_effect=KeyboardInterrupt)()
                ),
            )
        else:
            put, seen = steps.put_batch, []

            def put_batch(mesh, batch):
                if len(batch["image"]) == 8:
                    seen.append(1)
                    # The fourth is of the validation behind the last step of a part.
                    if len(seen) == killed:
                        os.kill(os.getpid(), signal.SIGTERM)
                return put(mesh, batch)

            patch.setattr(steps, "put_batch", put_batch)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            sparsified(tmp_path, **fields)
    _, found = sparsified(tmp_path, **fields)
    folder, wanted = whole[form]
    chex.assert_trees_all_equal(found, wanted)
    assert rows(tmp_path) == rows(folder)


def test_the_target_is_met_in_a_run(whole):
    graph = prepared(whole["lasso"][0])[1]
    for _, variables in whole.values():
        keep = jp.dead(graph, variables)
        assert keep["first"].sum() == 3


@pytest.mark.parametrize("form", ["filters", "readers"])
def test_a_role_outside_the_penalty_is_trained_and_not_shrunk(whole, form, tmp_path):
    """What lives has the weights of that role as long as without any penalty."""
    role = {"filters": "in", "readers": "out"}[form]
    keep = jp.dead(prepared(whole[form][0])[1], whole[form][1])
    free = sparsified(tmp_path, **{**STEERED, "target": 0.0, "strength": 0.0})
    norms = [
        np.sqrt(sparsity.channel_squares(free[0], tree, (role,))["first"])[
            keep["first"]
        ]
        for tree in (whole[form][1], free[1])
    ]
    np.testing.assert_allclose(*norms, rtol=0.2)


def test_importance_is_estimated_anew_at_each_cut(tmp_path, monkeypatch):
    """Of what is left, as it is by then; what is gone is paid for at the mean."""
    asked, paid = [], []
    importance, adaptive = choose.importance, pricing.adaptive

    def estimated(job, graph, variables):
        asked.append(importance(job, graph, variables))
        return asked[-1]

    def weighted(graph, scores, weights, **more):
        paid.append(scores)
        return adaptive(graph, scores, weights, **more)

    monkeypatch.setattr(choose, "importance", estimated)
    monkeypatch.setattr(pricing, "adaptive", weighted)
    fields = {**STEERED, **FORMS["adaptive"]}
    graph, variables = sparsified(tmp_path, **fields)
    first, second = (a["first"] for a in asked)
    left = len(second)
    assert len(first) == 6 and 3 <= left < 6
    np.testing.assert_array_equal(paid[0]["first"], first)
    dead = ~np.isin(paid[1]["first"], second)
    assert dead.sum() == 6 - left
    np.testing.assert_allclose(paid[1]["first"][dead], second.mean(), rtol=1e-6)
    assert jp.dead(graph, variables)["first"].sum() == 3


@pytest.mark.parametrize("text", ["{", "[]", '{"first": [1, 2]}', '{"first": null}'])
def test_importance_is_kept_and_its_damage_is_named(tmp_path, monkeypatch, text):
    fields = {**STEERED, **FORMS["adaptive"], "lasso_epochs": 1.0}
    sparsified(tmp_path, **fields)
    monkeypatch.setattr(choose, "importance", lambda *_: pytest.fail("again"))
    sparsified(tmp_path, **fields)
    file = tmp_path / "importance" / "0.json"
    file.write_text(text)
    with pytest.raises(CheckpointError, match=f"{file} is damaged .*; delete it to"):
        sparsified(tmp_path, **fields)


class Three(nn.Module):
    """Three convolutions; the widths of the first two may be cut."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.relu(nn.Conv(4, (3, 3), name="a")(x))
        x = nn.relu(nn.Conv(5, (1, 1), name="b")(x))
        return nn.Conv(3, (3, 3), name="c")(x)


def test_weights_in_milliseconds_are_made_of_the_file_s_timings(tmp_path, monkeypatch):
    """Those measured at first, then whatever the file holds."""
    known = {(3, 3, 3, 4): 7.0, (1, 1, 4, 5): 2.0, (3, 3, 5, 3): 11.0}

    def timed(reading, features, kernel, repeats):
        return known[kernel.shape]

    monkeypatch.setattr(sys.modules["jaxprune.latency"], "_timed", timed)
    job, *_ = prepared(tmp_path, weights="latency", strength=3.0)
    job = dataclasses.replace(job, apply=Three().apply)
    images = jnp.zeros((1, *tinyrun.SIZE, 3))
    variables = toygraphs.init(Three(), images)
    variables = jax.tree.map(lambda x: np.asarray(x) + np.float32(0.1), variables)
    graph = jp.trace(job.apply, variables, images, train=False)
    params, (first, second) = variables["params"], graph.groups

    def taken(name, layer, updates):
        """What a step takes off the norm of each channel, as its bias shows."""
        share = -np.float64(updates[layer]["bias"]) / params[layer]["bias"]
        channels = range(graph.groups[name].size)
        sizes = [toygraphs.of(variables, graph, name, c) for c in channels]
        return share * np.linalg.norm(sizes, axis=1)

    file = tmp_path / "timings.json"
    for ms in ((7.0, 2.0, 11.0), (7.0, 20.0, 1.5)):
        if file.exists():
            other = dict(zip(known.values(), ms))
            found = json.loads(file.read_text())
            assert sorted(found.values()) == sorted(known.values())
            file.write_text(json.dumps({k: other[was] for k, was in found.items()}))
        around = penalty.penalty(job, graph, variables)
        tx = around(graph, graph.full(), None)(optax.set_to_zero())
        updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
        # So narrow that they have no grid, products take time as they have channels.
        prices = (ms[0] + ms[1]) / 4, (ms[1] + ms[2]) / 5
        mean = (4 * prices[0] + 5 * prices[1]) / 9
        # A channel of `a` has 27 + 1 + 5 numbers, one of `b` 4 + 1 + 27.
        for name, layer, entries, price in (
            (first, "a", 33, prices[0]),
            (second, "b", 32, prices[1]),
        ):
            weight = np.sqrt(entries) * price / mean
            want = 3.0 * job.fit.lr * weight
            np.testing.assert_allclose(taken(name, layer, updates), want, rtol=1e-4)


def test_cuts_are_spread_over_ends_of_epochs(tmp_path):
    job = tinyrun.job(tmp_path, 10)
    assert sparsify.cut_steps(job, 0) == [30]
    assert sparsify.cut_steps(job, 3) == [6, 15, 24, 30]
    assert sparsify.cut_steps(job, 100) == list(range(3, 31, 3))
    assert sparsify.cut_steps(tinyrun.job(tmp_path, 1), 4) == [3]
