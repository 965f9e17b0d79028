# SPDX-License-Identifier: Apache-2.0
"""What the masked network holds at removed channels: never taken for what it is not.

Each of these once made slim differ from mask, or trace fail. A function that cannot be
followed freezes its axes; what matters is that the law holds.
"""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxprune as jp
from jaxprune.base import UNREAD


def total(t: Any) -> Any:
    """A sum over channels that would tell any wrong number."""
    return t.astype(float).sum(1, keepdims=True)


PROGRAMS = {
    "scatter apply": lambda h, x: h + total(h.at[0].apply(jnp.cos)),
    "window pad": lambda h, x: lax.reduce_window(
        h * jnp.arange(6.0), 0.0, lax.add, (1, 1), (1, 1), ((0, 0), (1, -1))
    ),
    "window stride": lambda h, x: lax.reduce_window(
        h * jnp.arange(6.0), 0.0, lax.add, (1, 1), (1, 2), ((0, 0), (0, 5))
    ),
    "log under": lambda h, x: h + total(jnp.log(h) + x[:, :1] < -20),
    "isinf": lambda h, x: h + total(jnp.isinf(jnp.log(h) + x[:, :1])),
    "isnan": lambda h, x: h + total(jnp.isnan(1 / h + x[:, :1])),
    "bfloat16": lambda h, x: h + total((h.astype(jnp.bfloat16) + 256 + 1) - 256 - 1),
    "reduce precision": lambda h, x: (
        h + total(lax.reduce_precision(h + 1.001, 8, 7) - 1.001)
    ),
    "underflow": lambda h, x: (
        h + total(jnp.where(jnp.exp(h.astype(jnp.float32) - 150) > 0, 0, 1))
    ),
    "to uint8": lambda h, x: (
        h + total(jnp.where((h - 1).astype(jnp.uint8) > 100, 0, 1))
    ),
    "inf to int": lambda h, x: (
        h + total(jnp.where((1 / h).astype(jnp.int32) < 0, 0, 1))
    ),
    "nan to int": lambda h, x: (
        h + total(jnp.where((h / h).astype(jnp.int32) < 0, 0, 1))
    ),
    "sign of zero": lambda h, x: h + total(jnp.where(1 / (h * -1) > 0, 0, 1)),
    "angle of zero": lambda h, x: (
        h + total(jnp.arctan2(h * jnp.where(jnp.arange(6) == 1, -1, 1), -1.0))
    ),
    "angle of minus zero": lambda h, x: h + total(jnp.arctan2(h * -1, -1.0)),
    "sign bit": lambda h, x: h + total(jnp.signbit(h * -1)),
    "sign copied": lambda h, x: h + total(jnp.copysign(x[:, :1], h * -1)),
    "bits of zero": lambda h, x: (
        h + total(lax.bitcast_convert_type(h * -1, jnp.int64) == 0)
    ),
    "branch cut": lambda h, x: (
        h + total(jnp.log(lax.complex(h - 1 - x[:, :1], h * -1)).imag)
    ),
    "branch cut at a number": lambda h, x: (
        h + total(jnp.arctan(lax.complex(h * -1, h - 2)).real)
    ),
    "log of complex zero": lambda h, x: (
        h + total(jnp.log((h * -1).astype(complex)).imag)
    ),
    "to int4": lambda h, x: h + total((jnp.exp(h) * 300).astype(jnp.int4)),
    "to uint4": lambda h, x: h + total((h - 1).astype(jnp.uint4)),
    "even inf": lambda h, x: h + total(jnp.exp(jnp.log(h) - x[:, :1])),
    "even nan": lambda h, x: h * (jnp.log(h) - jnp.log(h).max(-1, keepdims=True)),
    "largest of none": lambda h, x: h - jnp.log(h).max(-1, keepdims=True),
    "largest of zeros": lambda h, x: h - (-jnp.abs(h)).max(-1, keepdims=True),
    "ties": lambda h, x: h - (h * 0 + x[:, :1]).max(-1, keepdims=True),
    "beside padding": lambda h, x: (
        h + jnp.pad(h - h.mean(-1)[:, None], ((0, 0), (1, 0))).var(-1)[:, None]
    ),
    "two halves": lambda h, x: (
        h + jnp.concatenate([jnp.exp(h[:, :3]), jnp.cos(h[:, 3:]) / 3], -1).var()
    ),
    "taken beyond": lambda h, x: h + jnp.take(h, jnp.array([0, 1, 9, 3, 4, 5]), 1),
    "taken in a loop": lambda h, x: lax.fori_loop(
        0, 3, lambda i, h: h + h[:, (jnp.arange(6) + i) % 6], h
    ),
    "taken by rows of a loop": lambda h, x: lax.scan(
        lambda h, i: (h + h[:, i], None), h, jnp.array([[0, 1, 2, 3, 5, 4]] * 2)
    )[0],
    "taken by few": lambda h, x: h[:, jnp.array([2])] + h,
    "taken by a table": lambda h, x: (
        h + h[:, jnp.array([[0, 2], [1, 3], [5, 5]])].reshape(4, 6)
    ),
    "integer division": lambda h, x: (
        h
        + total(
            lax.div(h.astype(int), (x[:, :1] * 0).astype(int) * jnp.ones((4, 6), int))
        )
    ),
    "beyond 2^53": lambda h, x: h * (jnp.full((2, 3), 2**53 + 1).reshape(6) - 2**53),
    "division by zero": lambda h, x: x[:, :1] / h,
    "power of zero": lambda h, x: jnp.abs(h) ** (x[:, :1] - 1),
    "pole": lambda h, x: lax.lgamma(h),
    "zero by nan": lambda h, x: h / (h / h),
    "constant inf": lambda h, x: jnp.exp(h + np.where(np.arange(6) == 1, -np.inf, 0)),
    "bfloat16 inf": lambda h, x: (
        h.astype(jnp.bfloat16) * jnp.array([1, jnp.inf, 1, 1, 1, 1], jnp.bfloat16)
    ),
    "inf over devices": lambda h, x: (
        h
        * jax.shard_map(
            lambda h: lax.psum(1 / h, "d"),
            mesh=jax.make_mesh((1,), ("d",)),
            in_specs=jax.P(),
            out_specs=jax.P(),
        )(h)
    ),
    "log2 rounded": lambda h, x: h + total(jnp.floor(jnp.log2(h + 8)) - 3),
    "exp2 rounded": lambda h, x: h + total(jnp.floor(jnp.exp2(h + 3)) - 8),
    "jacobian": lambda h, x: jnp.einsum(
        "bij,bj->bi", jax.vmap(jax.jacfwd(jnp.sin))(h), h
    ),
    "or": lambda h, x: jnp.where((h < -1) | (h >= 0), 1.0, 0.5),
    "xor": lambda h, x: jnp.where((h < -1) ^ (h >= 0), 1.0, 0.5),
    "log compared": lambda h, x: jnp.where(jnp.log(h) < x[:, :1], 1.0, 0.5),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_law_holds_at_awkward_numbers(name: str) -> None:
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        shapes = {"a": (3, 6), "c": (6, 2)}
        variables = {n: jnp.asarray(rng.random(s)) for n, s in shapes.items()}
        x = jnp.arange(12.0).reshape(4, 3) / 7

        def apply(v: Any, x: Any) -> Any:
            return PROGRAMS[name](x @ v["a"], x) @ v["c"]

        graph = jp.trace(apply, variables, x)
        keep = {n: np.arange(g.size) != 1 for n, g in graph.groups.items()}
        assert jp.verify(apply, graph, keep, variables, x) < 1e-10


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_zero_divided_by_what_is_not_known_is_zero(dtype: Any) -> None:
    variables = {"a": np.ones((3, 6), np.float32), "c": np.ones((6, 2), np.float32)}

    def apply(v: Any, x: Any) -> Any:
        h = (x @ v["a"]).astype(dtype) / x[:, :1].astype(dtype)
        return (h @ v["c"]) / jnp.exp(h * jnp.arange(6)).max(1, keepdims=True)

    (group,) = jp.trace(apply, variables, np.ones((4, 3), np.float32)).groups.values()
    assert group.size == 6


@pytest.mark.parametrize("name", ["relu", "softplus", "gelu", "silu", "mish", "elu"])
def test_activations_stay_exactly_prunable(name: str) -> None:
    activation = getattr(jax.nn, name)
    variables = {"a": np.ones((3, 6), np.float32), "c": np.ones((6, 2), np.float32)}
    graph = jp.trace(
        lambda v, x: activation(x @ v["a"]) @ v["c"], variables, np.ones((4, 3))
    )
    (group,) = graph.groups.values()
    assert group.size == 6


def test_pooling_of_selected_windows_with_a_stride_along_channels() -> None:
    def apply(v: Any, x: Any) -> Any:
        def pooled(w: Any) -> Any:
            window = ((2, 1), (1, 2), "VALID")
            return lax.reduce_window(w, -jnp.inf, lax.max, *window).sum()

        return jax.grad(pooled)(v["a"]) @ v["c"] + x[:1, :1]

    variables = {"a": np.ones((3, 6), np.float32), "c": np.ones((6, 2), np.float32)}
    assert not jp.trace(apply, variables, np.ones((4, 3), np.float32)).groups


def test_derivatives_of_ones_own_may_close_over_arrays() -> None:
    scale = np.arange(6.0, dtype=np.float32)

    @jax.custom_vjp
    def scaled(h: Any) -> Any:
        return h * scale

    scaled.defvjp(lambda h: (h * scale, ()), lambda _, g: (2 * g * scale,))

    def loss(apply: Any) -> Any:
        return lambda v, x: jnp.sum(apply(v, x) ** 2)

    def apply(v: Any, x: Any) -> Any:
        return scaled(x @ v["a"]) @ v["c"]

    rng = np.random.default_rng(0)
    variables = {
        "a": rng.random((3, 6), np.float32),
        "c": rng.random((6, 2), np.float32),
    }
    x = rng.random((4, 3), np.float32)
    graph = jp.trace(apply, variables, x)
    keep = {n: np.arange(g.size) % 2 == 1 for n, g in graph.groups.items()}
    dense = jax.grad(loss(apply))(jp.mask(graph, keep, variables), x)
    small = jax.grad(loss(jp.slim(apply, graph, keep)))(
        jp.shrink(graph, keep, variables), x
    )
    chex.assert_trees_all_close(small, jp.shrink(graph, keep, dense), rtol=1e-5)


def test_what_nothing_reads_is_no_group() -> None:
    """An auxiliary head of training, say: its channels would use up a budget."""
    variables = {
        "a": np.ones((3, 6), np.float32),
        "c": np.ones((6, 2), np.float32),
        "head": np.ones((6, 8), np.float32),
    }
    graph = jp.trace(lambda v, x: x @ v["a"] @ v["c"], variables, np.ones((4, 3)))
    assert list(graph.groups) == ["a"]
    assert {f.path for f in graph.frozen if f.cause == UNREAD} == {("head",)}
