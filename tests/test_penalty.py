# SPDX-License-Identifier: Apache-2.0
"""What a run's config puts behind its optimiser."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tinyrun

import jaxprune as jp
from jaxprune import gates, metric, sparsity
from jaxprune.train import penalty
from jaxprune.train.config import Prune


def strength_of(folder, monkeypatch, optimizer, **fields):
    """The schedule that the proximal step of a run is given; its lr is 2e-3."""
    job = tinyrun.job(folder, 1)
    prune = Prune(method="lasso", weights="size", strength=0.5)
    prune = dataclasses.replace(prune, **fields)
    fit = dataclasses.replace(
        job.fit, optimizer=optimizer, lr=2e-3, momentum=0.9, schedule="constant"
    )
    config = dataclasses.replace(job.config, prune=prune, train=fit)
    job = dataclasses.replace(job, config=config, fit=fit)
    variables, images = tinyrun.variables(), jnp.zeros((1, *tinyrun.SIZE, 3))
    graph = jp.trace(job.apply, variables, images, train=False)
    given = []

    def caught(which):
        def make(*args, **kwargs):
            given.append(args[which])
            return optax.identity()

        return make

    monkeypatch.setattr(sparsity, "proximal", caught(1))
    monkeypatch.setattr(gates, "proximal_gates", caught(0))
    monkeypatch.setattr(gates, "preconditioned_gates", caught(1))
    monkeypatch.setattr(metric, "preconditioned", caught(2))
    around = penalty.penalty(job, graph, variables)(graph, graph.full(), None)
    around(optax.identity())
    return given[0]


@pytest.mark.parametrize("method", ["lasso", "gates"])
def test_a_step_of_the_penalty_is_as_long_as_one_of_the_gradient(
    tmp_path, monkeypatch, method
):
    """lr lambda, and behind momentum, which adds gradients up, lr lambda / (1 - mu)."""
    for optimizer, long in (("sgd", 10), ("adam", 1), ("muon", 1)):
        strength = strength_of(tmp_path, monkeypatch, optimizer, method=method)
        np.testing.assert_allclose(strength(0), long * 2e-3 * 0.5, rtol=1e-6)


@pytest.mark.parametrize("method", ["lasso", "gates"])
def test_in_adams_metric_it_is_the_learning_rate(tmp_path, monkeypatch, method):
    strength = strength_of(
        tmp_path, monkeypatch, "adam", method=method, metric="optimizer"
    )
    np.testing.assert_allclose(strength(0), 2e-3 * 0.5, rtol=1e-6)


def test_the_strength_rises_from_0(tmp_path, monkeypatch):
    """Over prune.ramp epochs, of three steps each here; at a constant rate."""
    strength = strength_of(tmp_path, monkeypatch, "adam", ramp=2.0)
    shares = [float(strength(n)) / (2e-3 * 0.5) for n in (0, 3, 6, 9)]
    np.testing.assert_allclose(shares, [0, 0.5, 1, 1], atol=1e-6)
