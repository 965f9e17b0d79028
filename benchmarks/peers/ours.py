# SPDX-License-Identifier: Apache-2.0
"""jaxprune's side: half the channels of every group, by magnitude, and the error.

python benchmarks/peers/ours.py NETWORK     prints a row as one line of JSON
"""

import json
import sys
import time
from typing import Any
from unittest import mock

import big_flax
import jax
import jax.numpy as jnp
import numpy as np
import zoo_flax

import jaxprune as jp
from jaxprune import base, jaxpr

REPEATS = 3


def values(tree: Any, rng: np.random.Generator) -> Any:
    """Random parameters of moderate size; scales and variances lie around 1."""

    def draw(path: Any, x: Any) -> Any:
        name = base.key_path(path)[-1]
        if "var" in name:
            return jnp.asarray(rng.uniform(0.5, 1.5, x.shape))
        sample = rng.standard_normal(x.shape)
        if "scale" in name:
            return jnp.asarray(1 + 0.1 * sample)
        fan = np.prod(x.shape[:-1]) if x.ndim > 1 else 100
        return jnp.asarray(sample * np.sqrt(3 / fan))

    return jax.tree_util.tree_map_with_path(draw, tree)


def images(like: Any, rng: np.random.Generator) -> Any:
    """Noise of a colour, so that pooled outputs move too; or tokens."""
    if like.dtype == jnp.int32:
        return jnp.asarray(rng.integers(0, 10, like.shape))
    hue = rng.standard_normal(like.shape[-1])
    return jnp.asarray(hue + rng.standard_normal(like.shape))


def best(function: Any) -> tuple[Any, float]:
    """The result, and the least CPU seconds of a few calls."""
    spent = []
    for _ in range(REPEATS):
        start = time.process_time()
        result = jax.block_until_ready(function())
        spent.append(time.process_time() - start)
    return result, min(spent)


def traced(apply: Any, variables: Any, image: Any) -> dict[str, float]:
    """CPU seconds of `trace`, and how many of these are JAX's own tracing."""
    own: list[float] = []

    def trace(*args: Any) -> Any:
        start = time.process_time()
        result = original(*args)
        own.append(time.process_time() - start)
        return result

    original = jaxpr.trace
    with mock.patch.object(jaxpr, "trace", trace):
        _, seconds = best(lambda: jp.trace(apply, variables, image))
    return {"graph_s": seconds, "jaxpr_s": min(own)}


def cut(graph: jp.Graph, variables: Any) -> Any:
    scores = jp.score(jp.magnitude(), graph, variables)
    keep = jp.select(graph, scores, jp.channels(0.5), scope="local")
    return keep, jp.shrink(graph, keep, variables)


def timed(name: str) -> dict[str, float]:
    """Seconds in float32: graphs at the network's own image size and at 64x64, cuts."""
    jax.config.update("jax_enable_x64", False)
    rng, row = np.random.default_rng(0), {}
    for size, suffix in ((big_flax.SIZES[name], ""), ((big_flax.SIZE,) * 2, "_64")):
        apply, shapes, like = big_flax.network(name, size)
        variables, image = values(shapes, rng), images(like, rng)
        found = traced(apply, variables, image)
        row |= {key + suffix: seconds for key, seconds in found.items()}
    graph = jp.trace(apply, variables, image)
    return row | {"cut_s": best(lambda: cut(graph, variables))[1]}


def measure(name: str) -> dict[str, Any]:
    row: dict[str, Any] = timed(name) if name in big_flax.BIG else {}
    jax.config.update("jax_enable_x64", True)
    source = zoo_flax if name in zoo_flax.ZOO else big_flax
    apply, shapes, like = source.network(name)
    rng = np.random.default_rng(0)
    variables, one, two = values(shapes, rng), images(like, rng), images(like, rng)
    graph = jp.trace(apply, variables, one)
    keep, small = cut(graph, variables)
    masked = jp.mask(graph, keep, variables)
    want, other = apply(masked, one), apply(masked, two)
    got = jp.slim(apply, graph, keep)(small, one)
    before, after = (sum(x.size for x in jax.tree.leaves(t)) for t in (shapes, small))
    return row | {
        "groups": len(graph.groups),
        "channels": sum(group.size for group in graph.groups.values()),
        "left": after / before,
        "error": float(jnp.abs(got - want).max() / jnp.abs(other - want).max()),
    }


if __name__ == "__main__":
    for title in sys.argv[1:]:
        print(json.dumps({"name": title, **measure(title)}), flush=True)
