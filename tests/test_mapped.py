# SPDX-License-Identifier: Apache-2.0
"""shard_map: the law, its gradients and the costs, on four devices and two axes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAPPED = """
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import jaxprune as jp

auto = (jax.sharding.AxisType.Auto,) * 2
mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=auto)


def mapped(f, ins, outs, checked):
    return jax.shard_map(f, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=checked)


def network(mean, gather, total, places):
    def normed(v, x):
        y = jax.nn.relu(x @ v["a"])
        y = (y - mean(y)) * jax.lax.rsqrt(mean(y**2) + 1.0) * v["s"]
        y = jax.nn.relu(y @ v["b"])
        return y + places(), gather(y)

    def columns(v, y):
        return total(jax.nn.relu(y @ v["w1"]) @ v["w2"])

    return normed, columns


def sharded(checked):
    def mean(y):
        return jax.lax.pmean(y.mean(0), "data")

    def gather(y):
        return jax.lax.all_gather(y, "data", axis=1).sum((0, 1))[None]

    normed, columns = network(
        mean,
        gather,
        lambda y: jax.lax.psum(y, "model"),
        lambda: 0.0 * jax.lax.axis_index("data"),
    )

    def apply(v, x):
        first = {k: v[k] for k in ("a", "s", "b")}
        ins, outs = (P(), P("data")), (P("data"), P("data"))
        y, z = mapped(normed, ins, outs, checked)(first, x)
        ins = {"w1": P(None, "model"), "w2": P("model")}, P("data")
        last = {k: v[k] for k in ins[0]}
        y = mapped(columns, ins, P("data"), checked)(last, y)
        return y @ v["c"], z @ v["d"]

    return apply


def plain(v, x):
    def same(y):
        return y

    normed, columns = network(lambda y: y.mean(0), same, same, lambda: 0.0)
    y, z = normed(v, x)
    return columns(v, y) @ v["c"], z.sum(0)[None].repeat(2, 0) @ v["d"]


rng = np.random.default_rng(0)
shapes = {"a": (3, 8), "s": (8,), "b": (8, 6), "w1": (6, 4), "w2": (4, 5)}
shapes |= {"c": (5, 2), "d": (6, 2)}
variables = {k: rng.normal(size=s) for k, s in shapes.items()}
x = rng.normal(size=(4, 3))
found = []
for checked in (True, False):
    apply = sharded(checked)
    graph = jp.trace(apply, variables, x)
    sizes = {n: g.size for n, g in graph.groups.items()}
    keep = {n: np.arange(k) % 2 == 0 for n, k in sizes.items()}
    small = jp.shrink(graph, keep, variables)

    def loss(f):
        return jax.jit(jax.grad(lambda v: sum(jnp.sum(jnp.sin(y)) for y in f(v, x))))

    wanted = loss(apply)(jp.mask(graph, keep, variables))
    wanted = jp.shrink(graph, keep, wanted)
    given = loss(jp.slim(apply, graph, keep))(small)
    gradients = [float(np.abs(wanted[k] - given[k]).max()) for k in wanted]
    dense = jp.trace(plain, variables, x)
    row = {
        "sizes": sizes,
        "error": jp.verify(apply, graph, keep, variables, x),
        "gradients": max(gradients),
        "plain": float(np.abs(apply(variables, x)[0] - plain(variables, x)[0]).max()),
        "flops": [
            int(jp.cost(g, {**g.full(), **keep}).flops) for g in (graph, dense)
        ],
        "frozen": [[f.path[0], f.count, f.cause] for f in graph.frozen],
    }
    found.append(row)
print(json.dumps(found))
"""


LAID = """
import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import jaxprune as jp

rng = np.random.default_rng(0)
shapes = {"a": (3, 8), "b": (8, 2)}
variables = {k: jnp.asarray(rng.normal(size=s)) for k, s in shapes.items()}
x = jnp.asarray(rng.normal(size=(8, 3)))
keep = {"a": np.arange(8) < 5}  # which no longer divides among the devices


def apply(v, x, lay=lambda y: y):
    h = lay(x @ v["a"])
    return (jax.nn.relu(h) + jax.nn.softmax(h)) @ v["b"]


def numbers(f, x):
    out = jax.jit(f)(small, x)
    grads = jax.jit(jax.grad(lambda v: jnp.sum(jnp.sin(f(v, x)))))(small)
    return jax.tree.map(np.asarray, (out, f(small, x), grads))


graph = jp.trace(apply, variables, x)
small = jp.shrink(graph, keep, variables)
wanted = numbers(jp.slim(apply, graph, keep), x)
worst = 0.0
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((4,), ("all",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        if kind == AxisType.Auto:
            place = NamedSharding(mesh, P(None, "all"))
            lay = lambda y: jax.lax.with_sharding_constraint(y, place)
        else:
            lay = lambda y: jax.sharding.reshard(y, P(None, "all"))
        laid = lambda v, x: apply(v, x, lay)
        f = jp.slim(laid, jp.trace(laid, variables, x), keep)
        given = [numbers(f, x)]
        if kind == AxisType.Explicit:  # the input's layout is part of its type
            spread = jax.device_put(x, NamedSharding(mesh, P("all")))
            small = jax.device_put(small, NamedSharding(mesh, P()))
            plain = jp.slim(apply, graph, keep)
            assert jax.typeof(plain(small, spread)).sharding.spec == P("all", None)
            given.append(numbers(plain, spread))
            cuts = {"a": P(None, "all"), "b": P("all", None)}
            for n, spec in cuts.items():
                cuts[n] = jax.device_put(variables[n], NamedSharding(mesh, spec))
            cut = jp.shrink(graph, keep, cuts)
            chex.assert_trees_all_equal(*jax.device_get((cut, small)))
            back = jp.expand(graph, keep, cut), jp.mask(graph, keep, cuts)
            chex.assert_trees_all_equal(*jax.device_get(back))
        for found in given:
            errors = jax.tree.map(lambda a, b: np.abs(a - b).max(), found, wanted)
            worst = max(worst, *jax.tree.leaves(errors))
print(worst)
"""


MEASURED = """
import jax, numpy as np, optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import jaxprune as jp

def apply(variables, x):
    return jax.nn.relu(x @ variables["a"]) @ variables["b"]

rng = np.random.default_rng(0)
plain = {k: rng.normal(size=s).astype("f4") for k, s in (("a", (4, 8)), ("b", (8, 4)))}
graph = jp.trace(apply, plain, np.ones((2, 4), "f4"))
mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Explicit,))
lies = {"a": NamedSharding(mesh, P(None, "d")), "b": NamedSharding(mesh, P("d"))}

def found(variables):
    tx = jp.proximal(graph, 0.1)
    none = jax.tree.map(jax.numpy.zeros_like, variables)
    step = jax.jit(lambda v: tx.update(none, tx.init(v), v)[0])
    criteria = jp.magnitude(), jp.lamp(), jp.geometric_median()
    return (
        jp.group_lasso(graph, variables),
        jax.jit(lambda v: jp.group_lasso(graph, v))(variables),
        jp.dead(graph, variables),
        step(variables),
        [jp.score(c, graph, variables) for c in criteria],
    )

want = found(plain)
with jax.set_mesh(mesh):
    got = found(jax.device_put(plain, lies))
apart = lambda a, b: np.abs(np.subtract(a, b, dtype=float)).max()
print(max(jax.tree.leaves(jax.tree.map(apart, got, want))))
"""


def on_four_devices(program: str) -> str:
    """What the program prints last, in doubles."""
    flags = os.environ.get("XLA_FLAGS", "")
    flags += " --xla_force_host_platform_device_count=4"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_ENABLE_X64": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**environment, "JAX_PLATFORMS": "cpu"},
    )
    assert not done.returncode, done.stderr
    return done.stdout.splitlines()[-1]


def test_programs_that_every_device_runs_on_its_shard():
    for row in json.loads(on_four_devices(MAPPED)):
        # The columns that lie over devices stay; all else can go.
        assert row["sizes"] == {"a": 8, "b": 6, "w2": 5}
        stuck = [f for f in row["frozen"] if "shard_map" in f[2]]
        assert [f[:2] for f in stuck] == [["w1", 4], ["w2", 4]]
        assert max(row["error"], row["gradients"], row["plain"]) < 1e-12
        assert row["flops"][0] == row["flops"][1]


def test_arrays_laid_over_devices_by_constraints_and_by_their_types():
    """Where a cut axis no longer divides among the devices, it is not split."""
    assert float(on_four_devices(LAID)) < 1e-12


def test_penalties_and_scores_of_arrays_whose_types_tell_where_they_lie():
    assert float(on_four_devices(MEASURED)) < 1e-5
