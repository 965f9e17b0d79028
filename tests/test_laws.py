# SPDX-License-Identifier: Apache-2.0
"""The laws of jaxprune, over shipped, hand-written and random networks."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import networks
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune.models.segnet import SegNet
from jaxprune.models.segnet_basic import SegNetBasic
from jaxprune.models.unet import UNet

SHIPPED = {
    "SegNet": lambda: SegNet(3, widths=(4, 5, 6, 4, 5)),
    "SegNetBasic": lambda: SegNetBasic(3, widths=(6,)),
    "UNet": lambda: UNet(3, widths=(4, 5, 6, 7, 8)),
}
NETS = {**{net.__name__: net for net in networks.LINEN}, **SHIPPED}
TRAIN = {
    "train": True,
    "mutable": ["batch_stats"],
    "rngs": {"dropout": jax.random.key(3)},
}
OPS = st.lists(
    st.tuples(st.sampled_from(networks.KINDS), st.integers(0, 6), st.integers(0, 6)),
    min_size=1,
    max_size=7,
).map(tuple)


def build(name: str, seed: int = 0) -> tuple[Any, Any, Any]:
    shape = (2, 9, 12, 3) if name in SHIPPED else (2, 8, 8, 3)
    return networks.linen(NETS[name], seed, shape)


def law1(apply: Any, graph: jp.Graph, keep: Any, variables: Any, x: Any, **kw: Any):
    """(outputs, gradients of params) of the masked and of the slim network, in float64.

    The masked side's are shrunk, so that the two compare leaf by leaf.
    """
    with jax.enable_x64(True):
        double = jax.tree.map(lambda a: np.asarray(a, np.float64), variables)
        x = np.asarray(x, np.float64)
        rest = {k: v for k, v in double.items() if k != "params"}

        def outputs(f: Any, params: Any, rest: Any) -> Any:
            out = f({"params": params, **rest}, x, **kw)
            logits = jax.tree.leaves(out)[0] if "mutable" not in kw else out[0]
            weights = np.cos(np.arange(logits.size)).reshape(logits.shape)
            return jnp.sum(weights * logits**2), out

        run = jax.jit(
            lambda f, p, r: jax.value_and_grad(outputs, argnums=1, has_aux=True)(
                f, p, r
            ),
            static_argnums=0,
        )
        masked = jp.mask(graph, keep, double)
        stats = {k: v for k, v in masked.items() if k != "params"}
        (_, out_m), grad_m = run(apply, masked["params"], stats)
        small = jp.shrink(graph, keep, double)
        stats = {k: v for k, v in small.items() if k != "params"}
        (_, out_s), grad_s = run(jp.slim(apply, graph, keep), small["params"], stats)
        grad_m = jp.shrink(graph, keep, jax.tree.map(np.asarray, grad_m))
        if "mutable" in kw:
            state = jax.tree.map(np.asarray, dict(out_m[1]))
            out_m = (out_m[0], jp.shrink(graph, keep, state) if state else state)
            out_s = (out_s[0], dict(out_s[1]))
        del rest
    return (out_m, grad_m), (out_s, grad_s)


def assert_close(a: Any, b: Any, tolerance: float = 1e-10) -> None:
    """Leaf by leaf, relative to the largest entry of the whole tree."""
    chex.assert_trees_all_equal_shapes(a, b)
    scale = max(float(np.max(np.abs(x))) for x in jax.tree.leaves(a))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("kw", [{}, TRAIN], ids=["eval", "train"])
def test_slim_is_mask(name: str, kw: Any) -> None:
    apply, variables, x = build(name)
    graph = jp.trace(apply, variables, x)
    keep = networks.random_keep(graph, 1)
    masked, slim = law1(apply, graph, keep, variables, x, **kw)
    assert_close(masked[0], slim[0])
    assert_close(masked[1], slim[1])


def test_verify_tells_of_values_that_are_no_numbers() -> None:
    """Masked, 0 / 0; cut, nothing of the kind."""

    def apply(v: Any, x: Any) -> Any:
        y = x @ v["a"]
        return y / jnp.linalg.norm(y, axis=0) @ v["b"]

    variables = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    x = jnp.ones((5, 3))
    graph = jp.trace(apply, variables, x, exact=False)
    keep = {n: np.arange(g.size) < 2 for n, g in graph.groups.items()}
    assert jp.verify(apply, graph, keep, variables, x) == np.inf
    assert jp.verify(apply, graph, graph.full(), variables, x) == 0
    assert jp.verify(apply, graph, graph.full(), variables, x * np.nan) == 0


@pytest.mark.parametrize("name", NETS)
def test_masked_output_depends_on_input(name: str) -> None:
    """Law 1 would be idle on a network that the cut has made constant."""
    apply, variables, x = build(name)
    graph = jp.trace(apply, variables, x)
    masked = jp.mask(graph, networks.random_keep(graph, 1), variables)
    f = jax.jit(apply)
    first, second = f(masked, x), f(masked, 1.5 * x + 0.3)
    assert float(jnp.abs(first - second).max()) > 1e-4 * float(jnp.abs(first).max())


@settings(max_examples=25, deadline=None)
@given(ops=OPS, seed=st.integers(0, 99), train=st.booleans())
def test_slim_is_mask_on_random_networks(ops: Any, seed: int, train: bool) -> None:
    apply, variables, x = networks.drawn(ops, seed)
    graph = jp.trace(apply, variables, x)
    keep = networks.random_keep(graph, seed)
    kw = TRAIN if train else {}
    masked, slim = law1(apply, graph, keep, variables, x, **kw)
    assert_close(masked[0], slim[0])
    assert_close(masked[1], slim[1])


@pytest.mark.parametrize("name", NETS)
def test_tree_laws_hold_bit_for_bit(name: str) -> None:
    apply, variables, x = build(name)
    graph = jp.trace(apply, variables, x)
    keep = networks.random_keep(graph, 2)
    small = jp.shrink(graph, keep, variables)
    masked = jp.mask(graph, keep, variables)
    chex.assert_trees_all_equal(jp.expand(graph, keep, small), masked)
    chex.assert_trees_all_equal(jp.shrink(graph, keep, masked), small)
    for f in (jp.mask, jp.shrink, jp.expand):
        same = f(graph, graph.full(), variables)
        for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(variables)):
            assert a is b
    assert jp.slim(apply, graph, graph.full()) is apply


@pytest.mark.parametrize("name", NETS)
def test_shrinking_twice_is_shrinking_by_the_composition(name: str) -> None:
    apply, variables, x = build(name)
    graph = jp.trace(apply, variables, x)
    first = networks.random_keep(graph, 3)
    cut = jp.shrink_graph(graph, first)
    second = networks.random_keep(cut, 4, share=0.7)
    both = jp.compose(first, second)
    small = jp.shrink(graph, first, variables)
    once = jp.shrink(graph, both, variables)
    chex.assert_trees_all_equal(jp.shrink(cut, second, small), once)
    assert jp.cost(cut, second) == jp.cost(graph, both)
    assert jp.cost(cut) == jp.cost(graph, first)
    for name_, line in both.items():
        assert not (line & ~first[name_]).any()


@pytest.mark.parametrize("name", ["ResNet", "Fcn", "SegNet"])
def test_slim_can_be_traced_again(name: str) -> None:
    """The graph of slim's function is the cut graph: pruning composes with itself."""
    apply, variables, x = build(name)
    graph = jp.trace(apply, variables, x)
    keep = {n: np.arange(g.size) % 3 != 0 for n, g in graph.groups.items()}
    small = jp.shrink(graph, keep, variables)
    again = jp.trace(jp.slim(apply, graph, keep), small, x)
    cut = jp.shrink_graph(graph, keep)
    left = {n: g for n, g in cut.groups.items() if g.size > 1}
    assert {n: g.size for n, g in again.groups.items()} == {
        n: g.size for n, g in left.items()
    }
    assert jp.cost(again) == jp.cost(cut)


OPTIMISERS = {
    "sgd": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1, weight_decay=0.1),
    "chain": optax.chain(optax.trace(0.9), optax.ema(0.9), optax.scale(-0.1)),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_optimiser_state_shrinks_with_the_tree(name: str) -> None:
    apply, variables, x = build("ResNet")
    graph = jp.trace(apply, variables, x)
    keep = networks.random_keep(graph, 5)
    tx, params = OPTIMISERS[name], jp.mask(graph, keep, variables)["params"]
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(p.dtype), params)
    grads = jp.mask(graph, keep, grads)

    @jax.jit
    def step(grads: Any, state: Any, params: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    warm = step(grads, tx.init(params), params)
    late = jp.shrink(graph, keep, step(grads, warm[1], warm[0]))
    params, state = jp.shrink(graph, keep, warm)
    early = step(jp.shrink(graph, keep, grads), state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(late, early)
    chex.assert_trees_all_close(late, early, rtol=1e-6, atol=1e-7)


def test_factored_statistics_shrink_with_the_tree() -> None:
    """Adafactor's row and column means, and its placeholders of one entry."""
    shapes = {"a": (9, 6), "bias": (6,), "b": (6, 2)}
    variables = {k: jnp.ones(s) for k, s in shapes.items()}

    def apply(v: Any, x: Any) -> Any:
        return jnp.tanh(x @ v["a"] + v["bias"]) @ v["b"]

    graph = jp.trace(apply, variables, jnp.ones((4, 9)))
    keep = {n: np.array([1, 1, 0, 1, 0, 1], bool) for n in graph.groups}
    tx = optax.adafactor(0.1, min_dim_size_to_factor=2)
    rng = np.random.default_rng(0)
    grads = {k: jnp.float32(rng.normal(size=s)) for k, s in shapes.items()}
    state = tx.update(grads, tx.init(variables), variables)[1]
    small, early = jp.shrink(graph, keep, (variables, state))
    chex.assert_trees_all_equal_shapes_and_dtypes(early, tx.init(small))
    tx.update(jp.shrink(graph, keep, grads), early, small)
    columns = state[0].v_col["a"]
    np.testing.assert_array_equal(early[0].v_col["a"], columns)
    np.testing.assert_array_equal(early[0].v_row["a"], state[0].v_row["a"][keep["a"]])
    chex.assert_trees_all_equal(
        jp.expand(graph, keep, early), jp.mask(graph, keep, state)
    )


def test_eval_and_train_traces_have_the_same_groups() -> None:
    for name in NETS:
        apply, variables, x = build(name)
        evaluated = jp.trace(apply, variables, x)
        trained = jp.trace(apply, variables, x, **TRAIN)
        assert {n: g.size for n, g in evaluated.groups.items()} == {
            n: g.size for n, g in trained.groups.items()
        }


def test_linen_and_nnx_have_the_same_groups() -> None:
    apply, variables, x = networks.linen(networks.LinenTwin)
    a = jp.trace(apply, variables, x)
    b = jp.trace(*networks.nnx_net())
    assert [g.size for g in a.groups.values()] == [g.size for g in b.groups.values()]
    assert [len(g.slots) for g in a.groups.values()] == [
        len(g.slots) for g in b.groups.values()
    ]
    assert jp.cost(a) == jp.cost(b)


@pytest.mark.parametrize(
    "criterion",
    [jp.magnitude(), jp.taylor(), jp.taylor(1, roles=("out",)), jp.fisher(), jp.lamp()],
)
def test_linen_and_nnx_have_the_same_scores(criterion: Any) -> None:
    _, state, x = networks.nnx_net()
    own, stats = nnx.to_pure_dict(state), ("mean", "var")
    norm, names = own["norm"], {"stem": "Conv_0", "conv": "Conv_1", "head": "Dense_0"}
    twin = {
        "params": {
            "BatchNorm_0": {n: v for n, v in norm.items() if n not in stats},
            **{name: own[n] for n, name in names.items()},
        },
        "batch_stats": {"BatchNorm_0": {n: norm[n] for n in stats}},
    }
    found = []
    for apply, variables in (
        (networks.linen(networks.LinenTwin)[0], twin),
        (networks.nnx_net()[0], state),
    ):

        def loss(v: Any, x: Any, apply: Any = apply) -> Any:
            return jax.numpy.square(apply(v, x) - 1).mean()

        graph = jp.trace(apply, variables, x)
        scores = jp.score(criterion, graph, variables, loss=loss, batches=[x])
        found.append(list(scores.values()))
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4)


def test_nnx_slim_is_mask() -> None:
    apply, state, x = networks.nnx_net()
    graph = jp.trace(apply, state, x)
    keep = networks.random_keep(graph, 1)
    assert jp.verify(apply, graph, keep, state, x) < 1e-5


def test_jitted_functions_trace_once() -> None:
    apply, variables, x = build("ResNet")
    graph = jp.trace(apply, variables, x)
    traces = []

    def masked(keep: Any, v: Any) -> Any:
        traces.append("mask")
        return apply(jp.mask(graph, keep, v), x)

    jitted = jax.jit(masked)
    for seed in range(3):
        jitted(networks.random_keep(graph, seed), variables)
    keep = networks.random_keep(graph, 1)
    small, slim = jp.shrink(graph, keep, variables), jp.slim(apply, graph, keep)

    def slimmed(v: Any, x: Any) -> Any:
        traces.append("slim")
        return slim(v, x)

    jitted = jax.jit(slimmed)
    for factor in (1.0, 2.0):
        jitted(small, np.float32(factor) * x)
    assert traces == ["mask", "slim"]


def test_slim_takes_any_batch_size_and_transformation() -> None:
    apply, variables, _ = build("SegNet")
    x = networks.images(0, (3, 19, 22, 3))
    graph = jp.trace(apply, variables, x)
    keep = networks.random_keep(graph, 6)
    small = jp.shrink(graph, keep, variables)
    slim = jp.slim(apply, graph, keep)
    masked = jp.mask(graph, keep, variables)
    for shape in ((1, 8, 8, 3), (2, 33, 17, 3)):
        y = networks.images(1, shape)
        want, got = jax.jit(apply)(masked, y), jax.jit(slim)(small, y)
        np.testing.assert_allclose(want, got, rtol=1e-4, atol=1e-4)
    want = jax.jit(apply)(masked, x)
    alone = jax.jit(jax.vmap(lambda image: slim(small, image[None])[0]))(x)
    np.testing.assert_allclose(want, alone, rtol=1e-4, atol=1e-4)
    remat = jax.jit(jax.checkpoint(slim))(small, x)
    np.testing.assert_allclose(want, remat, rtol=1e-4, atol=1e-4)
    _, looped = jax.jit(
        lambda x: jax.lax.scan(lambda c, i: (c, slim(small, i[None])[0]), 0, x)
    )(x)
    np.testing.assert_allclose(want, looped, rtol=1e-4, atol=1e-4)


def test_slim_takes_what_apply_takes() -> None:
    """Types as arguments, weakly typed numbers, 64 bits switched on between calls."""

    def apply(v: Any, x: Any, by: Any = None, dtype: Any = np.float32) -> Any:
        y = jnp.tanh(x.astype(dtype) @ v["a"].astype(dtype))
        return (
            y
            @ v["b"].astype(dtype)
            * (1 if by is None else by)
            * jnp.ones(2, dtype if by is not None else float)
        )

    rng = np.random.default_rng(0)
    shapes = {"a": (3, 6), "b": (6, 2)}
    variables = {k: jnp.float32(rng.normal(size=s)) for k, s in shapes.items()}
    x = jnp.ones((4, 3))
    graph = jp.trace(apply, variables, x)
    keep = networks.random_keep(graph, 0)
    small, slim = jp.shrink(graph, keep, variables), jp.slim(apply, graph, keep)
    masked = jp.mask(graph, keep, variables)
    for kw in (
        {},
        {"dtype": np.float32},
        {"dtype": np.dtype("float16")},
        {"dtype": jnp.bfloat16, "by": jnp.asarray(2.0)},
        {"dtype": jnp.bfloat16, "by": np.float32(2.0)},
    ):
        for wide in (False, True):
            with jax.enable_x64(wide):
                want, got = apply(masked, x, **kw), slim(small, x, **kw)
                assert want.dtype == got.dtype
                np.testing.assert_allclose(
                    np.float32(want), np.float32(got), rtol=0, atol=0.05
                )


@pytest.mark.parametrize("padding", ["VALID", "SAME", ((0, 2), (0, 0))])
def test_max_pooling_keeps_a_zero(padding: Any) -> None:
    """Unless a window lies in the padding alone, where it is minus infinity."""

    def apply(v: Any, x: Any) -> Any:
        y = nn.max_pool(x @ v["a"], (2, 2), (2, 2), padding)
        return (y - y.sum(axis=-1, keepdims=True)) @ v["b"]

    shapes = {"a": (3, 8), "b": (8, 2)}
    shapes = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in shapes.items()}
    variables, x = networks.randomised(shapes, 0), networks.images(0)
    graph = jp.trace(apply, variables, x)
    assert bool(graph.groups) == isinstance(padding, str)
    keep = networks.random_keep(graph, 0)
    assert jp.verify(apply, graph, keep, variables, x) < 1e-5
