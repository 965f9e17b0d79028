# SPDX-License-Identifier: Apache-2.0
"""Batch norm folded into kernels: the same function, by fewer steps; or left, named."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune import models
from jaxprune.base import GraphError
from jaxprune.slim import relative_error

OPS = st.lists(
    st.tuples(st.sampled_from(networks.KINDS), st.integers(0, 5), st.integers(0, 5)),
    min_size=1,
    max_size=5,
)


def steps(apply: Any, variables: Any, x: Any) -> int:
    """Multiplications, additions and roots of the program, within calls too."""

    def count(jaxpr: Any) -> int:
        total = 0
        for eqn in jaxpr.eqns:
            total += eqn.primitive.name in ("add", "sub", "mul", "div", "rsqrt")
            for value in eqn.params.values():
                inner = getattr(value, "jaxpr", value)
                total += count(inner) if hasattr(inner, "eqns") else 0
        return total

    return count(jax.make_jaxpr(apply)(variables, x).jaxpr)


def names(tree: Any) -> set[str]:
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(keys, simple=True, separator="/") for keys, _ in flat}


def error(apply: Any, variables: Any, folded: jp.Folded, x: Any, **kw: Any) -> float:
    want = jax.jit(lambda v, x: apply(v, x, **kw))(variables, x)
    got = jax.jit(lambda v, x: folded.apply(v, x, **kw))(folded.variables, x)
    assert got.dtype == want.dtype
    return relative_error(np.asarray(want), np.asarray(got))


def shipped(name: str, size: int = 16) -> tuple[Any, Any, Any]:
    widths = {"segnet": 5, "unet": 5, "segnet_basic": 4}.get(name)
    args = {"num_classes": 3, **({"widths": [4] * widths} if widths else {})}
    net = models.build(name, args)
    x = np.random.default_rng(0).random((1, size, size, 3), np.float32)
    shapes = jax.eval_shape(net.init, jax.random.key(0), x)
    return net.apply, networks.randomised(shapes, 0), x


def test_by_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    v = {n: rng.normal(size=s) for n, s in (("w", (3, 4)), ("m", 4), ("s", 4))}
    v |= {"var": 0.5 + rng.random(4), "b": rng.normal(size=4)}
    x = rng.normal(size=(5, 3))

    def apply(v: Any, x: Any) -> Any:
        y = (x @ v["w"] - v["m"]) / jnp.sqrt(v["var"] + 1e-3) * v["s"] + v["b"]
        return jnp.tanh(y)

    with jax.enable_x64(True):
        folded = jp.fold_batch_norm(apply, v, x)
        assert error(apply, v, folded, x) < 1e-14
    factor = v["s"] / np.sqrt(v["var"] + 1e-3)
    assert set(folded.variables) == {"w", "w_folded_bias"}
    np.testing.assert_allclose(folded.variables["w"], v["w"] * factor, rtol=1e-14)
    bias = v["b"] - v["m"] * factor
    np.testing.assert_allclose(folded.variables["w_folded_bias"], bias, rtol=1e-13)
    assert folded.merged == {"w": ("b", "m", "s", "var")} and not folded.left


@pytest.mark.parametrize(("name", "norms"), [("segnet", 25), ("segnet_basic", 8)])
def test_shipped_networks_lose_all_their_batch_norms(name: str, norms: int) -> None:
    apply, variables, x = shipped(name)
    folded = jp.fold_batch_norm(apply, variables, x, train=False)
    assert error(apply, variables, folded, x, train=False) < 1e-5
    assert len(folded.merged) == norms and not folded.left
    assert "batch_stats" not in folded.variables
    assert not any("scale" in n or "BatchNorm" in n for n in names(folded.variables))
    # sub, mul, mul, add, and the root's add and rsqrt; one add is left
    before, after = steps(apply, variables, x), steps(folded.apply, folded.variables, x)
    assert before - after >= 5 * norms
    if name == "segnet_basic":  # another batch and size
        more = np.random.default_rng(1).random((2, 32, 16, 3), np.float32)
        assert error(apply, variables, folded, more) < 1e-5


@pytest.mark.parametrize(
    "net", (networks.ResNet, networks.Mobile, networks.Fcn), ids=lambda n: n.__name__
)
def test_small_networks_in_float64(net: Any) -> None:
    with jax.enable_x64(True):
        apply, variables, x = networks.linen(net)
        variables = jax.tree.map(lambda a: a.astype(np.float64), variables)
        x = x.astype(np.float64)
        folded = jp.fold_batch_norm(apply, variables, x)
        assert error(apply, variables, folded, x) < 1e-10
        assert "batch_stats" not in folded.variables and not folded.left


def test_nnx() -> None:
    apply, state, x = networks.nnx_net()
    folded = jp.fold_batch_norm(apply, state, x)
    assert error(apply, state, folded, x) < 1e-5
    assert set(folded.merged) == {"stem/kernel"}
    assert names(folded.variables) == {
        *("conv/bias", "conv/kernel", "head/bias", "head/kernel"),
        *("stem/kernel", "stem/kernel_folded_bias"),
    }


def test_transposed_grouped_and_bfloat16() -> None:
    class Net(nn.Module):
        dtype: Any = None

        @nn.compact
        def __call__(self, x: Any) -> Any:
            def norm(x: Any) -> Any:
                return nn.BatchNorm(use_running_average=True, use_scale=False)(x)

            x = norm(nn.ConvTranspose(6, (3, 3), (2, 2), transpose_kernel=True)(x))
            x = nn.relu(x)
            x = norm(nn.Conv(9, (3, 3), feature_group_count=3, dtype=self.dtype)(x))
            return norm(nn.Dense(4, use_bias=False)(nn.relu(x)))

    for dtype, tolerance in ((None, 1e-5), (jnp.bfloat16, 0.05)):
        apply, variables, x = networks.linen(lambda dtype=dtype: Net(dtype=dtype))
        folded = jp.fold_batch_norm(apply, variables, x)
        assert error(apply, variables, folded, x) < tolerance
        assert len(folded.merged) == 3
        assert folded.variables["params"]["Conv_0"]["kernel"].dtype == jnp.float32


class Awkward(nn.Module):
    """Norms that cannot be folded, and one that can."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        def norm(x: Any, axis: int = -1, name: str = "") -> Any:
            return nn.BatchNorm(use_running_average=True, axis=axis, name=name)(x)

        y = nn.Conv(8, (3, 3), name="used_twice")(x)
        y = nn.relu(norm(y, name="beside")) + y
        y = norm(nn.relu(y), name="behind_relu")
        y = norm(nn.Conv(8, (3, 3), name="rows")(y), 1, "of_rows")
        shared = nn.Conv(8, (3, 3), name="shared")
        y = norm(shared(nn.relu(y)), name="first")
        y = norm(shared(nn.relu(y)), name="second")
        return norm(nn.Conv(3, (1, 1), name="last")(y), name="folds")


def test_what_does_not_fit_is_left_and_named() -> None:
    apply, variables, x = networks.linen(Awkward)
    folded = jp.fold_batch_norm(apply, variables, x)
    assert error(apply, variables, folded, x) < 1e-5
    assert set(folded.merged) == {"params/last/kernel"}
    left = {name.split("/")[1]: cause for name, cause in folded.left.items()}
    assert set(left) == {"beside", "behind_relu", "of_rows", "first", "second"}
    assert "is read elsewhere too" in left["beside"]
    assert left["behind_relu"].startswith("it follows")
    assert "along the channels of conv_general_dilated" in left["of_rows"]
    assert left["first"] == left["second"] == "its kernel is read elsewhere too"
    gone = names(variables) - names(folded.variables)
    assert {name.split("/")[1] for name in gone} == {"folds", "last"}


def test_a_norm_within_a_loop_is_left_and_named() -> None:
    v = {"w": np.eye(4, dtype=np.float32), "var": np.full(4, 2.0, np.float32)}

    def apply(v: Any, x: Any) -> Any:
        def body(x: Any, _: Any) -> Any:
            return jnp.tanh(x @ v["w"] * jax.lax.rsqrt(v["var"])), None

        return jax.lax.scan(body, x, None, length=2)[0]

    folded = jp.fold_batch_norm(apply, v, np.ones((2, 4), np.float32))
    assert not folded.merged and set(folded.variables) == set(v)
    assert list(folded.left) == ["var"] and "scan" in folded.left["var"]


def test_one_norm_behind_two_products() -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            norm = nn.BatchNorm(use_running_average=True)
            x = nn.relu(norm(nn.Conv(4, (3, 3))(x)))
            return norm(nn.Conv(4, (3, 3))(x))

    apply, variables, x = networks.linen(Net)
    folded = jp.fold_batch_norm(apply, variables, x)
    assert error(apply, variables, folded, x) < 1e-5
    assert len(folded.merged) == 2 and "batch_stats" not in folded.variables


@settings(max_examples=6)
@given(ops=OPS, number=st.integers(0, 99))
def test_random_networks(ops: Any, number: int) -> None:
    apply, variables, x = networks.drawn((*ops, ("norm", 0, 0)), number)
    with jax.enable_x64(True):
        variables = jax.tree.map(lambda a: a.astype(np.float64), variables)
        x = x.astype(np.float64)
        folded = jp.fold_batch_norm(apply, variables, x)
        assert error(apply, variables, folded, x) < 1e-10
    stay = {n.split("/")[1] for n in folded.left}
    held = {n.split("/")[1] for n in names(folded.variables) if "batch_stats" in n}
    assert held == stay


def test_pruned_saved_loaded_and_trained(tmp_path: Any) -> None:
    apply, variables, x = networks.linen(networks.ResNet)
    pruned = jp.prune(apply, variables, x, budget=jp.flops(0.5))
    folded = jp.fold_batch_norm(pruned.apply, pruned.variables, x, train=False)
    assert error(pruned.apply, pruned.variables, folded, x) < 1e-5
    thin = pruned._replace(apply=folded.apply, variables=folded.variables)
    jp.save(tmp_path / "net", thin)
    loaded = jp.load(tmp_path / "net", apply=apply)
    want = jax.jit(folded.apply)(folded.variables, x)
    np.testing.assert_array_equal(jax.jit(loaded.apply)(loaded.variables, x), want)

    @jax.jit
    @jax.grad
    def slopes(v: Any) -> Any:
        return jnp.sum(folded.apply(v, x) ** 2)

    found = jax.tree.leaves(slopes(folded.variables))
    assert all(float(jnp.abs(g).max()) > 0 for g in found)


def test_another_mode_is_refused() -> None:
    apply, variables, x = networks.linen(networks.LinenTwin)
    folded = jp.fold_batch_norm(apply, variables, x)
    with pytest.raises(GraphError, match="train=False"):
        folded.apply(folded.variables, x, train=True, mutable=["batch_stats"])
    with pytest.raises(GraphError, match="params/more, which is not read"):
        params = {**folded.variables["params"], "more": x}
        folded.apply({"params": params}, x)
    with pytest.raises(GraphError, match="has shape"):
        short = jax.tree.map(lambda a: a[..., :2], folded.variables)
        folded.apply(short, x)
    module = networks.NnxResNet(nnx.Rngs(0))
    definition, state = nnx.split(module)

    def train(state: Any, x: Any) -> Any:
        return nnx.merge(definition, state)(x)

    assert not jp.fold_batch_norm(train, state, x).merged


def scaled_product() -> tuple[Any, Any, Any]:
    """A product with a scale and a bias behind it, read by another."""
    rng = np.random.default_rng(0)
    shapes = {"a": {"kernel": (4, 6), "scale": (6,), "bias": (6,)}}
    shapes["b"] = {"kernel": (6, 3)}
    is_shape = lambda s: isinstance(s, tuple)  # noqa: E731
    variables = jax.tree.map(
        lambda s: rng.standard_normal(s).astype(np.float32), shapes, is_leaf=is_shape
    )

    def apply(v: Any, x: Any) -> Any:
        a = v["a"]
        return jax.nn.relu(x @ a["kernel"] * a["scale"] + a["bias"]) @ v["b"]["kernel"]

    return apply, variables, rng.standard_normal((5, 4)).astype(np.float32)


def test_what_was_folded_first_is_cut_saved_loaded_and_folded_again(
    tmp_path: Any,
) -> None:
    """The biases are then the function's own, not what another fold has left."""
    apply, variables, x = scaled_product()
    folded = jp.fold_batch_norm(apply, variables, x)
    assert folded.merged
    pruned = jp.prune(folded.apply, folded.variables, x, budget=jp.flops(0.5))
    again = jp.fold_batch_norm(pruned.apply, pruned.variables, x)
    assert not again.merged and error(pruned.apply, pruned.variables, again, x) < 1e-6
    jp.save(tmp_path / "net", pruned)
    loaded = jp.load(tmp_path / "net", folded.apply)
    want = pruned.apply(pruned.variables, x)
    np.testing.assert_array_equal(loaded.apply(loaded.variables, x), want)


def test_a_folded_tree_with_leaves_of_other_names_is_not_saved(tmp_path: Any) -> None:
    """As kernels in int8 are: `load` could not call it."""
    apply, variables, x = scaled_product()
    pruned = jp.prune(apply, variables, x, budget=jp.flops(0.5))
    thin = jp.fold_batch_norm(pruned.apply, pruned.variables, x)
    small = jp.quantize_weights(thin.apply, thin.variables, x)
    with pytest.raises(GraphError, match="kernel/(int8|scale), which the graph lacks"):
        jp.save(tmp_path / "net", pruned._replace(variables=small.variables))


def convolved(turned: tuple[int, ...], number: Any) -> tuple[Any, Any, Any]:
    """A convolution by a kernel that is turned round, its norm, and a number(x)."""
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((3, 3, 2, 5)).astype(np.float32)
    variables = {"w": kernel} | {n: 0.5 + rng.random(5, np.float32) for n in "vs"}

    def apply(v: Any, x: Any, t: float = 1.0) -> Any:
        y = jax.lax.conv_general_dilated(
            *(x, jnp.flip(v["w"], turned), (1, 1), "SAME"),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y / jnp.sqrt(v["v"] + 1e-3) * v["s"] * number(x, t)

    return apply, variables, rng.standard_normal((2, 8, 8, 2)).astype(np.float32)


@pytest.mark.parametrize("turned, merged", [((0, 1), 1), ((3,), 0), ((0, 3), 0)])
def test_channels_in_another_order_than_the_kernel_s_are_left(turned, merged) -> None:
    apply, variables, x = convolved(turned, lambda x, t: 1)
    folded = jp.fold_batch_norm(apply, variables, x)
    assert len(folded.merged) == merged
    assert error(apply, variables, folded, x) < 1e-6


def test_numbers_of_a_size_or_an_argument_are_not_folded() -> None:
    apply, variables, x = convolved((0, 1), lambda x, t: t / x.shape[1])
    folded = jp.fold_batch_norm(apply, variables, x, t=2.0)
    assert folded.merged
    assert error(apply, variables, folded, x[:, :4], t=3.0) < 1e-6
