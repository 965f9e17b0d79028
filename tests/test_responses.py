# SPDX-License-Identifier: Apache-2.0
"""Low rank in what kernels answer: what is behind a product, the fits, the networks."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune import responses
from jaxprune.behind import Answers, behind

RNG = np.random.default_rng(1)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


class Net(nn.Module):
    """Convolutions with and without a ReLU behind what is affine by channel."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(6, (3, 3), name="normed", use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, name="norm")(x))
        x = jnp.maximum(nn.Conv(5, (3, 3), name="biased")(x) * 2, 0)
        x = nn.leaky_relu(nn.Conv(5, (1, 1), name="leaky")(x))
        y = nn.Conv(5, (1, 1), name="shared")(x)
        x = nn.relu(y) + y
        x = nn.relu(nn.Conv(5, (1, 1), name="gated")(x) * x)
        return nn.Dense(4, name="last")(x.mean(axis=(1, 2)))


def filled(net: nn.Module, x: np.ndarray) -> Any:
    """Variables of which none is constant."""
    shapes = jax.eval_shape(net.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda s: normal(*s.shape), shapes)
    if "batch_stats" in variables:
        stats = variables["batch_stats"]
        for norm in stats.values():
            norm["var"] = np.abs(norm["var"]) + 0.5
    return variables


def test_a_relu_is_found_behind_a_bias_and_a_batch_norm() -> None:
    net, x = Net(), normal(2, 5, 6, 3)
    variables = filled(net, x)
    parts: dict[Any, Any] = {}  # in the program's order

    def look(found: Answers) -> Any:
        parts[found.path] = found
        return found.answers, found.before

    out, seen = jax.jit(behind(net.apply, look))(variables, x)
    np.testing.assert_allclose(out, net.apply(variables, x), rtol=1e-5, atol=1e-5)
    names = [path[1] for path in parts]
    assert names == ["normed", "biased", "leaky", "shared", "gated", "last"]
    with_relu = {p[1] for p, f in parts.items() if f.before is not None}
    assert with_relu == {"normed", "biased"}
    p, stats = variables["params"], variables["batch_stats"]["norm"]
    got, before = seen["params", "normed", "kernel"]
    answers = nn.Conv(6, (3, 3), use_bias=False).apply({"params": p["normed"]}, x)
    np.testing.assert_allclose(got, answers, rtol=1e-4, atol=1e-4)
    want = (answers - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * p["norm"]["scale"]
    np.testing.assert_allclose(before, want + p["norm"]["bias"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("call", [jax.jit, jax.checkpoint, lambda f: f])
def test_another_reader_in_a_called_program_is_seen(call: Any) -> None:
    """Only of what the ReLU alone reads is `before` known, inlined or not."""
    x, variables = np.ones((2, 4)), {"w": np.eye(4), "b": np.ones(4)}
    variables["v"] = np.ones((4, 3))
    alone, both = call(nn.relu), call(lambda y: nn.relu(y) + y)

    def net(variables: Any, x: jax.Array) -> jax.Array:
        return both(alone(x @ variables["w"] + variables["b"]) @ variables["v"])

    found = {}
    behind(net, lambda a: found.setdefault(a.path, a.before is not None))(variables, x)
    assert found == {("w",): True, ("v",): False}


def test_each_element_goes_where_its_cost_is_least() -> None:
    target, given = np.linspace(-2, 2, 9)[:, None], np.linspace(-2, 2, 11)[None]
    grid = np.linspace(-5, 5, 20001)
    for weight in (0.01, 1.0, 5.0):
        z = responses.nearest(target, given, weight)

        def cost(z: np.ndarray, weight: float = weight) -> np.ndarray:
            fit = np.maximum(target[..., None], 0) - np.maximum(z, 0)
            return fit**2 + weight * (z - given[..., None]) ** 2

        best = cost(grid).min(axis=-1)
        np.testing.assert_allclose(cost(z[..., None])[..., 0], best, atol=1e-6)


@pytest.mark.parametrize("biased", [True, False])
def test_a_fit_of_low_rank_is_the_whitened_svd(biased: bool) -> None:
    y = RNG.normal(size=(400, 7)) @ RNG.normal(size=(7, 7)) + RNG.normal(size=7)
    z = y @ RNG.normal(size=(7, 7)) + RNG.normal(size=(400, 7)) + 3.0
    fixed = None if biased else RNG.normal(size=7)
    fit = responses.reduced_rank(y, z, 3, fixed)
    means = (y.mean(axis=0), z.mean(axis=0)) if biased else (np.zeros(7), fixed)
    a, b = y - means[0], z - means[1]
    # The thin Q of a whitens it: the best fit of rank 3 is the SVD of Q^T b, cut.
    q, _ = np.linalg.qr(a)
    u, s, v = np.linalg.svd(q.T @ b)
    want = q @ (u[:, :3] * s[:3]) @ v[:3] + means[1]
    np.testing.assert_allclose(fit(y), want, atol=1e-5)


def answers(count: int) -> np.ndarray:
    """In half of the channels far below 0, where much happens that no ReLU shows."""
    rng = np.random.default_rng(count)
    hidden = rng.normal(size=(count, 8))
    mix = np.random.default_rng(5).normal(size=(8, 8))
    spread = np.where(np.arange(8) < 4, 6.0, 1.0)
    return hidden @ mix * spread - np.where(np.arange(8) < 4, 40.0, 0.0)


def test_through_the_relu_the_objective_falls_and_beats_the_linear_fit() -> None:
    seen, held = answers(2000), answers(1001)
    linear = responses.reduced_rank(seen, seen, 4)
    for fixed in (None, np.zeros(8)):
        fit, relaxed = responses.rectified(seen, seen, 4, fixed)
        for falls in (relaxed[:25], relaxed[25:]):  # as long as the weight stays
            assert np.all(np.diff(falls) <= 1e-9 * falls[0])

    def error(fit: responses.Fit) -> float:
        return float(np.mean((np.maximum(held, 0) - np.maximum(fit(held), 0)) ** 2))

    fit, _ = responses.rectified(seen, seen, 4)
    assert error(fit) < 0.7 * error(linear)


class Two(nn.Module):
    """Two convolutions with a ReLU between, the last without."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(16, (3, 3), name="a")(x)
        x = nn.BatchNorm(use_running_average=True, name="norm")(x)
        return nn.Conv(12, (3, 3), name="b")(nn.relu(x))


def test_a_network_is_fitted_through_its_relus_and_layer_after_layer() -> None:
    net, x = Two(), normal(4, 9, 9, 8)
    variables = filled(net, x)
    variables["params"]["norm"]["scale"] = np.linspace(-0.5, 1, 16, dtype=np.float32)
    graph = jp.trace(net.apply, variables, x)
    want = np.asarray(net.apply(variables, x))
    errors = {}
    for method in ("svd", "responses", "nonlinear", "asymmetric", "asymmetric3d"):
        more = {"batches": [x[:2], (x[2:],)], "positions": 1000}
        found = jp.factorize(
            net.apply, graph, variables, x, method=method, ratio=0.4, **more
        )
        errors[method] = np.mean((found.apply(found.variables, x) - want) ** 2)
        relus = {p: c.relu for p, c in found.chains.items()}
        fitted = method in ("nonlinear", "asymmetric", "asymmetric3d")
        assert relus == {"params/a/kernel": fitted, "params/b/kernel": False}
    shapes = [f.shape for f in found.variables["params"]["a"]["kernel"].values()]
    (kh, _, read, inner), (_, kw, _, rank), (*_, out) = shapes
    assert (kh, read, kw, out) == (3, 8, 3, 16) and shapes[2] == (1, 1, rank, 16)
    # The last layer has no ReLU: of all kernels of its rank, the asymmetric one is
    # nearest given what it reads.
    assert errors["asymmetric"] < errors["nonlinear"] < errors["responses"]
    assert errors["responses"] < errors["svd"]


def test_without_a_bias_the_answers_themselves_are_projected() -> None:
    x = normal(3, 6, 6, 8)
    net = nn.Conv(12, (1, 1), use_bias=False)
    variables = {"params": {"kernel": normal(1, 1, 8, 12)}}
    graph = jp.trace(net.apply, variables, x)
    more = {"method": "responses", "ratio": 0.5, "batches": [x]}
    found = jp.factorize(net.apply, graph, variables, x, **more)
    y = np.float64(net.apply(variables, x)).reshape(-1, 12)
    u, s, v = np.linalg.svd(y, full_matrices=False)
    want = (u[:, :2] * s[:2]) @ v[:2]
    got = np.asarray(found.apply(found.variables, x)).reshape(-1, 12)
    np.testing.assert_allclose(got, want, atol=1e-3)


# What follows is Zhang et al., 2016, once more, from their equations: in NumPy's
# float64, by its least squares and SVD, with convolutions written out.


def convolved(x: np.ndarray, kernel: np.ndarray, bias: Any = 0.0) -> np.ndarray:
    """Of images and a kernel of odd size, padded so that the size stays."""
    by = [(0, 0), *((n // 2, n // 2) for n in kernel.shape[:2]), (0, 0)]
    windows = np.lib.stride_tricks.sliding_window_view(
        np.pad(x, by), kernel.shape[:2], axis=(1, 2)
    )
    return np.einsum("bhwcij,ijco->bhwo", windows, kernel) + np.float64(bias)


def nearest_of_rank(given: np.ndarray, wanted: np.ndarray, rank: int) -> np.ndarray:
    """M given + b of least |wanted - (M given + b)|^2, M of this rank.

    Reduced-rank regression: of the fit by least squares, the principal axes.
    """
    y, mean = given - given.mean(axis=0), wanted.mean(axis=0)
    best = y @ np.linalg.lstsq(y, wanted - mean, rcond=None)[0]
    axes = np.linalg.svd(best, full_matrices=False)[2][:rank]
    return best @ axes.T @ axes + mean


def through_the_relu(
    given: np.ndarray, target: np.ndarray, rank: int
) -> tuple[np.ndarray, list[float]]:
    """M given + b, and the relaxed objective after each of 25 turns by 0.01, 25 by 1.

    In each the auxiliary z is the better of z0 = min(0, y') and z1 = max(0, (lambda y'
    + r(y)) / (lambda + 1)), y' = M given + b; then M and b are those nearest to z.
    """
    fit, goal, falls = nearest_of_rank(given, target, rank), np.maximum(target, 0), []
    for weight in [0.01] * 25 + [1.0] * 25:
        z0 = np.minimum(0, fit)
        z1 = np.maximum(0, (weight * fit + goal) / (weight + 1))
        cost0 = goal**2 + weight * (z0 - fit) ** 2
        cost1 = (goal - z1) ** 2 + weight * (z1 - fit) ** 2
        z = np.where(cost0 < cost1, z0, z1)
        fit = nearest_of_rank(given, z, rank)
        cost = (goal - np.maximum(z, 0)) ** 2 + weight * (z - fit) ** 2
        falls.append(float(cost.sum(axis=1).mean()))
    return fit, falls


def apart(target: np.ndarray, fit: np.ndarray, relu: bool) -> float:
    """The mean squared distance of rows, behind the ReLU where there is one."""
    y, z = (np.maximum(v, 0) if relu else v for v in (target, fit))
    return float(((y - z) ** 2).sum(axis=-1).mean())


def test_the_alternation_is_the_papers() -> None:
    target, rng = answers(300), np.random.default_rng(7)
    given = target + rng.normal(size=target.shape)  # as approximated layers give
    fit, relaxed = responses.rectified(given, target, 3)
    wanted, falls = through_the_relu(given, target, 3)
    np.testing.assert_allclose(relaxed, falls, rtol=1e-6)
    # Of all turns the best is taken, not the last.
    assert apart(target, fit(given), True) <= apart(target, wanted, True) * (1 + 1e-6)


class Deep(nn.Module):
    """Two convolutions and a dense layer; ReLUs between, or none."""

    relu: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        between = nn.relu if self.relu else lambda x: x
        x = between(nn.Conv(8, (3, 3), name="a")(x))
        x = between(nn.Conv(9, (3, 3), name="b")(x))
        return nn.Dense(7, name="c")(x)


@functools.cache
def deep(relu: bool, method: str) -> tuple[np.ndarray, Any, jp.Factorized]:
    """(images, params, the same factorised), fitted to all that its layers answer."""
    rng = np.random.default_rng(3)
    net, x = Deep(relu), rng.normal(size=(3, 6, 7, 5)).astype(np.float32)
    shapes = jax.eval_shape(net.init, jax.random.key(0), x)
    tree = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)
    graph = jp.trace(net.apply, tree, x)
    more = {"ratio": 0.5, "batches": [x[:2], x[2:]], "positions": 10**6}
    return (
        x,
        tree["params"],
        jp.factorize(net.apply, graph, tree, x, method=method, **more),
    )


def multiplied(kernel: Any) -> np.ndarray:
    """A kernel [kh, kw, in, out] of the tree, its factors multiplied out."""
    parts = list(kernel.values()) if isinstance(kernel, dict) else [kernel]
    parts = [np.float64(p).reshape((1, 1, *p.shape)[-4:]) for p in parts]

    def times(one: np.ndarray, two: np.ndarray) -> np.ndarray:
        (a, b, i, _), (c, d, _, o) = one.shape, two.shape
        return np.einsum("abir,cdro->acbdio", one, two).reshape(a * c, b * d, i, o)

    return functools.reduce(times, parts)


def separated(kernel: np.ndarray, count: int) -> np.ndarray:
    """The nearest kernel of so many filters [kh, 1], and filters [1, kw] behind."""
    kh, kw, read, out = kernel.shape
    u, s, v = np.linalg.svd(kernel.transpose(0, 2, 1, 3).reshape(kh * read, kw * out))
    low = (u[:, :count] * s[:count]) @ v[:count]
    return low.reshape(kh, read, kw, out).transpose(0, 2, 1, 3)


def layers(
    x: np.ndarray, params: Any, found: jp.Factorized, relu: bool
) -> Iterator[Any]:
    """(name, rank or None, answers to be met, answers given, the network's own, ReLU).

    Rows of each layer in turn: what the given network answers, ReLU not yet applied;
    what the layer, its channels still whole, makes of what the factorised layers before
    give; and what its factors make of it.
    """
    small, true, own = found.variables["params"], np.float64(x), np.float64(x)
    for name in ("a", "b", "c"):
        kernel, bias = multiplied(params[name]["kernel"]), params[name]["bias"]
        chain = found.chains.get(f"params/{name}/kernel")
        parts, whole = small[name]["kernel"], kernel
        if chain and len(parts) == 3:
            whole = separated(kernel, parts["factor0"].shape[-1])
        given = convolved(own, whole)
        true = convolved(true, kernel, bias)
        own = convolved(own, multiplied(parts), small[name]["bias"])
        last = relu and name != "c"
        rows = [v.reshape(-1, v.shape[-1]) for v in (true, given, own)]
        yield name, chain and chain.rank, *rows, last
        if last:
            true, own = np.maximum(true, 0), np.maximum(own, 0)


@pytest.mark.parametrize("method", ["asymmetric", "asymmetric3d"])
def test_linear_layers_are_fitted_to_what_those_before_give(method: str) -> None:
    x, params, found = deep(False, method)
    cut = []
    for name, rank, true, given, own, _ in layers(x, params, found, False):
        if rank:
            cut.append(name)
            wanted = nearest_of_rank(given, true, rank)
            np.testing.assert_allclose(own, wanted, atol=1e-5 * np.abs(true).max())
    # A matrix has no window to be separated.
    assert cut == (["a", "b", "c"] if method == "asymmetric" else ["a", "b"])
    out = np.asarray(found.apply(found.variables, x)).reshape(own.shape)
    np.testing.assert_allclose(out, own, atol=1e-5 * np.abs(own).max())


@pytest.mark.parametrize("method", ["asymmetric", "asymmetric3d"])
def test_layers_are_fitted_through_the_relu_as_the_paper_does(method: str) -> None:
    x, params, found = deep(True, method)
    for name, rank, true, given, own, relu in layers(x, params, found, True):
        if rank:
            assert found.chains[f"params/{name}/kernel"].relu == relu
            linear = nearest_of_rank(given, true, rank)
            wanted = through_the_relu(given, true, rank)[0] if relu else linear
            least = apart(true, wanted, relu)
            assert apart(true, own, relu) <= least * (1 + 1e-5)
            assert not relu or least < 0.95 * apart(true, linear, relu)


def test_who_does_not_look_at_what_the_layers_before_give_fits_worse() -> None:
    """So that the references tell 'asymmetric' from what it adds to."""
    for relu, method in ((False, "responses"), (True, "nonlinear")):
        x, params, found = deep(relu, method)
        _, second, _ = layers(x, params, found, relu)
        _, rank, true, given, own, _ = second
        fit = through_the_relu(given, true, rank)[0]
        wanted = fit if relu else nearest_of_rank(given, true, rank)
        assert apart(true, own, relu) > 1.05 * apart(true, wanted, relu)


def test_both_steps_of_asymmetric3d_leave_the_same_fraction() -> None:
    found = deep(False, "asymmetric3d")[2]
    for name, read, out in (("a", 5, 8), ("b", 8, 9)):
        parts = found.variables["params"][name]["kernel"].values()
        spatial, second, third = (p.shape for p in parts)
        s, r = spatial[-1], third[-2]
        assert spatial == (3, 1, read, s) and second == (1, 3, s, r)
        assert third == (1, 1, r, out)
        left = r * (9 * read + out) / (9 * read * out)
        # The most filters within that fraction of [3, 3, in, r].
        fits = [n for n in range(99) if n * 3 * (read + r) <= left * 9 * read * r]
        assert s == fits[-1]
