# SPDX-License-Identifier: Apache-2.0
"""Features that are read, least-squares refits, and the criteria that look at them."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from solvers import by_bounded_descent

import jaxprune as jp
from jaxprune.base import ConfigError, DataError, GraphError
from jaxprune.features import lasso_path
from jaxprune.taps import drawn, taps

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "SAME"},
        {"padding": ((2, 0), (1, 3)), "strides": (2, 3)},
        {"padding": "VALID", "kernel_dilation": (2, 1)},
        {"padding": ((1, 1), (2, 0)), "input_dilation": (2, 3)},
    ],
    ids=lambda options: "-".join(options),
)
def test_rows_times_kernel_are_a_convolutions_outputs(options: dict[str, Any]) -> None:
    conv = nn.Conv(5, (3, 2), use_bias=False, **options)
    x = normal(2, 9, 8, 4)
    variables = conv.init(jax.random.key(0), x)
    out, seen = taps(conv.apply, lambda r: r.rows() @ r.matrix(r.kernel))(variables, x)
    ((path, (found,)),) = seen.items()
    assert path == ("params", "kernel")
    np.testing.assert_allclose(out, conv.apply(variables, x), rtol=1e-6)
    np.testing.assert_allclose(found, out.reshape(-1, 5), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dims", [("NCHW", "OIHW", "NHWC"), ("CHWN", "HWIO", "NCHW")])
def test_rows_in_any_layout(dims: tuple[str, str, str]) -> None:
    x, w = normal(2, 5, 6, 3), normal(3, 2, 3, 4)  # NHWC, HWIO
    x = x.transpose(["NHWC".index(c) for c in dims[0]])
    w = w.transpose(["HWIO".index(c) for c in dims[1]])

    def apply(variables: Any, x: Any) -> Any:
        return jax.lax.conv_general_dilated(
            x, variables["w"], (1, 2), "SAME", dimension_numbers=dims
        )

    out, seen = taps(apply, lambda r: r.rows() @ r.matrix(r.kernel))({"w": w}, x)
    last = jnp.asarray(out).transpose([dims[2].index(c) for c in "NHWC"])
    np.testing.assert_allclose(seen["w",][0], last.reshape(-1, 4), rtol=1e-4, atol=1e-5)


def test_matrix_products_of_either_order_and_in_called_programs() -> None:
    variables = {"a": normal(3, 4, 5), "b": normal(6, 5)}

    @jax.jit
    def first(w: Any, x: Any) -> Any:
        return jnp.einsum("nij,ijk->nk", x, w.astype(jnp.float32))

    def apply(variables: Any, x: Any) -> Any:
        hidden = jax.nn.relu(jax.checkpoint(first)(variables["a"], x))
        return variables["b"] @ hidden.T

    x = normal(7, 3, 4)
    look = taps(apply, lambda r: (r.rows() @ r.matrix(r.kernel), r.kernel_of))
    out, seen = look(variables, x)
    assert list(seen) == [("a",), ("b",)]
    hidden = np.einsum("nij,ijk->nk", x, variables["a"])
    np.testing.assert_allclose(seen["a",][0][0], hidden, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(seen["b",][0][0], out.T, rtol=1e-4, atol=1e-5)


def test_a_dense_layer_is_refitted_as_by_lstsq() -> None:
    apply, variables, x = networks.two_layers(jax.nn.relu)
    x = normal(64, 3)
    graph = jp.trace(apply, variables, x)
    (name,) = graph.groups
    keep = {name: np.arange(6) < 4}
    found = jp.reconstruct(
        apply, graph, keep, variables, [x[:32], (x[32:],)], positions=None, ridge=0
    )
    hidden = np.maximum(np.float64(x) @ variables["a"], 0)
    want = np.linalg.lstsq(hidden[:, :4], hidden @ variables["b"], rcond=None)[0]
    np.testing.assert_allclose(found["b"][:4], want, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(found["b"][4:], 0)
    np.testing.assert_array_equal(found["a"], jp.mask(graph, keep, variables)["a"])


class Twice(nn.Module):
    """Convolutions, the first one's channels each made twice."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.relu(nn.Conv(8, (3, 3), name="one")(x))
        x = nn.relu(nn.Conv(6, (3, 3), (2, 2), name="two")(x))
        return nn.Dense(4, name="three")(x.mean(axis=(1, 2)))


def test_copies_of_channels_can_go_without_a_loss() -> None:
    x = normal(8, 12, 10, 3)
    variables = Twice().init(jax.random.key(0), x)
    one = variables["params"]["one"]
    one["kernel"] = one["kernel"].at[..., 4:].set(one["kernel"][..., :4])
    graph = jp.trace(Twice().apply, variables, x)
    keep = {**graph.full(), "one": np.arange(8) < 4}
    found = jp.reconstruct(Twice().apply, graph, keep, variables, [x], ridge=1e-9)
    want = Twice().apply(variables, x)
    masked = Twice().apply(jp.mask(graph, keep, variables), x)
    assert np.abs(masked - want).max() > 0.05 * np.abs(want).max()
    small = jp.slim(Twice().apply, graph, keep)(jp.shrink(graph, keep, found), x)
    np.testing.assert_allclose(small, want, atol=1e-4 * np.abs(want).max())


def test_each_layer_is_as_good_as_the_best_linear_one_on_what_it_reads() -> None:
    """With the mean in the bias, as an intercept by lstsq, behind a refitted layer."""
    x = normal(16, 8, 8, 3)
    variables = Twice().init(jax.random.key(1), x)
    graph = jp.trace(Twice().apply, variables, x)
    keep = {"one": np.arange(8) % 2 == 0, "two": np.arange(6) < 4}
    found = jp.reconstruct(
        Twice().apply, graph, keep, variables, [x], positions=None, ridge=0
    )

    def read(tree: Any) -> np.ndarray:
        _, seen = taps(Twice().apply, lambda r: r.rows())(tree, x)
        return np.float64(seen["params", "three", "kernel"][0])

    dense = variables["params"]["three"]
    y = read(variables) @ np.float64(dense["kernel"]) + dense["bias"]
    seen = np.concatenate([read(found)[:, :4], np.ones((16, 1))], axis=1)
    want = np.linalg.lstsq(seen, y, rcond=None)[0]
    three = found["params"]["three"]
    fitted = np.concatenate([three["kernel"][:4], three["bias"][None]])
    np.testing.assert_allclose(seen @ fitted, seen @ want, atol=1e-3)


def test_what_is_asked_of_reconstruct_is_checked() -> None:
    apply, variables, x = networks.two_layers(jax.nn.relu)
    graph = jp.trace(apply, variables, x)
    (name,) = graph.groups
    keep = {name: np.arange(6) < 4}
    for more, error, match in (
        ({"positions": 0}, ConfigError, "positions=0"),
        ({"ridge": -1}, ConfigError, "ridge=-1"),
        ({"batches": []}, DataError, "batches is empty"),
        ({"batches": [x * jnp.inf]}, DataError, "what b reads of the batches, .* not"),
    ):
        with pytest.raises(error, match=match):
            jp.reconstruct(apply, graph, keep, variables, **{"batches": [x], **more})

    def looped(variables: Any, x: Any) -> Any:
        return jax.lax.map(lambda row: apply(variables, row[None])[0], x)

    with pytest.raises(GraphError, match="alone"):
        jp.reconstruct(looped, jp.trace(looped, variables, x), keep, variables, [x])
    with pytest.raises(
        GraphError, match=f"'{name}': the scores of 6 of 6 channels are not"
    ):
        jp.score(
            jp.reconstruction(),
            *(graph, variables),
            loss=lambda v, b: apply(v, b).sum(),
            batches=[x * jnp.nan],
            key=jax.random.key(0),
        )
    with pytest.raises(GraphError, match=f"activation: nothing reads '{name}'"):
        jp.score(
            jp.activation(),
            jp.trace(looped, variables, x),
            variables,
            loss=lambda v, b: looped(v, b).sum(),
            batches=[x],
        )


@pytest.mark.parametrize(
    ("statistic", "of"),
    [
        ("mean", lambda x: np.abs(x).mean(axis=0)),
        ("std", lambda x: x.std(axis=0)),
        ("apoz", lambda x: 1 - (x == 0).mean(axis=0)),
    ],
)
def test_activation_is_a_statistic_of_what_is_read(statistic: str, of: Any) -> None:
    apply, variables, x = networks.two_layers(jax.nn.relu)
    graph = jp.trace(apply, variables, x)
    (name,) = graph.groups
    batches = [normal(5, 3), normal(5, 3)]
    found = jp.score(
        jp.activation(statistic),
        graph,
        variables,
        loss=lambda v, b: apply(v, b).sum(),
        batches=batches,
    )
    read = np.float64(np.concatenate(batches)) @ np.float64(variables["a"])
    np.testing.assert_allclose(found[name], of(np.maximum(read, 0)), rtol=1e-4)


def test_activation_averages_over_all_that_read() -> None:
    """A channel that two layers read, once behind another function."""
    rng = np.random.default_rng(3)
    variables = {n: rng.normal(size=s) for n, s in (("a", (3, 4)), ("b", (4, 2)))}
    variables["c"] = rng.normal(size=(4, 2))
    variables = jax.tree.map(np.float32, variables)

    def apply(variables: Any, x: Any) -> Any:
        x = jax.nn.relu(x @ variables["a"])
        return x @ variables["b"] + (2 * x) @ variables["c"]

    x = normal(9, 3)
    graph = jp.trace(apply, variables, x)
    (name,) = graph.groups
    more = {"loss": lambda v, b: apply(v, b).sum(), "batches": [x]}
    hidden = np.maximum(np.float64(x) @ np.float64(variables["a"]), 0)
    both = np.concatenate([hidden, 2 * hidden])
    for statistic, want in (("mean", both.mean(axis=0)), ("std", both.std(axis=0))):
        found = jp.score(jp.activation(statistic), graph, variables, **more)
        np.testing.assert_allclose(found[name], want, rtol=1e-4)
    with pytest.raises(ConfigError, match="'max'.*one of mean, std, apoz"):
        jp.activation("max")  # type: ignore[arg-type]


def test_deviations_far_under_their_mean_are_seen() -> None:
    """1000 ± 0.1, the means of the batches 0.3 apart."""
    variables = {n: np.eye(4, dtype=np.float32) for n in ("a", "b")}

    def apply(variables: Any, x: Any) -> Any:
        return jax.nn.relu(x @ variables["a"]) @ variables["b"]

    spread = np.float32([0.1, 0.2, 0.05, 0.4])
    batches = [np.float32(1000 + 0.3 * i + spread * normal(50, 4)) for i in range(3)]
    graph = jp.trace(apply, variables, batches[0])
    found = jp.score(
        jp.activation("std"),
        graph,
        variables,
        loss=lambda v, b: apply(v, b).sum(),
        batches=batches,
    )
    (deviations,) = found.values()
    want = np.float64(np.concatenate(batches)).std(axis=0)
    np.testing.assert_allclose(deviations, want, rtol=1e-3)


def test_the_lasso_path_meets_its_subgradient_conditions() -> None:
    z = normal(40, 7)
    z[:, 6] = z[:, 0] + 1e-3 * z[:, 5]  # nearly twice the same
    gram = np.float64(z.T @ z)
    betas = np.float64(lasso_path(jnp.asarray(gram, jnp.float32), 20, 2000))
    top = np.abs(gram.sum(axis=1)).max()
    strengths = top * 1e-3 ** (np.arange(1, 21) / 20)
    for beta, strength in zip(betas, strengths, strict=True):
        slope = gram @ (1 - beta)  # of what is minimised, with the sign turned
        assert (np.abs(slope) <= strength + 2e-3 * top).all()
        on = beta != 0
        np.testing.assert_allclose(
            slope[on], strength * np.sign(beta[on]), atol=2e-3 * top
        )


def test_the_lasso_path_is_another_solvers() -> None:
    z = np.float64(normal(40, 6)) * [3, 1, 2, 0.5, 1.5, 1]
    z[:, 1] += z[:, 0]
    gram = z.T @ z / 40
    betas = lasso_path(jnp.asarray(gram, jnp.float32), 12)
    strengths = np.abs(gram.sum(axis=1)).max() * 1e-3 ** (np.arange(1, 13) / 12)
    want = [by_bounded_descent(gram, s) for s in strengths]
    np.testing.assert_allclose(betas, want, atol=5e-4)


def test_reconstruction_is_the_share_of_the_path_on_which_a_channel_lasts() -> None:
    """Of what each channel adds, z[c] = h[c] b[c], where every position is the same."""
    rng = np.random.default_rng(5)
    variables = {"a": rng.normal(size=(3, 6)), "b": rng.normal(size=(6, 20))}
    variables = jax.tree.map(np.float32, variables)

    def apply(variables: Any, x: Any) -> Any:
        return jnp.tanh(x @ variables["a"]) @ variables["b"]

    x = np.repeat(normal(1, 3), 8, axis=0)
    graph = jp.trace(apply, variables, x)
    (name,) = graph.groups
    found = jp.score(
        jp.reconstruction(positions=4, steps=20),
        graph,
        variables,
        loss=lambda v, b: apply(v, b).sum(),
        batches=[x],
        key=jax.random.key(0),
    )
    wide = jax.tree.map(np.float64, variables)
    added = np.tanh(x[0] @ wide["a"])[:, None] * wide["b"]
    gram = 4 * added @ added.T
    strengths = np.abs(gram.sum(axis=1)).max() * 1e-3 ** (np.arange(1, 21) / 20)
    betas = np.array([by_bounded_descent(gram, s) for s in strengths])
    size = np.abs(betas).mean(axis=0)
    want = (np.abs(betas) > 1e-6).mean(axis=0) + 1e-3 * size / (1 + size)
    np.testing.assert_allclose(found[name], want, atol=1e-4)


@pytest.mark.parametrize("behind", [(), (jp.normalize(),), (jp.ema(0.5),)])
def test_scores_that_are_dear_are_those_of_all_batches(behind: Any) -> None:
    """Left out before the last batch, but where something behind averages them."""
    apply, variables, x = networks.two_layers(jax.nn.relu)
    graph = jp.trace(apply, variables, x)
    criterion = jp.chain(jp.reconstruction(positions=4, steps=6), *behind)
    look = {"loss": lambda v, b: apply(v, b).sum(), "key": jax.random.key(0)}
    look["batches"] = [normal(5, 3) for _ in range(3)]
    found = jp.score(criterion, graph, variables, **look)
    want = jp.score(criterion._replace(costly=False), graph, variables, **look)
    for name, scores in want.items():
        np.testing.assert_allclose(found[name], scores, rtol=1e-4)


def test_reconstruction_ranks_by_what_readers_miss() -> None:
    """Channels that do not overlap go by their energy, a faint copy goes first."""
    energy = np.array([3.0, 1.0, 5.0, 2.0, 4.0, 0.5], np.float32)
    variables = {"a": np.eye(6, dtype=np.float32), "b": np.diag(energy)}
    x = np.repeat(np.eye(6, dtype=np.float32), 4, axis=0)

    def apply(variables: Any, x: Any) -> Any:
        return jax.nn.relu(x @ variables["a"]) @ variables["b"]

    graph = jp.trace(apply, variables, x)
    (name,) = graph.groups
    found = jp.score(
        jp.reconstruction(positions=512),
        graph,
        variables,
        loss=lambda v, b: apply(v, b).sum(),
        batches=[x, x],
        key=jax.random.key(0),
    )
    assert (np.argsort(found[name]) == np.argsort(energy)).all()


def test_reconstruction_error_is_what_a_reader_misses_of_all_that_it_reads() -> None:
    apply, variables, x = networks.two_layers(jax.nn.relu)
    x = normal(20, 3)
    graph = jp.trace(apply, variables, x)
    (name,) = graph.groups

    def scored(batches: Any, **more: Any) -> Any:
        criterion = jp.reconstruction_error(positions=20)
        look = {"loss": lambda v, b: apply(v, b).sum(), "batches": batches}
        return jp.score(criterion, graph, variables, **look, **more)

    hidden = np.maximum(np.float64(x) @ variables["a"], 0)
    added = [np.outer(hidden[:, c], variables["b"][c]) for c in range(6)]
    want = [np.sum(z**2) / np.sum(sum(added) ** 2) for z in added]
    # Batches of one position, so that it does not matter which are drawn.
    found = scored(np.split(x, 20), key=jax.random.key(0))
    np.testing.assert_allclose(found[name], want, rtol=1e-4)
    # And of one that has as few as are asked for, each once.
    found = scored([x], key=jax.random.key(1))
    np.testing.assert_allclose(found[name], want, rtol=1e-4)
    with pytest.raises(ConfigError, match="reconstruction_error needs a key"):
        scored([x])
    with pytest.raises(ConfigError, match="positions=0"):
        jp.reconstruction_error(0)


@pytest.mark.parametrize(("length", "count"), [(12, 5), (7, 7), (7, 9), (5, None)])
def test_outputs_are_drawn_once_and_from_every_part(length: int, count: Any) -> None:
    seen = np.zeros(length, int)
    for seed in range(200):
        places = np.asarray(drawn(length, count, jax.random.key(seed)))
        assert (np.diff(places) > 0).all()
        assert len(places) == min(length, count or length)
        parts = places * len(places) // length
        assert len(places) < length or (parts == np.arange(length)).all()
        seen[places] += 1
    # 5 of 12: parts of 2 or 3, so that each is drawn 100 or 67 times, more or less.
    share = min(length, count or length) / length
    np.testing.assert_allclose(seen / 200, share, atol=0.2)


def test_what_makes_a_criterion_is_none_in_a_chain() -> None:
    with pytest.raises(ConfigError, match=r"is no criterion; call it: normalize\(\)"):
        jp.chain(jp.magnitude(), jp.normalize)  # type: ignore[arg-type]


def test_convolutional_networks_are_scored() -> None:
    x = normal(2, 8, 8, 3)
    variables = Twice().init(jax.random.key(0), x)
    graph = jp.trace(Twice().apply, variables, x)
    more = {"loss": lambda v, b: Twice().apply(v, b).sum(), "batches": [x]}
    first = jp.score(jp.activation(), graph, variables, **more)
    params = variables["params"]
    want = nn.relu(nn.Conv(8, (3, 3)).apply({"params": params["one"]}, x))
    np.testing.assert_allclose(first["one"], want.mean(axis=(0, 1, 2)), rtol=1e-5)
    second = jp.score(
        jp.reconstruction(), graph, variables, **more, key=jax.random.key(0)
    )
    assert all(np.ptp(s) > 0 for s in second.values())
    with pytest.raises(ConfigError, match="key"):
        jp.score(jp.reconstruction(), graph, variables, **more)
    with pytest.raises(ConfigError, match="positions=0"):
        jp.reconstruction(positions=0)
