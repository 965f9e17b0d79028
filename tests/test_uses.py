# SPDX-License-Identifier: Apache-2.0
"""How kernels are used: transposed, twice, in loops; and what their bias is."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.base import BudgetError, GraphError
from jaxprune.behind import biases
from jaxprune.taps import readings, taps

RNG = np.random.default_rng(5)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def tied(v: Any, x: Any) -> Any:
    """An auto-encoder whose decoder is the encoder's kernel, transposed."""
    return (jax.nn.relu(x @ v["w"]) @ v["w"].T) @ v["o"]


TIED = {"w": normal(16, 12), "o": normal(16, 3)}


def test_convolutions_of_torch_s_layout_are_read_as_they_lie() -> None:
    v, x = {"conv": normal(4, 6, 3, 3)}, normal(2, 8, 8, 6)

    def apply(v: Any, x: Any, late: bool = False) -> Any:
        kernel = v["conv"] if late else v["conv"].astype(jnp.bfloat16)
        kernel = kernel.transpose(2, 3, 1, 0).astype(jnp.bfloat16)
        return jax.lax.conv_general_dilated(
            *(x.astype(jnp.bfloat16), kernel, (2, 1), "SAME"),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    (reading,) = readings(apply, v, [x], {})
    assert (reading.kernel.shape, reading.kernel.dtype) == ((4, 6, 3, 3), jnp.bfloat16)
    assert reading.pairs == [(1, 3)]
    out, seen = taps(apply, lambda r: r.rows() @ r.matrix(r.kernel))(v, x)
    (made,) = seen[("conv",)]
    np.testing.assert_allclose(
        np.float32(made), np.float32(out).reshape(-1, 4), rtol=0.02, atol=0.05
    )
    others: set[Any] = set()  # cast behind it: what it then is, nothing has
    assert readings(apply, v, [x], {"late": True}, elsewhere=others) == []
    assert others == {("conv",)}


@pytest.mark.parametrize("order", ["last", "first", "twice"])
def test_rows_and_matrix_of_a_transposed_kernel(order: str) -> None:
    v, x = {"w": normal(7, 5)}, normal(3, 4, 5)

    def apply(v: Any, x: Any) -> Any:
        if order == "first":
            return v["w"].T.T @ x.reshape(-1, 5).T
        w = v["w"].T if order == "last" else jax.jit(lambda w: w.T)(v["w"]).T.T
        return x @ w

    _, seen = taps(apply, lambda r: (r.rows() @ r.matrix(r.kernel), r.pairs))(v, x)
    ((made, pairs),) = seen[("w",)]
    (axis,) = (k for k, _ in pairs)
    assert axis == 1  # of the kernel as it lies in the tree
    np.testing.assert_allclose(made, x.reshape(-1, 5) @ v["w"].T, rtol=1e-5)


def test_products_whose_outputs_would_be_turned_are_not_shown() -> None:
    v, x = {"w": normal(3, 4, 5)}, normal(2, 4)
    others: set[Any] = set()

    def turned(v: Any, x: Any) -> Any:  # [2, 5, 3], of [3, 5] as the kernel lies
        return jnp.tensordot(x, v["w"].transpose(1, 2, 0), 1)

    assert readings(turned, v, [x], {}, elsewhere=others) == []
    assert others == {("w",)}

    def kept(v: Any, x: Any) -> Any:
        return jnp.tensordot(x, v["w"].transpose(1, 0, 2), 1)

    (reading,) = readings(kept, v, [x], {}, elsewhere=(others := set()))
    assert (reading.pairs, others) == ([(1, 1)], set())


def test_every_use_of_a_tied_kernel_counts() -> None:
    """Multiply-adds by hand: 512 rows, through w twice and o once."""
    x = normal(512, 16)
    graph = jp.trace(tied, TIED, x)
    thin = jp.prune_weights(tied, TIED, x, budget=jp.flops(0.6))
    left = {n: int(np.count_nonzero(w)) for n, w in thin.items()}
    by_hand = 2 * 512 * (2 * left["w"] + left["o"])
    assert jp.nonzero_cost(tied, thin, x).flops == by_hand
    assert 0.59 * jp.cost(graph).flops < by_hand <= 0.6 * jp.cost(graph).flops
    products = jp.timings(tied, graph, TIED, x, points=2, repeats=1).products
    assert [p.path for p in products] == [("w",), ("w",)]  # o is of no group


def test_what_is_used_otherwise_is_neither_factorised_nor_refitted() -> None:
    x = normal(64, 16)
    graph = jp.trace(tied, TIED, x)
    done = jp.factorize(tied, graph, TIED, x, ratio=0.7)
    assert list(done.chains) == ["o"]
    with pytest.raises(BudgetError, match=r"leave 0\.9\d"):
        jp.factorize(tied, graph, TIED, x, budget=jp.flops(0.8))
    (name,) = (n for n, g in graph.groups.items() if g.size == 12)
    keep = graph.full()
    keep[name][:4] = False
    with pytest.raises(GraphError, match="none of them can be refitted"):
        jp.reconstruct(tied, graph, keep, TIED, [x])

    def looped(v: Any, x: Any) -> Any:
        y = jax.lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ v["w"]), x)
        return jax.nn.relu(y @ v["w"]) @ v["o"]

    v = {"w": normal(6, 6), "o": normal(6, 6)}
    graph = jp.trace(looped, v, normal(4, 6))
    done = jp.factorize(looped, graph, v, normal(4, 6), ratio=0.7)
    assert list(done.chains) == ["o"]


def named(v: Any, x: Any) -> Any:
    """Its vectors stand for all that may be beside a kernel."""
    y = x @ v["a"]["w"] + v["a"]["b"]
    y = y @ v["scaled"]["w"] * v["scaled"]["s"] + v["scaled"]["b"]
    z = y @ v["shared"]["w"]
    y = z + v["shared"]["b"] + jnp.tanh(z)
    y = y @ v["lent"]["w"] + v["lent"]["b"]
    y = jnp.tanh(y) * v["lent"]["b"]
    y = jax.jit(lambda y, p: y @ p["w"] + p["b"].reshape(1, -1))(y, v["called"])
    y = jax.jit(lambda y, b: y + b + jnp.tanh(y))(
        y @ v["within"]["w"], v["within"]["b"]
    )
    y = (y @ v["rows"]["w"]) + v["rows"]["b"][:, None]
    y = y @ v["torch"]["w"].T + v["torch"]["b"]
    return y @ v["apart"]["w"] + v["else"]["b"]


def test_a_bias_is_what_products_are_added_to_directly() -> None:
    names = "a scaled shared lent called within rows torch apart".split()
    v: Any = {n: {"w": normal(5, 5), "b": normal(5)} for n in names}
    v["scaled"]["s"], v["else"] = normal(5), {"b": normal(5)}
    found = biases(named, v, [normal(5, 5)], {})
    assert found == {(n, "w"): (n, "b") for n in ("a", "called", "torch")}


@pytest.mark.parametrize("name", ["bias", "shift"])
def test_refits_know_a_norm_from_a_bias(name: str) -> None:
    """Of a product, a norm, and its shift, whatever it is called, the same refit."""
    x = normal(256, 6) + 1
    v = {
        "a": {"kernel": normal(6, 16)},
        "b": {"kernel": normal(16, 12), "scale": jnp.full(12, 0.1), name: normal(12)},
        "c": {"kernel": normal(12, 3)},
    }

    def apply(v: Any, x: Any) -> Any:
        y = jax.nn.relu(x @ v["a"]["kernel"]) @ v["b"]["kernel"]
        return jax.nn.relu(y * v["b"]["scale"] + v["b"][name]) @ v["c"]["kernel"]

    graph = jp.trace(apply, v, x)
    keep = graph.full()
    keep["a"][:6] = False
    refitted = jp.reconstruct(apply, graph, keep, v, [x], positions=None, ridge=0)
    np.testing.assert_array_equal(refitted["b"][name], v["b"][name])
    # Ordinary least squares without an offset, in float64.
    read = np.maximum(np.float64(x) @ np.float64(v["a"]["kernel"]), 0)
    wanted = read @ np.float64(v["b"]["kernel"])
    (best, *_) = np.linalg.lstsq(read[:, 6:], wanted)
    np.testing.assert_allclose(refitted["b"]["kernel"][6:], best, rtol=1e-3, atol=1e-4)
    for method in ("responses", "nonlinear"):
        thin = jp.factorize(
            *(apply, graph, v, x),
            method=method,  # type: ignore[arg-type]
            ratio=0.6,
            only=["b/kernel"],
            batches=[x],
        )
        np.testing.assert_array_equal(thin.variables["b"][name], v["b"][name])


def test_a_pruned_network_is_factorised_again_saved_and_loaded(tmp_path: Any) -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            for name in "ab":
                x = nn.relu(nn.Conv(12, (3, 3), name=name)(x))
            return nn.Dense(4, name="out")(x.mean((1, 2)))

    net, x = Net(), normal(2, 6, 6, 3)
    variables = net.init(jax.random.key(0), x)
    graph = jp.trace(net.apply, variables, x)
    first = jp.factorize(
        net.apply, graph, variables, x, method="predicted", only=["params/b/*"]
    )
    once = jp.prune(first.apply, first.variables, x, budget=jp.flops(0.8))
    more = ["params/a/*", "params/out/*"]
    for method in ("svd", "predicted"):
        again = jp.factorize(
            *(once.apply, jp.trace(once.apply, once.variables, x), once.variables, x),
            method=method,  # type: ignore[arg-type]
            ratio=0.7,
            only=more,
        )
        assert set(again.chains) == {"params/a/kernel", "params/out/kernel"}
        whole = jax.tree.map(lambda x: x, once.variables)
        for layer in ("a", "out"):
            fixed = again.variables["dictionary"].get(layer, {"kernel": {}})["kernel"]
            chain = {**fixed, **again.variables["params"][layer]["kernel"]}
            left, right = chain["factor0"], chain["factor1"]
            kernel = jnp.einsum("...ir,...ro->...io", left, right)
            whole["params"][layer]["kernel"] = kernel
        want = once.apply(whole, x)
        got = again.apply(again.variables, x)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
        twice = jp.prune(again.apply, again.variables, x, budget=jp.flops(0.8))
        jp.save(tmp_path / method, twice)
        loaded = jp.load(tmp_path / method, apply=again.apply)
        np.testing.assert_array_equal(
            loaded.apply(loaded.variables, x), twice.apply(twice.variables, x)
        )
