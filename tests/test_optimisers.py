# SPDX-License-Identifier: Apache-2.0
"""Optimiser states of every standard kind shrink with the tree, and go on."""

import chex
import jax
import jax.numpy as jnp
import networks
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import jaxprune as jp
from jaxprune.base import GraphError


def labels(params):
    return jax.tree.map(lambda p: "kernel" if p.ndim > 1 else "rest", params)


def matrices(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


# Those whose update is the same per weight, whatever the others are, come first.
ELEMENTWISE = {
    "adam": optax.adam(0.1),
    "amsgrad": optax.amsgrad(0.1),
    "adagrad": optax.adagrad(0.1),
    "lion": optax.lion(0.1),
    "rmsprop": optax.rmsprop(0.1, momentum=0.9),
    "yogi": optax.yogi(0.1),
    "nesterov": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "multi_transform": optax.multi_transform(
        {"kernel": optax.adam(0.1), "rest": optax.sgd(0.1, momentum=0.9)}, labels
    ),
    "masked": optax.masked(optax.adam(0.1), matrices),
    "multi_steps": optax.MultiSteps(
        optax.adamw(0.1), every_k_schedule=2
    ).gradient_transformation(),
    "ema": optax.chain(optax.adam(0.1), optax.ema(0.9)),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    "if finite": optax.apply_if_finite(optax.adam(0.1), 3),
    "schedule free": optax.contrib.schedule_free_adamw(0.1),
}
# A trust ratio or an orthogonalisation looks at whole arrays: what the masked arrays
# give differs from what the small ones give. Shapes and going on are what can be asked.
SPANNING = {
    "lamb": optax.lamb(0.1),
    "lars": optax.lars(0.1),
    "novograd": optax.novograd(0.1),
    "muon": optax.contrib.muon(0.1),
    "prodigy": optax.contrib.prodigy(0.1),
}


def stepped(tx, params, count=3):
    """Params and state after some steps on made-up gradients."""
    state = tx.init(params)
    for i in range(count):
        updates, state = tx.update(gradients(params, i), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def gradients(params, seed):
    return networks.randomised(params, seed)


@pytest.mark.parametrize("name", [*ELEMENTWISE, *SPANNING])
def test_the_cut_state_is_one_of_the_small_params_and_goes_on(name):
    tx = {**ELEMENTWISE, **SPANNING}[name]
    apply, variables, x = networks.linen(networks.ResNet)
    graph = jp.trace(apply, variables, x)
    keep = networks.random_keep(graph, 0)
    params, state = stepped(tx, variables["params"])

    small, cut = jp.shrink(graph, keep, (params, state))

    chex.assert_trees_all_equal_shapes_and_dtypes(cut, tx.init(small))
    grads = gradients(params, 9)
    updates, _ = tx.update(jp.shrink(graph, keep, grads), cut, small)
    chex.assert_tree_all_finite(updates)
    if name in ELEMENTWISE:
        want = jp.shrink(graph, keep, tx.update(grads, state, params)[0])
        chex.assert_trees_all_close(updates, want, rtol=1e-5, atol=1e-6)


def test_histories_are_cut_behind_their_leading_axis():
    tx = optax.lbfgs(0.1, memory_size=4, linesearch=None)
    apply, variables, x = networks.linen(networks.Vgg)
    graph = jp.trace(apply, variables, x)
    keep = networks.random_keep(graph, 0)
    params, state = stepped(tx, variables["params"])

    small, cut = jp.shrink(graph, keep, (params, state))

    chex.assert_trees_all_equal_shapes_and_dtypes(cut, tx.init(small))
    name, group = next(iter(graph.groups.items()))
    slot = group.slots[0]
    history = np.asarray(state[0].diff_params_memory[slot.path[1]][slot.path[2]])
    got = cut[0].diff_params_memory[slot.path[1]][slot.path[2]]
    want = np.take(history, np.flatnonzero(keep[name]), axis=slot.axis + 1)
    np.testing.assert_array_equal(got, want)
    chex.assert_trees_all_equal(
        jp.expand(graph, keep, cut), jp.mask(graph, keep, state)
    )


def test_an_ensemble_is_cut_as_one():
    apply, variables, x = networks.linen(networks.ResNet)
    graph = jp.trace(apply, variables, x)
    keep = networks.random_keep(graph, 3)
    both = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), variables)
    small = jp.shrink(graph, keep, both)
    one = jp.shrink(graph, keep, variables)
    chex.assert_trees_all_equal(jax.tree.map(lambda a: a[0], small), one)
    slim = jp.slim(apply, graph, keep)
    out = jax.vmap(slim, in_axes=(0, None))(small, x)
    np.testing.assert_allclose(out[0], slim(one, x), rtol=1e-5, atol=1e-5)


def pair(inner, ends, kept):
    """Graph, keep, params and an Adafactor after a step, of two dense layers."""
    rng = np.random.default_rng(0)
    shapes = {"a": (ends, inner), "b": (inner, ends)}
    params = {k: jnp.float32(rng.normal(size=s)) for k, s in shapes.items()}
    x = jax.ShapeDtypeStruct((1, ends), jnp.float32)
    graph = jp.trace(lambda v, x: jnp.tanh(x @ v["a"]) @ v["b"], params, x)
    keep = {n: np.arange(inner) < kept for n in graph.groups}
    return graph, keep, params


@pytest.mark.parametrize(
    ("inner", "ends", "kept", "least", "what"),
    [
        (32, 8, 6, 8, "longest"),  # of (8, 32), the longer becomes the shorter
        (32, 16, 16, 8, "longest"),  # of equal axes, optax takes the last for longer
        (20, 32, 6, 8, "too small"),
        (200, 256, 120, 128, "too small"),
    ],
)
def test_adafactor_starts_anew_where_other_axes_are_factored(
    inner, ends, kept, least, what
):
    graph, keep, params = pair(inner, ends, kept)
    tx = optax.adafactor(1e-2, min_dim_size_to_factor=least)
    state = tx.update(params, tx.init(params), params)[1]
    with pytest.raises(GraphError, match=f"start this optimiser anew.*{what}"):
        jp.shrink(graph, keep, (params, state))


@pytest.mark.parametrize(
    ("inner", "ends", "kept", "least"),
    [(20, 32, 20, 8), (20, 32, 19, 20), (200, 256, 130, 128), (64, 32, 40, 32)],
)
def test_adafactor_goes_on_where_the_same_axes_are_factored(inner, ends, kept, least):
    graph, keep, params = pair(inner, ends, kept)
    tx = optax.adafactor(1e-2, min_dim_size_to_factor=min(least, 128))
    if kept < least:
        tx = optax.adafactor(1e-2, min_dim_size_to_factor=256)  # nothing is factored
    state = tx.update(params, tx.init(params), params)[1]
    small, cut = jp.shrink(graph, keep, (params, state))
    chex.assert_trees_all_equal_shapes_and_dtypes(cut, tx.init(small))
    chex.assert_tree_all_finite(tx.update(small, cut, small)[0])


def test_a_tree_of_which_nothing_is_known_is_refused():
    graph, keep, params = pair(6, 4, 3)
    others = {"A": {"w": params["a"]}, "B": {"w": params["b"]}}
    flat = optax.flatten(optax.adam(0.1)).init(params)
    for strange in (others, list(params.values()), (1.0, flat)):
        for f in (jp.mask, jp.shrink):
            with pytest.raises(GraphError, match="it holds .*, the graph a "):
                f(graph, keep, strange)


@pytest.mark.parametrize(
    "tree",
    [
        None,
        {},
        (),
        optax.sgd(0.1).init({}),
        {"count": jnp.zeros((), jnp.int32), "rate": jnp.ones(())},
        {"key": jax.random.key_data(jax.random.key(0))},
        {"name": "adam", "rate": 0.1},
    ],
)
def test_trees_without_arrays_of_numbers_pass(tree):
    graph, keep, _ = pair(6, 4, 3)
    for f in (jp.mask, jp.shrink, jp.expand):
        got, want = jax.tree.leaves(f(graph, keep, tree)), jax.tree.leaves(tree)
        assert all(a is b for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ({"a": np.array([0.2, 0.0])}, "'a': a keep is bool.*float64"),
        ({"a": np.array([1, 0])}, "'a': a keep is bool.*int64"),
        ({"a": np.ones(3, bool)}, "leaves 2 channels"),
        ({}, "the second keep lacks group 'a'"),
        ({"a": np.ones(2, bool), "z": np.ones(3, bool)}, "first keep lacks group 'z'"),
    ],
)
def test_keeps_that_do_not_compose(second, words):
    with pytest.raises(GraphError, match=words):
        jp.compose({"a": np.array([1, 1, 0], bool)}, second)


def test_traced_keeps_do_not_compose():
    with pytest.raises(GraphError, match="'a': a keep is traced"):
        jax.jit(lambda k: jp.compose({"a": k}, {"a": k}))(np.ones(3, bool))


def test_a_train_state_that_lacks_a_parameter_is_an_error():
    apply, variables, x = networks.linen(networks.ResNet)
    graph = jp.trace(apply, variables, x)
    whole = TrainState.create(
        apply_fn=apply, params=variables["params"], tx=optax.adam(0.1)
    )
    jp.shrink(graph, graph.full(), whole)
    missing = next(iter(whole.params))
    rest = {k: v for k, v in whole.params.items() if k != missing}
    with pytest.raises(GraphError, match=f"lacks the leaf params/{missing}"):
        jp.shrink(graph, graph.full(), whole.replace(params=rest))


@pytest.mark.parametrize("metric", [False, True])
def test_an_nnx_optimizer_sparsifies_and_what_is_left_is_cut(metric):
    """nnx.Optimizer hands over params alone, as plain arrays; a norm has statistics."""
    module = networks.NnxResNet(nnx.Rngs(0))
    module.eval()
    definition, state = nnx.split(module)
    x = networks.images(0)

    def apply(state, x):
        return nnx.merge(definition, state)(x)

    graph = jp.trace(apply, state, x)
    inner = optax.adam(1e-2) if metric else optax.sgd(0.0)
    step = jp.proximal(graph, 0.02)
    tx = optax.chain(inner, step)
    if metric:
        tx = jp.preconditioned(inner, graph, 0.02, steps=jp.adam_steps())
    optimizer = nnx.Optimizer(module, tx, wrt=nnx.Param)
    before = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    optimizer.update(module, nnx.grad(lambda m: jnp.square(m(x)).mean())(module))
    after = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    keep = jp.dead(graph, nnx.state(module))
    if not metric:
        parts = [before["norm"][n][:, None] for n in ("scale", "bias")]
        for layer in ("stem", "conv"):
            kernel = before[layer]["kernel"]
            parts += [kernel.reshape(-1, 8).T, before[layer]["bias"][:, None]]
        # What reads a channel and does not make it: x + conv(x) ties both axes.
        reads = jnp.moveaxis(before["conv"]["kernel"], 2, 0)
        others = np.broadcast_to(~np.eye(8, dtype=bool)[:, None, None], reads.shape)
        parts += [reads[others].reshape(8, -1)]
        theta = np.concatenate([*parts, before["head"]["kernel"]], axis=1)
        norm, pull = np.linalg.norm(theta, axis=1), 0.02 * theta.shape[1] ** 0.5
        factor = np.maximum(0, 1 - pull / norm)
        np.testing.assert_allclose(
            after["norm"]["scale"], factor * before["norm"]["scale"], rtol=1e-5
        )
        (stays,) = keep.values()
        np.testing.assert_array_equal(stays, factor > 0)
    half = {n: np.arange(g.size) % 2 == 0 for n, g in graph.groups.items()}
    small = jp.shrink(graph, half, nnx.as_pure(nnx.state(module, nnx.Param)))
    assert jax.tree.leaves(small["norm"])[0].shape == (4,)
    cut = jp.shrink(graph, half, nnx.state(optimizer))
    moments = [m for m in jax.tree.leaves(cut) if jnp.ndim(m) == 4]
    assert all(4 in m.shape for m in moments) and bool(moments) == metric
