# SPDX-License-Identifier: Apache-2.0
"""The README's lines run as they stand; the table of cited works is true."""

import ast
import operator
import re
from pathlib import Path

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune as jp
from jaxprune.train import Config, settings, study

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


def test_the_table_of_cited_works_names_what_there_is():
    text = (README.parent / "docs" / "method.md").read_text()
    table = text.partition("## The cited works")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    refs = [n for row in rows[2:] for n in row.split("|")[1].split(",")]
    assert [int(n) for n in refs] == list(range(1, 22))
    for name in re.findall(r"jp\.([\w.]+)", table):
        operator.attrgetter(name)(jp)
    for name in re.findall(r"test_\w+\.py", table):
        assert (Path(__file__).parent / name).exists(), name
    named = {n for row in rows[2:] for n in re.findall(r"\(`(\w+)`\)", row)}
    assert named <= set(study.METHODS) and len(named) == 15
    default = Config()
    for field, value in re.findall(r"`(\w+\.\w+) = (.*?)`", table):
        changed = settings.override(default, f"{field}={ast.literal_eval(value)}")
        assert str(settings.get(changed, field)) == str(ast.literal_eval(value))


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
