# SPDX-License-Identifier: Apache-2.0
"""The laws on a thousand random networks that mix every kind of operation.

`JAXPRUNE_NETWORKS` says how many. Each 125 are a part with a seed of its own, so that
processes can share the work: the first thousand are the same whatever the number.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

import chex
import jax
import jax.extend.core as jex_core
import mixed
import numpy as np
import optax
import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

import jaxprune as jp

PART = 125
PARTS = -(-int(os.environ.get("JAXPRUNE_NETWORKS", 1000)) // PART)
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


def check(ops: Any, number: int, train: bool) -> jp.Graph:
    """Laws 1 to 5 and 9, and for an operation without a rule law 6."""
    module, variables, x = mixed.mixed(ops, number)
    with jax.enable_x64(True):
        double = jax.tree.map(lambda a: np.asarray(a, np.float64), variables)
        x = np.asarray(x, np.float64)
        apply = recorded(module, double, x)
        graph = jp.trace(apply, double, x)
        trained = jp.trace(apply, double, x, train=True)
        keep = halved(graph, number)
        with jax.disable_jit():
            check_function(apply, graph, keep, double, x, number, train)
    assert {n: g.size for n, g in graph.groups.items()} == {
        n: g.size for n, g in trained.groups.items()
    }
    check_trees(graph, keep, variables, number)
    if any(kind == "unknown" for kind, *_ in ops):
        assert any("cholesky" in f.cause for f in graph.frozen)
    if number % 20 == 0:
        with tempfile.TemporaryDirectory() as folder:
            small = jp.shrink(graph, keep, variables)
            jp.save(f"{folder}/net", jp.Pruned(apply, small, graph, keep))
            loaded = jp.load(f"{folder}/net", apply, like=small)
            assert loaded.graph == graph
            chex.assert_trees_all_equal(dict(loaded.keep), keep)
            chex.assert_trees_all_equal(loaded.variables, small)
    return graph


def recorded(module: Any, variables: Any, x: Any) -> Any:
    """The module's two programs, which run without Flax, whose Python is slow."""
    programs = {}
    for train, kw in ((False, {}), (True, TRAIN)):

        def outputs(v: Any, x: Any, kw: Any = kw) -> Any:
            found = module(v, x, **kw)
            return (found[0], dict(found[1])) if kw else found

        jaxpr, shapes = jax.make_jaxpr(outputs, return_shape=True)(variables, x)
        programs[train] = jex_core.jaxpr_as_fun(jaxpr), jax.tree.structure(shapes)

    def apply(variables: Any, x: Any, train: bool = False) -> Any:
        program, tree = programs[train]
        return tree.unflatten(program(*jax.tree.leaves((variables, x))))

    return apply


def check_function(
    apply: Any, graph: Any, keep: Any, variables: Any, x: Any, number: int, train: bool
) -> None:
    """Law 1: outputs and statistics of slim are those of mask; of a few, gradients."""
    masked, small = (f(graph, keep, variables) for f in (jp.mask, jp.shrink))
    slimmed = jp.slim(apply, graph, keep)
    runs = (lambda v: apply(v, x, train=train)), (lambda v: slimmed(v, x, train=train))
    if number % 8:
        close(runs[1](small), cut_statistics(graph, keep, runs[0](masked)))
        return
    want, back = jax.vjp(runs[0], masked)
    got, small_back = jax.vjp(runs[1], small)
    close(got, cut_statistics(graph, keep, want))
    rng = np.random.default_rng(number)
    pulls = jax.tree.map(lambda y: np.asarray(rng.normal(size=y.shape)), want)
    small_pulls = cut_statistics(graph, keep, pulls)
    close(small_back(small_pulls)[0], jp.shrink(graph, keep, back(pulls)[0]))


def cut_statistics(graph: Any, keep: Any, outputs: Any) -> Any:
    """What a network returns, its batch statistics cut."""
    if not (isinstance(outputs, tuple) and outputs[1]):
        return outputs
    return outputs[0], jp.shrink(graph, keep, outputs[1])


def close(got: Any, want: Any) -> None:
    """On one scale for all leaves: some gradients are 0 but for rounding."""
    leaves = jax.tree.leaves(want)
    scale = max(1e-3, *(float(np.max(np.abs(a), initial=0)) for a in leaves))
    for a, b in zip(leaves, jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-10 * scale)


def check_trees(graph: jp.Graph, keep: Any, variables: Any, number: int) -> None:
    """Laws 2 to 4: cut bit for bit, twice as once, before a step as after it."""
    masked, small = jp.mask(graph, keep, variables), jp.shrink(graph, keep, variables)
    chex.assert_trees_all_equal(jp.expand(graph, keep, small), masked)
    chex.assert_trees_all_equal(jp.shrink(graph, keep, masked), small)
    whole = jax.tree.leaves(jp.shrink(graph, graph.full(), variables))
    assert all(a is b for a, b in zip(whole, jax.tree.leaves(variables), strict=True))

    cut = jp.shrink_graph(graph, keep)
    more = halved(cut, number + 1)
    both = jp.compose(keep, more)
    twice = jp.shrink(cut, more, small)
    chex.assert_trees_all_equal(twice, jp.shrink(graph, both, variables))
    assert jp.cost(cut, more) == jp.cost(graph, both)

    params = masked["params"]
    state = (params, MOMENTUM.init(params))
    late = jp.shrink(graph, keep, step(params, state))
    early = step(small["params"], jp.shrink(graph, keep, state))
    chex.assert_trees_all_equal(late, early)
    assert jp.Graph.from_json(graph.to_json()) == graph


MOMENTUM = optax.sgd(0.1, momentum=0.9)


def step(gradients: Any, state: Any) -> Any:
    updates, moments = MOMENTUM.update(gradients, state[1], state[0])
    return optax.apply_updates(state[0], updates), moments


def part(number: int) -> Any:
    @seed(number)
    @settings(max_examples=PART)
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
        assert check(ops, 1, train).groups
