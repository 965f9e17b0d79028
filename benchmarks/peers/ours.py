# SPDX-License-Identifier: Apache-2.0
"""jaxprune's side: half the channels of every group, by magnitude, and the error.

python benchmarks/peers/ours.py NETWORK     prints a row as one line of JSON
"""

import json
import sys
import time
from typing import Any

import big_flax
import jax
import jax.numpy as jnp
import numpy as np
import zoo_flax

import jaxprune as jp

REPEATS = 3


def values(tree: Any, rng: np.random.Generator) -> Any:
    """Random parameters of moderate size; scales and variances lie around 1."""

    def draw(path: Any, x: Any) -> Any:
        name = jax.tree_util.keystr(path[-1:])
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
    """The result, and the least seconds of a few calls."""
    spent = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        result = jax.block_until_ready(function())
        spent.append(time.perf_counter() - start)
    return result, min(spent)


def measure(name: str) -> dict[str, Any]:
    source = zoo_flax if name in zoo_flax.ZOO else big_flax
    net, like = source.network(name)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(net.init, jax.random.key(0), like)
    variables, one, two = values(shapes, rng), images(like, rng), images(like, rng)
    graph, graph_s = best(lambda: jp.trace(net.apply, variables, one))

    def cut() -> Any:
        scores = jp.score(jp.magnitude(), graph, variables)
        keep = jp.select(graph, scores, jp.channels(0.5), scope="local")
        return keep, jp.shrink(graph, keep, variables)

    (keep, small), cut_s = best(cut)
    masked = jp.mask(graph, keep, variables)
    want, other = net.apply(masked, one), net.apply(masked, two)
    got = jp.slim(net.apply, graph, keep)(small, one)
    before, after = (sum(x.size for x in jax.tree.leaves(t)) for t in (shapes, small))
    return {
        "groups": len(graph.groups),
        "channels": sum(group.size for group in graph.groups.values()),
        "left": after / before,
        "graph_s": graph_s,
        "cut_s": cut_s,
        "error": float(jnp.abs(got - want).max() / jnp.abs(other - want).max()),
    }


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    for title in sys.argv[1:]:
        print(json.dumps({"name": title, **measure(title)}), flush=True)
