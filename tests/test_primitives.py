# SPDX-License-Identifier: Apache-2.0
"""Primitives one by one, between two matrix products: exact, or frozen by name.

Those that vision networks come down to and that the other tests do not meet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import jaxprune as jp

Program = Callable[[Any, Any], Any]
MATRIX = np.random.default_rng(1).normal(size=(6, 6))
POLICY = jax.checkpoint_policies


def summed(t: Any) -> Any:
    """A sum over channels that would tell any wrong number."""
    return t.astype(float).sum(1, keepdims=True)


@jax.custom_jvp
def composite_sine(h: Any) -> Any:
    return lax.composite(jnp.sin, "a.sine")(h)


# JAX has no derivative of a composite and asks for one so.
composite_sine.defjvps(lambda tangent, out, h: tangent * jnp.cos(h))


def resized(method: str) -> Program:
    def body(h: Any, x: Any) -> Any:
        image = jax.image.resize(h.reshape(2, 2, 6), (2, 4, 6), method)
        return image[:, 1:3].reshape(4, 6)

    return body


def remat(policy: Any) -> Program:
    def body(h: Any) -> Any:
        return jnp.sin(checkpoint_name(jnp.exp(h) - 1, "kept"))

    return lambda h, x: jax.checkpoint(body, policy=policy)(h)


def of_numbers(dtype: Any, out: Any) -> Program:
    """A product of integers or small floats that is summed in another type."""

    def product(h: Any, x: Any) -> Any:
        left, right = jnp.round(8 * h).astype(dtype), jnp.round(MATRIX).astype(dtype)
        summed = (((1,), (0,)), ((), ()))
        made = lax.dot_general(left, right, summed, preferred_element_type=out)
        return h + made.astype(float)

    return product


def quantised_convolution(h: Any, x: Any) -> Any:
    kernel = jnp.round(4 * MATRIX[None]).astype(jnp.int8)
    image, dims = jnp.round(8 * h).astype(jnp.int8)[None], ("NWC", "WIO", "NWC")
    how = {"dimension_numbers": dims, "preferred_element_type": jnp.int32}
    out = lax.conv_general_dilated(image, kernel, (1,), "SAME", **how)
    return h + out[0].astype(float)


@jax.custom_vjp
def scaled(h: Any) -> Any:
    return h


def _backward(_: None, g: Any) -> tuple[Any]:
    return (3 * g + 1,)


scaled.defvjp(lambda h: (h, None), _backward)


def powered(f: Callable[[Any], Any], h: Any, n: int) -> Any:
    return f(h) ** n


powered = jax.custom_vjp(powered, nondiff_argnums=(0, 2))
powered.defvjp(lambda f, h, n: (f(h) ** n, h), lambda f, n, h, g: (n * jnp.cos(h) * g,))


@jax.custom_batching.custom_vmap
def doubled(h: Any) -> Any:
    return 2 * h


doubled.def_vmap(lambda size, batched, h: (2 * h, batched[0]))


def by_reference(h: Any, x: Any) -> Any:
    ref = jax.new_ref(h)
    ref[0] = ref[1] * 2
    return ref[...]


def watched(h: Any, x: Any) -> Any:
    jax.debug.callback(lambda h: None, h)
    return h


EXACT: dict[str, Program] = {
    "reduce_precision": lambda h, x: h + lax.reduce_precision(h, 8, 20),
    "optimization_barrier": lambda h, x: (
        h + summed(lax.optimization_barrier(jnp.exp(h)))
    ),
    "clamp": lambda h, x: (
        h + summed(lax.clamp(x[:, :1] - 0 * h, h, x[:, :1] + 1 + 0 * h))
    ),
    "population_count": lambda h, x: (
        h + lax.population_count((h * 9).astype(int)).astype(float)
    ),
    "bits of integers": lambda h, x: (
        h + summed(lax.bitcast_convert_type((h * 9).astype(jnp.int32), jnp.uint32) == 0)
    ),
    "approx_top_k over space": lambda h, x: (
        h + lax.approx_max_k(h, 2, reduction_dimension=0)[0].sum(0)
    ),
    "cumlogsumexp over space": lambda h, x: h + lax.cumlogsumexp(h, axis=0),
    "sort of several": lambda h, x: lax.sort((h, jnp.exp(h)), 0, num_keys=1)[1] + h,
    "int8 product": of_numbers(jnp.int8, jnp.int32),
    "float8 product": of_numbers(jnp.float8_e4m3fn, jnp.float32),
    "int8 convolution": quantised_convolution,
    "float8 cast": lambda h, x: (
        h + summed(jnp.exp(h).astype(jnp.float8_e5m2).astype(float) - 1)
    ),
    "associative scan": lambda h, x: lax.associative_scan(jnp.add, h, axis=0),
    "map over space": lambda h, x: lax.map(lambda r: r + r.sum(), h, batch_size=2),
    "batched einsum": lambda h, x: jnp.einsum("bc,bd,bd->bc", h, h, h),
    "outer product": lambda h, x: jnp.einsum("bc,bd->bcd", h, h + 1).sum(-1),
    "linear": resized("linear"),
    "cubic": resized("cubic"),
    "lanczos5": resized("lanczos5"),
    "rematerialised, no product twice": remat(POLICY.dots_saveable),
    "rematerialised but for names": remat(POLICY.save_only_these_names("kept")),
    "custom derivative that adds": lambda h, x: scaled(h),
    "custom derivative, static arguments": lambda h, x: powered(jnp.sin, h, 2),
    "linearised": lambda h, x: jax.linearize(jnp.sin, h)[1](h),
    "composite": lambda h, x: composite_sine(h),
    "by platform": lambda h, x: lax.platform_dependent(h, cpu=jnp.sin, default=jnp.cos),
    "rng_bit_generator": lambda h, x: (
        h * lax.rng_bit_generator(np.zeros(4, np.uint32), (4, 6), np.uint32)[1]
    ),
    "rbg": lambda h, x: h * jax.random.normal(jax.random.key(0, impl="rbg"), (4, 6)),
}
FROZEN: dict[str, Program] = {
    "approx_top_k": lambda h, x: h + summed(lax.approx_max_k(h, 2)[0]),
    "cumlogsumexp": lambda h, x: h + lax.cumlogsumexp(h, axis=1),
    "custom_linear_solve": lambda h, x: lax.custom_linear_solve(
        lambda z: 2 * z, h, lambda _, z: z / 2, symmetric=True
    ),
    "custom_vmap_call": lambda h, x: doubled(h),
    "debug_callback": watched,
    "eigh": lambda h, x: h @ jnp.linalg.eigh(h.T @ h + jnp.eye(6))[1],
    "new_ref": by_reference,
    "pure_callback": lambda h, x: jax.pure_callback(
        lambda h: np.sin(h), jax.ShapeDtypeStruct(h.shape, h.dtype), h
    ),
    "ragged_dot_general": lambda h, x: (
        h + lax.ragged_dot(h, MATRIX[None].repeat(2, 0), jnp.array([1, 3]))
    ),
    "reduce": lambda h, x: (
        h + lax.reduce(h, 0.0, lambda a, b: a + b * b, (1,))[:, None]
    ),
    "reduce_window": lambda h, x: lax.reduce_window(
        h, 0.0, lambda a, b: a + 2 * b, (2, 1), (1, 1), "SAME"
    ),
    "select_and_gather_add": lambda h, x: jax.jvp(
        lambda h: nn.max_pool(h[None], (2,), (1,), "SAME")[0], (h,), (h,)
    )[1],
    "svd": lambda h, x: h * jnp.linalg.svd(h, compute_uv=False)[0],
    # Whether 0 or -0 is beside 1 would decide.
    "reduce_sum": lambda h, x: h + summed(jnp.nextafter(-h, 1.0) > 0),
}


def cut(program: Program) -> tuple[jp.Graph, float]:
    """The graph, and the largest error of slim's law: output, gradients of weights."""
    rng = np.random.default_rng(0)
    variables = {"a": rng.normal(size=(3, 6)), "c": rng.normal(size=(6, 2))}
    x = rng.normal(size=(4, 3))

    def apply(v: Any, x: Any) -> Any:
        return program(x @ v["a"], x) @ v["c"]

    graph = jp.trace(apply, variables, x)
    keep = networks.random_keep(graph, 0)

    def loss(f: Any, v: Any) -> Any:
        out = f(v, x)
        return jnp.sum(out * np.cos(np.arange(8.0)).reshape(4, 2)), out

    found = []
    for f, v in (
        (apply, jp.mask(graph, keep, variables)),
        (jp.slim(apply, graph, keep), jp.shrink(graph, keep, variables)),
    ):
        if graph.groups:
            (_, out), gradient = jax.value_and_grad(loss, 1, has_aux=True)(f, v)
        else:
            (_, out), gradient = loss(f, v), v
        found.append((out, gradient))
    (want, dense), (got, small) = found
    dense = jp.shrink(graph, keep, jax.tree.map(np.asarray, dense))
    return graph, max(
        float(jnp.abs(a - b).max() / jnp.abs(a).max())
        for a, b in zip(*map(jax.tree.leaves, ((want, dense), (got, small))))
    )


@pytest.mark.parametrize("name", EXACT)
def test_what_can_be_cut_is_exact(name: str) -> None:
    with jax.enable_x64(True):
        graph, error = cut(EXACT[name])
    assert [g.size for n, g in graph.groups.items() if n == "a"] == [6], str(graph)
    assert error < 1e-10


@pytest.mark.parametrize("name", FROZEN)
def test_what_cannot_be_followed_is_frozen_by_name(name: str) -> None:
    with jax.enable_x64(True):
        graph, error = cut(FROZEN[name])
    causes = {f.cause.split(" (")[0] for f in graph.frozen if f.path == ("a",)}
    assert "a" not in graph.groups and name in causes, str(graph)
    assert error == 0


def test_a_convolution_of_no_images_is_cut_like_any() -> None:
    def apply(v: Any, x: Any) -> Any:
        h = lax.conv_general_dilated(
            x, v["a"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return h.sum((1, 2)) @ v["c"]

    variables = {"a": np.ones((3, 3, 2, 6)), "c": np.ones((6, 2))}
    images = np.ones((4, 5, 5, 2))
    graph = jp.trace(apply, variables, images)
    keep = networks.random_keep(graph, 0)
    small = jp.shrink(graph, keep, variables)
    assert jp.slim(apply, graph, keep)(small, images[:0]).shape == (0, 2)
