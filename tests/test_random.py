# SPDX-License-Identifier: Apache-2.0
"""The laws on a thousand random networks that mix every kind of operation.

`JAXPRUNE_NETWORKS` says how many.
"""

from __future__ import annotations

import os
from typing import Any

import chex
import jax
import mixed
import numpy as np
import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

import jaxprune as jp

COUNT = int(os.environ.get("JAXPRUNE_NETWORKS", 1000))
PARTS = 8  # so that processes can share the work
OPS = st.lists(
    st.tuples(st.sampled_from(mixed.KINDS), st.integers(0, 5), st.integers(0, 5)),
    min_size=1,
    max_size=6,
).map(tuple)
TRAIN = {
    "train": True,
    "mutable": ["batch_stats"],
    "rngs": {"dropout": jax.random.key(3)},
}


def halved(graph: jp.Graph, number: int) -> dict[str, np.ndarray]:
    """Half of every group, at random: few sizes, so that little is compiled anew."""
    rng = np.random.default_rng(number)
    keep = {}
    for name, group in graph.groups.items():
        keep[name] = rng.permutation(group.size) < max(1, group.size // 2)
    return keep


def check(ops: Any, number: int, train: bool) -> None:
    """Laws 1 and 2: outputs and statistics of slim and mask, and the trees."""
    apply, variables, x = mixed.mixed(ops, number)
    kw = TRAIN if train else {}
    graph = jp.trace(apply, variables, x)
    keep = halved(graph, number)
    with jax.enable_x64(True), jax.disable_jit():
        double = jax.tree.map(lambda a: np.asarray(a, np.float64), variables)
        x = np.asarray(x, np.float64)
        masked, small = jp.mask(graph, keep, double), jp.shrink(graph, keep, double)
        want = apply(masked, x, **kw)
        got = jp.slim(apply, graph, keep)(small, x, **kw)
        if train:
            statistics = jax.tree.map(np.asarray, dict(want[1]))
            if statistics:
                statistics = jp.shrink(graph, keep, statistics)
            want, got = (want[0], statistics), (got[0], dict(got[1]))
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        scale = max(float(np.max(np.abs(a))), 1e-3)
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-10 * scale)
    chex.assert_trees_all_equal(jp.expand(graph, keep, small), masked)
    chex.assert_trees_all_equal(jp.shrink(graph, keep, masked), small)


def part(number: int) -> Any:
    @seed(number)
    @settings(max_examples=-(-COUNT // PARTS))
    @given(ops=OPS, draw=st.integers(0, 99), train=st.booleans())
    def run(ops: Any, draw: int, train: bool) -> None:
        check(ops, draw, train)

    return run


@pytest.mark.parametrize("number", range(PARTS))
def test_slim_is_mask(number: int) -> None:
    part(number)()


@pytest.mark.parametrize("kind", mixed.KINDS)
def test_each_kind_by_itself(kind: str) -> None:
    """So that none is always hidden behind another; most channels can be cut."""
    ops = ((kind, 0, 1), ("conv", 0, 1))
    for train in (False, True):
        check(ops, 1, train)
    apply, variables, x = mixed.mixed(ops)
    graph = jp.trace(apply, variables, x)
    assert graph.groups


@settings(max_examples=20)
@given(ops=OPS, draw=st.integers(0, 99))
def test_eval_and_train_have_the_same_groups(ops: Any, draw: int) -> None:
    """Law 9."""
    apply, variables, x = mixed.mixed(ops, draw)
    evaluated = jp.trace(apply, variables, x)
    trained = jp.trace(apply, variables, x, **TRAIN)
    assert list(evaluated.groups) == list(trained.groups)
