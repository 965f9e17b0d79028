# SPDX-License-Identifier: Apache-2.0
"""The README's lines run as they stand, on a small network."""

import re
from pathlib import Path

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune as jp

README = Path(__file__).parents[1] / "README.md"


class Net(nn.Module):
    """Two convolutions, batch norm, a residual sum."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(16, (3, 3))(x)))
        x = x + nn.relu(nn.Conv(16, (3, 3))(x))
        return nn.Dense(3)(x.mean(axis=(1, 2)))


def train(apply, variables, tx):
    """One step on the params, as somebody's own loop would do it."""
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))

    def loss(params):
        return jnp.mean(apply({**variables, "params": params}, images) ** 2)

    params, opt_state = variables["params"], tx.init(variables["params"])
    updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
    return {**variables, "params": optax.apply_updates(params, updates)}, opt_state


def test_the_lines_for_ones_own_network():
    model, images = Net(), jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    dense = model.init(jax.random.key(2), images)
    names = {"model": model, "images": images, "variables": dense, "train": train}
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    exec(compile(code, str(README), "exec"), names)

    graph, keep = names["graph"], names["keep"]
    assert jp.cost(graph, keep).flops <= 0.4 * jp.cost(graph).flops
    shapes = {np.shape(x) for x in jax.tree.leaves(names["opt_state"])}
    assert {
        np.shape(x) for x in jax.tree.leaves(names["variables"]["params"])
    } <= shapes
    assert names["apply"](names["variables"], images).shape == (2, 3)
    params = names["variables"]["params"]
    updates, _ = names["tx"].update(params, names["opt_state"], params)
    chex.assert_trees_all_equal_shapes(updates, params)
