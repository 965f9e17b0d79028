# SPDX-License-Identifier: Apache-2.0
"""Scores against sums written out in float64, and the laws of the combinators."""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.spatial
import toygraphs

import jaxprune
from jaxprune.base import BudgetError, ConfigError, DataError, GraphError
from jaxprune.criteria import chain, ema, normalize, per_cost, score, scorer, stateless
from jaxprune.measures import (
    bn_scale,
    fisher,
    geometric_median,
    lamp,
    magnitude,
    random,
    taylor,
)
from jaxprune.placement import power_sums

GRAPH = toygraphs.chain(5, 4)
VARIABLES = toygraphs.variables(GRAPH)
KERNELS = {
    n: np.asarray(v["kernel"], np.float64) for n, v in VARIABLES["params"].items()
}
BIASES = {n: np.asarray(v["bias"], np.float64) for n, v in VARIABLES["params"].items()}


def loss(variables, batch):
    return jnp.mean((toygraphs.apply(variables, batch["x"]) - batch["y"]) ** 2)


def make_batches(n=3):
    rng = np.random.default_rng(1)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return [{"x": draw(8, 3), "y": draw(8, 2)} for _ in range(n)]


def gradients(batch):
    """Of `loss` by backpropagation in float64, as a tree like the variables."""
    reads, names = [np.float64(batch["x"])], list(KERNELS)
    for name in names[:-1]:
        reads.append(np.maximum(reads[-1] @ KERNELS[name] + BIASES[name], 0))
    out = reads[-1] @ KERNELS[names[-1]] + BIASES[names[-1]]
    back = 2 * (out - batch["y"]) / out.size
    found = {}
    for name, read in zip(names[::-1], reads[::-1], strict=True):
        found[name] = {"kernel": read.T @ back, "bias": back.sum(axis=0)}
        back = (back @ KERNELS[name].T) * (read > 0)
    return {"params": found}


def given(values):
    """A criterion that puts fixed scores in."""
    return stateless(lambda scores, evidence: values)


@pytest.mark.parametrize("p", [1, 2])
def test_magnitude_of_the_filter(p):
    scores = score(magnitude(p), GRAPH, VARIABLES)
    for name in GRAPH.groups:
        every = np.concatenate([KERNELS[name], BIASES[name][None]])
        np.testing.assert_allclose(
            scores[name], np.linalg.norm(every, ord=p, axis=0), rtol=1e-6
        )


@pytest.mark.parametrize("p", [1, 2])
def test_magnitude_of_all_that_belongs_to_a_channel(p):
    scores = score(magnitude(p, roles=("out", "in")), GRAPH, VARIABLES)
    for name, group in GRAPH.groups.items():
        expected = [
            np.linalg.norm(toygraphs.of(VARIABLES, GRAPH, name, c), ord=p)
            for c in range(group.size)
        ]
        np.testing.assert_allclose(scores[name], expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "int32"])
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("shape", [(3, 3, 50, 70), (300, 301), (2, 90_000), (7,)])
def test_power_sums_of_every_axis(shape, power, dtype):
    """Some shapes are longer than what is summed at a time, before or behind."""
    x = 3 * np.random.default_rng(0).standard_normal(shape)
    x = x.astype(jnp.dtype(dtype))
    x.flags.writeable = False  # the arrays are shared with JAX
    for axis in range(len(shape)):
        others = tuple(a for a in range(len(shape)) if a != axis)
        exact = (np.abs(x.astype(np.float64)) ** power).sum(axis=others)
        sums = power_sums(x, axis, power)
        assert sums.dtype == np.float32  # as JAX has it
        np.testing.assert_allclose(sums, exact, rtol=1e-6)


@pytest.mark.parametrize("by", ["mean", "max", "sum", "l2"])
@pytest.mark.parametrize("p", [1, 2])
def test_numpy_scores_as_compiled_ones_do(p, by):
    """Of variables in a CPU's memory nothing is compiled, unless there are batches."""
    criterion = chain(magnitude(p), normalize(by), per_cost())
    assert criterion.numpy
    plain = score(criterion, GRAPH, VARIABLES)
    compiled = score(criterion, GRAPH, VARIABLES, batches=[()])
    chex.assert_trees_all_equal_shapes_and_dtypes(plain, compiled)
    chex.assert_trees_all_close(plain, compiled, rtol=1e-6)
    assert not chain(magnitude(), ema(0.9)).numpy


def test_magnitude_beside_a_key_of_random_numbers():
    """As the states of nnx hold one; it is no number, and no array of NumPy's."""
    beside = {**VARIABLES, "rngs": {"key": jax.random.key(0)}}
    scores = score(magnitude(), GRAPH, beside)
    chex.assert_trees_all_equal(scores, score(magnitude(), GRAPH, VARIABLES))


def test_magnitude_of_params_alone_and_of_bfloat16():
    whole = score(magnitude(), GRAPH, VARIABLES)
    chex.assert_trees_all_equal(whole, score(magnitude(), GRAPH, VARIABLES["params"]))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), VARIABLES)
    scores = score(magnitude(), GRAPH, half)
    assert all(s.dtype == np.float32 for s in scores.values())
    chex.assert_trees_all_close(scores, whole, rtol=1e-2)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        a = nn.Conv(6, (3, 3), name="a")(x)
        a = nn.relu(nn.BatchNorm(use_running_average=not train, name="bn_a")(a))
        b = nn.Conv(6, (3, 3), name="b")(a)
        b = nn.relu(a + nn.BatchNorm(use_running_average=not train, name="bn_b")(b))
        return nn.Dense(3)(b.mean(axis=(1, 2)))


@pytest.fixture(scope="module")
def traced():
    net, x = Net(), jnp.ones((2, 8, 8, 3))
    variables = toygraphs.init(net, x)
    for i, name in enumerate(("bn_a", "bn_b")):
        gamma = np.random.default_rng(i).normal(size=6).astype(np.float32)
        variables["params"][name]["scale"] = gamma
    return net, variables, jaxprune.trace(net.apply, variables, x)


def test_bn_scale_averages_the_scales_of_a_group(traced):
    _, variables, graph = traced
    scales = [np.abs(variables["params"][n]["scale"]) for n in ("bn_a", "bn_b")]
    (scores,) = score(bn_scale(), graph, variables).values()
    np.testing.assert_allclose(scores, np.mean(scales, axis=0), rtol=1e-6)
    (alone,) = score(bn_scale(), graph, variables["params"]).values()
    np.testing.assert_array_equal(scores, alone)


def test_bn_scale_names_groups_without_one():
    with pytest.raises(GraphError, match="'l0', 'l1'"):
        score(bn_scale(), GRAPH, VARIABLES)


@pytest.mark.parametrize("power", [1, 2])
def test_taylor_is_the_mean_over_batches_of_the_summed_products(power):
    batches = make_batches()
    scores = score(taylor(power), GRAPH, VARIABLES, loss=loss, batches=batches)
    found = [gradients(b) for b in batches]
    for name, group in GRAPH.groups.items():
        for c in range(group.size):
            theta = toygraphs.of(VARIABLES, GRAPH, name, c)
            sums = [theta @ toygraphs.of(g, GRAPH, name, c) for g in found]
            expected = np.mean(np.abs(sums) ** power)
            np.testing.assert_allclose(scores[name][c], expected, rtol=1e-4, atol=1e-7)


def test_taylor_predicts_a_small_change_of_the_loss():
    # Scaling what reads a channel by 1 - e changes the loss by e times the score.
    (batch,) = make_batches(1)
    scores = score(
        taylor(1, roles=("in",)), GRAPH, VARIABLES, loss=loss, batches=[batch]
    )
    for c in range(5):
        rows = np.ones((5, 1), np.float32)
        rows[c] -= 1e-2
        moved = jax.tree.map(lambda x: x, VARIABLES)
        moved["params"]["l1"]["kernel"] = VARIABLES["params"]["l1"]["kernel"] * rows
        change = abs(loss(moved, batch) - loss(VARIABLES, batch)) / 1e-2
        np.testing.assert_allclose(scores["l0"][c], change, rtol=0.1, atol=0.02)


@pytest.mark.parametrize("makes", [(), ("a",), ("a", "b")])
def test_taylor_and_fisher_are_of_features_also_of_frozen_layers(makes):
    """Each reader alone tells feature * gradient, in a ReLU network each maker, too."""
    graph, variables, _ = toygraphs.frozen_backbone()
    # What makes some of the groups is no weight of the graph's: closed over, say.
    gone = {("frozen", name, "kernel") for name in makes}
    groups = {
        name: dataclasses.replace(
            group,
            slots=tuple(s for s in group.slots if s.role == "in" or s.path not in gone),
        )
        for name, group in graph.groups.items()
    }
    graph = dataclasses.replace(graph, groups=groups)
    images = jax.random.normal(jax.random.key(0), (6, 5))

    def features(x, a=0.0, b=0.0):
        one = jax.nn.relu(x @ variables["frozen"]["a"]["kernel"]) + a
        two = jax.nn.relu(one @ variables["frozen"]["b"]["kernel"]) + b
        return one, two, two @ variables["params"]["head"]["kernel"]

    def of(variables, x):
        one = jax.nn.relu(x @ variables["frozen"]["a"]["kernel"])
        two = jax.nn.relu(one @ variables["frozen"]["b"]["kernel"])
        return jnp.mean(jnp.sin(two @ variables["params"]["head"]["kernel"]))

    def slopes(x):
        def moved(a, b):
            return jnp.mean(jnp.sin(features(x, a, b)[2]))

        one, two, _ = features(x)
        a, b = jax.grad(moved, (0, 1))(jnp.zeros_like(one), jnp.zeros_like(two))
        return {"a": (one * a).sum(0), "b": (two * b).sum(0)}

    whole = slopes(images)
    each = [slopes(image[None]) for image in images]
    for roles, factor in ((("in",), 1), (("out", "in"), 2)):
        options = {"loss": of, "batches": [images]}
        first = score(taylor(1, roles=roles), graph, variables, **options)
        second = score(fisher(roles=roles), graph, variables, **options)
        for name in "ab":
            np.testing.assert_allclose(
                first[name], factor * np.abs(whole[name]), rtol=1e-3, atol=1e-6
            )
            squares = np.mean([np.square(s[name]) for s in each], axis=0) / 2
            np.testing.assert_allclose(
                second[name], factor**2 * squares, rtol=1e-3, atol=1e-7
            )
    if makes:
        with pytest.raises(GraphError, match=f"nothing of '{makes[0]}'.* roles out;"):
            score(taylor(roles=("out",)), graph, variables, **options)


def test_taylor_of_batch_statistics_and_counters(traced):
    net, variables, graph = traced
    variables = {**variables, "counters": {"steps": jnp.zeros((), jnp.int32)}}
    image = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))

    def of_images(variables, batch):
        kept = {k: variables[k] for k in ("params", "batch_stats")}
        return jnp.sum(net.apply(kept, batch) ** 2)

    scores = score(taylor(), graph, variables, loss=of_images, batches=[image])
    assert all((s > 0).any() for s in scores.values())


def test_a_batch_is_traced_once():
    chex.clear_trace_counter()
    traced = chex.assert_max_traces(loss, n=1)
    score(taylor(), GRAPH, VARIABLES, loss=traced, batches=iter(make_batches(5)))


def test_a_scorer_masks_and_is_traced_once():
    chex.clear_trace_counter()
    run = scorer(taylor(), GRAPH, chex.assert_max_traces(loss, n=1))
    for c in range(3):
        keep = GRAPH.full()
        keep["l0"][c] = False
        scores = run(VARIABLES, batches=make_batches(2), keep=keep)
        assert scores["l0"][c] == 0
        masked = jaxprune.mask(GRAPH, keep, VARIABLES)
        chex.assert_trees_all_close(
            scores,
            score(taylor(), GRAPH, masked, loss=loss, batches=make_batches(2)),
            rtol=1e-5,
        )


def test_random_follows_the_key_alone():
    one = score(random(), GRAPH, VARIABLES, key=jax.random.key(0))
    again = score(random(), GRAPH, VARIABLES, key=jax.random.key(0), batches=range(3))
    other = score(random(), GRAPH, VARIABLES, key=jax.random.key(1))
    chex.assert_trees_all_equal(one, again)
    assert all((one[n] != other[n]).all() for n in one)
    assert all((s >= 0).all() and (s < 1).all() for s in one.values())
    assert (one["l0"][:4] != one["l1"]).all()


@pytest.mark.parametrize(
    ("by", "norm"),
    [
        ("mean", lambda x: np.mean(np.abs(x))),
        ("max", lambda x: np.max(np.abs(x))),
        ("sum", lambda x: np.sum(np.abs(x))),
        ("l2", np.linalg.norm),
    ],
)
def test_normalize(by, norm):
    values = {"l0": np.array([1.0, -2, 3, 4, 5]), "l1": np.zeros(4)}
    scores = score(chain(given(values), normalize(by)), GRAPH, VARIABLES)
    np.testing.assert_allclose(
        scores["l0"], values["l0"] / norm(values["l0"]), rtol=1e-6
    )
    np.testing.assert_array_equal(scores["l1"], 0)


def test_normalizing_taylor_normalizes_the_mean():
    options = {"loss": loss, "batches": make_batches()}
    plain = score(taylor(), GRAPH, VARIABLES, **options)
    scores = score(chain(taylor(), normalize("sum")), GRAPH, VARIABLES, **options)
    chex.assert_trees_all_close(
        scores, jax.tree.map(lambda s: s / s.sum(), plain), rtol=1e-5
    )


def test_per_cost_by_hand():
    # 3 -> 5 -> 4 -> 2: 2 (15 + 20 + 8) = 86 FLOPs; a channel of l0 has 2 (3 + 4) of
    # them, one of l1 2 (5 + 2). Parameters: 20 + 24 + 10 = 54; 3 + 1 + 4 and 5 + 1 + 2.
    ones = {n: np.ones(g.size) for n, g in GRAPH.groups.items()}
    for kind, (of_l0, of_l1) in {
        "flops": (86 / 14, 86 / 14),
        "params": (54 / 8, 54 / 8),
        "channels": (9, 9),
        "bytes": (11, 11),
    }.items():
        scores = score(chain(given(ones), per_cost(kind)), GRAPH, VARIABLES)
        np.testing.assert_allclose(scores["l0"], of_l0, rtol=1e-6)
        np.testing.assert_allclose(scores["l1"], of_l1, rtol=1e-6)


def test_per_cost_of_channels_that_cost_nothing():
    free = jaxprune.Graph(GRAPH.groups, (), GRAPH.leaves, GRAPH.terms[:2])
    with pytest.raises(GraphError, match="'l1' cost nothing"):
        score(chain(magnitude(), per_cost("flops")), free, VARIABLES)
    none = jaxprune.Graph(GRAPH.groups, (), GRAPH.leaves, ())
    with pytest.raises(BudgetError, match="no flops"):
        score(chain(magnitude(), per_cost("flops")), none, VARIABLES)


def test_ema_is_the_weighted_mean():
    per_batch = stateless(
        lambda s, e: {n: e.batch * jnp.ones_like(x) for n, x in s.items()}
    )
    batches = [1.0, 5.0, 2.0]
    scores = score(chain(per_batch, ema(0.9)), GRAPH, VARIABLES, batches=batches)
    expected = np.average(batches, weights=[0.81, 0.9, 1])
    np.testing.assert_allclose(scores["l1"], expected, rtol=1e-5)
    same = score(chain(magnitude(), ema(0.9)), GRAPH, VARIABLES, batches=batches)
    chex.assert_trees_all_close(same, score(magnitude(), GRAPH, VARIABLES), rtol=1e-5)


def test_taylor_of_single_batches_under_ema():
    batches = make_batches(2)
    single = [
        score(taylor(), GRAPH, VARIABLES, loss=loss, batches=[b])["l0"] for b in batches
    ]
    criterion = chain(taylor(mean=False), ema(0.5))
    scores = score(criterion, GRAPH, VARIABLES, loss=loss, batches=batches)
    expected = (0.5 * single[0] + single[1]) / 1.5
    np.testing.assert_allclose(scores["l0"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: magnitude(3), ConfigError, "p is 1 or 2"),
        (lambda: taylor(0), ConfigError, "power is 1 or 2"),
        (lambda: taylor(roles=("x",)), ConfigError, "roles="),
        (lambda: score(magnitude, GRAPH, VARIABLES), ConfigError, r"it: magnitude\("),
        (lambda: score(chain(ema(0), lamp()), GRAPH, VARIABLES), ConfigError, "first:"),
        (lambda: normalize("median"), ConfigError, "mean, max, sum, l2"),
        (lambda: ema(1), ConfigError, "decay is in"),
        (lambda: per_cost("time"), BudgetError, "'time'"),
        (lambda: score(random(), GRAPH, VARIABLES), ConfigError, "random needs a key"),
        (
            lambda: score(taylor(), GRAPH, VARIABLES, batches=make_batches()),
            ConfigError,
            "taylor needs loss=",
        ),
        (
            lambda: score(taylor(), GRAPH, VARIABLES, loss=loss),
            ConfigError,
            "taylor needs batches=",
        ),
        (
            lambda: score(taylor(), GRAPH, VARIABLES, loss=loss, batches=[]),
            DataError,
            "batches is empty",
        ),
        (
            lambda: score(given({"l0": np.ones(5)}), GRAPH, VARIABLES),
            GraphError,
            "lack group 'l1'",
        ),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_scores_that_are_not_finite_name_the_group():
    broken = jax.tree.map(lambda x: x, VARIABLES)
    broken["params"]["l1"]["bias"] = (
        VARIABLES["params"]["l1"]["bias"].at[2].set(jnp.nan)
    )
    with pytest.raises(GraphError, match="'l1'.*1 of 4 channels.*channel 2"):
        score(magnitude(), GRAPH, broken)


def test_magnitude_of_groups_that_lack_a_role_or_are_not_trained():
    graph, variables, trained = toygraphs.frozen_backbone()
    first, second = graph.groups
    with pytest.raises(GraphError, match=f"magnitude: nothing of {first!r} is trained"):
        score(magnitude(), graph, variables)
    # Without the untrained group: only the reader of the second one is trained.
    graph = dataclasses.replace(graph, groups={second: graph.groups[second]})
    for roles in (("in",), ("out",)):
        scores = score(magnitude(roles=roles), graph, variables)
        np.testing.assert_allclose(scores[second], np.abs(trained).sum(1), rtol=1e-6)


def filters(name):
    """float64[C, n]: what makes each channel of a group."""
    return np.concatenate([KERNELS[name], BIASES[name][None]]).T


def test_fisher_squares_each_image():
    batches = make_batches(2)
    scores = score(fisher(), GRAPH, VARIABLES, loss=loss, batches=batches)
    images = [
        jax.tree.map(lambda x, i=i: x[i : i + 1], b) for b in batches for i in range(8)
    ]
    found = [gradients(image) for image in images]
    for name, group in GRAPH.groups.items():
        for c in range(group.size):
            theta = toygraphs.of(VARIABLES, GRAPH, name, c)
            sums = [theta @ toygraphs.of(g, GRAPH, name, c) for g in found]
            expected = np.mean(np.square(sums)) / 2
            np.testing.assert_allclose(scores[name][c], expected, rtol=1e-4, atol=1e-7)


def test_fisher_needs_images_along_the_first_axis():
    batch = {"x": np.ones((8, 3)), "y": np.ones((4, 2))}
    with pytest.raises(ConfigError, match="first axis.*4.*8"):
        score(fisher(), GRAPH, VARIABLES, loss=loss, batches=[batch])
    with pytest.raises(ConfigError, match="fisher needs batches="):
        score(fisher(), GRAPH, VARIABLES, loss=loss)


def test_geometric_median_is_the_sum_of_the_distances():
    scores = score(geometric_median(), GRAPH, VARIABLES)
    for name in GRAPH.groups:
        expected = scipy.spatial.distance.cdist(filters(name), filters(name)).sum(1)
        np.testing.assert_allclose(scores[name], expected, rtol=1e-5)


def test_geometric_median_over_all_that_makes_a_tied_channel(traced):
    """Two convolutions, two scales and their biases make each channel of the sum."""
    _, variables, graph = traced
    params = variables["params"]
    rows = [np.reshape(params[n]["kernel"], (-1, 6)) for n in "ab"]
    rows += [params[n][k][None] for n in ("bn_a", "bn_b") for k in ("scale", "bias")]
    rows += [params[n]["bias"][None] for n in "ab"]
    points = np.concatenate(rows).T.astype(np.float64)
    (scores,) = score(geometric_median(), graph, variables).values()
    expected = scipy.spatial.distance.cdist(points, points).sum(1)
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    for p in (1, 2):
        (scores,) = score(magnitude(p), graph, variables).values()
        expected = np.linalg.norm(points, ord=p, axis=1)
        np.testing.assert_allclose(scores, expected, rtol=1e-5)
    (scores,) = score(lamp(), graph, variables).values()
    squares = np.sum(points**2, axis=1)
    expected = [s / squares[squares >= s].sum() for s in squares]
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_lamp_divides_by_what_is_not_smaller():
    scores = score(lamp(), GRAPH, VARIABLES)
    for name in GRAPH.groups:
        squares = np.sum(filters(name) ** 2, axis=1)
        expected = [s / squares[squares >= s].sum() for s in squares]
        np.testing.assert_allclose(scores[name], expected, rtol=1e-5)
        assert scores[name].max() == 1


def test_lamp_of_equal_channels():
    equal = jax.tree.map(np.ones_like, VARIABLES)
    scores = score(lamp(), GRAPH, equal)
    for name, group in GRAPH.groups.items():
        np.testing.assert_allclose(scores[name], 1 / np.arange(group.size, 0, -1))
    none = score(lamp(), GRAPH, jax.tree.map(np.zeros_like, VARIABLES))
    assert not any(s.any() for s in none.values())
