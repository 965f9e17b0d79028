# SPDX-License-Identifier: Apache-2.0
"""What trace finds: groups, slots, what is frozen and why; its errors."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
import scipy.sparse
from flax import nnx

import jaxprune as jp
from jaxprune.base import INPUT, OUTPUT, GraphError
from jaxprune.labels import components
from jaxprune.models.segnet import SegNet


def segnet() -> tuple[Any, Any, Any]:
    net = SegNet(11)
    x = jax.ShapeDtypeStruct((1, 360, 480, 3), jnp.float32)
    return net.apply, jax.eval_shape(net.init, jax.random.key(0), x), x


def test_segnet_has_the_published_groups_and_costs() -> None:
    """21 groups: un-pooling ties four encoder stages to the decoder."""
    arguments = segnet()
    before = len(jax.live_arrays())
    graph = jp.trace(*arguments, train=False)
    assert len(jax.live_arrays()) == before  # no weights are allocated
    assert len(graph.groups) == 21
    assert graph.channels == 6976
    assert all(g.exact for g in graph.groups.values())
    dense = jp.cost(graph)
    assert dense.flops == 2 * 106_712_432_640
    assert dense.params == 29_449_355
    half = {n: np.arange(g.size) % 2 == 0 for n, g in graph.groups.items()}
    cut = jp.cost(graph, half)
    assert round(cut.flops / 2e9, 3) == 27.026
    assert cut.params == 7_370_315
    tied = graph.groups["encoder4_conv3"]
    assert {"decoder5_conv3", "encoder4_conv3"} <= {s.path[1] for s in tied.slots}


def test_slots_say_who_makes_and_who_reads_a_channel() -> None:
    graph = jp.trace(*networks.linen(networks.Vgg))
    first, second, dense = graph.groups.values()
    found = {("/".join(s.path), s.axis): s for s in first.slots}
    assert found["params/Conv_0/kernel", 3].role == "out"
    assert found["params/Conv_0/bias", 0].role == "out"
    assert found["params/Conv_1/kernel", 2].role == "in"
    flat = {s.path[1]: s for s in second.slots}["Dense_0"]
    # Flattening [2, 2, C] puts channel c at c, C + c, 2C + c, 3C + c.
    want = np.arange(9)[:, None] + 9 * np.arange(4)
    np.testing.assert_array_equal(np.sort(flat.indices, axis=1), want)
    assert dense.size == 10


def test_names_and_order_are_stable() -> None:
    apply, variables, x = networks.linen(networks.ResNet)
    a, b = jp.trace(apply, variables, x), jp.trace(apply, variables, x)
    assert list(a.groups) == list(b.groups)
    assert a.to_json() == b.to_json()
    assert list(a.groups)[0] == "Conv_0"


def test_graph_survives_json() -> None:
    graph = jp.trace(*networks.linen(networks.Fcn))
    again = jp.Graph.from_json(graph.to_json())
    assert again.to_json() == graph.to_json()
    assert jp.cost(again) == jp.cost(graph)
    assert "Conv_0" in str(graph)


def test_input_and_output_channels_are_frozen() -> None:
    graph = jp.trace(*networks.linen(networks.Vgg))
    causes = {("/".join(f.path[1:]), f.axis): f.cause for f in graph.frozen}
    assert causes["Conv_0/kernel", 2] == INPUT
    assert causes["Dense_1/kernel", 1] == OUTPUT
    assert causes["Dense_1/bias", 0] == OUTPUT


FREEZING = {
    "sort": lambda x: jnp.sort(x, axis=-1),
    "cumsum": lambda x: jnp.cumsum(x, axis=-1),
    "argmax": lambda x: x * x.argmax(axis=-1)[:, None],
    "top_k": lambda x: x + jax.lax.top_k(x, 6)[0],
    "scatter": lambda x: jnp.asarray(x).at[:, x.sum(1).argmax()].add(1.0),
    "gather": lambda x: x + x[:, (jnp.arange(6) + x.sum(1).argmax()) % 6],
    "dynamic_update_slice": lambda x: jax.lax.dynamic_update_slice(
        x, jnp.ones((4, 2)), (0, x.sum(1).argmax())
    ),
    "fft": lambda x: jnp.fft.fft(x).real,
    # These have no rule.
    "lu": lambda x: x @ jnp.linalg.inv(x.T @ x),
    "pure_callback": lambda x: jax.pure_callback(np.sin, x, x),
    "cholesky": jax.jit(lambda x: x @ jnp.linalg.cholesky(x.T @ x)),
}


@pytest.mark.parametrize("name", FREEZING)
def test_what_cannot_be_cut_is_frozen_and_named(name: str) -> None:
    apply, variables, x = networks.two_layers(FREEZING[name])
    graph = jp.trace(apply, variables, x)
    assert not graph.groups
    assert any(name in f.cause for f in graph.frozen)
    assert jp.verify(apply, graph, {}, variables, x) == 0


def test_causes_name_the_line_of_the_users_code() -> None:
    _, variables, x = networks.two_layers(jnp.sort)
    graph = jp.trace(lambda v, x: jnp.sort(x @ v["a"]) @ v["b"], variables, x)
    assert any("test_trace.py" in f.cause for f in graph.frozen)


EXACT = {
    "relu": jax.nn.relu,
    "softplus": jax.nn.softplus,
    "scaled": lambda x: 2 * x / 3 - 1,
    "layer norm, fast": lambda x: (
        (x - x.mean(-1, keepdims=True))
        / jnp.sqrt((x**2).mean(-1, keepdims=True) - x.mean(-1, keepdims=True) ** 2 + 1)
    ),
    "logsumexp of zero": lambda x: x * jnp.sum(jnp.expm1(x), -1, keepdims=True),
    "iota": lambda x: x * jnp.arange(6.0),
    "constant": lambda x: x * np.linspace(1, 2, 6, dtype=np.float32) + 1,
    "reverse": lambda x: x[:, ::-1],
    "concatenate": lambda x: jnp.concatenate([x[:, 3:], x[:, :3]], -1),
    "pad": lambda x: jnp.pad(x, ((0, 0), (2, 2)))[:, 2:-2],
    "stack": lambda x: jnp.stack([x, 2 * x]).sum(0),
    "tile": lambda x: jnp.tile(x, (1, 2))[:, 6:],
    "repeat": lambda x: jnp.repeat(x, 2, -1)[:, ::2],
    "group norm": lambda x: x - jnp.repeat(x.reshape(4, 3, 2).mean(-1), 2, -1),
    "there and back": lambda x: jnp.reshape(jnp.reshape(x, (4, 2, 3)), (4, 6)),
    "permuted": lambda x: x[:, np.array([3, 1, 0, 2, 5, 4])],
    "permuted under jit": lambda x: jnp.take(
        x, jnp.array([3, -1, 0, 2, 5, 1]), axis=-1
    ),
    "turned by iota": lambda x: x + jnp.take(x, 5 - jnp.arange(6), axis=1),
    "some twice": lambda x: jnp.concatenate([x[:, [0, 0, 3]], x[:, [5, 5, 4]]], -1),
    "chosen by a mask": lambda x: x * x[:, np.arange(6) % 2 > 0].sum(-1)[:, None],
    "along axis": lambda x: jnp.take_along_axis(x, np.arange(6)[None, ::-1], axis=-1),
    "gather rows": lambda x: x[jnp.array([3, 1, 0, 2])],
    "dynamic slice": lambda x: jax.lax.dynamic_slice(x, (x.shape[0] - 3, 0), (2, 6)),
    "fft": lambda x: jnp.fft.fft(x, axis=0).real,
    "sum of fft": lambda x: x * jnp.fft.fft(x, axis=0).real.sum(-1, keepdims=True),
    "sum of rounded": lambda x: x * jnp.round(jnp.sinh(x)).sum(-1, keepdims=True),
    "unstack": lambda x: x + sum(jnp.unstack(jnp.stack([x, jnp.sin(x)], 1), axis=1)),
    "bessel": lambda x: x * jax.scipy.special.i0e(x),
    "where": lambda x: jnp.where(x > 0, x, 0.5),
    "remat": jax.checkpoint(lambda x: jnp.sin(x)),
    "jit": jax.jit(lambda x: x**3),
    "einsum": lambda x: jnp.einsum("bc,bd->bc", x, x),
    "softmax weights": lambda x: x * jax.nn.softmax(jnp.ones_like(x[:, 0])[:, None]),
    # What removed channels hold is the same for all of them, so it is brought in again.
    "sum of exp": lambda x: x * jnp.exp(x).sum(-1, keepdims=True),
    "sum of squared distances": lambda x: x / (1 + x.var(-1, keepdims=True)),
    "maximum": lambda x: x - x.max(axis=-1, keepdims=True),
    "maximum of ties": lambda x: x - (x - jnp.sin(x)[:, :1]).max(-1, keepdims=True),
    "minimum under an axis": lambda x: x * (x - x.sum(-1)[:, None]).T.min(0)[:, None],
    "product": lambda x: x * jnp.cos(x - x.mean(-1)[:, None]).prod(-1, keepdims=True),
    "all": lambda x: x * (jnp.exp(x) > 0.3).all(-1, keepdims=True),
    "softmax": jax.nn.softmax,
    "rows and channels": lambda x: (
        x
        * jnp.square(x[None] - x.mean(-1)[None, :, None])
        .transpose(2, 1, 0)
        .sum((0, 2))[:, None]
    ),
    "mixed tokens": lambda x: _mixed_tokens(x),
    "squeezed": lambda x: (
        x
        * jnp.exp(jnp.squeeze(x[:, None] - x.mean(-1)[:, None, None], 1)).mean(-1)[
            :, None
        ]
    ),
    "around a spread": lambda x: (
        x * jnp.cos(x - x.var(-1, keepdims=True)).sum(-1, keepdims=True)
    ),
    "spread twice": lambda x: x * (x - x.var(-1, keepdims=True)).var(-1, keepdims=True),
    "through a call": lambda x: (
        x * jax.jit(jnp.cos)(jax.jit(jnp.subtract)(x, x.mean(-1)[:, None])).mean()
    ),
    "around means of groups": lambda x: (
        x - jnp.repeat(jnp.cos(jnp.exp(x / 9)).reshape(4, 3, 2).mean(-1), 2, -1)
    ),
    "beside what stays": lambda x: (
        x * jnp.concatenate([jnp.exp(x / 9) + x[:, :1], x[:, :1]], -1).var(-1)[:, None]
    ),
    "under another": lambda x: (
        x * jnp.concatenate([jnp.exp(x / 9), jnp.cos(x + 1)]).var(-1)[:4, None]
    ),
    "log of a softmax": lambda x: x * jax.nn.log_softmax(x).sum(-1, keepdims=True) / 9,
    "unsigned": lambda x: _of_unsigned(x),
    "integer division": lambda x: (
        x + jnp.prod(2 * jax.lax.div((0 * x).astype(int) + 1, 2), -1, keepdims=True)
    ),
    "bits": lambda x: (
        x
        * jnp.bitwise_and.reduce(
            (0 * x).astype(int) + 1, axis=-1, keepdims=True
        ).astype(x.dtype)
    ),
}


def _mixed_tokens(x: Any) -> Any:
    """A layer over rows, with a bias: at removed channels it leaves the bias."""
    over = jnp.cos(jnp.arange(32.0)).reshape(8, 4)
    rows = jnp.tanh(x.T @ over.T + over[:, 0]) @ over
    both = jnp.einsum(
        "crs,csr->cr", rows[:, None] * rows[..., None], rows[..., None] + over[:4]
    )
    x = x + rows.T - both.T / 30
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1)


def _of_unsigned(x: Any) -> Any:
    """0 - 1 is 255, which no maximum takes away."""
    whole = jnp.abs(x).astype(jnp.uint8)
    return x + jnp.maximum(whole - 1, 0).sum(-1, keepdims=True).astype(x.dtype) / 255


@pytest.mark.parametrize("name", EXACT)
def test_slim_is_mask_for_each_kind_of_rule(name: str) -> None:
    apply, variables, x = networks.two_layers(EXACT[name])
    graph = jp.trace(apply, variables, x)
    assert graph.groups, graph.frozen
    for seed in range(3):
        keep = networks.random_keep(graph, seed)
        assert jp.verify(apply, graph, keep, variables, x) < 1e-5
        grads = [
            jax.grad(lambda v, f=f: jnp.sum(jnp.sin(f(v, x))))(v)
            for f, v in (
                (apply, jp.mask(graph, keep, variables)),
                (jp.slim(apply, graph, keep), jp.shrink(graph, keep, variables)),
            )
        ]
        want = jp.shrink(graph, keep, grads[0])
        for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(grads[1]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def _against_padding(x: Any) -> Any:
    """Ones beside the rows also lie at the removed channels of those rows."""
    return x * jnp.pad(x, ((1, 1), (0, 0)), constant_values=1.0).sum()


INEXACT = {
    "padding beside": _against_padding,
    "gather, filled": lambda x: (
        x * x.at[np.array([0, 9])].get(mode="fill", fill_value=1.0).sum()
    ),
    "permuting reshape": lambda x: jax.lax.reshape(x, (4, 6), dimensions=(1, 0)),
}


@pytest.mark.parametrize("name", INEXACT)
def test_what_a_mask_would_not_leave_out_is_frozen(name: str) -> None:
    apply, variables, x = networks.two_layers(INEXACT[name])
    apply = jax.jit(apply)
    assert not jp.trace(apply, variables, x).groups


def test_strict_makes_a_frozen_module_an_error() -> None:
    v = {name: {"kernel": jnp.ones((4, 4))} for name in ("one", "two", "three")}

    def apply(v: Any, x: Any) -> Any:
        x = jnp.sort(x @ v["one"]["kernel"]) @ v["two"]["kernel"]
        return jnp.tanh(x) @ v["three"]["kernel"]

    x = jnp.ones((2, 4))
    assert list(jp.trace(apply, v, x).groups) == ["two"]
    with pytest.raises(jp.base.GraphError, match="one is frozen: 4 indices.*sort"):
        jp.trace(apply, v, x, strict=["one"])
    with pytest.raises(jp.base.GraphError, match="three.*the network's output"):
        jp.trace(apply, v, x, strict=["t*"])
    with pytest.raises(jp.base.GraphError, match="is 'three' meant"):
        jp.trace(apply, v, x, strict=["tree"])
    fine = jp.trace(lambda v, x: apply(v, x) ** 2, v, x, strict=[])
    assert list(fine.groups) == ["two"]


def test_an_empty_reshape_is_no_error() -> None:
    apply, variables, x = networks.two_layers(
        lambda x: x + x[:, :0].reshape(0, 4).sum() + x[:0].reshape(6, 0).sum()
    )
    graph = jp.trace(apply, variables, x)
    keep = networks.random_keep(graph, 0)
    assert jp.verify(apply, graph, keep, variables, x) < 1e-5


def test_one_number_for_all_channels_stays_where_they_are_removed() -> None:
    variables = {"a": jnp.ones((3, 6)), "one": jnp.ones(1), "b": jnp.ones((6, 2))}

    def apply(v: Any, x: Any, summed: bool) -> Any:
        y = x @ v["a"] + jnp.tile(v["one"], 6)
        return (y.sum(-1, keepdims=True) if summed else 1) * (y @ v["b"])

    x = jnp.ones((4, 3))
    assert jp.trace(apply, variables, x, summed=False).groups
    assert not jp.trace(apply, variables, x, summed=True).groups


def test_a_plain_cut_through_a_variance_can_be_asked_for() -> None:
    """Removed channels are zero, their distance from the mean is not: left out too."""
    apply, variables, x = networks.two_layers(
        lambda x: x / (1 + x.var(-1, keepdims=True))
    )
    assert [g.exact for g in jp.trace(apply, variables, x).groups.values()] == [True]
    graph = jp.trace(apply, variables, x, exact=False)
    assert [g.exact for g in graph.groups.values()] == [False]
    keep = {"a": np.arange(6) < 4}
    small = jp.shrink(graph, keep, variables)
    y = x @ small["a"]
    plain = ((y - y.sum(-1, keepdims=True) / 6) ** 2).sum(-1, keepdims=True) / 6
    want = y / (1 + plain) @ small["b"]
    got = jp.slim(apply, graph, keep)(small, x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_shared_weights_are_cut_once() -> None:
    def apply(v: Any, x: Any) -> Any:
        y = jnp.tanh(x @ v["a"])
        return jnp.tanh(jnp.tanh(y @ v["w"]) @ v["w"]) @ v["b"]

    rng = np.random.default_rng(0)
    variables = {"a": rng.normal(size=(3, 5)), "w": rng.normal(size=(5, 5))}
    variables = {**variables, "b": rng.normal(size=(5, 2))}
    variables = jax.tree.map(np.float32, variables)
    x = np.ones((2, 3), np.float32)
    graph = jp.trace(apply, variables, x)
    assert [g.size for g in graph.groups.values()] == [5]
    keep = networks.random_keep(graph, 0)
    assert jp.verify(apply, graph, keep, variables, x) < 1e-5


def test_errors_name_what_does_not_fit() -> None:
    apply, variables, x = networks.two_layers(jax.nn.relu)
    graph = jp.trace(apply, variables, x)
    (name,) = graph.groups
    keep = {name: np.arange(6) < 3}
    with pytest.raises(GraphError, match="hold no array"):
        jp.trace(apply, {}, x)
    with pytest.raises(GraphError, match="linen module, SegNet; pass .apply"):
        jp.trace(SegNet(11), variables, x)
    with pytest.raises(GraphError, match="nnx module, Linear; .*nnx.split.module"):
        jp.trace(nnx.Linear(3, 6, rngs=nnx.Rngs(0)), variables, x)
    net = SegNet(11)
    for call in (
        lambda: jp.slim(net, graph, keep),
        lambda: jp.verify(net, graph, keep, variables, x),
        lambda: jp.factorize(net, graph, variables, x),
        lambda: jp.reconstruct(net, graph, keep, variables, [x]),
        lambda: jp.lasso_select(net, graph, variables, [x], jp.flops(0.5)),
        lambda: jp.timings(net, graph, variables, x),
        lambda: jp.fold_batch_norm(net, variables, x),
        lambda: jp.quantize_weights(net, variables, x),
    ):
        with pytest.raises(GraphError, match="linen module, SegNet; pass .apply"):
            call()
    with pytest.raises(GraphError, match="variables are one array"):
        jp.trace(lambda v, x: x @ v, variables["a"], x)
    with pytest.raises(GraphError, match="two arrays of the variables are w"):
        jp.trace(apply, {"w": {"value": x, "raw_value": x}}, x)
    for wrong, match in (
        ({}, f"lacks group '{name}'"),
        ({name: np.ones(5, bool)}, "6 channels.*shape \\(5,\\)"),
        ({name: np.zeros(6, bool)}, "removes all 6"),
        ({name: np.ones(6)}, "bool"),
        ({name: keep[name], "bb": keep[name]}, "'bb'"),
    ):
        with pytest.raises(GraphError, match=match):
            jp.shrink(graph, wrong, variables)
    with pytest.raises(GraphError, match=r"lacks the leaf b \(6, 2\)"):
        jp.mask(graph, keep, {"a": variables["a"]})
    with pytest.raises(GraphError, match=r"a has shape \(3, 5\)"):
        jp.shrink(graph, keep, {**variables, "a": variables["a"][:, :5]})
    cut = jp.shrink(graph, keep, variables)
    with pytest.raises(GraphError, match="cut already.*jaxprune.shrink_graph"):
        jp.shrink(graph, keep, cut)
    with pytest.raises(GraphError, match="another network's"):
        jp.expand(graph, keep, variables)
    with pytest.raises(GraphError, match="traced"):
        jax.jit(lambda k: jp.shrink(graph, k, variables))(keep)
    slim = jp.slim(apply, graph, keep)
    with pytest.raises(
        GraphError, match=r"a has shape \(3, 6\), shrunk it is \(3, 3\)"
    ):
        slim(variables, x)
    with pytest.raises(GraphError, match="another keep.*jaxprune.compose"):
        slim({**cut, "a": variables["a"][:, :2]}, x)
    with pytest.raises(GraphError, match="variables lack b"):
        slim({"a": variables["a"][:, :3]}, x)


def test_sharded_leaves_keep_their_sharding() -> None:
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    apply, variables, x = networks.two_layers(jax.nn.relu)
    graph = jp.trace(apply, variables, x)
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
    placed = jax.device_put(variables, spec)
    keep = {n: np.arange(6) < 4 for n in graph.groups}
    small = jp.shrink(graph, keep, placed)
    for leaf in jax.tree.leaves(small):
        assert leaf.sharding.is_equivalent_to(spec, leaf.ndim)


def test_what_is_infinite_at_a_removed_channel_is_no_zero() -> None:
    """0 * rsqrt(0) is nan in the masked network."""
    _, variables, x = networks.two_layers(lambda x: x)

    def apply(v: Any, x: Any) -> Any:
        return x @ (v["a"] * jax.lax.rsqrt(jnp.sum(v["a"] ** 2, 0))) @ v["b"]

    assert not jp.trace(apply, variables, x).groups
    graph = jp.trace(
        lambda v, x: (x @ v["a"] * jnp.maximum(-jnp.inf, v["a"]).sum(0)) @ v["b"],
        variables,
        x,
    )
    assert [g.size for g in graph.groups.values()] == [6]


def test_a_leaf_that_is_no_array_is_named() -> None:
    with pytest.raises(GraphError, match="^b/note is no array but str"):
        jp.trace(lambda v, x: x @ v["a"], {"a": np.ones((2, 3)), "b": {"note": "hi"}})


@pytest.mark.parametrize("edges", [0, 60, 400, 2000])
def test_components_are_scipys_and_numbered_by_their_first_nodes(edges):
    rng, count = np.random.default_rng(edges), 500
    a, b = rng.integers(count, size=(2, edges))
    graph = scipy.sparse.coo_array((np.ones(edges), (a, b)), shape=(count, count))
    _, want = scipy.sparse.csgraph.connected_components(graph, directed=False)
    found = components(count, a, b)
    _, first, same = np.unique(want, return_index=True, return_inverse=True)
    np.testing.assert_array_equal(found, np.argsort(np.argsort(first))[same])


def test_components_of_a_path_in_any_order():
    nodes = np.random.default_rng(0).permutation(10_000)
    assert not components(10_000, nodes[1:], nodes[:-1]).any()
