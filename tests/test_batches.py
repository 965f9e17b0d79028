# SPDX-License-Identifier: Apache-2.0
"""Batches are a list: one array or dict would be taken apart, image by image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toygraphs

import jaxprune as jp
from jaxprune.base import DataError
from jaxprune.measures import taylor

GRAPH = toygraphs.chain(5, 4)
VARIABLES = toygraphs.variables(GRAPH)
IMAGES = np.ones((2, 3), np.float32)


def loss(variables, batch):
    return jnp.mean(toygraphs.apply(variables, batch) ** 2)


def scored(batches):
    return jp.score(taylor(), GRAPH, VARIABLES, loss=loss, batches=batches)


def walked(batches):
    return jp.prune_path(GRAPH, VARIABLES, loss, batches, until=jp.flops(0.8))


def validated(batches):
    given = {"validation": batches, "until": jp.flops(0.8)}
    return jp.prune_path(GRAPH, VARIABLES, loss, [IMAGES], **given)


def searched(batches):
    given = {"budget": jp.flops(0.5), "key": jax.random.key(0), "count": 2}
    return jp.best_of(GRAPH, VARIABLES, loss, batches, **given)


def refitted(batches):
    return jp.reconstruct(toygraphs.apply, GRAPH, GRAPH.full(), VARIABLES, batches)


def thinned(batches):
    given = {"method": "responses", "batches": batches}
    return jp.factorize(toygraphs.apply, GRAPH, VARIABLES, IMAGES, **given)


@pytest.mark.parametrize(
    "call", [scored, walked, validated, searched, refitted, thinned]
)
@pytest.mark.parametrize(
    ("batches", "kind"),
    [
        (IMAGES, "is one array"),
        (jnp.asarray(IMAGES), "is one array"),
        ({"x": IMAGES}, "is one dict"),
        ((IMAGES, np.zeros(2, int)), "are arrays of 2, 1 axes"),
    ],
)
def test_a_single_batch_is_named(call, batches, kind):
    name = "validation" if call is validated else "batches"
    with pytest.raises(DataError, match=rf"{name} {kind}.*\[{name}\]"):
        call(batches)
