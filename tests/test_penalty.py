# SPDX-License-Identifier: Apache-2.0
"""What a run's config puts behind its optimiser."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tinyrun

import jaxprune as jp
from jaxprune import gates, metric, sparsity, steering
from jaxprune.train import choose, penalty
from jaxprune.train.config import Prune


class Step(NamedTuple):
    """The transformation that a run puts behind its optimiser, and its arguments."""

    name: str
    strength: Any
    options: dict


def step_of(folder, monkeypatch, optimizer, **fields):
    """Of a run whose learning rate is 2e-3, and 0.1 of accelerated gates."""
    job = tinyrun.job(folder, 1)
    prune = Prune(method="lasso", weights="size", strength=0.5, gates_lr=0.1)
    prune = dataclasses.replace(prune, **fields)
    fit = dataclasses.replace(
        job.fit, optimizer=optimizer, lr=2e-3, momentum=0.9, schedule="constant"
    )
    config = dataclasses.replace(job.config, prune=prune, train=fit)
    job = dataclasses.replace(job, config=config, fit=fit)
    variables, images = tinyrun.variables(), jnp.zeros((1, *tinyrun.SIZE, 3))
    graph = jp.trace(job.apply, variables, images, train=False)
    given = []

    def caught(name, which):
        def make(*args, **options):
            given.append(Step(name, args[which], options))
            return optax.identity()

        return make

    monkeypatch.setattr(sparsity, "proximal", caught("proximal", 1))
    monkeypatch.setattr(gates, "proximal_gates", caught("proximal_gates", 0))
    monkeypatch.setattr(gates, "accelerated_gates", caught("accelerated_gates", 0))
    for module, name, which in (
        (gates, "preconditioned_gates", 1),
        (metric, "preconditioned", 2),
    ):
        monkeypatch.setattr(module, name, caught(name, which))
    around = penalty.penalty(job, graph, variables)(graph, graph.full(), None)
    around(optax.identity())
    return given[0]


@pytest.mark.parametrize(
    ("method", "name"), [("lasso", "proximal"), ("gates", "proximal_gates")]
)
def test_a_step_of_the_penalty_is_as_long_as_one_of_the_gradient(
    tmp_path, monkeypatch, method, name
):
    """lr lambda, and behind momentum, which adds gradients up, lr lambda / (1 - mu)."""
    for optimizer, long in (("sgd", 10), ("adam", 1), ("muon", 1)):
        step = step_of(tmp_path, monkeypatch, optimizer, method=method)
        assert step.name == name
        np.testing.assert_allclose(step.strength(0), long * 2e-3 * 0.5, rtol=1e-6)


@pytest.mark.parametrize(
    ("method", "name"), [("lasso", "preconditioned"), ("gates", "preconditioned_gates")]
)
def test_in_adams_metric_it_is_the_learning_rate(tmp_path, monkeypatch, method, name):
    step = step_of(tmp_path, monkeypatch, "adam", method=method, metric="optimizer")
    assert step.name == name and step.options["steps"]
    np.testing.assert_allclose(step.strength(0), 2e-3 * 0.5, rtol=1e-6)


def test_accelerated_gates_have_their_own_rate_and_momentum(tmp_path, monkeypatch):
    step = step_of(tmp_path, monkeypatch, "sgd", method="gates", accelerated=True)
    assert step.name == "accelerated_gates"
    np.testing.assert_allclose(step.strength(0), 0.1 * 0.5, rtol=1e-6)


def test_a_controller_has_the_same_rate(tmp_path, monkeypatch):
    rates = []
    monkeypatch.setattr(steering, "steer", lambda *_, rate, **more: rates.append(rate))
    step_of(tmp_path, monkeypatch, "sgd", target=0.8)
    np.testing.assert_allclose(rates[0](0), 10 * 2e-3, rtol=1e-6)


@pytest.mark.parametrize(
    ("roles", "sides"),
    [("both", ("out", "in")), ("out", ("out",)), ("in", ("in",))],
)
def test_a_run_penalises_the_roles_that_it_names(tmp_path, monkeypatch, roles, sides):
    for fields in ({}, {"metric": "optimizer"}):
        step = step_of(tmp_path, monkeypatch, "adam", roles=roles, **fields)
        assert step.options["roles"] == sides


def test_the_strength_rises_from_0(tmp_path, monkeypatch):
    """Over prune.ramp epochs, of three steps each here; at a constant rate."""
    strength = step_of(tmp_path, monkeypatch, "adam", ramp=2.0).strength
    shares = [float(strength(n)) / (2e-3 * 0.5) for n in (0, 3, 6, 9)]
    np.testing.assert_allclose(shares, [0, 0.5, 1, 1], atol=1e-6)


def test_what_is_cut_behind_a_penalty_on_readers_is_ranked_by_them(tmp_path):
    """Their makers, which nothing holds back, are the largest of all."""
    job = tinyrun.job(tmp_path, 1)
    variables, images = tinyrun.variables(), jnp.zeros((1, *tinyrun.SIZE, 3))
    graph = jp.trace(job.apply, variables, images, train=False)
    faint = {"first": jnp.array([1e-3, 1e-3, 1e-3, 1, 1, 1])}
    large = {"first": jnp.array([9.0, 9, 9, 1, 1, 1])}
    variables = jp.trees.channel_scale(graph, faint, variables, roles=("in",))
    variables = jp.trees.channel_scale(graph, large, variables, roles=("out",))
    for roles, stays in (("in", [3, 4, 5]), ("out", [0, 1, 2])):
        prune = Prune(method="lasso", roles=roles, multiple_of=1, min_channels=1)
        config = dataclasses.replace(job.config, prune=prune)
        mine = dataclasses.replace(job, config=config)
        keep, _ = choose.choose(mine, graph, variables, jp.flops(0.5), None)
        np.testing.assert_array_equal(np.flatnonzero(keep["first"]), stays)
