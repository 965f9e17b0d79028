# SPDX-License-Identifier: Apache-2.0
"""Kernels as chains of thinner ones, and the function that runs them."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest

import jaxprune as jp
from jaxprune import factors as by
from jaxprune.base import ConfigError, DataError, GraphError
from jaxprune.models import max_pool, unpool

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def chain(method: str, kernel: tuple[int, ...], rank: int) -> dict[str, np.ndarray]:
    kh, kw, read, out = kernel
    shapes = {
        "svd": [(kh, kw, read, rank), (1, 1, rank, out)],
        "separable": [(kh, 1, read, rank), (1, kw, rank, out)],
        "cp": [
            (1, 1, read, rank),
            (kh, 1, 1, rank),
            (1, kw, 1, rank),
            (1, 1, rank, out),
        ],
    }
    return {f"factor{i}": normal(*s) for i, s in enumerate(shapes[method])}


def product(method: str, factors: dict[str, np.ndarray]) -> np.ndarray:
    """The kernel that they stand for, by its definition."""
    f = [np.float64(x) for x in factors.values()]
    if method == "svd":
        return np.einsum("hwir,ro->hwio", f[0], f[1][0, 0])
    if method == "separable":
        return np.einsum("hir,wro->hwio", f[0][:, 0], f[1][0])
    parts = f[0][0, 0], f[1][:, 0, 0], f[2][0, :, 0], f[3][0, 0]
    return np.einsum("ir,hr,wr,ro->hwio", *parts)


@pytest.mark.parametrize("method", ["svd", "separable", "cp"])
@pytest.mark.parametrize(
    "options",
    [
        {"strides": (2, 3), "padding": ((2, 0), (1, 3))},
        {"kernel_dilation": (2, 1), "padding": "SAME"},
        {"input_dilation": (2, 3), "padding": ((1, 1), (2, 0))},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_chain_computes_what_its_product_does(
    method: str, options: dict[str, Any]
) -> None:
    conv = nn.Conv(5, (3, 2), **options)
    x = normal(2, 9, 8, 4)
    factors = chain(method, (3, 2, 4, 5), 3)
    whole = {"params": {"kernel": product(method, factors), "bias": normal(5)}}
    thin = {"params": {**whole["params"], "kernel": factors}}
    want = conv.apply(jax.tree.map(jnp.float32, whole), x)
    got = jp.factorized(conv.apply)(thin, x)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("method", ["svd", "separable", "cp"])
def test_a_chain_of_rank_one_is_not_depthwise(method: str) -> None:
    conv, x = nn.Conv(5, (3, 2), use_bias=False), normal(1, 5, 4, 4)
    factors = chain(method, (3, 2, 4, 5), 1)
    whole = {"params": {"kernel": np.float32(product(method, factors))}}
    got = jp.factorized(conv.apply)({"params": {"kernel": factors}}, x)
    np.testing.assert_allclose(got, conv.apply(whole, x), rtol=1e-4, atol=1e-4)


def one_layer(layer: nn.Module, x: np.ndarray) -> tuple[Any, Any, jp.Graph]:
    variables = layer.init(jax.random.key(0), x)
    return layer.apply, variables, jp.trace(layer.apply, variables, x)


def test_svd_leaves_out_the_smallest_singular_values() -> None:
    x = normal(1, 6, 6, 8)
    apply, variables, graph = one_layer(nn.Conv(12, (3, 3)), x)
    found = jp.factorize(apply, graph, variables, x, method="svd", ratio=0.5)
    factors = found.variables["params"]["kernel"]
    rank = 72 * 12 // 2 // (72 + 12)  # half of the multiply-adds of a position
    assert factors["factor0"].shape == (3, 3, 8, rank)
    kernel = np.float64(variables["params"]["kernel"])
    left_out = np.linalg.svd(kernel.reshape(72, 12), compute_uv=False)[rank:]
    error = np.sum((product("svd", factors) - kernel) ** 2)
    np.testing.assert_allclose(error, np.sum(left_out**2), rtol=1e-4)


def test_separable_filters_are_the_nearest() -> None:
    x = normal(1, 6, 6, 8)
    apply, variables, graph = one_layer(nn.Conv(12, (3, 3)), x)
    found = jp.factorize(apply, graph, variables, x, method="separable", ratio=0.5)
    factors = found.variables["params"]["kernel"]
    rank = 9 * 8 * 12 // 2 // (3 * 8 + 3 * 12)
    assert factors["factor1"].shape == (1, 3, rank, 12)
    kernel = np.float64(variables["params"]["kernel"])
    matrix = np.moveaxis(kernel, 2, 1).reshape(24, 36)
    left_out = np.linalg.svd(matrix, compute_uv=False)[rank:]
    error = np.sum((product("separable", factors) - kernel) ** 2)
    np.testing.assert_allclose(error, np.sum(left_out**2), rtol=1e-4)


def test_cp_finds_a_kernel_that_has_the_rank() -> None:
    kernel = product("cp", chain("cp", (3, 3, 8, 12), 4))
    found = by.by_cp(kernel, 4, 0)
    error = product("cp", dict(enumerate(found))) - kernel
    assert np.linalg.norm(error) < 1e-2 * np.linalg.norm(kernel)
    assert [f.shape for f in found] == [
        (1, 1, 8, 4),
        (3, 1, 1, 4),
        (1, 3, 1, 4),
        (1, 1, 4, 12),
    ]


@pytest.mark.parametrize("method", by.METHODS)
def test_kernels_of_zeros_stay_zeros(method: str) -> None:
    kernel = np.zeros((3, 3, 4, 5))
    made = by.METHODS[method](kernel, 2, 0)
    assert all(np.isfinite(factor).all() for factor in made)
    assert any(not factor.any() for factor in made)


def test_responses_of_low_rank_are_kept_whole() -> None:
    """Features in a plane have answers in one, though the kernel is of full rank."""
    x = (normal(2, 6, 6, 2) @ normal(2, 8) + normal(8)).astype(np.float32)
    apply, variables, graph = one_layer(nn.Conv(12, (1, 1)), x)
    variables["params"]["bias"] = normal(12)
    more = {"method": "responses", "batches": [x[:1], (x[1:],)]}
    found = jp.factorize(apply, graph, variables, x, **more, ratio=0.5)
    rank = found.variables["params"]["kernel"]["factor0"].shape[-1]
    assert rank == 8 * 12 // 2 // 20 == 2
    want = apply(variables, x)
    plain = jp.factorize(apply, graph, variables, x, method="svd", ratio=0.5)
    np.testing.assert_allclose(found.apply(found.variables, x), want, atol=2e-4)
    assert np.abs(plain.apply(plain.variables, x) - want).max() > 0.05


def test_the_ranks_are_the_largest_that_fit() -> None:
    for (kh, kw, read, out), stride, method, rank in (
        ((3, 3, 12, 16), 1, "svd", 9 * 12 * 16 // 4 // (9 * 12 + 16)),
        ((3, 3, 12, 16), 2, "separable", 9 * 12 * 16 // 4 // (3 * 12 * 2 + 3 * 16)),
        ((3, 3, 12, 16), 1, "cp", 9 * 12 * 16 // 4 // (12 + 3 + 3 + 16)),
        ((3, 3, 12, 16), 2, "cp", 9 * 12 * 16 // 4 // (12 * 4 + 3 * 2 + 3 + 16)),
    ):
        x = normal(1, 8, 8, read)
        layer = nn.Conv(out, (kh, kw), strides=stride)
        apply, variables, graph = one_layer(layer, x)
        found = jp.factorize(apply, graph, variables, x, method=method, ratio=0.25)
        assert found.chains["params/kernel"].rank == rank
        before = jp.cost(graph).flops
        after = jp.cost(jp.trace(found.apply, found.variables, x)).flops
        assert after <= 0.25 * before
        one = after / rank  # what each rank costs
        assert after + one > 0.25 * before


class SmallSegNet(nn.Module):
    """Two convolutions, pooled, un-pooled to where values came from, and two more."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        def block(x: jax.Array, name: str, features: int) -> jax.Array:
            x = nn.Conv(features, (3, 3), name=name)(x)
            x = nn.BatchNorm(use_running_average=not train, name=f"{name}_bn")(x)
            return nn.relu(x)

        x = block(x, "encoder1", 8)
        size = x.shape[1], x.shape[2]
        x, code = max_pool(block(x, "encoder2", 12))
        x = block(unpool(x, code, size), "decoder2", 8)
        return nn.Conv(3, (1, 1), name="classifier")(x)


def test_a_segnet_runs_trains_and_is_pruned_on() -> None:
    """Un-pooling by the encoder's locations, batch norm, odd sizes."""
    net = SmallSegNet()
    x = normal(2, 9, 10, 3)
    variables = net.init(jax.random.key(0), x)
    graph = jp.trace(net.apply, variables, x)
    found = jp.factorize(net.apply, graph, variables, x, method="separable", ratio=0.4)
    thin = jp.trace(found.apply, found.variables, x)
    assert jp.cost(thin).flops < 0.5 * jp.cost(graph).flops
    keep = networks.random_keep(thin, 0)
    # The ranks are channels, too.
    assert len(keep) == len(graph.groups) + len(found.chains)
    assert jp.verify(found.apply, thin, keep, found.variables, x) < 1e-4

    def loss(variables: Any) -> Any:
        out, _ = found.apply(variables, x, train=True, mutable=["batch_stats"])
        return jnp.mean(out**2)

    slopes = jax.jit(jax.grad(loss))(found.variables)
    chex.assert_tree_all_finite(slopes)
    first = slopes["params"]["encoder2"]["kernel"]
    assert all(np.abs(g).max() > 0 for g in first.values())


@pytest.mark.parametrize("method", ["predicted", "asymmetric3d"])
def test_chains_are_pruned_saved_loaded_and_exported(
    method: str, tmp_path: Path
) -> None:
    net = SmallSegNet()
    x = normal(1, 8, 8, 3)
    variables = net.init(jax.random.key(0), x)
    graph = jp.trace(net.apply, variables, x, train=False)
    found = jp.factorize(
        net.apply,
        graph,
        variables,
        x,
        method=method,
        budget=jp.flops(0.5),
        batches=[x],
        train=False,
    )
    thin = jp.trace(found.apply, found.variables, x, train=False)
    scores = jp.score(jp.magnitude(), thin, found.variables)
    keep = jp.select(thin, scores, jp.flops(0.3))
    small = jp.shrink(thin, keep, found.variables)
    pruned = jp.Pruned(jp.slim(found.apply, thin, keep), small, thin, keep)
    want = pruned.apply(small, x, train=False)
    jp.save(tmp_path / "net", pruned)
    for apply in (net.apply, found.apply):
        loaded = jp.load(tmp_path / "net", apply)
        chex.assert_trees_all_equal(loaded.variables, jax.tree.map(np.asarray, small))
        got = loaded.apply(loaded.variables, x, train=False)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    if importlib.util.find_spec("flatbuffers"):
        folder = jp.export(loaded, tmp_path / "program", x, train=False)
        run = jp.load_export(folder)
        np.testing.assert_allclose(run(x), want, rtol=1e-4, atol=1e-4)


def test_a_dictionary_predicts_the_weights_and_is_not_trained() -> None:
    """The regression of a filter on its known weights, written out in NumPy."""
    x = normal(1, 6, 6, 4)
    apply, variables, graph = one_layer(nn.Conv(9, (3, 3)), x)
    found = jp.factorize(
        apply, graph, variables, x, method="predicted", ratio=0.5, seed=3
    )
    chain = found.chains["params/kernel"]
    assert chain.rank == 9 * 4 * 9 // 2 // (9 * 4 + 9)
    dictionary = found.variables["dictionary"]["kernel"]["factor0"]
    learned = found.variables["params"]["kernel"]
    assert list(learned) == ["factor1"]
    kernel = np.float64(variables["params"]["kernel"])
    known = np.random.default_rng(3).permutation(36)[: chain.rank]
    channels = sum(kernel[i, j] @ kernel[i, j].T for i in range(3) for j in range(3))
    channels = channels / np.mean(np.diag(channels))
    covariance = np.zeros((36, 36))
    places = [*itertools.product(range(3), range(3), range(4))]
    for (a, (i, j, c)), (b, (k, m, d)) in itertools.product(
        enumerate(places), repeat=2
    ):
        near = np.exp(-((i - k) ** 2 + (j - m) ** 2) / 2)
        covariance[a, b] = near * channels[c, d]
    inner = covariance[np.ix_(known, known)] + 1e-4 * np.eye(chain.rank)
    want = covariance[:, known] @ np.linalg.inv(inner)
    np.testing.assert_allclose(dictionary.reshape(36, -1), want, rtol=1e-3, atol=1e-4)
    # What is learned begins where the product is nearest.
    whole = dictionary.reshape(36, -1) @ learned["factor1"][0, 0]
    residue = np.float64(whole) - kernel.reshape(36, 9)
    np.testing.assert_allclose(want.T @ residue, 0, atol=1e-3)
    conv = {"params": {**variables["params"], "kernel": whole.reshape(3, 3, 4, 9)}}
    got = found.apply(found.variables, x)
    np.testing.assert_allclose(got, apply(conv, x), rtol=1e-4, atol=1e-4)
    # It saves parameters as its rank does, and no more multiply-adds than an SVD.
    thin = jp.trace(found.apply, found.variables, x)
    assert jp.cost(thin).params == chain.rank * 9 + 9
    plain = jp.factorize(apply, graph, variables, x, method="svd", ratio=0.5)
    same = jp.cost(jp.trace(plain.apply, plain.variables, x))
    assert same.flops == jp.cost(thin).flops


def test_alternating_least_squares_never_climbs() -> None:
    kernel = np.float64(normal(3, 3, 6, 8))
    parts, errors = by.alternate(kernel, 5, 0)
    assert len(errors) > 3
    assert np.all(np.diff(errors) <= 1e-9 * errors[0])
    whole = np.einsum("hr,wr,ir,or->hwio", *parts)
    np.testing.assert_allclose(np.sum((kernel - whole) ** 2), errors[-1], rtol=1e-6)


def test_derivatives_of_ones_own_and_other_uses_are_kept() -> None:
    def apply(variables: Any, x: Any) -> Any:
        hidden = jax.nn.relu(jax.jit(jnp.dot)(x, variables["w"].astype(jnp.float32)))
        return hidden + jnp.sum(variables["w"] ** 2)

    parts = {"factor0": normal(3, 2), "factor1": normal(2, 4)}
    thin = jp.factorized(apply)
    whole = parts["factor0"] @ parts["factor1"]
    x = normal(5, 3)
    np.testing.assert_allclose(thin({"w": parts}, x), apply({"w": whole}, x), rtol=1e-5)
    zero = np.zeros_like(x)
    slope = jax.grad(lambda x: thin({"w": parts}, x).sum())(zero)
    np.testing.assert_array_equal(slope, 0)  # relu'(0) = 0


@pytest.mark.parametrize("method", sorted(by.METHODS))
@pytest.mark.parametrize("lower", [jnp.bfloat16, jnp.float16])
def test_a_chain_computes_in_its_products_precision(method: str, lower: Any) -> None:
    """Parameters in float32, computation in 16 bits: as the dense network does."""
    net = nn.Conv(8, (3, 3), dtype=lower)
    x = normal(2, 6, 6, 8)
    apply, variables, graph = one_layer(net, x)
    thin = jp.factorize(
        apply, graph, variables, x, method=method, ratio=0.9, batches=[x]
    )
    program = jax.make_jaxpr(thin.apply)(thin.variables, x)
    convs = [e for e in program.eqns if e.primitive.name == "conv_general_dilated"]
    assert len(convs) > 1
    assert all(v.aval.dtype == lower for e in convs for v in e.invars)
    plain = nn.Conv(8, (3, 3))
    whole = jp.factorized(plain.apply)(thin.variables, x)
    got = thin.apply(thin.variables, x)
    assert got.dtype == lower
    np.testing.assert_allclose(
        np.float32(got), whole, rtol=0, atol=0.05 * np.abs(whole).max()
    )


def test_factors_are_not_cut_anew() -> None:
    x = normal(4, 16)
    variables = {n: {"kernel": normal(16, 16)} for n in "ab"}

    def apply(variables: Any, x: Any) -> Any:
        return jax.nn.relu(x @ variables["a"]["kernel"]) @ variables["b"]["kernel"]

    def again(thin: Any, **more: Any) -> Any:
        graph = jp.trace(thin.apply, thin.variables, x)
        return jp.factorize(thin.apply, graph, thin.variables, x, **more)

    graph = jp.trace(apply, variables, x)
    thin = jp.factorize(apply, graph, variables, x, only=["a*"])
    both = again(thin, ratio=0.3)
    assert list(both.chains) == ["b/kernel"]
    for name, factor in thin.variables["a"]["kernel"].items():
        np.testing.assert_array_equal(both.variables["a"]["kernel"][name], factor)
    whole = {
        n: {"kernel": v["kernel"]["factor0"] @ v["kernel"]["factor1"]}
        for n, v in both.variables.items()
    }
    found, want = both.apply(both.variables, x), apply(whole, x)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-3)
    with pytest.raises(GraphError, match="factors are not cut anew"):
        again(both)


def test_what_cannot_be_is_said() -> None:
    x = normal(1, 6, 6, 8)
    apply, variables, graph = one_layer(nn.Conv(12, (3, 3)), x)
    bad = jax.tree.map(lambda w: w * np.nan, variables)
    with pytest.raises(GraphError, match="params/kernel is not finite"):
        jp.factorize(apply, graph, bad, x)
    for more, error, match in (
        ({"method": "tucker"}, ConfigError, "one of svd, separable, cp, pred"),
        ({"ratio": 1.0}, ConfigError, "ratio=1.0"),
        ({"method": "responses"}, DataError, "needs batches"),
        ({"method": "responses", "batches": []}, DataError, "batches is empty"),
        ({"only": ["head*"]}, GraphError, r"only=\['head\*'\] names no kernel"),
        ({"only": "head*"}, ConfigError, r"a list of patterns, \['head\*'\]"),
        ({"positions": 0}, ConfigError, "positions=0"),
        (
            {"method": "responses", "batches": [x * np.nan]},
            DataError,
            "params/kernel answ",
        ),
    ):
        with pytest.raises(error, match=match):
            jp.factorize(apply, graph, variables, x, **more)
    with pytest.raises(GraphError, match="not the graph's"):
        jp.factorize(apply, graph, {"params": {"kernel": np.ones((3, 3, 8, 9))}}, x)
    bad = {"factor0": normal(3, 3, 8, 2), "factor1": normal(1, 1, 3, 12)}
    with pytest.raises(GraphError, match="params/kernel.*make no chain"):
        jp.factorized(apply)({"params": {**variables["params"], "kernel": bad}}, x)
    bad = {"factor0": normal(3, 3, 8, 2), "other": normal(1, 1, 2, 12)}
    with pytest.raises(GraphError, match="factors are factor0, factor1"):
        jp.factorized(apply)({"params": {**variables["params"], "kernel": bad}}, x)
